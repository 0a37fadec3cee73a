"""What our own Triton kernels share."""
