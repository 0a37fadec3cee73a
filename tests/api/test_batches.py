"""How whole segments share calls of a kernel: every token in one call, and back where it came from."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.backends.segments import runs
from flexjag.backends.segments import whole as whole_segments
from flexjag.backends.segments.batches import (
    ADJACENT,
    GATHERED,
    LONGEST,
    SHORT,
    Cut,
    Packed,
    SegmentBatch,
    list_batches,
)

WIDTH = 256
FEW = SHORT // WIDTH  # tokens that share calls
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 127, 128, 129, 300]))


def ends(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def tokens(batch: SegmentBatch, is_query: bool) -> list[int]:
    """The packed tokens that a batch writes."""
    at, own = (batch.q, batch.own_q) if is_query else (batch.kv, batch.own_kv)
    if isinstance(at, tuple):
        return list(range(*at))
    return at.tolist() if own is None else at[own].tolist()


@given(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=12), st.sampled_from([64, 256]), st.booleans(), st.booleans())
def test_every_token_is_in_one_call(pairs: list[tuple[int, int]], width: int, is_self: bool, pad_keys: bool) -> None:
    """Every query and every key: once in a call, or in a segment without a counterpart."""
    q = ends([n for n, _ in pairs])
    kv = q if is_self else ends([m for _, m in pairs])
    batches, unmet_q, unmet_kv = list_batches(q, kv, width, pad_keys)
    for is_query, offsets, unmet in ((True, q, unmet_q), (False, kv, unmet_kv)):
        seen = [t for batch in batches for t in tokens(batch, is_query)] + [t for r in unmet for t in range(*r)]
        assert sorted(seen) == list(range(offsets[-1]))


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=12), st.sampled_from([None, 1, 2]), st.booleans())
def test_what_is_taken_can_be_put_back(pairs: list[tuple[int, int]], groups: int | None, pad_keys: bool) -> None:
    """take() and put() are inverse, and padding is 0 in gradients."""
    q = ends([n for n, _ in pairs])
    kv = ends([m for _, m in pairs])
    batches, unmet, _ = list_batches(q, kv, WIDTH, pad_keys)
    x = torch.randn(q[-1], 2, 3)
    back = torch.full_like(x, torch.nan)
    for start, end in unmet:
        back[start:end] = x[start:end]
    cut = Cut([batch.q for batch in batches if isinstance(batch.q, tuple)], q[-1])
    for batch in batches:
        batch.put(Packed(back, cut), batch.take(Packed(x, cut), True, groups), True)
        padded = batch.take_gradient(Packed(torch.ones_like(x), cut), groups)
        assert int(padded.sum()) == 6 * len(tokens(batch, True))
    assert torch.equal(back, x)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([64] * 8, 1),  # adjacent and alike: as they are
        ([300] * 4, 1),
        ([300, 300, 299], 2),
        ([17, 20, 31, 32], 1),  # gathered, padded to 32
        ([17, 20, 31], 3),  # so few are not
        ([17, 20, 31, 32, 90], 2),
        ([17, 18] * (GATHERED // WIDTH // 64) + [19] * 4, 2),  # no three alike side by side: those are one call
        ([FEW + 1, 5, FEW + 2], 3),
        ([ADJACENT // 2] * 3, 2),
        ([0, 0], 0),
    ],
)
def test_number_of_calls(lengths: list[int], calls: int) -> None:
    offsets = ends(lengths)
    assert len(list_batches(offsets, offsets, WIDTH, True)[0]) == calls


@pytest.mark.parametrize(("width", "tokens"), [(64, LONGEST), (512, 24), (4096, 3)])
def test_wide_tokens_are_gathered_less(width: int, tokens: int) -> None:
    for longest, calls in ((tokens, 1), (tokens + 1, 4)):
        offsets = ends([longest, longest - 1] * 2)
        assert len(list_batches(offsets, offsets, width, True)[0]) == calls


def gathers(lengths: list[int], kv_lengths: list[int] | None, width: int, pad_keys: bool) -> bool:
    """Whether a call gathers its segments, so that a test of that does test it."""
    q = ends(lengths)
    kv = q if kv_lengths is None else ends(kv_lengths)
    return any(isinstance(batch.q, Tensor) for batch in list_batches(q, kv, width, pad_keys)[0])


def attended(lengths: list[int], kv_lengths: list[int], mask: fj.Mask, backend: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 4, 16), (sum(kv_lengths), 2, 16), (sum(kv_lengths), 2, 16)]
    q, k, v = (torch.randn(x, dtype=torch.float64, generator=generator).requires_grad_() for x in shapes)
    x = fj.Jagged.from_lengths(q, lengths)
    y = fj.Jagged.from_lengths(k, kv_lengths)
    found = fj.attention(x, y, y.with_values(v), mask=mask, return_lse=True, backend=backend)
    assert isinstance(found, tuple)
    out, lse = found
    finite = lse.values.masked_fill(lse.values.isinf(), 0.0)
    grads = torch.autograd.grad(out.values.square().sum() + finite.sum(), (q, k, v))
    return out.values.detach(), lse.values.detach(), *grads


@pytest.mark.parametrize(("n", "m"), [(17, 17), (33, 33), (47, 47), (1, 40)])
def test_segments_alike_side_by_side_are_not_copied(n: int, m: int) -> None:
    """They share a call as they are, so only a few short ones are worth gathering with others."""
    q, kv = ends([n] * 64), ends([m] * 64)
    (batch,), _, _ = list_batches(q, kv, WIDTH, True)
    assert batch.q == (0, 64 * n)
    assert batch.kv == (0, 64 * m)


def test_gathered_tokens_are_bounded_on_both_sides() -> None:
    """Few queries of many keys fill the cache with keys."""
    pairs = [(1 + s % 7, 33 + s % 14) for s in range(256)]
    batches, _, _ = list_batches(ends([n for n, _ in pairs]), ends([m for _, m in pairs]), WIDTH, True)
    assert max(batch.count * batch.m for batch in batches) <= GATHERED // WIDTH


def test_the_plan_of_two_widths_is_cut_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, int]] = []

    def spy(q: list[int], kv: list[int], width: int, pad_keys: bool) -> tuple[list[SegmentBatch], list[Any], list[Any]]:
        found = list_batches(q, kv, width, pad_keys)
        seen.append((width, pad_keys, len(found[0])))
        return found

    monkeypatch.setattr(whole_segments, "list_batches", spy)
    x = fj.Jagged.from_lengths(torch.zeros(600), [150, 151, 149, 150])
    for mask in (fj.Causal(), fj.Full()):
        plan = fj.plan(x, mask=mask)
        for heads, dim, wide in ((1, 64, 64), (4, 64, 64), (1, 32, 64), (2, 0, 0)):
            q, v = (x.with_values(torch.randn(600, heads, d)) for d in (dim, wide))
            fj.attention(q, q, v, plan=plan, backend="segments")
    # The third with a scale of its own, and as wide as its values.
    assert seen == [(64, True, 1), (256, True, 4), (64, True, 1), (2, True, 1)] * 2


@pytest.mark.parametrize("mask", [fj.Causal(), fj.Full()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_segments_in_lower_precision(mask: fj.Mask, dtype: torch.dtype) -> None:
    lengths, kv_lengths = [3, 20, 31, 17, 25, 5], None if isinstance(mask, fj.Causal) else [20, 31, 25, 22, 30, 7]
    assert gathers(lengths, kv_lengths, 4 * 16, True)
    shapes = [(101, 4, 16), *[(101 if kv_lengths is None else 135, 2, 16)] * 2]
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    found = []
    for to, backend in ((dtype, "segments"), (torch.float64, "reference")):
        leaves = [t.to(to).requires_grad_() for t in given]
        x = fj.Jagged.from_lengths(leaves[0], lengths)
        y = x.with_values(leaves[1]) if kv_lengths is None else fj.Jagged.from_lengths(leaves[1], kv_lengths)
        out = fj.attention(x, y, y.with_values(leaves[2]), mask=mask, backend=backend).values
        found.append((out.detach(), *torch.autograd.grad(out.double().square().sum(), leaves)))
    # Sums of up to 31 terms of either sign; a gradient is rounded about five times on its way.
    limit = 32 * torch.finfo(dtype).eps
    for got, wanted in zip(*found, strict=True):
        assert float((got.double() - wanted).abs().max()) <= limit * float(wanted.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("mask", [fj.Causal(), fj.Full()], ids=repr)
@pytest.mark.parametrize(
    ("lengths", "kv_lengths"),
    [
        ([3, 20, 31, 17, 0, 5, 9, 12, 16, 16, 130, 130, 25, 1], None),
        ([3, 20, 31, 17, 4, 5, 16, 16, 18, 30, 30, 25], [5, 2, 31, 0, 7, 20, 16, 16, 20, 30, 30, 27]),
        ([20, 31, 25, 22], [7, 7, 7, 7]),
        ([16, 5, 11, 9], [20, 31, 25, 22]),
    ],
    ids=["self", "cross", "padded_queries", "padded_keys"],
)
def test_calls_together_give_what_the_reference_gives(
    lengths: list[int], kv_lengths: list[int] | None, mask: fj.Mask
) -> None:
    """All kinds of calls in one batch, grouped heads and the gradient of the log-sum-exp included."""
    full = isinstance(mask, fj.Full)
    same_m = kv_lengths is None or len(set(kv_lengths)) == 1
    assert gathers(lengths, kv_lengths, 4 * 16, full or kv_lengths is None) == (full or same_m)
    got, exact = (attended(lengths, kv_lengths or lengths, mask, backend) for backend in ("segments", "reference"))
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)  # float64 sums of 130 terms in another order


def masked_by_position(name: str, heads: int) -> tuple[fj.Mask, fj.Score | None]:
    table = torch.linspace(-1, 1, heads * 21, dtype=torch.float64).view(heads, 21)
    cases: dict[str, tuple[fj.Mask, fj.Score | None]] = {
        "window": (fj.Window(7, 2), None),
        "rows without keys": (fj.Prefix(3) & fj.Window(4, 0), None),
        "complement": (~fj.Window(3, 3) | fj.Prefix(1), fj.Alibi.from_heads(heads)),
        "per head": (fj.PerHead([fj.Causal(), fj.Window(5, 0), fj.Chunked(8), fj.GlobalTokens(2)]), None),
        "table": (fj.Causal(), fj.RelativeBias(table)),
        "buckets": (fj.Window(None, 4), fj.BucketedBias(table[:, :4].contiguous(), torch.tensor([-8, 0, 3]))),
    }
    return cases[name]


BY_POSITION = ["window", "rows without keys", "complement", "per head", "table", "buckets"]


@pytest.mark.parametrize("lengths", [[20, 0, 1, 300, 7], [1, 1], [0, 2], [257, 255]], ids=str)
@pytest.mark.parametrize("name", BY_POSITION)
def test_one_bias_for_all_segments(name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that shares it gives what the dense definition does; also between segments of other lengths."""
    made: list[runs.Shared | None] = []
    share = runs._share
    monkeypatch.setattr(runs, "_share", lambda *given: made.append(share(*given)) or made[-1])
    mask, score = masked_by_position(name, 4)
    kv_lengths = [n + 3 * (n % 2) for n in lengths]
    for keys in (lengths, kv_lengths):
        shapes = [(sum(lengths), 4, 16), (sum(keys), 2, 16), (sum(keys), 2, 16)]
        q, k, v = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes)
        x = fj.Jagged.from_lengths(q, lengths)
        y = fj.Jagged.from_lengths(k, keys) if keys is not lengths else x.with_values(k)
        found = {}
        for backend in ("segments", "reference"):
            both = fj.attention(x, y, y.with_values(v), mask=mask, score=score, backend=backend, return_lse=True)
            out, lse = (t.values for t in both)
            loss = (out * out).sum() + torch.where(lse == -torch.inf, 0.0, lse).sum()
            found[backend] = (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))
        for got, wanted in zip(*found.values(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    if len(lengths) > 4 and name != "rows without keys":  # where there is less to compute if each run has its own
        assert len(made) == 2
        assert all(x is not None for x in made)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [0, 3]], ids=str)
