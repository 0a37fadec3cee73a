"""Compile, measure and simulate a plan's GPU kernels without a GPU."""
