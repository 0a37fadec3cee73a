"""Lowering of nodes to the tables that kernels read."""
