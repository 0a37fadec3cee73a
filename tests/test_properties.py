"""Properties of masks, scores, plans and backends over random problems. Budgets are in conftest's profiles."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

import flexjag as fj
from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.testing import (
    Problem,
    assert_matches_reference,
    assert_no_leak,
    assert_sandwich,
    assert_tiles,
    dense_mask,
    problems,
    rounding_bounds,
    span_bound,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_tiled_is_the_reference(data: st.DataObject, dtype: torch.dtype) -> None:
    p = data.draw(problems(dtype=dtype))
    assert_matches_reference(p.q, p.k, p.v, plan=p.plan(), backend="tiled", learned=p.learned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_segments_is_the_reference(data: st.DataObject, dtype: torch.dtype) -> None:
    p = data.draw(problems(dtype=dtype, additive=True))
    assert_matches_reference(p.q, p.k, p.v, plan=p.plan(), backend="segments", learned=p.learned)


@given(p=problems(dtype=torch.float32, depth=1))
def test_auto_is_the_reference(p: Problem) -> None:
    assert_matches_reference(p.q, p.k, p.v, mask=p.mask, score=p.score, learned=p.learned)


@given(p=problems(score=False))
def test_spans_sandwich_the_mask(p: Problem) -> None:
    assert_sandwich(p.mask, p.q, p.k, heads=p.heads, block_size=p.block_size)


@given(p=problems(score=False, interval=True))
def test_interval_masks_are_their_spans_and_tiles(p: Problem) -> None:
    assert_sandwich(p.mask, p.q, p.k, heads=p.heads, block_size=p.block_size)
    assert_tiles(p.mask, p.q, p.k, heads=p.heads, block_size=p.block_size)


@given(p=problems(score=False))
def test_tiles_classify_any_mask_soundly(p: Problem) -> None:
    assert_tiles(p.mask, p.q, p.k, heads=p.heads, block_size=p.block_size)


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
@given(data=st.data())
def test_no_segment_leaks(data: st.DataObject, backend: str) -> None:
    p = data.draw(problems(dtype=torch.float32, additive=backend == "segments"))
    assert_no_leak(backend, p.q, p.k, p.v, plan=p.plan())


@given(p=problems(portable=True, depth=3))
def test_a_jagged_batch_is_a_loop_over_its_segments(p: Problem) -> None:
    whole, _ = fj.attention(p.q, p.k, p.v, plan=p.plan(), backend="tiled", return_lse=True)
    bound = _rounding(p, p.mask)
    outs = []
    for q, k, v in zip(p.q.to_list(), p.k.to_list(), p.v.to_list(), strict=True):
        one = [fj.Jagged.from_list([x]) for x in (q, k, v)]
        outs.append(fj.attention(*one, mask=p.mask, score=p.score, backend="reference").values)
    loop = torch.cat(outs) if outs else whole.values
    assert bool(((whole.values - loop).abs() <= 2 * bound.out).all())


@given(p=problems())
def test_merged_disjoint_masks_are_the_whole(p: Problem) -> None:
    parts = [
        fj.attention(p.q, p.k, p.v, mask=mask, score=p.score, backend="tiled", return_lse=True)
        for mask in (p.mask, ~p.mask)
    ]
    out, lse = fj.merge(parts)
    wanted, wanted_lse = fj.attention(p.q, p.k, p.v, score=p.score, backend="reference", return_lse=True)
    eps = torch.finfo(torch.float64).eps
    bounds = [_rounding(p, mask) for mask in (p.mask, ~p.mask, m.Full())]
    # The parts' weights add up to 1 and move by what their log-sum-exps do; each weight takes a few operations.
    size = sum(out.values.abs() for out, _ in parts)
    logs = sum(torch.where(lse.values.isinf(), 0.0, lse.values).abs() for _, lse in parts)
    lse_error = sum(b.lse for b in bounds) + 4 * eps * (1 + logs)
    out_error = sum(b.out for b in bounds) + (lse_error[..., None] + 4 * eps) * size
    infinite = wanted_lse.values.isinf()
    assert torch.equal(infinite, lse.values.isinf())
    assert bool(((out.values - wanted.values).abs() <= 2 * out_error).all())
    off = (lse.values - wanted_lse.values).masked_fill(infinite, 0.0).abs()
    assert bool((off <= 2 * lse_error).all())


def _rounding(p: Problem, mask: m.Mask):
    plan = fj.plan(p.q, p.k, mask=mask)
    g = torch.zeros(*p.q.values.shape[:2], p.v.values.shape[2], dtype=torch.float64)
    scale = p.q.values.shape[2] ** -0.5
    values = (x.values for x in (p.q, p.k, p.v))
    return rounding_bounds(
        *values, plan.layout, mask, p.score, scale=scale, grad_out=g, grad_lse=g.sum(2), dtype=torch.float64
    )


def test_the_profiles_hold_the_budgets_that_were_promised() -> None:
    tests = [x for name, x in vars(sys.modules[__name__]).items() if getattr(x, "is_hypothesis_test", False)]
    cases = 0
    for test in tests:
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        cases += len(marks[0].args[1]) if marks else 1
    assert cases * settings.get_profile("ci").max_examples >= 2_000
    assert cases * settings.get_profile("nightly").max_examples >= 20_000


def _depth(mask: m.Mask) -> int:
    match mask:
        case m.And() | m.Or():
            return 1 + max(_depth(mask.left), _depth(mask.right))
        case m.Not():
            return 1 + _depth(mask.mask)
        case m.PerHead():
            return 1 + max(map(_depth, mask.masks))
        case _:
            return 0


def _has_dead_row(p: Problem) -> bool:
    allowed = dense_mask(p.mask, p.q, p.k, p.heads)
    has_key = allowed.any(2)
    return bool(has_key.any()) and bool((~has_key & (p.k.lengths > 0).repeat_interleave(p.q.lengths)).any())


HARD = {
    "a row without keys among others that have some": _has_dead_row,
    "an empty segment in the middle": lambda p: (p.q.lengths[1:-1] == 0).any() and p.q.lengths[0] > 0 < p.q.lengths[-1],
    "no segments": lambda p: p.q.num_segments == 0,
    "no tokens in some segments": lambda p: p.q.num_segments > 0 and p.q.values.shape[0] == 0,
    "queries without keys": lambda p: ((p.q.lengths > 0) & (p.k.lengths == 0)).any() and p.k.values.shape[0] > 0,
    "one token": lambda p: p.q.values.shape[0] == 1 and p.q.num_segments == 1,
    "whole tiles": lambda p: p.q.values.shape[0] > 0 and p.q.values.shape[0] % p.block_size == 0,
    "a token over whole tiles": lambda p: p.q.values.shape[0] == 2 * p.block_size + 1,
    "a segment over several tiles": lambda p: max([0, *p.q.lengths.tolist()]) > 2 * p.block_size,
    "differing offsets": lambda p: not torch.equal(p.q.offsets, p.k.offsets),
    "grouped heads and E over D": lambda p: (
        p.heads > p.k.values.shape[1] > 1 and p.v.values.shape[2] > p.q.values.shape[2]
    ),
    "a mask of depth 4": lambda p: _depth(p.mask) == 4,
    "another mask per head": lambda p: m.num_mask_heads(p.mask) is not None,
    "a bound per segment": lambda p: isinstance(p.mask, m.Window) and isinstance(p.mask.left, torch.Tensor),
    "a learned user score": lambda p: len(p.learned) == 2 and any(isinstance(x, s.ScoreMod) for x in s.parts(p.score)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HARD)
def test_hard_cases_are_drawn(case: str) -> None:
    find(problems(), lambda p: bool(HARD[case](p)), settings=settings.get_profile("find"))


def test_masks_that_overflow_their_spans_are_drawn() -> None:
    def overflows(p: Problem) -> bool:
        return span_bound(m.at_head(p.mask, 0)) is None and not p.plan().sandwiches[0].exact

    found = find(problems(interval=True, score=False), overflows, settings=settings.get_profile("find"))
    assert_sandwich(found.mask, found.q, found.k, heads=found.heads)


SLOPES = torch.tensor([0.3, 0.1], dtype=torch.float64)
TABLE = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.5, -0.4]], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["tiled", "segments"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_gradcheck(backend: str, groups: int, learned: bool) -> None:
    """The analytic gradients, the log-sum-exp's included, are those of finite differences."""
    lengths, mask = [3, 0, 2], (fj.Causal() & fj.Window(1, 0)) | fj.Prefix(1)
    tensors = [torch.randn(5, n, d, dtype=torch.float64) for n, d in ((2, 3), (groups, 3), (groups, 2))]
    tensors += [SLOPES.clone(), TABLE.clone()] if learned else []

    def run(q, k, v, slopes=None, table=None):
        score = fj.Alibi(slopes) >> fj.RelativeBias(table) if learned else None
        q, k, v = (fj.Jagged.from_lengths(x, lengths) for x in (q, k, v))
        out, lse = fj.attention(q, k, v, mask=mask, score=score, backend=backend, return_lse=True)
        return out.values, lse.values

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("backend", ["tiled", "segments", "reference"])
def test_gradcheck_of_rows_without_keys(backend: str) -> None:
    tensors = [torch.randn(5, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(q, k, v):
        q, k, v = (fj.Jagged.from_lengths(x, [3, 0, 2]) for x in (q, k, v))
        return fj.attention(q, k, v, mask=~fj.Causal(), backend=backend).values

    assert torch.autograd.gradcheck(run, tensors)


BACKENDS = ["tiled", "segments", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_take_no_part_however_steep_the_bias(backend: str) -> None:
    x = fj.Jagged.from_lengths(torch.randn(200, 1, 8), [200])
    mask = fj.Causal() & ~fj.Prefix(3)  # the first rows would meet a bias of e**338 at the last key
    assert_matches_reference(x, x, x, mask=mask, score=fj.Alibi(torch.tensor([1.7])), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_any_keys_have_zero_gradients(backend: str) -> None:
    slopes = torch.rand(1, dtype=torch.float64, requires_grad=True)
    q = fj.Jagged.from_lengths(torch.randn(2, 1, 8, dtype=torch.float64), [2, 0])
    k = fj.Jagged.from_lengths(torch.randn(3, 1, 8, dtype=torch.float64), [0, 3])
    assert_matches_reference(q, k, k, score=fj.Alibi(slopes), learned=[slopes], backend=backend)


@pytest.mark.parametrize("learned", [False, True])
def test_a_score_may_ignore_the_product(learned: bool) -> None:
    x, table = (
        fj.Jagged.from_lengths(torch.randn(9, 2, 8, dtype=torch.float64), [9]),
        torch.rand(2, dtype=torch.float64),
    )
    table.requires_grad_(learned)
    score = fj.ScoreMod(lambda s, b, h, q, kv: table[h] * (q - kv))
    assert_matches_reference(x, x, x, score=score, learned=[table] * learned, backend="tiled")


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_score_may_hold_wider_tensors_than_the_inputs(backend: str, dtype: torch.dtype) -> None:
    x, table = fj.Jagged.from_lengths(torch.randn(9, 2, 8, dtype=dtype), [9]), torch.rand(2, dtype=torch.float64)
    score = fj.ScoreMod(lambda s, b, h, q, kv: s + table[h]) >> fj.Alibi(table)
    assert_matches_reference(x, x, x, score=score, backend=backend)


@pytest.mark.parametrize("mask", [~(~fj.Full() & fj.Full() & fj.Causal()), ~(~fj.Full() & fj.Causal())], ids=repr)
def test_the_complement_of_an_empty_span_is_whole(mask: fj.Mask) -> None:
    assert assert_tiles(mask, fj.Jagged.from_lengths(torch.zeros(16), [16])).num_full == 1


def test_a_head_with_no_matching_predicate_leaves_nothing_to_refine() -> None:
    empty = fj.MaskMod(lambda b, h, q, kv: q > kv) & fj.Dense(torch.zeros(0, 0, dtype=torch.bool))
    assert_tiles(fj.PerHead([fj.Full(), empty]), fj.Jagged.from_lengths(torch.zeros(1), [1]))
