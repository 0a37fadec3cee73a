"""Stick-breaking by the backend ``cpp``: its blocks and spans of keys, what is used up, threads, and precision."""

from __future__ import annotations

import pytest
import torch
from cases import make_qkv, needing_gradients
from test_stick_breaking import ALLOWED, check, run, with_gradients
from torch import Tensor

import flexjag as fj
from flexjag.algebra.normalizers import StickBreaking
from flexjag.testing import assert_matches_reference, assert_no_leak

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64: sums of at most a hundred numbers of about 1
F32, F64 = torch.float32, torch.float64

EDGES = [0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 47, 48, 49, 95, 96, 97, 0]
"""Around the tiles of 8 keys, the vectors, the blocks of 24 or 48 queries and of 96 keys."""
LONG = [575, 576, 577, 0, 1200]
"""Around the 576 keys whose weights the backward holds, and beyond them."""


def scores_of(level: float, lengths: list[int], kv_lengths: list[int] | None = None, **sizes) -> list[fj.Jagged]:  # type: ignore[no-untyped-def]
    """Random q, k and v with scores around `level`: at -6 a key takes 1/400 of a stick."""
    q, k, v = make_qkv(lengths, kv_lengths, **sizes)
    x, y = q.values.clone(), k.values.clone()
    x[..., 0], y[..., 0] = x.shape[2] ** 0.5, level
    return [q.with_values(x), k.with_values(y), v]


def compare(batches, limits: dict[str, float] = CLOSE, **parts) -> None:  # type: ignore[no-untyped-def]
    """Output, remainder and gradients beside those of the reference."""
    plan = fj.plan(*batches[:2], block_size=16, **parts)
    got, wanted = (
        with_gradients(lambda q, k, v, b=backend: run(q, k, v, plan=plan, backend=b), batches)
        for backend in ("cpp", "reference")
    )
    for what, a, b in zip(("out", "rest", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, **limits, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("level", [0.0, -6.0, 6.0])
def test_edges_of_blocks(name: str, level: float) -> None:
    for normalizer in (StickBreaking(), StickBreaking(True, True)):
        compare(scores_of(level, EDGES), mask=ALLOWED[name][0], normalizer=normalizer)


@pytest.mark.parametrize("level", [0.0, -6.0, -30.0])
def test_long_walks(level: float) -> None:
    """Sticks that are used up after a hundred keys, and those that last for several spans of keys."""
    batches = scores_of(level, LONG, heads=1)
    compare(batches, {"rtol": 1e-11, "atol": 1e-11}, mask=fj.Causal(), normalizer=StickBreaking())
    mask = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(5))
    compare(batches, {"rtol": 1e-11, "atol": 1e-11}, mask=mask, normalizer=StickBreaking(True))


@pytest.mark.parametrize("align", ["start", "end"])
def test_offsets_that_differ(align) -> None:  # type: ignore[no-untyped-def]
    q, k, v = scores_of(-3.0, [40, 1, 0, 1, 97, 3], [50, 700, 5, 1, 96, 0], heads=4, groups=2, dim=5, value_dim=9)
    for mask in (fj.Causal(align), fj.Window(30, 0, align)):
        for normalizer in (StickBreaking(), StickBreaking(True)):
            plan = fj.plan(q, k, mask=mask, normalizer=normalizer, block_size=16)
            assert_matches_reference(q, k, v, plan=plan, backend="cpp")


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "dim", "value_dim"), [(4, 8, 8), (1, 33, 17), (2, 1, 70)])
def test_within_rounding(groups: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    for level, normalizer in ((0.0, StickBreaking()), (-4.0, StickBreaking(True, True))):
        batches = scores_of(level, [97, 0, 1, 130], heads=4, groups=groups, dim=dim, value_dim=value_dim, dtype=dtype)
        for mask in (fj.Causal(), fj.PerHead([fj.Causal(), fj.Window(9, 0), fj.Window(None, 0), fj.Causal()])):
            plan = fj.plan(*batches[:2], mask=mask, normalizer=normalizer, block_size=16)
            assert_matches_reference(*batches, plan=plan, backend="cpp")


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
def test_learned_scores_and_opaque_masks(dtype: torch.dtype) -> None:
    batches = scores_of(-2.0, [60, 1, 0, 110], heads=4, groups=2, dtype=dtype)
    slopes, table = torch.rand(4, dtype=dtype), torch.randn(4, 41, dtype=dtype)
    learned = [x.requires_grad_() for x in (slopes, table)]
    score = fj.Alibi(slopes) >> fj.RelativeBias(table) >> fj.SoftCap(5.0)
    opaque = fj.Causal() & fj.MaskMod(lambda b, h, q, kv: (q + kv + h) % 4 != 0)
    for mask in (fj.Causal(), opaque):
        plan = fj.plan(*batches[:2], mask=mask, score=score, normalizer=StickBreaking(), block_size=16)
        assert_matches_reference(*batches, plan=plan, backend="cpp", learned=learned)


@pytest.mark.parametrize("level", [-4.0, -9.0, -17.0])
def test_many_small_shares_keep_their_digits(level: float) -> None:
    """3000 equal keys in float32, where plain sums along them would err by 1e-4: no worse than products do."""
    q, k, v = (x.to(F32) for x in torch.zeros(3, 3000, 1, 4, dtype=F64))
    q[..., 0], k[..., 0] = 2.0, level
    v[:] = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).abs()
    batch = fj.Jagged.from_lengths(q, [3000])
    keywords = {"mask": fj.Causal(), "normalizer": StickBreaking()}
    got, wanted = (
        with_gradients(
            lambda q, k, v, b=backend: run(q, k, v, backend=b, **keywords),
            [batch.with_values(x.to(dtype)) for x in (q, k, v)],
        )
        for backend, dtype in (("cpp", F32), ("segments", F64))
    )
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def results(batches, threads: int = 1) -> list[Tensor]:  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        keywords = {
            "mask": fj.Causal(),
            "normalizer": StickBreaking(),
            "score": fj.Alibi.from_heads(4),
            "backend": "cpp",
        }
        return with_gradients(lambda q, k, v: run(q, k, v, **keywords), batches)
    finally:
        torch.set_num_threads(before)


