"""Masks and scores lined up with the last key: what is left of a segment's queries gets the whole's last rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from cases import CPP_SLOWLY, jagged
from torch import Tensor

import flexjag as fj
from flexjag.algebra.scores import t5_buckets
from flexjag.errors import ScoreError
from flexjag.testing import assert_compiles, assert_matches_reference, assert_no_leak, assert_sandwich, assert_tiles

LENGTHS = [9, 0, 1, 21]
LEFT = [2, 0, 1, 5]  # queries of a later step
H = 2
TABLE = torch.linspace(-2, 2, H * 8, dtype=torch.float64).reshape(H, 8)
ENDS = torch.tensor([-6, -2, 0, 1, 2, 9, 30])
SCORES: dict[str, Callable[[Tensor, str], fj.Score]] = {
    "alibi": lambda t, align: fj.Alibi(t[:, 0], align=align),
    "symmetric": lambda t, align: fj.Alibi(t[:, 0], symmetric=True, align=align),
    "relative": lambda t, align: fj.RelativeBias(t[:, :7], align),
    "bucketed": lambda t, align: fj.BucketedBias(t, ENDS, align),
    "t5": lambda t, align: fj.T5Bias(t, max_distance=11, align=align),
    "t5, causal": lambda t, align: fj.T5Bias(t, bidirectional=False, max_distance=11, align=align),
}
MASKS: dict[str, Callable[[str], fj.Mask]] = {
    "causal": lambda align: fj.Causal(align),
    "window": lambda align: fj.Window(4, 0, align),
    "window before": lambda align: fj.Window(6, -2, align),
    "window ahead": lambda align: fj.Window(-1, 3, align),
    "chunked": lambda align: fj.Chunked(4, align),
    "chunks of each": lambda align: fj.Chunked(torch.tensor([3, 1, 2, 8]), align) & fj.Causal(align),
}
BACKENDS = ["reference", "tiled", "segments", CPP_SLOWLY]


def step(x: fj.Jagged) -> fj.Jagged:
    """The last tokens of each segment."""
    return fj.Jagged.from_list([s[len(s) - n :] for s, n in zip(x.to_list(), LEFT, strict=True)])


def same(mask: Callable[[str], fj.Mask], score: Callable[[Tensor, str], fj.Score] | None, backend: str) -> None:
    q, k, v = jagged(LENGTHS, H, 8), jagged(LENGTHS, 1, 8, seed=1), jagged(LENGTHS, 1, 4, seed=2)
    k, v = (fj.Jagged(x.values, q.offsets) for x in (k, v))
    table = TABLE.clone().requires_grad_()
    make = (lambda align: None) if score is None else (lambda align: score(table, align))
    whole = fj.attention(q, k, v, mask=mask("start"), score=make("start"), backend="reference")
    later = fj.attention(step(q), k, v, mask=mask("end"), score=make("end"), backend=backend)
    torch.testing.assert_close(later.values, step(whole).values, rtol=1e-12, atol=1e-12)
    if score is not None:
        grads = [torch.autograd.grad(x.values.square().sum(), table)[0] for x in (later, step(whole))]
        assert grads[0].abs().max() > 1e-3
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SCORES)
def test_a_later_step_has_the_scores_of_the_whole(kind: str, backend: str) -> None:
    same(lambda align: fj.Causal(align), SCORES[kind], backend)
    same(lambda align: fj.Full(), SCORES[kind], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_later_step_has_the_mask_of_the_whole(kind: str, backend: str) -> None:
    same(MASKS[kind], None, backend)


@pytest.mark.parametrize("kind", SCORES)
def test_one_graph_for_all_steps(kind: str) -> None:
    def run(q: fj.Jagged, k: fj.Jagged) -> Tensor:
        score = SCORES[kind](TABLE.float(), "end")
        out = fj.attention(q, k, k, mask=fj.Causal("end"), score=score, backend="tiled")
        assert isinstance(out, fj.Jagged)
        return out.values

    batches = []
    for wide, few in ([9, 21], [3, 2]), ([4, 0, 30], [4, 0, 1]), ([5, 5, 5, 40], [2, 2, 2, 2]):
        batches.append(tuple(jagged(x, H, 8, dtype=torch.float32).requires_grad_() for x in (few, wide)))
    assert_compiles(run, batches, backend="aot_eager")


def by_loops(left: list[int | None], right: list[int | None], align: str, q: list[int], k: list[int]) -> list[Tensor]:
    found = []
    for lo, hi, n, m in zip(left, right, q, k, strict=True):
        at = [i + (m - n if align == "end" else 0) for i in range(n)]
        rows = [[(lo is None or i - lo <= j) and (hi is None or j <= i + hi) for j in range(m)] for i in at]
        found.append(torch.tensor(rows, dtype=torch.bool).reshape(n, m))
    return found


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (3, -1), (-2, 4), (-1, None), (None, -3), (2**40, -2), (-(2**40), 2**50), (0, 0),
        ([3, -2, 0, -(2**62)], [-1, 5, -4, 2**62]), ([-1, 2, 2**31, 5], 0), (2, [-5, -1, 0, 1]),
    ],
)  # fmt: skip
def test_windows_are_shifted(left: object, right: object, align: str) -> None:
    q, k = jagged([4, 0, 17, 6], H, 8), jagged([9, 2, 33, 3], H, 8)
    sides = [x if isinstance(x, list) else [x] * 4 for x in (left, right)]
    mask = fj.Window(*(torch.tensor(x) if isinstance(x, list) else x for x in (left, right)), align=align)
    plan = fj.plan(q, k, mask=mask)
    wanted = torch.block_diag(*by_loops(*sides, align, q.lengths.tolist(), k.lengths.tolist()))
    assert torch.equal(plan.to_dense(), wanted)
    assert plan.exact
    assert_sandwich(mask, q, k, heads=H)
    assert_tiles(mask, q, k, heads=H)
    assert_matches_reference(q, k, k, mask=mask, backend="tiled")
    assert_no_leak("segments", q, k, k, mask=mask)


def test_alibi_by_distance_is_symmetric() -> None:
    x, slopes = jagged([5, 3], H, 4), torch.tensor([0.5, 2.0], dtype=torch.float64)
    by_hand = fj.ScoreMod(lambda s, b, h, q, kv: s - slopes[h] * (q - kv).abs())
    for backend in ("reference", "tiled", "segments"):
        out = fj.attention(x, x, x, score=fj.Alibi(slopes, symmetric=True), backend=backend)
        wanted = fj.attention(x, x, x, score=by_hand, backend="reference")
        torch.testing.assert_close(out.values, wanted.values, rtol=1e-12, atol=1e-12)


def test_structures_tell_nodes_apart_that_compile_differently() -> None:
    slopes = torch.zeros(2)
    assert fj.Alibi(slopes).structure() != fj.Alibi(slopes, symmetric=True).structure()
    assert fj.Alibi(slopes).structure() != fj.Alibi(slopes, align="end").structure()
    assert fj.Chunked(2).structure() == fj.Chunked(3).structure()


# --------------------------------------------------------------------------------------------------------- T5's buckets

BUCKETS = [
    (32, True, 128),
    (32, False, 128),
    (8, True, 9),
    (8, False, 20),
    (64, True, 256),
    (4, True, 2),
    (2, False, 3),
]


@pytest.mark.parametrize(("count", "bidirectional", "most"), BUCKETS)
def test_t5_buckets_by_the_formula(count: int, bidirectional: bool, most: int) -> None:
    """In exact arithmetic: distance n has bucket b or a later one if n**w >= e**(w - c) * most**c for c = b - e."""
    found = t5_buckets(count, bidirectional, most).tolist()
    assert len(found) == 2 * most + 1
    each = count // 2 if bidirectional else count
    exact = each // 2
    width = each - exact
    for distance, bucket in zip(range(-most, most + 1), found, strict=True):
        n = abs(distance) if bidirectional else max(-distance, 0)
        wanted = n
        if n >= exact:
            steps = [c for c in range(width) if n**width >= exact ** (width - c) * most**c]
            wanted = exact + max(steps)
        assert bucket == wanted + (each if bidirectional and distance > 0 else 0), distance


def test_t5_buckets_are_those_of_transformers() -> None:
    """Needs transformers, which no extra brings (it installs 160 MB): skipped where it is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    for count in (2, 4, 8, 16, 32, 64, 320):
        for bidirectional in (True, False):
            for most in (5, 20, 64, 100, 128, 200, 256, 1000):
                if most <= count // (2 + 2 * bidirectional) or count // (2 + 2 * bidirectional) < 1:
                    continue
                distance = torch.arange(-most, most + 1)
                bucket = t5.T5Attention._relative_position_bucket(distance, bidirectional, count, most)
                assert t5_buckets(count, bidirectional, most).tolist() == bucket.tolist(), (count, most)


