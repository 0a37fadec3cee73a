"""What our own Triton kernels can run, by rule."""

from __future__ import annotations

import os
from typing import Any

from flexjag import expressions
from flexjag.backends.base import Backend, Case, Pair, Promises
from flexjag.launching import DTYPES, HAS_TRITON
from flexjag.normalizers import GELU, Identity, Pointwise, Sigmoid, SiLU, StickBreaking

KERNELS = (SiLU, GELU, Identity, Sigmoid, StickBreaking)
"""The normalizers that there are kernels for."""

WIDEST = 256  # features that a program keeps of a token


def refuse(case: Case) -> str | None:
    """Why the kernels cannot run a case."""
    if type(case.normalizer) not in KERNELS:
        return f"it has no kernels for the normalizer {case.normalizer!r}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if case.layout.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels run on CUDA only"
    if case.dtype is not None and case.dtype not in DTYPES:
        return f"its kernels compute with float32, float16 and bfloat16, not {case.dtype}"
    if case.dims is not None and max(case.dims[2:]) > WIDEST:
        return f"its kernels need D and E of at most {WIDEST}; got D={case.dims[2]}, E={case.dims[3]}"
    return expressions.objection(case.mask, case.score, case.layout.device, case.tracing)


def _run(*args: Any) -> Pair:
    from flexjag.backends.triton.run import run

    return run(*args)


TRITON = Backend(
    name="triton",
    title="own kernels for normalizers that are no softmax, CUDA",
    takes="any mask and score it can print (users' functions: not while tracing)",
    run=_run,
    refuse=refuse,
    promises=Promises(normalizers=(Pointwise, StickBreaking), lse="nowhere", contains_nan=True),
    needs_tiles=True,
)
