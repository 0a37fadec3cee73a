"""The assertions of flexjag.testing fail when they should, and say what is wrong."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

import flexjag as fj
from flexjag.backends import reference
from flexjag.backends.tiled import run as tiled
from flexjag.lowering import spans, tiles
from flexjag.testing import (
    assert_compiles,
    assert_matches_reference,
    assert_no_leak,
    assert_sandwich,
    assert_tiles,
    dense_mask,
    rounding_bounds,
    span_bound,
)

LENGTHS = [5, 0, 33, 1]


def batch(dtype: torch.dtype = torch.float64, heads: int = 2) -> fj.Jagged:
    return fj.Jagged.from_lengths(torch.randn(sum(LENGTHS), heads, 8, dtype=dtype), LENGTHS)


def broken(change):  # type: ignore[no-untyped-def]
    """The tiled backend with its results changed."""
    run = tiled.run
    return mock.patch.object(tiled, "run", lambda *args: change(*run(*args)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_reference_accepts_a_right_backend(dtype: torch.dtype) -> None:
    x, slopes = batch(dtype), torch.rand(2, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    ratios = assert_matches_reference(x, x, x, mask=fj.Causal(), score=fj.Alibi(slopes), backend="tiled")
    assert set(ratios) == {"out", "lse", "grad_q", "grad_k", "grad_v", "grad_learned[0]"}
    assert all(0 <= r <= 1 for r in ratios.values())


def test_matches_reference_finds_learned_tensors_or_takes_them() -> None:
    x, table = batch(), torch.rand(2, dtype=torch.float64, requires_grad=True)
    score = fj.ScoreMod(lambda s, b, h, q, kv: s * table[h])
    assert "grad_learned[0]" in assert_matches_reference(x, x, x, score=score, backend="tiled")
    assert "grad_learned[0]" not in assert_matches_reference(x, x, x, score=score, backend="tiled", learned=[])


def test_matches_reference_compares_what_is_asked() -> None:
    x = batch()
    assert set(assert_matches_reference(x, x, x, lse=False, backward=False)) == {"out"}


# A few thousand roundings in single and double precision, some forty in half: a real mistake is far larger.
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.3)], ids=str
)
@pytest.mark.parametrize("what", ["out", "lse"])
def test_matches_reference_rejects_a_small_error(dtype: torch.dtype, size: float, what: str) -> None:
    x = batch(dtype)

    def change(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.zeros(out.shape[0], 1)
        at[7] = size
        return (out + at[..., None].to(out.dtype), lse) if what == "out" else (out, lse + at.to(lse.dtype))

    with broken(change), pytest.raises(AssertionError, match=rf"{what}\[7, .*q_lengths=\[5, 0, 33, 1\].*Causal"):
        assert_matches_reference(x, x, x, mask=fj.Causal(), backend="tiled")


def test_matches_reference_rejects_a_wrong_gradient() -> None:
    x = batch()

    class Double(torch.autograd.Function):
        """The identity, with a gradient that is a little too large."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad * 1.000001

    with broken(lambda out, lse: (Double.apply(out), lse)), pytest.raises(AssertionError) as seen:
        assert_matches_reference(x, x, x, backend="tiled")
    assert "grad_q" in str(seen.value)
    assert "; out[" not in str(seen.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_matches_reference_rejects_what_is_not_a_number(value: float) -> None:
    x = batch()
    with broken(lambda out, lse: (out + value, lse)), pytest.raises(AssertionError, match="out"):
        assert_matches_reference(x, x, x, backend="tiled", backward=False)


def test_matches_reference_rejects_a_finite_lse_of_a_row_without_keys() -> None:
    x = batch()
    with broken(lambda out, lse: (out, lse.clamp(min=-1e30))), pytest.raises(AssertionError, match="lse"):
        assert_matches_reference(x, x, x, mask=~fj.Full(), backend="tiled", backward=False)


def test_matches_reference_rejects_another_mask() -> None:
    x = batch(torch.bfloat16)
    with (
        mock.patch.dict(reference.dense.cases, {fj.Causal: lambda mask, seg: seg.j < seg.i + 2}),
        pytest.raises(AssertionError, match="out"),
    ):
        assert_matches_reference(x, x, x, mask=fj.Causal(), backend="tiled")


def test_rounding_bounds_grow_with_epsilon_and_are_small() -> None:
    x = batch()
    plan = fj.plan(x)
    g = torch.ones_like(x.values)
    found = [
        rounding_bounds(
            *[x.values] * 3, plan.layout, plan.mask, None, scale=0.3, grad_out=g, grad_lse=g.sum(2), dtype=dtype
        )
        for dtype in (torch.float64, torch.float32)
    ]
    ratio = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    for name in ("out", "lse", "q", "k", "v"):
        small, large = (getattr(b, name) for b in found)
        torch.testing.assert_close(large / ratio, small, rtol=0.01, atol=0.0)  # first order, so in proportion
        assert float(large.max()) < 0.01


def test_dense_mask_isolates_segments() -> None:
    x = batch()
    allowed = dense_mask(fj.Full(), x, x, 2)
    assert allowed.shape == (2, 39, 39)
    assert int(allowed[0].sum()) == sum(n * n for n in LENGTHS)


def test_span_bound_knows_intervals() -> None:
    assert span_bound(fj.Causal() & ~fj.Window(2, 2)) == 2
    assert span_bound(fj.Causal() | fj.MaskMod(lambda b, h, q, kv: q > kv)) is None
    many = torch.zeros(9, 3, dtype=torch.int64)
    assert span_bound(fj.Rows(many, many)) is None


def _spans(lo: int, hi: int):  # type: ignore[no-untyped-def]
    """A sandwich of Causal that is off by some keys at the start and the end."""

    def case(mask: fj.Mask, layout) -> spans.Sandwich:  # type: ignore[no-untyped-def]
        return spans._exact(layout, layout.kv_start + lo, layout.kv_start + layout.q_pos + 1 + hi)

    return mock.patch.dict(spans.sandwich.cases, {fj.Causal: case})


@pytest.mark.parametrize(("lo", "hi", "says"), [(0, 1, "inner allows key"), (1, 0, "the mask allows key")])
def test_sandwich_rejects_wrong_spans(lo: int, hi: int, says: str) -> None:
    with _spans(lo, hi), pytest.raises(AssertionError, match=rf"{says} .* on head 0.*Causal"):
        assert_sandwich(fj.Causal(), batch())


def test_sandwich_rejects_spans_of_an_interval_mask_that_are_not_exact() -> None:
    exact = spans.sandwich.cases[fj.Causal]

    def case(mask: fj.Mask, layout) -> spans.Sandwich:  # type: ignore[no-untyped-def]
        found = exact(mask, layout)
        return spans.Sandwich(spans._nothing(layout), found.outer, spans.InSpans(found.outer.lo, found.outer.hi))

    with (
        mock.patch.dict(spans.sandwich.cases, {fj.Causal: case}),
        pytest.raises(AssertionError, match="made of intervals"),
    ):
        assert_sandwich(fj.Causal(), batch())


@pytest.mark.parametrize(("lo", "hi"), [(0, 40), (16, 0)])
def test_tiles_rejects_wrong_tiles(lo: int, hi: int) -> None:
    with _spans(lo, hi), pytest.raises(AssertionError, match=r"tile \(\d, \d\) of head 0 is .* instead of .*Causal"):
        assert_tiles(fj.Causal(), batch())


def test_tiles_wants_exact_tiles_of_interval_masks_only() -> None:
    """A FULL tile called PARTIAL is right but slow: an error for an interval mask, none for an opaque one."""
    x = fj.Jagged.from_lengths(torch.zeros(64), [64])
    with mock.patch.object(tiles, "_is_full", lambda row, *rest: torch.zeros_like(row, dtype=torch.bool)):
        with pytest.raises(AssertionError, match="is PARTIAL instead of FULL"):
            assert_tiles(fj.Full(), x)
        assert_tiles(fj.Full() | fj.MaskMod(lambda b, h, q, kv: q > kv), x)


def test_tiles_rejects_tables_that_disagree() -> None:
    build = tiles.build_tables

    def without_full(*args):  # type: ignore[no-untyped-def]
        kv_partial, kv_full, q_partial, q_full = build(*args)
        return kv_partial, kv_full, q_partial, tiles.TileTable(torch.zeros_like(q_full.count), q_full.index)

    x = fj.Jagged.from_lengths(torch.zeros(64), [64])
    with (
        mock.patch("flexjag.lowering.outline.build_tables", without_full),
        pytest.raises(AssertionError, match="disagree"),
    ):
        assert_tiles(fj.Full(), x)


def leaky(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> fj.Jagged:
    """Attention, and a millionth of the first token of the batch."""
    out = fj.attention(q, k, v, backend="tiled")
    return out.with_values(out.values + 1e-6 * v.values[:1])


def test_no_leak_rejects_a_leak() -> None:
    x = batch()
    with pytest.raises(AssertionError, match=r"segment 0 leaks.* output 0 of 34 tokens .* first token 5"):
        assert_no_leak(leaky, x, x, x)


def test_no_leak_sees_the_sign_of_zero() -> None:
    x = batch()

    def signed(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> fj.Jagged:
        return q.with_values(torch.full_like(q.values, 0.0 if torch.equal(q.values[0], x.values[0]) else -0.0))

    with pytest.raises(AssertionError, match="segment 0 leaks"):
        assert_no_leak(signed, x, x, x)


def test_no_leak_wants_jagged_results_and_no_stray_keywords() -> None:
    x = batch()
    with pytest.raises(AssertionError, match="must return Jagged"):
        assert_no_leak(lambda q, k, v: q.values, x, x, x)
    with pytest.raises(TypeError, match=r"backend's name only.*mask"):
        assert_no_leak(leaky, x, x, x, mask=fj.Causal())


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiles_counts_graphs_per_direction(backend: str) -> None:
    graphs = assert_compiles(lambda x: x.sin(), [(torch.randn(4, requires_grad=True),)] * 3, backend=backend)
    assert (graphs.forward, graphs.backward, graphs.inference) == ([0], [0], [])
    graphs = assert_compiles(lambda x: x.sin(), [(torch.randn(4),)] * 3, backend=backend, backward=False)
    assert (graphs.forward, graphs.backward, graphs.inference) == ([], [], [0])


def test_compiles_rejects_a_function_that_recompiles() -> None:
    given = [(torch.randn(4, requires_grad=True), n) for n in (True, True, False)]
    with pytest.raises(
        AssertionError, match=r"2 forward graphs \(batches \[0, 2\]\), 2 backward.*after batch 2, .*at most 1"
    ):
        assert_compiles(lambda x, flag: x.sin() if flag else x.cos(), given, backend="aot_eager")
    assert_compiles(lambda x, flag: x.sin() if flag else x.cos(), given, backend="aot_eager", max_graphs=2)


def test_compiles_rejects_what_cannot_be_one_graph() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        assert_compiles(lambda x: x * float(x.sum().item()) if x.sum() > 0 else x, [(torch.randn(4),)], backward=False)


def test_compiles_rejects_an_empty_trial() -> None:
    with pytest.raises(AssertionError, match="nothing was compiled"):
        assert_compiles(lambda x: x.sin(), [])
    with pytest.raises(AssertionError, match="no output of batch 0 needs a gradient"):
        assert_compiles(lambda x: x.sin(), [(torch.randn(4),)], backend="aot_eager")
    with pytest.raises(ValueError, match="one of inductor, aot_eager; got backend='eager'"):
        assert_compiles(lambda x: x.sin(), [], backend="eager")


def test_the_assertions_need_no_hypothesis_and_flexjag_needs_no_testing() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None; import flexjag; "
        "assert 'flexjag.testing' not in sys.modules; from flexjag.testing import assert_no_leak"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
