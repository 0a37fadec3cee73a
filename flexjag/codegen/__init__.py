"""A plan's GPU kernels, made, measured and run without a GPU."""
