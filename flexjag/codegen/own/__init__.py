"""Instances of flexjag's own Triton kernels, for assembly."""
