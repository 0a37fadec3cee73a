"""Random calls in which learned tensors, dtypes, backends and edges meet: none may differ silently from float64.

What is right comes from the reference in float64, of float64 copies of everything and without spare rows. What is
allowed is an error analysis of the case (``flexjag.testing.rounding_bounds``) in the precision that a backend computes
in, and one rounding of each result to its dtype. A failing case prints the decorator that repeats it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import CPP_SLOWLY
from fuzz_cases import F64, INF, NAN, Case, cases
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import flexjag as fj
from flexjag.algebra import user_functions as functions
from flexjag.algebra.node import Axis, NodeKind
from flexjag.algebra.tree import replaced, walk
from flexjag.backends import Backend
from flexjag.backends.segments import run as segments
from flexjag.backends.segments import runs
from flexjag.lowering.layout import build_layout
from flexjag.testing import Bounds, rounding_bounds

calls = importlib.import_module("flexjag.api.attention")  # the module: the package has the function by that name
BACKENDS = ("reference", "tiled", "plain", "segments", "auto")  # plain: tiled, with what it does in a graph
BUDGETS = {"dev": 80, "ci": 1_000, "nightly": 20_000}
CASES = BUDGETS.get(os.environ.get("HYPOTHESIS_PROFILE", "dev"), BUDGETS["dev"]) // len(BACKENDS)


# Running.


@dataclass(frozen=True, eq=False)
class Result:
    """What a call returns, and the gradients of q, k, v and of all that is learned."""

    out: Tensor
    rest: Tensor
    grads: list[Tensor]


def _padded(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """With spare rows, or columns, that hold NaN, or a number far off."""
    shape = [*x.shape]
    shape[dim] = rows
    return torch.cat([x, x.new_full(shape, NAN if x.dtype.is_floating_point else 77)], dim)


def _with_spare(node: NodeKind, rows: tuple[int, int]) -> NodeKind:
    """A node with as many entries more per query and key token."""
    axes: tuple[Axis, Axis] = ("query token", "key token")
    for axis, count in zip(axes, rows, strict=True):
        node = replaced(node, lambda x, n=count: _padded(x, n, -1) if x.ndim else x, (axis,))
    return node


def _leaves(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with leaves of its own."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x.detach()).clone().requires_grad_(x.requires_grad)

    batches = [x.with_values(change(x.values).clone().requires_grad_()) for x in (case.q, case.k, case.v)]
    tables, bias, factor = [leaf(x) for x in case.tables], leaf(case.bias), leaf(case.factor)
    return replace(case, q=batches[0], k=batches[1], v=batches[2], tables=tables, bias=bias, factor=factor)


def run(case: Case, backend: str, tangents: tuple[Tensor, Tensor]) -> Result:
    """Forward and backward of leaves; `tangents` flow back."""
    inputs, learned = [x.values for x in (case.q, case.k, case.v)], case.learned
    q, k, v, mask, score, normalizer = case.q, case.k, case.v, case.mask, case.score(), case.weights()
    rows = None
    if case.spare is not None:
        counts = case.spare[0], case.spare[1], case.spare[1]
        q, k, v = (fj.Jagged(_padded(x.values, n), x.offsets) for x, n in zip((q, k, v), counts, strict=True))
        rows = q.values.shape[0]
        mask, normalizer = _with_spare(mask, case.spare), _with_spare(normalizer, case.spare)
        score = None if score is None else _with_spare(score, case.spare)
        tangents = tuple(_padded(x, case.spare[0]) for x in tangents)
    longest = max([0, *q.lengths.tolist(), *k.lengths.tolist()]) if case.bounded else None
    plan = fj.plan(
        q, k, mask=mask, score=score, normalizer=normalizer, block_size=case.block_size, max_tokens=rows,
        max_length=longest,
    )  # fmt: skip
    has_rest = {"softmax": "return_lse", "stick": "return_remainder"}.get(case.normalizer)
    returns = {has_rest: True} if has_rest else {}
    with forward_ad.dual_level() if backend == "plain" else nullcontext():
        name = "tiled" if backend == "plain" else backend
        found = fj.attention(q, k, v, plan=plan, scale=case.scale, backend=name, **returns)
    outs = [x.values for x in found] if isinstance(found, tuple) else [found.values]
    made = [(x, g.to(x.dtype)) for x, g in zip(outs, tangents, strict=False) if x.requires_grad]
    ends, flows = zip(*made, strict=True)
    grads = list(torch.autograd.grad(ends, [*inputs, *learned], flows, allow_unused=True, materialize_grads=True))
    if rows is not None:
        end = rows - case.spare[0]
        assert not outs[0][end:].any()
        assert (outs[-1][end:] == {"softmax": -INF, "stick": 1.0}.get(case.normalizer, 0.0)).all()
        outs = [x[:end] for x in outs]
    return Result(outs[0].detach(), outs[1].detach() if has_rest else outs[0].new_zeros(0), grads)


# Comparing.


def _compute(case: Case, backend: str) -> torch.dtype:
    """The precision of intermediates: kernels of a softmax store some in the inputs' own."""
    dtype = case.q.values.dtype
    own = backend in ("segments", "auto", "cpp") and case.normalizer == "softmax"
    return dtype if own else torch.promote_types(dtype, torch.float32)


