"""Parsers of Triton IR and machine code."""
