"""Triton kernels of our own for normalizers that are no softmax."""