def test_a_shared_bias_and_spare_rows(offsets: list[int]) -> None:
    values = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    x = fj.Jagged(values, torch.tensor(offsets))
    plan = fj.plan(x, mask=fj.Window(2, 0), max_tokens=5)
    out, wanted = (fj.attention(x, x, x, plan=plan, backend=b).values for b in ("segments", "reference"))
    given, expected = (torch.autograd.grad(t.square().sum(), values)[0] for t in (out, wanted))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["complement", "table", "buckets"])
def test_a_learned_bias_of_all_segments_has_its_gradient(name: str, dtype: torch.dtype) -> None:
    lengths = [20, 0, 1, 300, 7]
    mask, score = masked_by_position(name, 4)
    assert isinstance(score, fj.Alibi | fj.RelativeBias | fj.BucketedBias)
    field = "slopes" if isinstance(score, fj.Alibi) else "table"
    q, k, v = (torch.randn(sum(lengths), h, 16, dtype=dtype) for h in (4, 2, 2))
    learned = getattr(score, field).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    found = {}
    for backend, to in (("segments", dtype), ("reference", torch.float64)):
        leaves = [t.to(to).requires_grad_() for t in (q, k, v)]
        held = learned.double().requires_grad_() if to == torch.float64 else learned.clone().requires_grad_()
        x = fj.Jagged.from_lengths(leaves[0], lengths)
        own = replace(score, **{field: held})
        out = fj.attention(
            x, x.with_values(leaves[1]), x.with_values(leaves[2]), mask=mask, score=own, backend=backend
        ).values
        found[backend] = torch.autograd.grad((out.double() ** 2).sum(), [*leaves, held])
    # A table's entry sums up to 45,000 pairs in another order: about the root of that in roundings. In bfloat16 what
    # is summed was rounded more coarsely than the sums are.
    limit = (8 if dtype == torch.bfloat16 else 256) * torch.finfo(dtype).eps
    for got, wanted in zip(*found.values(), strict=True):
        assert float((got.double() - wanted).abs().max()) <= limit * float(wanted.abs().max().clamp(min=1.0))


