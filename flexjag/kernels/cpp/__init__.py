"""What kernels in C++ share: the compiler, threads, and headers of numbers, vectors and small products."""
