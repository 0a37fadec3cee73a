"""Simulation of kernels in Triton's interpreter."""