def bounds_of(
    wide: Case, compute: torch.dtype, tangents: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Bounds, list[Any]]:
    """How far rounding may move outputs and gradients, and what is learned; `wide` is the case in float64."""
    q, k, v = (x.values.detach() for x in (wide.q, wide.k, wide.v))
    score, normalizer, bias = wide.score(), wide.weights(), wide.bias
    if bias is not None:  # which adds to the score before the sigmoid
        add = fj.ScoreMod(lambda s, b, h, i, j: s + bias[h])
        score, normalizer = add if score is None else score >> add, replace(normalizer, bias=0.0)
    in_score = [x for x in wide.learned if x is not wide.factor]
    bounds = rounding_bounds(
        q, k, v, build_layout(wide.q, wide.k), wide.mask, score,
        scale=q.shape[2] ** -0.5 if wide.scale is None else wide.scale,
        grad_out=tangents[0], grad_lse=tangents[1], dtype=compute, learned=in_score, normalizer=normalizer,
    )  # fmt: skip
    learned: list[Any] = list(bounds.learned)
    if wide.factor is not None and wide.factor.requires_grad:
        # Its gradient is the sum of the output times what flows back, over the factor, whatever is summed first.
        terms = (tangents[0].double().abs() * (bounds.out + torch.finfo(compute).eps * out.abs())).sum((1, 2))
        terms = terms / wide.factor.detach().abs()
        each = out.shape[1] * out.shape[2]
        learned.append(terms * (1 + each) if wide.factor.ndim else terms.sum() * (1 + out.shape[0] * each))
    return bounds, learned


def _fault(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype, bound: Any) -> list[str]:
    """What is wrong with a result, if anything."""
    if got.shape != exact.shape or got.dtype != dtype:
        return [f"{name} is {got.dtype} {list(got.shape)} instead of {dtype} {list(exact.shape)}"]
    if not exact.numel():
        return []
    kind = torch.finfo(dtype)
    allowed = 2 * (bound + kind.eps / 2 * exact.abs()) + kind.smallest_normal * kind.eps
    rounded = exact.to(dtype).double()  # may overflow
    same = (got.double() == rounded) & rounded.isinf()
    error = torch.where(same, 0.0, (got.double() - exact).abs())
    allowed = torch.where(rounded.isinf(), 0.0, allowed)
    wrong = ~(error <= allowed)
    if not wrong.any():
        return []
    at = tuple(wrong.nonzero()[0].tolist())
    off = f"{got[at]:.9g} instead of {exact[at]:.9g}, allowed {allowed[at]:.3g}"
    return [f"{name}{list(at)} is {off} ({int(wrong.sum())} of {wrong.numel()} off)"]


