"""The suites of ragged ops and of normalizers, the lengths they draw, and that their checks can fail."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import flexjag.bench.suites.ops as suites_ops
from flexjag import ops
from flexjag.bench.arms.ragged import FBGEMM, FLEXJAG, OPS, PADDED, PLAIN, SDPA, RaggedBatch
from flexjag.bench.arms.weights import Dense
from flexjag.bench.measuring.lengths import constant_lengths, document_lengths, lognormal_lengths, meta_lengths
from flexjag.bench.measuring.padded import Padding
from flexjag.bench.measuring.schedule import run_suite
from flexjag.bench.suites.normalizers import AUTO, BIASED, HSTU, LAYER, STICK, AttentionJob, LayerJob
from flexjag.bench.suites.normalizers import QUICK_SIZES as QUICK_NORMALIZERS
from flexjag.bench.suites.ops import DIRECTIONS, QUICK_SIZES, Job, find_fbgemm
from flexjag.bench.suites.registry import ArmResult, CaseResult, Figure, Options, find
from flexjag.kernels.cpp import build

QUICK = Options(quick=True, device="cpu", rounds=2, memory=False)


def quietly(_text: str) -> None:
    pass


@pytest.mark.parametrize("name", ["ops", "normalizers"])
def test_every_arm_is_right_or_says_why_it_is_absent(name: str) -> None:
    results = run_suite(find(name), QUICK, quietly)
    names = [case.name for case in results]
    assert len(names) == len(set(names))
    for case in results:
        assert {arm.name for arm in case.arms if arm.status == "skipped"} <= {FBGEMM}
        for arm in case.arms:
            assert arm.status == "ok" or (arm.status == "skipped" and arm.reason), (case.name, arm)
            assert len(arm.seconds) == (0 if arm.status == "skipped" else QUICK.rounds)
    figures = find(name).figures(QUICK, results)
    assert all(f.limit is None for f in figures), "a quick run proves nothing about speed"
    timed = [f for f in figures if "memory" not in f.text]
    assert timed
    assert all(f.value is not None and f.value > 0 for f in timed)


def test_every_op_is_measured_in_both_directions() -> None:
    assert {name.split(",")[0] for name in OPS} == set(ops.__all__)
    cases = {case.name for case in find("ops").cases(QUICK)}
    assert cases == {f"{name}, {direction}" for name in OPS for direction in DIRECTIONS}


def test_arms_of_an_op() -> None:
    arms = [arm.name for arm in Job("jagged_dense_attention", QUICK_SIZES, False, QUICK).arms()]
    compiled = [PLAIN] if build.refusal() is None else []
    assert arms == [FLEXJAG, PADDED, SDPA, *compiled, FBGEMM]
    assert [arm.name for arm in Job("segment_sum", QUICK_SIZES, False, QUICK).arms()] == [FLEXJAG, PADDED]


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_result_of_an_op_is_noticed(name: str) -> None:
    job = Job(name, QUICK_SIZES, True, QUICK)
    arm = job.arms()[0]
    right = arm.make()()
    assert arm.check(right) is None
    for i, x in enumerate(right):
        off = x.clone()
        off.flatten()[off.numel() // 2] += 1e-3 * float(x.abs().max())
        assert "is off by" in str(arm.check((*right[:i], off, *right[i + 1 :])))
    assert "results instead of" in str(arm.check(right[1:]))


@pytest.mark.parametrize("kind", [HSTU, BIASED, STICK, LAYER])
def test_a_leak_between_segments_is_noticed(kind: str) -> None:
    job = (LayerJob if kind == LAYER else AttentionJob)(kind, QUICK_NORMALIZERS, True, QUICK)
    auto = next(arm for arm in job.arms() if arm.name == AUTO)
    assert auto.check(auto.make()()) is None
    job.n = [sum(job.n)]  # what the check expects stays as it is
    assert "output is off by" in str(auto.check(auto.make()()))


def test_a_share_of_the_results_is_checked_as_the_whole_is() -> None:
    sizes = replace(QUICK_NORMALIZERS, segments=5, checked=(2, 1))
    job = AttentionJob(HSTU, sizes, True, QUICK)
    auto = next(arm for arm in job.arms() if arm.name == AUTO)
    right = auto.make()()
    assert auto.check(right) is None
    for off in right:
        off = off.detach().clone()
        off[0, 0] += 1.0
        assert "is off by" in str(auto.check((off, *right[1:])))


def test_stick_breaking_by_hand() -> None:
    """Two keys before a query: the nearer one takes its share first."""
    dense = Dense(Padding([3], "cpu"), torch.tensor([3]), 1.0)
    q = k = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    share = 1 / (1 + math.exp(-1.0))
    v = torch.eye(3, dtype=torch.float64)[None, None]
    wanted = torch.tensor([[0, 0, 0], [share, 0, 0], [share * (1 - share), share, 0]], dtype=torch.float64)
    # Sums of two logarithms, each rounded.
    torch.testing.assert_close(dense.stick_breaking(q, k, v)[0, 0], wanted, rtol=8 * torch.finfo(v.dtype).eps, atol=0)


def test_fbgemm_is_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    find_fbgemm.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(suites_ops.importlib, "import_module", missing)
        arms = Job("jagged_softmax", QUICK_SIZES, False, QUICK).arms()
    find_fbgemm.cache_clear()
    assert {arm.absent for arm in arms[:-1]} == {None}
    assert arms[-1].absent == "fbgemm_gpu cannot be imported: No module named 'fbgemm_gpu'"


def results_of_ops(fbgemm: float | None) -> list[CaseResult]:
    """Every op in 2 ms, padding in 6 ms, FBGEMM in as many as given; None: it is not there."""

    def arm(name: str, seconds: float | None) -> ArmResult:
        return ArmResult(name, "skipped", "no") if seconds is None else ArmResult(name, "ok", None, [seconds])

    def case(name: str, direction: str) -> CaseResult:
        arms = [arm(FLEXJAG, 0.002), arm(PADDED, 0.006)]
        return CaseResult(f"{name}, {direction}", {}, arms + ([arm(FBGEMM, fbgemm)] if OPS[name].fbgemm else []))

    return [case(name, direction) for name in OPS for direction in DIRECTIONS]


def ratio_of(figures: list[Figure], op: str) -> Figure:
    return next(f for f in figures if f.text.startswith(f"{op}:"))


def test_figures_of_ops() -> None:
    figures = find("ops").figures(Options(), results_of_ops(0.001))
    assert (figures[0].limit, figures[0].met) == (">= 2", True)
    assert figures[0].value == pytest.approx(3.0)
    assert ratio_of(figures, "jagged_softmax") == Figure(ratio_of(figures, "jagged_softmax").text, 2.0, "x", "<= 1.2")
    assert ratio_of(figures, "segment_sum").value == pytest.approx(1 / 3)
    assert all(f.limit is None for f in find("ops").figures(Options(device="cuda"), results_of_ops(0.001)))


def test_nothing_is_claimed_of_an_op_whose_rival_is_not_there() -> None:
    figures = find("ops").figures(Options(), results_of_ops(None))
    assert ratio_of(figures, "jagged_softmax").limit is None
    assert ratio_of(figures, "segment_sum").limit == "<= 1.2"
    assert all(f.value is None for f in find("ops").figures(Options(), []))


def test_figures_of_normalizers_carry_their_limits() -> None:
    figures = find("normalizers").figures(Options(), [])
    assert [(f.value, f.limit) for f in figures] == [(None, ">= 2.5"), (None, "<= 0.334")]


def test_larger_sizes_on_a_gpu() -> None:
    names = [case.name for case in find("normalizers").cases(Options(device="cuda"))]
    assert "HSTU attention, N = 4096, forward + backward" in names
    assert "stick-breaking attention, N = 16384, forward" in names
    assert "jagged_dense_attention, s = 0.95, N = 8192, forward" in [
        case.name for case in find("ops").cases(Options(device="cuda"))
    ]


@pytest.mark.parametrize(("sparsity", "low", "high"), [(0.1, 0, 100), (0.25, 0, 250), (0.5, 0, 500), (0.95, 450, 500)])
def test_metas_lengths(sparsity: float, low: int, high: int) -> None:
    lengths = meta_lengths(2000, 500, sparsity, seed=0)
    assert lengths == meta_lengths(2000, 500, sparsity, seed=0)
    assert lengths != meta_lengths(2000, 500, sparsity, seed=1)
    assert low <= min(lengths) <= low + 5
    assert high - 5 <= max(lengths) < high
    # Uniform: the mean of 2000 draws is within 5 of its own deviations, width / sqrt(12 * 2000).
    assert abs(sum(lengths) / 2000 - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * 2000)


def test_other_lengths() -> None:
    lengths = lognormal_lengths(300, 1000, seed=0)
    assert len(lengths) == 300
    assert 1 <= min(lengths) <= max(lengths) == 1000
    documents = document_lengths(30_000, seed=0)
    assert sum(documents) == 30_000
    assert min(documents) >= 1
    assert constant_lengths(3, 7) == [7, 7, 7]


def test_rows_of_a_padded_batch() -> None:
    b = RaggedBatch(QUICK_SIZES, "cpu", 0)
    x = torch.arange(b.tokens, dtype=torch.float32)[:, None]
    dense = b.pad(x)
    for s, n in enumerate(b.n):
        assert torch.equal(dense[s, :n], x.split(b.n)[s])
    chosen = dense.index_select(0, b.chosen).flatten(0, 1).index_select(0, b.chosen_row)
    assert torch.equal(chosen, torch.cat([x.split(b.n)[s] for s in b.chosen.tolist()]))
    first, second = b.half_rows
    assert torch.equal(torch.cat([first, second]).sort()[0], b.index.sort()[0])
