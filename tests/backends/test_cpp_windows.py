"""Sliding windows in the kernels of ``cpp``: computed from offsets there, and from spans they give the same bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cpp_cases import KEYS, QUERIES
from hypothesis import example, given
from hypothesis import strategies as st

import flexjag as fj
from flexjag.backends.cpp import run
from flexjag.backends.cpp.library import UNBOUNDED
from flexjag.kernels.cpp import build
from flexjag.lowering import layout, outline

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
EDGES = (0, 1, 7, 15, 16, 17, 63, 64, 65, UNBOUNDED - 1, UNBOUNDED, UNBOUNDED + 1, 2**40)
BOUNDS = st.one_of(st.none(), st.sampled_from(EDGES), st.integers(0, 300))
Q_LENGTHS = st.one_of(st.sampled_from(QUERIES), st.integers(0, 80))
KV_LENGTHS = st.one_of(st.sampled_from(KEYS), st.integers(0, 200))
ALIGNS = st.sampled_from(["start", "end"])


def attend(lengths: list[tuple[int, int]], mask: fj.Mask, normalizer: Any, seed: int) -> list[torch.Tensor]:
    """Output, rest and gradients, by the kernels' windows if they take any."""
    gen = torch.Generator().manual_seed(seed)
    n, m = [a for a, _ in lengths], [b for _, b in lengths]
    q, k, v = (torch.randn(sum(x), h, 8, generator=gen).requires_grad_() for x, h in ((n, 2), (m, 1), (m, 1)))
    keys = fj.Jagged.from_lengths(k, m)
    queries = keys.with_values(q) if n == m else fj.Jagged.from_lengths(q, n)
    options = {"normalizer": normalizer, "mask": mask, "backend": "cpp"}
    kept = {"return_lse": normalizer is None, "return_remainder": normalizer is not None}
    out, rest = fj.attention(queries, keys, keys.with_values(v), **options, **kept)
    whole = out.values.sin().sum() + rest.values.clamp(min=-1e3).sin().sum()
    return [out.values, rest.values, *torch.autograd.grad(whole, [q, k, v])]


def same(lengths: list[tuple[int, int]], mask: fj.Mask, normalizer: Any, seed: int) -> None:
    """The kernels' window and spans of the same mask give the same bits."""
    with mock.patch.object(run, "_window", wraps=run._window) as asked:
        by_window = attend(lengths, mask, normalizer, seed)
    assert asked.call_count == (1 if sum(a for a, _ in lengths) and sum(b for _, b in lengths) else 0)
    with mock.patch.object(run, "_window", return_value=[]):
        by_spans = attend(lengths, mask, normalizer, seed)
    for got, wanted in zip(by_window, by_spans, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.tuples(Q_LENGTHS, KV_LENGTHS), max_size=4), BOUNDS, BOUNDS, ALIGNS, st.integers(0, 9))
@example([(100, 30), (0, 5), (3, 0), (1, 200)], 0, 0, "end", 0)
@example([(16, 16), (17, 17)], None, 0, "start", 0)
def test_a_window_is_its_spans(
    lengths: list[tuple[int, int]], left: int | None, right: int | None, align: Any, seed: int
) -> None:
    same(lengths, fj.Window(left, right, align=align), None, seed)


@given(st.lists(st.tuples(Q_LENGTHS, KV_LENGTHS), max_size=3), BOUNDS, ALIGNS, st.booleans(), st.integers(0, 9))
def test_stick_breaking_leaves_out_its_own_key(
    lengths: list[tuple[int, int]], left: int | None, align: Any, current: bool, seed: int
) -> None:
    mask = fj.Window(left, 0, align=align)
    same(lengths, mask, fj.StickBreaking(attend_current=current), seed)


def test_masks_that_are_no_window_of_all_heads_have_spans() -> None:
    x = fj.Jagged.from_lengths(torch.randn(9, 2, 8), [4, 5])
    windows = [fj.Causal(), fj.Full(), fj.Window(3, 1), fj.Causal() & fj.Window(2, 5), fj.Window(2, 0, align="end")]
    for mask in windows:
        assert run._window(fj.plan(x, mask=mask)), mask
    others = [fj.Prefix(2), fj.Causal() | fj.Prefix(2), ~fj.Causal(), fj.PerHead((fj.Causal(), fj.Window(1, 0)))]
    others += [fj.Window(-1, 3), fj.Window(torch.tensor([1, 2]), 0), fj.MaskMod(lambda b, h, i, j: i >= j)]
    for mask in others:
        assert not run._window(fj.plan(x, mask=mask)), mask


def test_one_call_makes_nothing_per_token_that_its_kernels_do_not_read() -> None:
    x = fj.Jagged.from_lengths(torch.randn(9, 2, 8), [4, 5])
    with mock.patch.object(layout, "_coordinates", wraps=layout._coordinates) as made:
        out = fj.attention(x, x, x, mask=fj.Causal(), backend="cpp")
        assert made.call_count == 0
        wanted = fj.attention(x, x, x, plan=fj.plan(x, mask=fj.Causal()), backend="cpp")
    assert made.call_count == 1
    assert torch.equal(out.values, wanted.values)


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp", "auto"])
def test_one_call_is_a_plan_of_its_own(backend: str) -> None:
    """Backends that read rows find them, and only then."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 8, generator=gen) for n in (9, 12, 12))
    keys = fj.Jagged.from_lengths(k, [4, 0, 8])
    queries, values = fj.Jagged.from_lengths(q, [2, 3, 4]), keys.with_values(v)
    mask = fj.Window(2, 1, align="end")
    got = fj.attention(queries, keys, values, mask=mask, backend=backend)
    wanted = fj.attention(queries, keys, values, plan=fj.plan(queries, keys, mask=mask), backend=backend)
    assert torch.equal(got.values, wanted.values)


def test_a_recipe_of_one_call_is_one() -> None:
    x = fj.Jagged.from_lengths(torch.randn(9, 2, 8), [4, 5])
    one = outline.outline(outline.OneCall, x, None, fj.Causal(), None, None)
    plan = fj.plan(x, mask=fj.Causal())
    assert one.exact
    assert (one.layout.num_q, one.layout.num_kv, one.layout.num_segments) == (9, 9, 2)
    assert "sandwiches" not in vars(one)
    assert torch.equal(one.sandwiches[0].outer.hi, plan.sandwiches[0].outer.hi)
    assert torch.equal(one.layout.q_pos, plan.layout.q_pos)
    assert torch.equal(one.tables.kv_last, plan.tables.kv_last)
    assert one.sandwiches is one.sandwiches
    with pytest.raises(AttributeError, match="no attribute 'spans'"):
        _ = one.spans