def test_a_shared_bias_follows_its_tensors() -> None:
    """It is kept with the plan, so a change in place has to be seen; and one that is trained is never kept."""
    x = fj.Jagged.from_lengths(torch.randn(60, 2, 8, dtype=torch.float64), [20, 40])
    step = torch.linspace(-3, 3, 10, dtype=torch.float64).view(2, 5)
    for trained in (False, True):
        table = torch.zeros(2, 5, dtype=torch.float64, requires_grad=trained)
        plan = fj.plan(x, mask=fj.Causal(), score=fj.RelativeBias(table))
        for changed in (table, table.data, torch.from_numpy(table.numpy(force=True))):  # the last two tell no version
            with torch.no_grad():
                before = fj.attention(x, x, x, plan=plan, backend="segments").values
                changed.add_(step)
                after = fj.attention(x, x, x, plan=plan, backend="segments").values
                wanted = fj.attention(x, x, x, plan=plan, backend="reference").values
            assert not torch.allclose(before, after)
            torch.testing.assert_close(after, wanted)
        assert sum(isinstance(key, tuple) and key[0] == "bias" for key in plan.own_notes) == 1


def test_a_bias_that_is_trained_later_has_its_gradient() -> None:
    x = fj.Jagged.from_lengths(torch.randn(60, 2, 8), [20, 40])
    table = torch.zeros(2, 5)
    plan = fj.plan(x, mask=fj.Causal(), score=fj.RelativeBias(table))
    for _ in range(2):  # the second time with a bias kept
        assert not fj.attention(x, x, x, plan=plan, backend="segments").values.requires_grad
    table.requires_grad_()
    out = fj.attention(x, x, x, plan=plan, backend="segments").values
    assert bool(torch.autograd.grad(out.square().sum(), table)[0].any())


