"""Attention sinks: a logit per head in the denominator, for every backend, from its log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CPP_SLOWLY, EDGE_LENGTHS, jagged
from torch import Tensor

import flexjag as fj
from flexjag.errors import PlanError, ShapeError
from flexjag.testing import assert_compiles

HEADS, GROUPS, DIM, VALUE = 4, 2, 8, 5
BACKENDS = ["reference", "tiled", "segments", CPP_SLOWLY]
MASKS = [fj.Full(), fj.Causal(), fj.Window(-2, 6)]  # the last leaves rows without keys


def batch(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged, Tensor]:
    q = jagged(lengths, HEADS, DIM, dtype=dtype, seed=1)
    k, v = (q.with_values(jagged(lengths, GROUPS, n, dtype=dtype, seed=n).values) for n in (DIM, VALUE))
    q, k, v = (x.with_values(x.values.requires_grad_()) for x in (q, k, v))
    sinks = torch.tensor([-2.0, 0.0, 3.0, 40.0], dtype=torch.float64)  # the last takes all the weight
    return q, k, v, sinks.requires_grad_()


def dense(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, mask: fj.Mask, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp: a softmax over the keys and the sink, segment by segment."""
    link = sum(x.flatten()[:0].sum().to(q.values.dtype) for x in (q.values, k.values, v.values, sinks))  # 0
    outs, sums = ([q.values.new_zeros(0, HEADS, *rest) + link] for rest in ((VALUE,), ()))
    at = 0
    for n in q.lengths.tolist():
        x, y, z = (t.values[at : at + n].transpose(0, 1) for t in (q, k, v))
        y, z = (t.repeat_interleave(HEADS // GROUPS, 0) for t in (y, z))
        i, j = torch.arange(n)[:, None], torch.arange(n)
        allowed = {"Full": i == i, "Causal": j <= i, "Window": (j >= i + 2) & (j <= i + 6)}[type(mask).__name__]
        scores = (x @ y.transpose(1, 2) / DIM**0.5).masked_fill(~allowed, -torch.inf)
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(HEADS, n, 1)], 2)
        outs.append((scores.softmax(2)[:, :, :-1] @ z).transpose(0, 1))
        sums.append(scores.logsumexp(2).transpose(0, 1))
        at += n
    return torch.cat(outs), torch.cat(sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
def test_equal_a_softmax_with_one_more_column(lengths: list[int], mask: fj.Mask, backend: str) -> None:
    q, k, v, sinks = batch(lengths)
    out, lse = fj.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True, backend=backend)
    inputs = [q.values, k.values, v.values, sinks]
    wanted = dense(q, k, v, mask, sinks)
    torch.testing.assert_close((out.values, lse.values), wanted)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in wanted]
    found = torch.autograd.grad((out.values, lse.values), inputs, weights)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, inputs, weights))
    without = fj.attention(q, k, v, mask=mask, sinks=sinks, backend=backend)
    assert torch.equal(without.values, out.values)


def test_one_number_for_all_heads_is_softmax_plus_one() -> None:
    q, k, v, _ = batch([5, 0, 9])
    out = fj.attention(q, k, v, mask=fj.Causal(), sinks=0.0)
    torch.testing.assert_close(out.values, dense(q, k, v, fj.Causal(), torch.zeros(HEADS))[0])
    assert torch.equal(out.values, fj.attention(q, k, v, mask=fj.Causal(), sinks=torch.zeros(HEADS)).values)


def test_half_precision_and_gradients_of_sinks_alone() -> None:
    q, k, v, sinks = batch([30, 7])
    half = [x.with_values(x.values.detach().bfloat16()) for x in (q, k, v)]
    low = sinks.detach().bfloat16().requires_grad_()
    out = fj.attention(*half, mask=fj.Causal(), sinks=low, backend="tiled")
    assert out.values.dtype == torch.bfloat16
    exact = dense(*(x.with_values(x.values.double()) for x in half), fj.Causal(), sinks)[0]
    # Weights and values are rounded to 8 bits, and the result once more; values are at most about 4.
    torch.testing.assert_close(out.values.double(), exact, rtol=2**-7, atol=2**-7)
    (grad,) = torch.autograd.grad(out.values.float().sum(), low)
    (wanted,) = torch.autograd.grad(exact.sum(), sinks)
    # A sum over 37 rows of 5 values, each rounded to 8 bits.
    torch.testing.assert_close(grad.double(), wanted, rtol=2**-6, atol=37 * 5 * 2**-9)


def test_spare_rows_get_nothing() -> None:
    q, k, v, sinks = batch([6, 3])
    padded = [
        fj.Jagged(torch.cat([x.values.detach(), torch.full_like(x.values[:4], torch.nan)]), x.offsets)
        for x in (q, k, v)
    ]
    plan = fj.plan(padded[0], mask=fj.Causal(), max_tokens=13, max_length=9)
    out, lse = fj.attention(*padded, plan=plan, sinks=sinks, return_lse=True)
    torch.testing.assert_close((out.values[:9], lse.values[:9]), dense(q, k, v, fj.Causal(), sinks))
    assert not out.values[9:].any()
    assert (lse.values[9:] == -torch.inf).all()


def test_segments_do_not_see_each_other() -> None:
    q, k, v, sinks = batch([6, 3, 8])
    other = [x.with_values(torch.cat([x.values[:6], x.values[6:9] + 1, x.values[9:]])) for x in (q, k, v)]
    for backend in ("reference", "segments"):
        a, b = (fj.attention(*x, sinks=sinks, backend=backend).values for x in ((q, k, v), other))
        assert torch.equal(a[:6], b[:6])
        assert torch.equal(a[9:], b[9:])


def test_one_graph_for_all_batches() -> None:
    def fn(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, sinks: Tensor) -> Tensor:
        return fj.attention(q, k, v, mask=fj.Causal(), sinks=sinks).values

    batches = [batch(x) for x in ([5, 9], [3, 0, 12], [20], [2, 2, 2, 2])]
    graphs = assert_compiles(
        fn,
        batches,
        backend="aot_eager",
        after_each=lambda i, out: torch.testing.assert_close(
            out, dense(*batches[i][:3], fj.Causal(), batches[i][3])[0]
        ),
    )
    assert graphs.forward == graphs.backward == [0]


BAD: dict[str, tuple[Any, str]] = {
    "shape": (torch.zeros(3), r"sinks: .*\[H\].*heads=4"),
    "integers": (torch.zeros(4, dtype=torch.int64), r"sinks: .*floating-point.*int64"),
    "list": ([0.0] * 4, r"sinks: must be a finite number; got sinks=\[0.0, 0.0"),
    "bool": (True, "sinks: must be a finite number; got sinks=True"),
    "nan": (float("nan"), "sinks: must be a finite number; got sinks=nan"),
    "meta": (torch.zeros(4, device="meta"), "sinks: .*q's device.*meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sinks(case: str) -> None:
    sinks, message = BAD[case]
    with pytest.raises(ShapeError, match=message):
        fj.attention(*batch([3, 2])[:3], sinks=sinks)


def test_only_a_softmax_has_sinks() -> None:
    with pytest.raises(PlanError, match="sinks: only a softmax has them"):
        fj.attention(*batch([3, 2])[:3], normalizer=fj.SiLU(), sinks=0.0)