def test_t5_bias_is_constant_beyond_its_distance() -> None:
    table = torch.arange(16.0, dtype=torch.float64).reshape(2, 8).requires_grad_()
    q = jagged([40], 2, 4)
    assert_matches_reference(q, q, q, score=fj.T5Bias(table, max_distance=9), learned=[table], backend="tiled")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fj.T5Bias(torch.zeros(2, 7)), r"an even number of 4 if bidirectional.*buckets=7"),
        (lambda: fj.T5Bias(torch.zeros(2, 2)), "buckets=2"),
        (lambda: fj.T5Bias(torch.zeros(2, 32), max_distance=8), "max_distance=8"),
        (lambda: fj.T5Bias(torch.zeros(2)), r"table: must be float \[H, K\]"),
        (lambda: fj.T5Bias(torch.zeros(2, 8), buckets=torch.zeros(3)), r"buckets: must be int32"),
        (lambda: fj.Alibi(torch.zeros(2), align="middle"), "align: must be 'start' or 'end'"),
        (lambda: fj.RelativeBias(torch.zeros(2, 3), "last"), "align: must be"),
        (lambda: fj.BucketedBias(torch.zeros(2, 8), ENDS, "last"), "align: must be"),
    ],
)
def test_bad_scores(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        make()


def test_the_slope_of_a_far_key_keeps_its_precision() -> None:
    """In bfloat16 a slope times a distance is computed in the scores' float32, lined up with either end."""
    q, k = jagged([1], 1, 8, dtype=torch.bfloat16), jagged([4000], 1, 8, dtype=torch.bfloat16)
    score = fj.Alibi(torch.tensor([math.pi / 1000]), align="end")
    assert_matches_reference(q, k, k, mask=fj.Causal("end"), score=score, backend="tiled")