def test_a_shared_bias_in_inference_mode() -> None:
    """Its tensors count no versions there, and what is kept must serve a later training step."""
    with torch.inference_mode():
        score = fj.Alibi.from_heads(2)
        x = fj.Jagged.from_lengths(torch.randn(60, 2, 8), [20, 40])
        before = fj.attention(x, x, x, mask=fj.Causal(), score=score, backend="segments").values
    values = torch.randn(60, 2, 8, dtype=torch.float64, requires_grad=True)
    y = fj.Jagged.from_lengths(values, [20, 40])
    plan = fj.plan(y, mask=fj.Window(9, 0))
    with torch.inference_mode():
        fj.attention(y, y, y, plan=plan, backend="segments")
    out = fj.attention(y, y, y, plan=plan, backend="segments").values
    wanted = fj.attention(y, y, y, plan=plan, backend="reference").values
    given, expected = (torch.autograd.grad(t.square().sum(), values)[0] for t in (out, wanted))
    torch.testing.assert_close(given, expected)
    y = fj.Jagged(x.values.clone(), x.offsets.clone())
    after = fj.attention(y, y, y, mask=fj.Causal(), score=fj.Alibi.from_heads(2), backend="segments").values
    assert torch.equal(before, after)


@pytest.mark.parametrize("outside", [True, False])
def test_a_trained_bias_under_autocast(outside: bool) -> None:
    """The products of its gradient stay in float32, whether the backward runs in the context or not."""
    table = torch.linspace(-1, 1, 10).view(2, 5).requires_grad_()
    values = torch.randn(60, 2, 8)
    found = []
    for enabled in (False, True):
        x = fj.Jagged.from_lengths(values, [20, 40])
        with torch.autocast("cpu", enabled=enabled):
            loss = fj.attention(x, x, x, mask=fj.Causal(), score=fj.RelativeBias(table), backend="segments")
            loss = loss.values.square().sum()
            if not outside:
                found += torch.autograd.grad(loss, table)
        if outside:
            found += torch.autograd.grad(loss, table)
    assert torch.equal(*found)


def test_a_bias_that_is_too_large_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    x = fj.Jagged.from_lengths(torch.randn(60, 2, 8, dtype=torch.float64), [20, 40])
    for limit, shares in ((40 * 40 * 2, True), (40 * 40 * 2 - 1, False)):
        monkeypatch.setattr(runs, "SHARED", limit)
        plan = fj.plan(x, mask=fj.Window(5, 0))
        assert (runs.runs_of_queries(plan, 1.0, 2, torch.float64, True).shared is not None) == shares
        out = fj.attention(x, x, x, plan=plan, backend="segments").values
        torch.testing.assert_close(out, fj.attention(x, x, x, plan=plan, backend="reference").values)
