"""When C++ kernels of operators run, and what is compiled for them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from flexjag.errors import BuildError
from flexjag.kernels.cpp import build, openmp
from flexjag.kernels.cpp.units import ELEMENTS, heading

LEAST = 2e-5
"""Estimated seconds of a call without a kernel below which none is looked for."""

ENOUGH = 0.5
"""Estimated seconds that calls without a kernel have taken from which on it is compiled, which takes about as long.

So a process that calls an operator a few times does not wait for the compiler, and one that calls it often loses no
more by waiting than it had lost before.
"""

GRAIN = 2**15
"""Numbers that are worth a thread."""

_spent: dict[str, float] = {}
"""Estimated seconds by unit; infinitely many where the cache on disk has its library."""


def find(header: str, dtype: torch.dtype, seconds: float) -> ctypes.CDLL | None:
    """The library of an operator's header, if a call is worth it; compiled if the calls before were.

    Args:
        header: Name of a file in this folder, without its ending.
        dtype: Of the tensors.
        seconds: Estimate of what the call takes without a kernel.

    Returns:
        None where the plain kernel is to run.

    Raises:
        CacheError: As :func:`flexjag.caches.limit`.
    """
    if seconds < LEAST or dtype not in ELEMENTS or build.refusal() is not None:
        return None
    text = unit(header, dtype)
    if text not in _spent:
        _spent[text] = float("inf") if build.is_built(text) else 0.0
    _spent[text] += seconds
    if _spent[text] < ENOUGH:
        return None
    try:
        return build.load(text)
    except BuildError:
        return None


def prepare(dtype: torch.dtype) -> None:
    """Compile all kernels for a dtype now, for a process that measures them. It does nothing without a compiler.

    Raises:
        BuildError: If a unit does not compile or load.
        CacheError: As :func:`flexjag.caches.limit`.
    """
    for text in [unit(file.stem, dtype) for file in sorted(Path(__file__).parent.glob("*.h"))]:
        if build.refusal() is None:
            build.load(text)
            _spent[text] = float("inf")


@functools.cache
def unit(header: str, dtype: torch.dtype) -> str:
    """The translation unit of a header for a dtype."""
    return f'{heading(dtype)}#include "ops/cpp/{header}.h"\n'


def threads(numbers: int) -> int:
    """Threads for a call that reads so many numbers."""
    return max(1, min(openmp.threads(), numbers // GRAIN))
