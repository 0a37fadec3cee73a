"""Our own Triton kernels for normalizers other than a softmax."""
