"""The Triton kernels of the softmax, in Triton's interpreter: against the reference, and what the backend promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CUDA_ONLY, mostly_slow, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_softmax import CASES, POISONED, SMALL, compare

import flexjag as fj
from flexjag.backends.triton.softmax import printed
from flexjag.backends.triton.softmax_counts import computed_scores
from flexjag.backends.triton.softmax_tables import SHARE, list_items
from flexjag.codegen.worker import Worker
from flexjag.testing import Problem, problems
from flexjag.testing import lengths as drawn_lengths

QUICK = (
    "causal",
    "sinks",
    "per head, holes",
    "shorter keys",
    "three heads of a key",
    "slopes, cap",
    "dropped",
    "heights",
)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


def call(worker: Worker, function: str, *args: Any) -> Any:
    return worker.call("call_function", "triton_softmax", function, *args)


@pytest.mark.parametrize("name", mostly_slow(CASES, *QUICK))
def test_equals_the_reference(name: str, worker: Worker) -> None:
    ratios = call(worker, "compare_named", name)
    assert {"out", "lse", "grad_q", "grad_k", "grad_v"} <= ratios.keys()
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("name", [pytest.param(name, marks=CUDA_ONLY) for name in CASES])
def test_equals_the_reference_on_a_gpu(name: str) -> None:
    ratios = compare(CASES[name], *on_gpu(*CASES[name].batches()))
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.slow
def test_every_edge_length(worker: Worker) -> None:
    call(worker, "compare_edges")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_problems_equal_the_reference(dtype: torch.dtype, worker: Worker) -> None:
    call(worker, "compare_drawn", settings().max_examples // 3, dtype)  # interpreted: half a second each


@pytest.mark.slow
def test_no_segment_leaks(worker: Worker) -> None:
    call(worker, "check_leaks")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("which", mostly_slow(["q", "k", "v", "g", "qkvg"], "qkvg"))
def test_poison_stays_in_its_segment(which: str, value: float, worker: Worker) -> None:
    clean = call(worker, "run_poisoned", "", value)
    got = call(worker, "run_poisoned", which, value)
    others = torch.ones(sum(SMALL.lengths), dtype=torch.bool)
    others[POISONED] = False
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[others], b[others])
        assert a[others].isfinite().all()
    row = POISONED.start + 1
    if which == "v":  # those who attend the key know of it
        assert not got[0][row : POISONED.stop, :, 3].isfinite().any()
    if which == "g":  # and the gradients of the keys that the row attends
        assert not got[4][POISONED.start : row + 1].isfinite().all(-1).any()


def test_a_segment_alone_gives_the_same_bits(worker: Worker) -> None:
    for among_others, alone in call(worker, "run_apart"):
        assert all(torch.equal(a, b) for a, b in zip(among_others, alone, strict=True))


def test_repeats_bit_by_bit(worker: Worker) -> None:
    first, second = call(worker, "run_again")
    assert len(first) == len(second) == 5
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_spare_rows_are_left_alone(worker: Worker) -> None:
    out, lse, *grads = call(worker, "run_with_spare_rows")
    assert (lse[20:] == -torch.inf).all()
    assert lse[:20].isfinite().all()
    for x in (out, *grads):
        assert x[:20].isfinite().all()
        assert x[:20].any()
        assert not x[20:].any()


def test_one_graph_for_all_batches(worker: Worker) -> None:
    assert call(worker, "run_compiled") == ([0], [0])


@pytest.mark.slow
def test_operators_are_what_they_claim(worker: Worker) -> None:
    call(worker, "check_operators")


@given(lengths=drawn_lengths(max_segments=9, max_total=900, tile=128), bounded=st.booleans())
def test_items_cover_every_token_once(lengths: list[int], bounded: bool) -> None:
    """Of every segment in order, with the greatest height of which it has enough, in a list long enough for any."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    others = torch.arange(len(lengths) + 1, dtype=torch.int32) * 3
    heights, longest = (16, 32, 64), max([0, *lengths])
    found = list_items([offsets, others], sum(lengths), heights, longest if bounded else None)
    wanted: list[list[tuple[int, ...]]] = [[] for _ in heights]
    for s, n in enumerate(lengths):
        at = max([0, *(i for i, height in enumerate(heights) if n >= SHARE * height)])
        first, end = offsets[s : s + 2].tolist()
        wanted[at] += [(i, end, 3 * s, 3 * s + 3) for i in range(first, end, heights[at])]
    for at, (items, some) in enumerate(zip(found, wanted, strict=True)):
        assert [tuple(x) for x in items.T.tolist() if x[1]] == some
        assert not items[:, len(some) :].any()
        assert items.shape[1] >= 2 or (bounded and longest < SHARE * heights[at])


def uniform(segments: int, longest: int) -> fj.Jagged:
    lengths = torch.randint(1, longest + 1, (segments,), generator=torch.Generator().manual_seed(0)).tolist()
    return fj.Jagged.from_lengths(torch.zeros(sum(lengths), 8, 64, dtype=torch.bfloat16), lengths)


@pytest.mark.parametrize(("segments", "longest", "limit"), [(1024, 40, 2.0), (512, 200, 1.3)])
@pytest.mark.parametrize("groups", [8, 4, 2])
def test_short_segments_compute_little_more_than_they_need(
    segments: int, longest: int, limit: float, groups: int
) -> None:
    plan = fj.plan(uniform(segments, longest), mask=fj.Causal())
    needed = float((plan.sandwiches[0].outer.hi - plan.sandwiches[0].outer.lo).sum())
    assert needed <= computed_scores(plan, (8, groups, 64, 64), torch.bfloat16) <= limit * needed


@given(p=problems(score=False))
def test_at_least_the_spans_are_computed(p: Problem) -> None:
    plan, groups = p.plan(), p.k.values.shape[1]
    each = torch.stack([(x.outer.hi - x.outer.lo).sum() for x in plan.sandwiches]).double()
    needed = float(each[0] if plan.head_of is None else each[plan.head_of].mean())
    computed = computed_scores(plan, (p.heads, groups, 64, 64), torch.float16)
    assert needed <= computed + 1e-6 * needed
    assert (needed > 0) == (computed > 0)


def test_an_explanation_compares_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # without which the kernels are refused here
    text = fj.plan(uniform(100, 40), mask=fj.Causal()).explain()
    assert re.search(r"^needed    6% of [\d.]+ kscores by flex, 5\d% of [\d.]+ kscores by triton$", text, re.MULTILINE)


def test_the_source_has_what_spans_leave_open() -> None:
    x = fj.Jagged.from_lengths(torch.zeros(8, 2, 16), [3, 5])
    source = printed(fj.plan(x, mask=fj.Causal() & fj.SameGroup(torch.arange(8) // 2), score=fj.SoftCap(3.0))).source
    assert "def mask(h, q, kv, captures, numbers)" in source
    assert "tanh" in source
