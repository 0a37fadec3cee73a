"""Rule and record of the backend ``triton``: our own Triton kernels."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexjag import printing
from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.node import Node
from flexjag.algebra.normalizers import GELU, Identity, Sigmoid, SiLU, Softmax, StickBreaking
from flexjag.algebra.tree import walk
from flexjag.backends.base import ASSUMED_DIMS, Backend, Case, Pair, Promises
from flexjag.backends.triton.cost import wasteful
from flexjag.kernels.launch import DTYPES, HAS_TRITON
from flexjag.lowering import mods

KERNELS = (Softmax, SiLU, GELU, Identity, Sigmoid, StickBreaking)
"""The normalizers with kernels."""

WIDEST = 256  # features that a program keeps of a token


def refuse(case: Case) -> str | None:
    """The reason why the kernels cannot run a case; None if they can."""
    if type(case.normalizer) not in KERNELS:
        return f"it has no kernels for the normalizer {case.normalizer!r}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if case.layout.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels run on CUDA only"
    if torch.version.hip and isinstance(case.normalizer, Softmax):
        return "its softmax kernels are fitted to NVIDIA's GPUs: on AMD's they run out of registers"
    if case.dtype is not None and case.dtype not in DTYPES:
        return f"its kernels compute with float32, float16 and bfloat16, not {case.dtype}"
    if case.dims is not None and max(case.dims[2:]) > WIDEST:
        return f"its kernels need D and E of at most {WIDEST}; got D={case.dims[2]}, E={case.dims[3]}"
    asked = [*printing.functions(case.mask, case.score), *_cases_to_try(case)]
    return printing.objection(asked, case.layout.device, case.tracing, (printing.Triton(), printing.Torch()))


def _cases_to_try(case: Case) -> Iterator[tuple[Callable[..., Tensor], bool]]:
    """The mod of each node not declared printable, with True for a score's and False for a mask's."""
    tables = mods.one_row()
    for one in (*walk(case.mask), *walk(case.score)):
        if one.printable or isinstance(one, m.MaskMod | s.ScoreMod):
            continue
        if isinstance(one, s.Score):
            yield _named(mods.score_case(one, tables), one), True
        elif mods.mask_case.knows(one):  # else its spans are exact, or leave masks that are in the tree, too
            yield _named(mods.mask_case(one, tables, case.layout), one), False


def _named(fn: Callable[..., Tensor], node: Node) -> Callable[..., Tensor]:
    named = functools.partial(fn)
    named.__name__ = type(node).__name__  # pyright: ignore[reportAttributeAccessIssue]
    return named


def _run(*args: Any) -> Pair:
    from flexjag.backends.triton.run import run

    return run(*args)


def _source(recipe: Any) -> str:
    from flexjag.backends.triton.run import kind_of

    return kind_of(recipe).printed(recipe).source


def _scores(recipe: Any, case: Case) -> float:
    from flexjag.backends.triton.softmax_counts import computed_scores

    dims, dtype = case.dims or ASSUMED_DIMS, case.dtype or torch.bfloat16
    return computed_scores(recipe, dims, dtype if dtype in DTYPES else torch.bfloat16)


TRITON = Backend(
    name="triton",
    title="own kernels in Triton, CUDA",
    takes="any mask and score it can print (users' functions: not while tracing)",
    run=_run,
    refuse=refuse,
    promises=Promises(contains_nan=True, deterministic="everywhere"),
    wasteful=wasteful,
    scores=_scores,
    source=_source,
)
