"""Launching and arithmetic shared by our own Triton kernels."""
