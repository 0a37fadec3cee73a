"""Backend ``cpp``: a plan's mask, score and normalizer printed as C++, in kernels for CPUs."""
