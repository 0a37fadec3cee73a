"""Capture, lowering and assembly of kernels without a GPU."""
