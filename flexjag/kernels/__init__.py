"""What our own kernels share: how those of Triton are launched, and those of C++ compiled."""
