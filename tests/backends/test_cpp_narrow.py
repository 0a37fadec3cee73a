"""Spans of masks that a predicate decides: found by the backend ``cpp`` once per plan, and true."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import StickBreaking
from flexjag.backends.cpp import run
from flexjag.backends.cpp.source import printed
from flexjag.kernels.cpp import build
from flexjag.lowering.spans import MAX_SPANS, Spans
from flexjag.testing import assert_matches_reference

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
LONGEST = 97


def batch(lengths: list[int], heads: int = 1, seed: int = 0) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (fj.Jagged.from_lengths(torch.randn(sum(lengths), heads, 8, generator=g), lengths) for _ in range(3))
    return q, q.with_values(k.values), q.with_values(v.values)


def looked_up(table: Tensor) -> fj.MaskMod:
    """The mask of a bool table ``[n, n]`` by positions in the segment: one source for all tables."""
    return fj.MaskMod(lambda b, h, i, j: table[i, j])


def found(plan: fj.Plan, q: fj.Jagged) -> list[tuple[Spans, Spans]]:
    """The outer and inner spans that attention finds, per mask."""
    fj.attention(q, q, q, plan=plan, backend="cpp")
    return next(x for key, x in plan.notes.items() if isinstance(key, tuple) and key[0] == run.NARROWED)[0]


def dense(spans: Spans, num_kv: int) -> Tensor:
    at = torch.arange(num_kv)
    return ((spans.lo[..., None] <= at) & (at < spans.hi[..., None])).any(0)


def num_runs(allowed: Tensor) -> Tensor:
    before = torch.nn.functional.pad(allowed, (1, 0))[:, :-1]
    return (allowed & ~before).sum(1)


@given(
    st.lists(st.integers(0, LONGEST), min_size=1, max_size=4).filter(any),
    st.integers(1, 40),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
    st.integers(1, 2),
)
def test_spans_are_the_mask_or_bound_it(lengths: list[int], step: int, share: float, seed: int, threads: int) -> None:
    """Tables of runs of about `step` keys, from one run to more than kernels have spans for."""
    g = torch.Generator().manual_seed(seed)
    table = (torch.rand(LONGEST, LONGEST // step + 1, generator=g) < share).repeat_interleave(step, 1)[:, :LONGEST]
    q, before = batch(lengths)[0], torch.get_num_threads()
    torch.set_num_threads(threads)
    plan = fj.plan(q, mask=looked_up(table))
    ((outer, inner),) = found(plan, q)
    torch.set_num_threads(before)
    mask = plan.to_dense()
    wide, narrow = dense(outer, mask.shape[1]), dense(inner, mask.shape[1])
    assert not (mask & ~wide).any()
    assert not (narrow & ~mask).any()
    fits = num_runs(mask) <= MAX_SPANS
    assert torch.equal(wide[fits], mask[fits])
    assert torch.equal(narrow[fits], mask[fits])
    assert (inner is outer) == bool(fits.all())
    assert bool((outer.lo <= outer.hi).all())
    assert bool((outer.hi[:-1] <= outer.lo[1:]).all())
    ends = torch.where(mask, torch.arange(mask.shape[1]), -1).amax(1) + 1
    assert torch.equal(outer.hi.amax(0), ends.clamp(min=0).int())  # nothing is behind the last key


@given(
    st.lists(st.integers(0, LONGEST), min_size=1, max_size=4).filter(any),
    st.tuples(*[st.integers(0, LONGEST)] * 3),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
@example([21, 39], (2, 3, 10), 9, 0)
@example([97], (75, 10, 97), 1, 0)
def test_spans_stay_in_those_of_the_rest_of_a_mask(
    lengths: list[int], sizes: tuple[int, int, int], step: int, seed: int
) -> None:
    """Which may have a gap, and whose first may be empty: then their numbers are in no order over queries."""
    prefix, near, width = sizes
    table = torch.rand(LONGEST, LONGEST // step + 1, generator=torch.Generator().manual_seed(seed)) < 0.6
    table = table.repeat_interleave(step, 1)[:, :LONGEST]
    q, k, v = batch(lengths)
    rest = (fj.Prefix(prefix) | fj.Window(near, 0)) & fj.Window(width, 0)
    plan = fj.plan(q, mask=rest & looked_up(table))
    ((outer, inner),) = found(plan, q)
    mask, bounds = plan.to_dense(), fj.plan(q, mask=rest).to_dense()
    wide, narrow = dense(outer, mask.shape[1]), dense(inner, mask.shape[1])
    for part, whole in ((mask, wide), (wide, bounds), (narrow, mask)):
        assert not (part & ~whole).any()
    fits = num_runs(mask) <= MAX_SPANS
    assert torch.equal(wide[fits], mask[fits])
    assert torch.equal(narrow[fits], mask[fits])
    assert_matches_reference(q, k, v, plan=plan, backend="cpp")


def test_the_spans_with_the_least_gaps_are_joined() -> None:
    starts = torch.tensor([0, 3, 20, 30, 40, 50, 60, 70, 80, 90])  # ten runs of two keys; the least gaps: 1, 8
    keys = torch.zeros(LONGEST, dtype=torch.bool)
    keys[starts] = keys[starts + 1] = True
    q = batch([LONGEST])[0]
    ((outer, inner),) = found(fj.plan(q, mask=looked_up(keys.expand(LONGEST, -1).contiguous())), q)
    rows = list(zip(outer.lo[:, 0].tolist(), outer.hi[:, 0].tolist(), strict=True))
    assert rows[0] == (0, 5)
    assert len(rows) == MAX_SPANS
    assert sum(b - a for a, b in rows) == 5 + 12 + 6 * 2  # (20, 32) is joined next
    assert [b - a for a, b in zip(inner.lo[:, 0].tolist(), inner.hi[:, 0].tolist(), strict=True)].count(2) == 6


def test_a_mask_is_evaluated_once_for_a_plan() -> None:
    q, k, v = batch([50, 0, 70], 4)
    plan = fj.plan(q, mask=fj.MaskMod(lambda b, h, i, j: (j <= i) & (j > i - 20)))
    with mock.patch.object(run, "narrowed", wraps=run.narrowed) as narrowed:
        for x in (q, k.with_values(k.values.double())):
            fj.attention(x, x, x, plan=plan, backend="cpp")
            fj.attention(x, x, x, plan=plan, backend="cpp", return_lse=True)
            fj.attention(x, x, x, plan=plan.with_score(fj.Alibi.from_heads(4)), backend="cpp")
    assert [list(x.args[4]) for x in narrowed.call_args_list] == [[0]]
    assert_matches_reference(q, k, v, plan=plan, backend="cpp")


def test_a_mask_that_reads_the_head_has_spans_per_head() -> None:
    q, k, v = batch([50, 0, 70], 4)
    widths = torch.tensor([3, 17, 30, 1])
    plan = fj.plan(q, mask=fj.MaskMod(lambda b, h, i, j: (j <= i) & (j > i - widths[h])))
    spans = found(plan, q)
    assert len(spans) == 4
    for (outer, inner), mask in zip(spans, plan.to_dense(4), strict=True):
        assert inner is outer
        assert torch.equal(dense(outer, mask.shape[1]), mask)
    assert_matches_reference(q, k, v, plan=plan, backend="cpp")


def test_heads_whose_mask_is_its_spans_are_not_evaluated() -> None:
    q, k, v = batch([50, 0, 70], 4)
    function = fj.MaskMod(lambda b, h, i, j: (i - j).abs() % 32 < 5)
    plan = fj.plan(q, mask=fj.PerHead([fj.Causal(), function, fj.Window(5, 5), function]))
    with mock.patch.object(run, "narrowed", wraps=run.narrowed) as narrowed:
        spans = found(plan, q)
    assert [list(x.args[4]) for x in narrowed.call_args_list] == [[1, 3]]
    assert len(spans) == 4
    assert_matches_reference(q, k, v, plan=plan, backend="cpp")


def test_functions_of_masks_are_printed_once_and_those_of_scores_on_each_call() -> None:
    q = batch([9], 2)[0]
    mask, score = fj.MaskMod(lambda b, h, i, j: i - j < 3), fj.ScoreMod(lambda s, b, h, i, j: s * 2.0)
    one, other = fj.plan(q, mask=mask), fj.plan(q, mask=mask, score=score)
    assert printed(one, torch.float32) is printed(one, torch.float32)
    assert printed(other, torch.float32) is not printed(other, torch.float32)


def test_the_plan_keeps_what_its_mask_read() -> None:
    """As with other backends: a plan has copies of tensors that its functions close over."""
    q, table = batch([30])[0], torch.ones(LONGEST, LONGEST, dtype=torch.bool)
    plan = fj.plan(q, mask=looked_up(table))
    before = fj.attention(q, q, q, plan=plan, backend="cpp").values
    table[3] = False
    for backend in ("cpp", "reference"):
        torch.testing.assert_close(fj.attention(q, q, q, plan=plan, backend=backend).values, before)


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU(), StickBreaking()], ids=repr)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_segment_with_many_runs_changes_no_bit_of_another(normalizer: fj.Normalizer, threads: int) -> None:
    """Kernels ask the predicate in the one, and need not in the other."""
    before, lengths = torch.get_num_threads(), [97, 60, 33]
    torch.set_num_threads(threads)
    tables = torch.rand(2, LONGEST, LONGEST, generator=torch.Generator().manual_seed(1)) < 0.5
    tables[1] = torch.ones(LONGEST, LONGEST).tril().bool() & ~torch.ones(LONGEST, LONGEST).tril(-40).bool()

    def allowed(which: Tensor) -> fj.Mask:
        table = tables[which]
        return fj.Causal() & fj.MaskMod(lambda b, h, i, j: table[b, i, j])

    def attend(which: Tensor, x: fj.Jagged) -> list[Tensor]:
        x = x.with_values(x.values.detach()).requires_grad_()
        plan = fj.plan(x, mask=allowed(which), normalizer=normalizer)
        out = fj.attention(x, x, x, plan=plan, backend="cpp").values
        out.square().sum().backward()
        assert x.values.grad is not None
        return [out.detach(), x.values.grad]

    x = batch(lengths, 2)[0]
    quiet, loud = attend(torch.tensor([1, 1, 1]), x), attend(torch.tensor([1, 0, 1]), x)
    alone = attend(torch.tensor([1]), fj.Jagged.from_lengths(x.values[:97], [97]))
    torch.set_num_threads(before)
    rows = torch.arange(sum(lengths))
    kept = (rows < 97) | (rows >= 157)
    for a, b, c in zip(quiet, loud, alone, strict=True):
        assert torch.equal(a[kept], b[kept])
        assert not torch.equal(a, b)
        assert torch.equal(b[:97], c)
