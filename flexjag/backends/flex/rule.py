"""Rule and record of the backend ``flex``."""

from __future__ import annotations

from typing import Any

import torch

from flexjag import printing
from flexjag.algebra.normalizers import Softmax
from flexjag.backends.base import Backend, Case, Pair, Promises
from flexjag.upstream import ROWS, cpu_flex_misplaces


def refuse(case: Case) -> str | None:
    """The reason why FlexAttention cannot run a case; None if it can."""
    if not case.on_cuda:
        if case.layout.device.type != "cpu":
            return f"FlexAttention is not tested on {case.layout.device.type}"
        for fn, is_score in [] if case.tracing else printing.functions(case.mask, case.score):
            if cpu_flex_misplaces(fn, is_score):  # in a graph, its lowering says so
                return f"{ROWS}, as {getattr(fn, '__name__', type(fn).__name__)} does"
    if case.dtype == torch.float64:
        return "FlexAttention's kernels have no float64"
    if case.on_cuda and case.block_size % 128:
        return f"FlexAttention's CUDA kernels work in tiles of 128; got block_size={case.block_size}"
    if case.on_cuda and case.dims is not None and min(case.dims[2:]) < 16:
        return f"FlexAttention's CUDA kernels need D >= 16 and E >= 16; got D={case.dims[2]}, E={case.dims[3]}"
    return None


def _run(*args: Any) -> Pair:
    from flexjag.backends.flex.run import run

    return run(*args)


def _scores(recipe: Any, case: Case) -> float:
    return float(recipe.num_tiles * recipe.block_size**2)


FLEX = Backend(
    name="flex",
    title="compiled `flex_attention`",
    takes="any mask, any score, no float64",
    run=_run,
    refuse=refuse,
    promises=Promises(normalizers=(Softmax,), gradients="on CUDA", lse="on CUDA"),
    needs_tiles=True,
    scores=_scores,
)
