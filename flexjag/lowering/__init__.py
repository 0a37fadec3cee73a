"""From nodes to what kernels read."""
