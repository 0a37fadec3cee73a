"""The threads of the CPU kernels: those of the OpenMP runtime that torch has loaded, and no others.

Kernels are compiled without ``-fopenmp``. They call ``GOMP_parallel``, which the runtimes of GCC, LLVM and Intel all
have, and the symbol is resolved when a kernel is loaded: there is neither a second runtime nor a second thread pool.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

SYMBOL = "GOMP_parallel"

_forked = False


class _Symbol(ctypes.Structure):
    """``Dl_info`` of ``dlfcn.h``."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@functools.cache
def is_loaded() -> bool:
    """True if torch has loaded an OpenMP runtime. Libraries that are loaded afterwards see its symbols, on Linux."""
    process = ctypes.CDLL(None)
    if hasattr(process, SYMBOL):  # what torch's own calls find first, too
        return True
    found = getattr(ctypes.CDLL(torch._C.__file__), SYMBOL, None)  # in what torch is linked to
    if found is None:
        return False
    symbol = _Symbol()
    if not process.dladdr(ctypes.cast(found, ctypes.c_void_p), ctypes.byref(symbol)):
        return False
    ctypes.CDLL(os.fsdecode(symbol.file), ctypes.RTLD_GLOBAL)
    return True


def threads() -> int:
    """Number of threads of a kernel: :func:`torch.get_num_threads`, and one in a forked process.

    GNU's runtime waits forever for the threads of its parent, which a fork does not copy. A kernel that takes one
    thread calls no runtime.
    """
    return 1 if _forked else torch.get_num_threads()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
