"""How whole segments share calls of a kernel: every token in one call, and back where it came from."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.backends.batches import ADJACENT, GATHERED, SHORT, Batch, list_batches

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 127, 128, 129, 300]))


def ends(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def tokens(batch: Batch, is_query: bool) -> list[int]:
    """The packed tokens that a batch writes."""
    at, own = (batch.q, batch.own_q) if is_query else (batch.kv, batch.own_kv)
    if isinstance(at, tuple):
        return list(range(*at))
    return at.tolist() if own is None else at[own].tolist()


@given(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=12), st.booleans(), st.booleans())
def test_every_token_is_in_one_call(pairs: list[tuple[int, int]], is_self: bool, pad_keys: bool) -> None:
    """Every query and every key: once in a call, or in a segment without a counterpart."""
    q = ends([n for n, _ in pairs])
    kv = q if is_self else ends([m for _, m in pairs])
    batches, unmet_q, unmet_kv = list_batches(q, kv, pad_keys and is_self)
    for is_query, offsets, unmet in ((True, q, unmet_q), (False, kv, unmet_kv)):
        seen = [t for batch in batches for t in tokens(batch, is_query)] + [t for r in unmet for t in range(*r)]
        assert sorted(seen) == list(range(offsets[-1]))


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=12), st.sampled_from([None, 1, 2]))
def test_what_is_taken_can_be_put_back(pairs: list[tuple[int, int]], groups: int | None) -> None:
    """take() and put() are inverse, and padding is 0 in gradients."""
    q = ends([n for n, _ in pairs])
    kv = ends([m for _, m in pairs])
    batches, unmet, _ = list_batches(q, kv, False)
    x = torch.randn(q[-1], 2, 3).transpose(0, 1)[None]  # heads in front
    back = torch.full_like(x, torch.nan)
    for start, end in unmet:
        back[:, :, start:end] = x[:, :, start:end]
    for batch in batches:
        batch.put(back, batch.take(x, True, groups), True)
        padded = batch.take_gradient(torch.ones_like(x), groups)
        assert int(padded.sum()) == 6 * len(tokens(batch, True))
    assert torch.equal(back, x)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([64] * 8, 1),  # adjacent and alike: as they are
        ([300] * 4, 1),
        ([300, 300, 299], 2),
        ([17, 20, 31, 32], 1),  # gathered, padded to 32
        ([17, 20, 90], 2),
        ([17] * (GATHERED // 32 + 1), 2),
        ([SHORT + 1, 5, SHORT + 2], 3),
        ([ADJACENT // 2] * 3, 2),
        ([0, 0], 0),
    ],
)
def test_number_of_calls(lengths: list[int], calls: int) -> None:
    offsets = ends(lengths)
    assert len(list_batches(offsets, offsets, True)[0]) == calls


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


@pytest.mark.parametrize("mask", [fj.Causal(), fj.Full()], ids=repr)
@pytest.mark.parametrize(
    ("lengths", "kv_lengths"),
    [
        ([3, 20, 31, 17, 0, 5, 16, 16, 130, 130, 1], None),
        ([3, 20, 31, 17, 4, 5, 16, 16, 30, 30], [5, 2, 31, 0, 7, 20, 16, 16, 30, 30]),
        ([20, 31, 25, 22], [7, 7, 7, 7]),
    ],
    ids=["self", "cross", "padded_queries"],
)
def test_calls_together_give_what_the_reference_gives(
    lengths: list[int], kv_lengths: list[int] | None, mask: fj.Mask
) -> None:
    """All kinds of calls in one batch, grouped heads and the gradient of the log-sum-exp included."""
    got, exact = (attended(lengths, kv_lengths or lengths, mask, backend) for backend in ("segments", "reference"))
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)  # float64 sums of 130 terms in another order