def check(case: Case, backend: str) -> None:
    """Assert that a backend's results are those of float64 but for rounding."""
    dtype, g = case.q.values.dtype, torch.Generator().manual_seed(0)
    acc = torch.promote_types(dtype, torch.float32)
    rows, heads, _ = case.q.values.shape
    shapes = (rows, heads, case.v.values.shape[2]), (rows, heads)
    tangents = tuple((torch.randn(s, generator=g) / 8).to(t) for s, t in zip(shapes, (dtype, acc), strict=True))
    wide = replace(_leaves(case, lambda x: x.double()), spare=None, bounded=False)
    exact = run(wide, "reference", tangents)
    got = run(_leaves(case, lambda x: x), backend, tangents)
    bounds, learned = bounds_of(wide, _compute(case, backend), tangents, exact.out)
    faults = _fault("out", got.out, exact.out, dtype, bounds.out) + _fault(
        "rest", got.rest, exact.rest, got.rest.dtype, bounds.lse
    )
    limits = [bounds.q, bounds.k, bounds.v, *learned]
    names = ["q", "k", "v", *(f"learned[{i}]" for i in range(len(learned)))]
    dtypes = [dtype] * 3 + [x.dtype for x in case.learned]
    for name, *rest in zip(names, got.grads, exact.grads, dtypes, limits, strict=True):
        faults += _fault(f"grad of {name}", *rest)
    assert not faults, f"{backend}: {'; '.join(faults)}"


@pytest.mark.parametrize("backend", [*BACKENDS, CPP_SLOWLY])
@settings(max_examples=CASES)
@given(data=st.data())
def test_no_silent_difference_from_float64(data: st.DataObject, backend: str) -> None:
    check(data.draw(cases(backend)), backend)


# What the cases reach, and what they notice.

FIRST = settings(settings.get_profile("find"), phases=[Phase.generate])
HARD: dict[str, Callable[[Case], Any]] = {
    "a half-precision table in a float64 call": lambda c: (
        c.q.values.dtype == F64 and any(x.dtype == torch.bfloat16 for x in c.learned)
    ),
    "a whole table of -inf": lambda c: any(bool((x == -INF).all()) for x in c.tables if x.numel()),
    "spare rows and a factor per token": lambda c: c.spare and c.spare[0] and c.factor is not None and c.factor.ndim,
    "a learned bias of a sigmoid": lambda c: c.bias is not None and c.bias.requires_grad,
    "a user's score and queries without keys": lambda c: (
        isinstance(c.score(), fj.ScoreMod) and bool(((c.q.lengths > 0) & (c.k.lengths == 0)).any())
    ),
    "a bound past int64": lambda c: any(bound == 2**70 for bound in _bounds(c.mask) if isinstance(bound, int)),
    "a bound per segment at its type's end": lambda c: any(
        x.numel() and x.tolist()[0] == torch.iinfo(x.dtype).max for x in _bounds(c.mask) if isinstance(x, Tensor)
    ),
    "grouped heads and stick-breaking": lambda c: c.normalizer == "stick" and c.q.values.shape[1] > c.k.values.shape[1],
}


def _bounds(mask: fj.Mask) -> list[int | Tensor]:
    return [node.n for node in walk(mask) if isinstance(node, fj.Prefix)]


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_hard_cases_are_drawn(name: str) -> None:
    find(cases("tiled").map(lambda case: bool(HARD[name](case))), bool, settings=FIRST)


def _without_care_for_spare_rows(backend: Backend, *args: Any) -> Any:
    return backend.run(*args)


def _all_ruled_out(*args: Any) -> tuple[Tensor | None, Tensor | None]:
    bias, no_key = runs.bias_of(*args)
    return (bias, no_key) if bias is None or no_key is None else (bias.masked_fill(no_key[..., None], -INF), no_key)


def _blurred(*args: Any) -> tuple[Tensor, Tensor | None]:
    out, rest = _EXECUTE(*args)
    return (out * (1 + 2**-14), rest) if out.dtype == torch.float32 else (out, rest)


_EXECUTE = calls._execute


FAULTS: dict[str, tuple[str, Any, str, Any]] = {
    "tables learn in their own precision": ("tiled", functions, "widened", lambda x, dtype: x),
    "spare rows take part": ("tiled", calls, "_execute", _without_care_for_spare_rows),
    "rows of scores of -inf are left to SDPA": ("segments", segments, "bias_of", _all_ruled_out),
    "outputs lose a few bits": ("auto", calls, "_execute", _blurred),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name: str) -> None:
    backend, module, function, fault = FAULTS[name]

    def differs(case: Case) -> bool:
        with mock.patch.object(module, function, fault):
            try:
                check(case, backend)
            except AssertionError:
                return True
        return False

    find(cases(backend).map(differs), bool, settings=FIRST)
