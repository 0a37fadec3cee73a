"""Mends for PyTorch: what its CPU FlexAttention gets wrong is refused, and ``~`` of a mask is traced."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from cases import make_qkv
from torch import Tensor

import flexjag as fj
from flexjag.algebra.node import node
from flexjag.backends.choose import refusal
from flexjag.errors import BackendError
from flexjag.lowering.mods import mask_case
from flexjag.lowering.spans import Sandwich, Spans, sandwich
from flexjag.upstream import ROWS, cpu_flex_misplaces

LENGTHS = [9, 0, 7, 20]
POS = torch.arange(40)
SPANS = torch.stack([POS // 3 * 2 % 7, POS // 3 * 2 % 7 + 5], 1)
IMAGE, TABLE, BY_HEAD = POS % 13, torch.rand(40, 40) < 0.5, torch.tensor([[0, 5, 40], [3, 9, 20]])
WEIGHTS = torch.rand(40, 2)
TWO = torch.tensor(2)


def in_row(row: Tensor, x: Tensor) -> Tensor:
    return (x >= row[0]) & (x < row[1])


def first_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    start, _ = SPANS[j]
    return start <= i


MISPLACED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "by a looked up key": lambda b, h, i, j: in_row(SPANS[IMAGE[j]], i),
    "by key": lambda b, h, i, j: in_row(SPANS[j], i),
    "by query": lambda b, h, i, j: in_row(SPANS[i], j),
    "by segment": lambda b, h, i, j: in_row(SPANS[b], j),
    "row, then column": lambda b, h, i, j: TABLE[i][j],
    "unpacked": first_row,
    "part of a row": lambda b, h, i, j: SPANS[j][0:1][0] <= i,
    "any of a row": lambda b, h, i, j: (SPANS[j] == i % 5).any(-1),
    "stacked": lambda b, h, i, j: torch.stack([i > j, i > 4])[0],
    "with a vector": lambda b, h, i, j: torch.bucketize(j, POS) > 4,
}


def looked_up(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return in_row(BY_HEAD[h], j) & (IMAGE[IMAGE[j]] > 2) | (SPANS[j, 0] <= i) & (SPANS[i, -1] >= j) & TABLE[TWO, i]


def weighted(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s * WEIGHTS[b, 1] + WEIGHTS[(i - j).abs(), 0]


@pytest.mark.parametrize("name", MISPLACED)
def test_rows_by_position_are_refused_by_name(name: str) -> None:
    q, k, v = make_qkv(LENGTHS, dtype=torch.float32)
    plan = fj.plan(q, mask=fj.Causal() | ~fj.MaskMod(MISPLACED[name]))
    assert f"{ROWS}, as {MISPLACED[name].__name__} does" in " ".join(plan.explain().split())
    with pytest.raises(BackendError, match=ROWS):
        fj.attention(q, k, v, plan=plan, backend="flex")


def test_rows_in_scores_are_refused() -> None:
    assert cpu_flex_misplaces(lambda s, b, h, i, j: s + WEIGHTS[j][0], True)
    assert cpu_flex_misplaces(lambda s, b, h, i, j: s + (WEIGHTS[i] * WEIGHTS[j]).sum(-1), True)
    assert cpu_flex_misplaces(lambda s, b, h, i, j: torch.stack([s, s * 2])[1], True)
    assert not cpu_flex_misplaces(weighted, True)


@pytest.mark.slow
def test_lookups_of_numbers_run_and_are_right() -> None:
    q, k, v = make_qkv(LENGTHS, dtype=torch.float32)
    plan = fj.plan(q, mask=fj.MaskMod(looked_up), score=fj.ScoreMod(weighted))
    assert not cpu_flex_misplaces(looked_up, False)
    want = fj.attention(q, k, v, plan=plan, backend="reference").values
    torch.testing.assert_close(fj.attention(q, k, v, plan=plan, backend="flex").values, want, atol=1e-5, rtol=1e-5)


def test_rows_by_position_are_refused_inside_a_graph() -> None:
    """Where the function is not called in advance, its lowering looks at the graph."""
    q, k, v = make_qkv(LENGTHS, dtype=torch.float32)
    plan = fj.plan(q, mask=fj.MaskMod(MISPLACED["by a looked up key"]))

    @torch.compile(fullgraph=True)
    def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> fj.Jagged:
        return fj.attention(q, k, v, plan=plan, backend="flex")

    with pytest.raises(RuntimeError, match=ROWS):
        attend(q, k, v)


@node
class Starts(fj.Mask):
    """A node of a user's own: keys from the row's start on."""

    spans: Tensor


@sandwich.register(Starts)
def _(mask, layout):  # type: ignore[no-untyped-def]
    start, end = layout.kv_start[None], layout.kv_end[None]
    return Sandwich(Spans(start, start), Spans(start, end), mask)


@mask_case.register(Starts)
def _(mask, tables, layout):  # type: ignore[no-untyped-def]
    return lambda b, h, q, kv: mask.spans[q][0] <= kv


def test_a_node_of_ones_own_is_refused_when_lowered() -> None:
    q, k, v = make_qkv(LENGTHS, dtype=torch.float32)
    # It works on scalars only, so that no tile can be refined by it.
    plan = fj.plan(q, mask=Starts(torch.zeros(36, 2, dtype=torch.int32)), refine_tiles=False)
    assert refusal("flex", plan.case()) is None
    with pytest.raises(BackendError, match=ROWS):
        fj.attention(q, k, v, plan=plan, backend="flex")


@pytest.mark.slow
def test_tilde_is_traced_where_dynamo_was_imported_first() -> None:
    code = """
        import torch._dynamo
        import flexjag as fj
        mask, fn = fj.Causal(), torch.compile(lambda mask: ~(~mask & ~fj.Prefix(2)), fullgraph=True, backend="eager")
        assert fn(mask) == ~(~mask & ~fj.Prefix(2))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
