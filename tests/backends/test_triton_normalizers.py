"""The Triton kernels for pointwise normalizers: printed, interpreted against the reference, traced, and assembled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import EDGE_LENGTHS, check_error
from hypothesis import settings
from torch import Tensor
from triton_normalizers import LENGTHS, MASKS, NORMALIZERS, SCORES, TOTAL

import flexjag as fj
from flexjag.algebra.normalizers import Sigmoid
from flexjag.backends.triton.pointwise import printed
from flexjag.codegen.own.attention import list_kernels
from flexjag.codegen.read.measure import Usage
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.codegen.worker import Worker

IS_LONG = settings._current_profile == "nightly"
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


def call(worker: Worker, function: str, *args: Any) -> Any:
    return worker.call("call_function", "triton_normalizers", function, *args)


@pytest.mark.parametrize("mask", MASKS)
def test_a_printed_mask_is_the_mask(mask: str, worker: Worker) -> None:
    allowed, wanted, plain, *_ = call(worker, "print_mods", mask, "none")
    assert torch.equal(allowed, wanted)
    assert torch.equal(plain, wanted)


@pytest.mark.parametrize("score", SCORES)
def test_a_printed_score_is_the_score(score: str, worker: Worker) -> None:
    """Its slope, too. A few roundings apart, each of numbers that the largest value bounds."""
    *_, found, value, plain, slope, by_torch = call(worker, "print_mods", "causal", score)
    for got, wanted in ((found, value), (plain, value), (slope, by_torch)):
        ruled_out = wanted == -torch.inf
        assert torch.equal(got == -torch.inf, ruled_out)
        got, wanted = (x.masked_fill(ruled_out, 0.0) for x in (got, wanted))
        limit = 16 * EPS * float(wanted.abs().max().clamp(min=1.0))
        assert float((got - wanted).abs().max()) <= limit


def test_equal_structures_print_equal_sources() -> None:
    sources, numbers = set(), []
    for lengths in ([40, 7, 0, 33], [300], [1, 1, 200, 5, 90]):
        x = fj.Jagged.from_lengths(torch.zeros(sum(lengths)), lengths)
        dense = fj.Dense(torch.ones(sum(n * n for n in lengths), dtype=torch.bool))
        plan = fj.plan(x, mask=fj.Causal() & dense, score=fj.Alibi(torch.ones(2)), normalizer=Sigmoid(), block_size=16)
        text = printed(plan)
        sources.add(text.source)
        numbers.append(text.numbers)
    assert len(sources) == 1
    assert numbers[0] != numbers[1]
    other = fj.plan(x, mask=fj.Causal() & dense, normalizer=Sigmoid(), block_size=16)
    assert printed(other).source not in sources


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_matches_the_reference(normalizer: str, worker: Worker) -> None:
    masks = list(MASKS) if normalizer == "silu" else ["causal", "heads"]
    assert call(worker, "match", [{"lengths": LENGTHS}], masks, [normalizer]) == len(masks)


@pytest.mark.parametrize("score", SCORES)
def test_scores_match_the_reference(score: str, worker: Worker) -> None:
    assert call(worker, "match", [{"lengths": LENGTHS}], ["causal"], ["silu"], [score], 32) == 1


def test_every_edge_length(worker: Worker) -> None:
    shapes = [{"lengths": lengths} for lengths in EDGE_LENGTHS.values()]
    assert call(worker, "match", shapes, ["function"], ["silu"]) == len(shapes)


SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {"lengths": LENGTHS, "heads": 4, "groups": 1},
    "two groups, narrow values": {"lengths": LENGTHS, "heads": 4, "groups": 2, "dim": 24, "value_dim": 3},
    "one feature": {"lengths": LENGTHS, "dim": 1, "value_dim": 1},
    "wide values": {"lengths": LENGTHS, "dim": 16, "value_dim": 72},
    "more keys": {"lengths": LENGTHS, "kv_lengths": [30, 20, 3, 1]},
    "fewer keys": {"lengths": LENGTHS, "kv_lengths": [3, 0, 5, 30]},
    "bfloat16": {"lengths": LENGTHS, "dtype": torch.bfloat16},
    "float16": {"lengths": LENGTHS, "dtype": torch.float16},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, worker: Worker) -> None:
    normalizers = ["silu, scaled rows", "sigmoid"]
    assert call(worker, "match", [SHAPES[shape]], ["causal, end"], normalizers) == 2


@pytest.mark.slow
def test_large_tiles(worker: Worker) -> None:
    """Those of a GPU, in which a program has a part of a tile, and some are FULL."""
    assert call(worker, "match", [{"lengths": [260, 0, 30, 1]}], ["causal"], ["silu"], ["alibi"], 128) == 1


def test_learned_tensors(worker: Worker) -> None:
    """Scores of every kind, the bias and the factors at once: all sums are of up to TOTAL² products."""
    got, exact = (call(worker, "learn", backend, torch.float32) for backend in ("triton", "reference"))
    same = call(worker, "learn", "tiled", torch.float32)
    for i, (x, y, z) in enumerate(zip([got[0], *got[1]], [same[0], *same[1]], [exact[0], *exact[1]], strict=True)):
        check_error(x, y, z, f"tensor {i}", products=TOTAL)


def rows(lengths: list[int], segment: int) -> Tensor:
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    start = sum(lengths[:segment])
    inside[start : start + lengths[segment]] = True
    return inside


SHARED_TILE = [3, 5, 8, 0, 30]


@pytest.mark.parametrize("mask", ["full", "causal", "heads"])
def test_other_segments_do_not_change_by_a_bit(mask: str, worker: Worker) -> None:
    (before,) = call(worker, "attend", SHARED_TILE, mask, "silu", {})
    (after,) = call(worker, "attend", SHARED_TILE, mask, "silu", {"q": 7.5, "k": 7.5, "v": 7.5, "grad": 7.5})
    own = rows(SHARED_TILE, 1)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[~own], y[~own])
        assert not torch.equal(x[own], y[own])


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=["nan", "-inf"])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv", "grad"])
def test_poison_stays_in_its_segment(which: str, value: float, worker: Worker) -> None:
    """In the output and in every gradient, while the poisoned segment does not look healthy."""
    change = dict.fromkeys(["grad"] if which == "grad" else which, value)
    own = rows(SHARED_TILE, 1)
    (clean,), (dirty,) = (call(worker, "attend", SHARED_TILE, "causal", "silu", x) for x in ({}, change))
    for x, y in zip(clean, dirty, strict=True):
        assert torch.equal(x[~own], y[~own])
    if "v" in which:
        assert not dirty[0][own].isfinite().any()
    if which == "grad":
        assert not dirty[3][own].isfinite().any()


@pytest.mark.slow
def test_results_are_the_same_every_time(worker: Worker) -> None:
    first, *others = call(worker, "attend", [70, 0, 21], "heads", "sigmoid", {}, 1, 3)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("normalizer", ["silu", "sigmoid"])
def test_fixed_capacity_zeroes_the_spare_rows(normalizer: str, worker: Worker) -> None:
    for x in call(worker, "fill_capacity", normalizer):
        assert x[:48].any()
        assert not x[48:].any()


@pytest.mark.slow
def test_operators_are_what_they_claim(worker: Worker) -> None:
    call(worker, "check_operators")


@pytest.mark.slow
def test_one_graph_for_all_batches(worker: Worker) -> None:
    assert call(worker, "trace", [[20, 7, 0, 13], [20, 30], [60, 2, 5]]) == ([0], [0])


def check(kernel: Usage, target: str) -> None:
    where = f"{kernel.name} of {kernel.phase} on {target}"
    most = 512 if get_target(target).vendor == "amd" else 255
    assert 0 < kernel.registers <= most, where
    assert kernel.spilled_bytes == 0, f"{where} spills {kernel.spilled_bytes} B"
    assert kernel.shared_bytes <= get_target(target).shared_per_block, f"{where} asks for {kernel.shared_bytes} B"
    assert kernel.resident_blocks > 0, where


POINTWISE = ["pointwise_forward", "pointwise_of_queries", "pointwise_of_keys"]
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_assembles_without_spills(target: str) -> None:
    """The lightest kernels and the heaviest; at night of all features and dtypes."""
    features = [64, 128] if IS_LONG else [128]
    dtypes = [torch.bfloat16, torch.float32, torch.float16] if IS_LONG else [torch.bfloat16]
    with Worker() as compiler:
        kernels = compiler.call("assemble_ops", get_target(target), features, dtypes, POINTWISE, "triton_normalizers")
    assert {k.name for k in kernels} == set(POINTWISE)
    for kernel in kernels:
        check(kernel, target)
    halves = [k for k in kernels if "bfloat16" in k.phase]
    assert all(k.tensor_cores for k in halves)
    assert TENSOR_CORES[target] in {core for k in halves for core in k.tensor_cores}


def test_every_normalizer_has_its_kernels() -> None:
    cases = [case for case in list_kernels() if case.name in POINTWISE]
    assert {case.op.split(",")[0] for case in cases} == {"silu", "gelu", "identity", "sigmoid"}
    assert {case.constants["CAREFUL"] for case in cases} == {False, True}


def test_no_kernel_uses_atomics() -> None:
    from flexjag.backends.triton import pointwise_kernels as triton_pointwise
    from flexjag.kernels import math

    sources = [getattr(x, "src", "") for module in (math, triton_pointwise) for x in vars(module).values()]
    assert any("tl.dot" in source for source in sources)
    assert not any("atomic" in source for source in sources)
