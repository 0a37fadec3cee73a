"""Spare rows that hold NaN, scores of -inf, integers at their limits, and what users' functions are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CPP_SLOWLY, make_qkv
from torch import Tensor

import flexjag as fj
from flexjag.algebra.masks import Bound
from flexjag.backends.cpp.rule import CPP

F64, NAN, INF = torch.float64, float("nan"), torch.inf
NAMES = ["reference", "tiled", "segments", "auto"]
BACKENDS = [*NAMES, CPP_SLOWLY]
NORMALIZERS = [
    fj.Softmax(),
    fj.SiLU(),
    fj.GELU(),
    fj.GELU(approximate="tanh"),
    fj.Identity(),
    fj.Sigmoid(),
    fj.StickBreaking(),
]
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")])
FLEX = pytest.param("flex", marks=pytest.mark.slow)


def attend(backend: str) -> Callable[..., fj.Jagged]:
    """``fj.attention`` with a backend, or in a graph."""
    if backend != "compiled":
        return lambda *args, **given: fj.attention(*args, backend=backend, **given)
    return torch.compile(lambda *args, **given: fj.attention(*args, **given), fullgraph=True)


# Spare rows.


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU(), fj.StickBreaking()], ids=repr)
@pytest.mark.parametrize("backend", [*BACKENDS, FLEX, COMPILED])
def test_spare_rows_may_hold_anything(backend: str, normalizer: fj.Normalizer) -> None:
    """Of q, k, v, of a scale per token, and of what flows back: real rows are as without them, spare ones get zeros."""
    if backend == "cpp" and not isinstance(normalizer, CPP.promises.normalizers):
        pytest.skip("not one of its normalizers")
    trains, is_softmax = backend != "flex", isinstance(normalizer, fj.Softmax)
    if not trains and not is_softmax:
        pytest.skip("flex computes a softmax")
    if backend == "compiled" and isinstance(normalizer, fj.StickBreaking):
        pytest.skip("two graphs are enough")
    dtype = torch.float32 if backend == "flex" else F64
    q, k, v = make_qkv([10, 0, 20], dim=16, dtype=dtype)
    rows, offsets = 50, q.offsets

    def padded(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), fill)])

    found = []
    for fill in (0.0, NAN):
        leaves = [padded(x.values, fill).requires_grad_(trains) for x in (q, k, v)]
        x, y, z = (fj.Jagged(leaf, offsets) for leaf in leaves)
        if isinstance(normalizer, fj.SiLU):
            normalizer = fj.SiLU(padded(torch.ones(30, dtype=F64), fill))
        plan = fj.plan(x, y, mask=fj.Causal(), normalizer=normalizer, max_tokens=rows)
        out = attend(backend)(x, y, z, plan=plan).values
        assert not out[30:].any()
        weights = padded(torch.linspace(-1, 1, 30, dtype=dtype)[:, None, None].expand(30, 2, 16), fill)
        found.append((out, *(torch.autograd.grad(out, leaves, weights) if trains else ())))
    for wanted, got in zip(*found, strict=True):
        assert bool(torch.isfinite(got).all())
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# Scores of -inf.


def _ruled_out(where: Callable[[Tensor, Tensor], Tensor]) -> fj.Score:
    return fj.ScoreMod(lambda s, b, h, i, j: torch.where(where(i, j), -INF, s))


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize("kind", ["table", "learned table", "function"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_of_minus_infinity_rules_a_key_out(backend: str, kind: str, normalizer: fj.Normalizer) -> None:
    """As if it were not allowed, for every normalizer; a row that it leaves without keys is one without keys."""
    if backend == "cpp" and not isinstance(normalizer, CPP.promises.normalizers):
        pytest.skip("not one of its normalizers")
    if backend == "segments" and kind == "function" and isinstance(normalizer, fj.Softmax):
        pytest.skip("not additive")
    table = torch.zeros(2, 7, dtype=F64)
    table[:, 2:4] = -INF  # distances -1 and 0: first rows of segments have no key left
    table[1, 1] = -INF
    if kind == "function":
        score = _ruled_out(lambda i, j: (i - j < 2) | (j == 3))
        allowed = fj.MaskMod(lambda b, h, i, j: (i - j >= 2) & (j != 3))
    else:
        score = fj.RelativeBias(table.requires_grad_(kind == "learned table"))
        allowed = fj.MaskMod(lambda b, h, i, j: (i - j >= 2) & ~((h == 1) & (i - j == 2)))
    results = []
    for mask, held in ((fj.Causal(), score), (fj.Causal() & allowed, None)):
        q, k, v = make_qkv([1, 40, 3], dim=8)
        leaves = [x.values.requires_grad_() for x in (q, k, v)]
        rest = {"return_lse": True} if isinstance(normalizer, fj.Softmax) else {}
        runs = backend if held is not None else "reference"
        got = fj.attention(q, k, v, mask=mask, score=held, normalizer=normalizer, backend=runs, **rest)
        parts = [x.values for x in got] if isinstance(got, tuple) else [got.values]
        loss = sum(torch.nan_to_num(x, neginf=0.0).sin().sum() for x in parts)
        results.append([*parts, *torch.autograd.grad(loss, leaves, retain_graph=True)])
        if held is not None and kind == "learned table":
            (slope,) = torch.autograd.grad(loss, table)
            assert bool(torch.isfinite(slope).all())
            assert not slope[table == -INF].any()
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    if isinstance(normalizer, fj.Softmax):
        assert results[0][1][0, 0] == -INF
        assert not results[0][0][0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_minus_infinity_under_a_bias_of_their_own_segment(backend: str) -> None:
    """A learned bias that segments do not share: rows that it leaves without a key learn nothing, and teach nothing."""
    q, k, v = make_qkv([2, 3], dim=8)
    leaves = [x.values.requires_grad_() for x in (q, k, v)]
    table = torch.full((2, 1), -INF, dtype=F64, requires_grad=True)
    score = fj.TimeBias(table, torch.arange(5), torch.tensor([], dtype=torch.int64))
    out, lse = fj.attention(q, k, v, score=score, backend=backend, return_lse=True)
    assert bool((lse.values == -INF).all())
    ones = [torch.ones_like(x.values) for x in (out, lse)]
    for x in (out.values, *torch.autograd.grad([out.values, lse.values], [*leaves, table], ones)):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.slow
def test_a_score_of_minus_infinity_in_a_graph() -> None:
    q, k, v = make_qkv([1, 40], dim=8)
    table = torch.zeros(2, 7, dtype=F64)
    table[:, 2:4] = -INF

    def run(x: fj.Jagged, y: fj.Jagged, z: fj.Jagged) -> tuple[Tensor, Tensor, Tensor]:
        score = fj.RelativeBias(table)
        out, lse = fj.attention(x, y, z, mask=fj.Causal(), score=score, return_lse=True)
        weighed = fj.attention(x, y, z, mask=fj.Causal(), score=score, normalizer=fj.SiLU())
        return out.values, lse.values, weighed.values

    for got, wanted in zip(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v), strict=True):
        torch.testing.assert_close(got, wanted)


# Integers at their limits.

LIMITS = [2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70]
INTEGERS = [
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip
NODES: dict[str, Callable[[Bound], fj.Mask]] = {
    "left": lambda n: fj.Window(n, 0),
    "right": lambda n: fj.Window(2, n),
    "Prefix": fj.Prefix,
    "Chunked": fj.Chunked,
    "GlobalTokens": fj.GlobalTokens,
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NODES)
def test_wide_bounds_are_unlimited(name: str, limit: int) -> None:
    q, k, v = make_qkv([7, 30], dim=8)
    wide, enough = NODES[name](limit), NODES[name](1000)
    assert torch.equal(fj.plan(q, mask=wide).to_dense(), fj.plan(q, mask=enough).to_dense())
    for backend in NAMES:
        got = fj.attention(q, k, v, mask=wide, backend=backend).values
        torch.testing.assert_close(got, fj.attention(q, k, v, mask=enough, backend="reference").values)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", NODES)
def test_bounds_of_every_integer_type(name: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv([7, 30], dim=8)
    most = torch.iinfo(dtype).max
    narrow = torch.tensor([3, most], dtype=dtype)
    wanted = fj.attention(q, k, v, mask=NODES[name](torch.tensor([3, min(most, 1000)])), backend="reference").values
    for backend in NAMES:
        got = fj.attention(q, k, v, mask=NODES[name](narrow), backend=backend).values
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_ids_and_spans_of_every_integer_type(dtype: torch.dtype) -> None:
    q, k, v = make_qkv([7, 30], dim=8)
    ids = (torch.arange(37) % 2).to(dtype)
    if dtype not in (torch.bool, torch.int64):  # made as a list: torch 2.11 has no `where` for unsigned ones
        ids = torch.tensor([torch.iinfo(dtype).max if n % 2 else 0 for n in range(37)], dtype=dtype)
    pairs = [(fj.SameGroup(ids), fj.SameGroup(torch.arange(37) % 2))]
    if dtype != torch.bool:
        low, high = torch.arange(37) % 5, torch.arange(37) % 5 + 9
        pairs.append((fj.Rows(low.to(dtype), high.to(dtype)), fj.Rows(low, high)))
    for mask, plain in pairs:
        wanted = fj.attention(q, k, v, mask=plain, backend="reference").values
        for backend in NAMES:
            torch.testing.assert_close(fj.attention(q, k, v, mask=mask, backend=backend).values, wanted)


def test_unsigned_ids_do_not_meet_signed_ones() -> None:
    with pytest.raises(fj.errors.MaskError, match="ids, kv_ids: must both be uint64 or neither"):
        fj.SameGroup(torch.tensor([1], dtype=torch.uint64), torch.tensor([1]))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_times_of_every_integer_type(backend: str, dtype: torch.dtype) -> None:
    """Differences do not wrap."""
    q, k, v = make_qkv([7, 30], dim=8)
    times = torch.cat([torch.arange(7), torch.arange(30)])
    times[3], times[9] = torch.iinfo(dtype).max if dtype.itemsize < 8 else 2**62, 0
    table, boundaries = torch.randn(2, 5, dtype=F64), torch.tensor([-100, 0, 1, 100])
    wanted = fj.attention(q, k, v, score=fj.TimeBias(table, times, boundaries), backend="reference").values
    got = fj.attention(q, k, v, score=fj.TimeBias(table, times.to(dtype), boundaries), backend=backend).values
    torch.testing.assert_close(got, wanted)


# What functions are told exists.


@pytest.mark.parametrize(
    "lengths", [([2, 1], [2, 0]), ([0, 2, 3], [4, 2, 0]), ([3, 2], [0, 5]), ([2], [0]), ([0, 2], [3, 0])]
)
@pytest.mark.parametrize("backend", ["reference", "tiled", "segments", FLEX, "auto"])
def test_functions_see_existing_tokens_only(backend: str, lengths: tuple[list[int], list[int]]) -> None:
    """A table with an entry per key of every segment, read past neither end by queries of segments without keys."""
    dtype = torch.float32 if backend == "flex" else F64
    q, k, v = make_qkv(*lengths, dim=16, dtype=dtype)
    per_key = torch.linspace(-1, 1, max(1, k.values.shape[0]), dtype=dtype)[: k.values.shape[0]]
    per_pair = [torch.full((n * m,), float(s)) for s, (n, m) in enumerate(zip(*lengths, strict=True))]
    before = torch.tensor([0, *[x.shape[0] for x in per_pair]]).cumsum(0)
    pairs, widths = torch.cat([*per_pair, torch.zeros(1)]).to(dtype), torch.tensor(lengths[1])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + per_key[k.offsets[b] + j] + pairs[before[b] + i * widths[b] + j]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return per_key[k.offsets[b] + j] > -2

    given = {"mask": fj.MaskMod(mask), "score": None if backend == "segments" else fj.ScoreMod(score)}
    got = fj.attention(q, k, v, backend=backend, **given).values
    wanted = fj.attention(q, k, v, backend="reference", **given).values
    torch.testing.assert_close(got, wanted)
