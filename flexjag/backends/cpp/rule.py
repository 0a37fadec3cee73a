"""Rule and record of the backend ``cpp``: kernels in C++ for CPUs."""

from __future__ import annotations

from typing import Any

import torch

from flexjag import printing
from flexjag.algebra.normalizers import Pointwise, StickBreaking
from flexjag.backends.base import Backend, Case, Pair, Promises
from flexjag.backends.cpp.cost import cost
from flexjag.kernels.cpp import build

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuse(case: Case) -> str | None:
    """The reason why it cannot run a case, or None."""
    if case.layout.device.type != "cpu" or case.layout.on_gpu:
        return "its kernels run on CPUs only"
    if case.dtype is not None and case.dtype not in DTYPES:
        return f"its kernels compute with float32, float64, bfloat16 and float16, not {case.dtype}"
    if case.dims is not None and 0 in case.dims[2:]:
        return f"its kernels need D and E of at least 1; got D={case.dims[2]}, E={case.dims[3]}"
    why = build.refusal()
    if why is not None:
        return why
    fns = printing.functions(case.mask, case.score)
    return printing.objection(fns, case.layout.device, case.tracing, (printing.Cpp(),))


def _run(*args: Any) -> Pair:
    from flexjag.backends.cpp.run import run

    return run(*args)


def _source(recipe: Any) -> str:
    from flexjag.backends.cpp.source import printed

    return printed(recipe, torch.float32).source


CPP = Backend(
    name="cpp",
    title="own kernels, printed in C++ and compiled on first use, CPU",
    takes="any mask and score it can print (users' functions: not while tracing)",
    run=_run,
    refuse=refuse,
    promises=Promises(contains_nan=True, unmixed=True, wide=(Pointwise, StickBreaking)),
    cost=cost,
    setup=2.5,
    source=_source,
)
