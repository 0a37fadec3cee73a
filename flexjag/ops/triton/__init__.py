"""Triton kernels of the ragged operations."""