def test_bits_do_not_vary() -> None:
    batches = scores_of(-3.0, [*EDGES, 700], heads=4, groups=2, dtype=F32)
    one = results(batches)
    for threads in (1, 2, 3):
        first, again = results(batches, threads), results(batches, threads)
        for a, b, alone in zip(first, again, one, strict=True):
            assert torch.equal(a, b)
            # dk and dv of a long segment are sums of one part per thread.
            torch.testing.assert_close(a, alone, rtol=1e-5, atol=1e-5)


def test_no_segment_leaks() -> None:
    batches = scores_of(-2.0, [17, 0, 49, 1, 97], heads=2, dtype=F32)
    plan = fj.plan(batches[0], mask=fj.Causal(), normalizer=StickBreaking(), block_size=16)
    assert_no_leak("cpp", *batches, plan=plan, return_lse=False, return_remainder=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_poison_stays_in_its_segment(which: int, value: float) -> None:
    q, *_ = batches = make_qkv([30, 50, 0, 70], heads=4, groups=2, dtype=F32)
    values = [x.values.clone() for x in batches]
    values[which][40] = value
    clean, poisoned = results(batches), results([q.with_values(x) for x in values])
    others = torch.ones(150, dtype=torch.bool)
    others[30:80] = False
    for a, b in zip(poisoned, clean, strict=True):
        assert torch.equal(a[others], b[others])
        assert b.isfinite().all()
    assert not poisoned[0][~others].isfinite().all()


def test_unused_sticks() -> None:
    """Rows without keys, and a remainder alone that needs a gradient."""
    batches = make_qkv([5, 40, 0, 3])
    q, k, v = needing_gradients(*batches)
    _, rest = run(q, k, v, mask=fj.Causal(), normalizer=StickBreaking(), backend="cpp")
    assert (rest[[0, 5, 45]] == 1).all()
    _, wanted = run(q, k, v, mask=fj.Causal(), normalizer=StickBreaking(), backend="reference")
    leaves = [q.values, k.values]
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (rest, wanted)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    check(StickBreaking(), "causal", make_qkv([1, 1]), "cpp")
