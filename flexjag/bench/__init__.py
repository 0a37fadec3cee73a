"""Benchmarks of flexjag against the alternatives that a user has: ``python -m flexjag.bench``."""

from flexjag.bench.cli import main

__all__ = ["main"]
