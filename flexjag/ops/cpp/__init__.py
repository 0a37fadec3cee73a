"""C++ kernels of the ragged operations."""
