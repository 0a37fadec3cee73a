"""Benchmarks beside what a user would use instead: ``python -m flexjag.bench``."""

from flexjag.bench.cli import main

__all__ = ["main"]
