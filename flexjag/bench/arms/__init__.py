"""Implementations that suites compare."""
