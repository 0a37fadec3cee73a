"""Kernels for CPUs, printed in C++ and compiled by the machine's compiler."""
