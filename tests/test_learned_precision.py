"""Gradients of learned tensors add up in float32 at least and are rounded once; autocast changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CPP_SLOWLY
from torch import Tensor

import flexjag as fj
from flexjag.testing import assert_compiles

HALF = [torch.bfloat16, torch.float16]
BOUNDARIES = torch.tensor([-300, -20, -1, 1])
LENGTHS = [300, 0, 200]
TIMES = torch.arange(500) * 2


def _clipped(table: Tensor) -> fj.Score:
    return fj.ScoreMod(lambda s, b, h, i, j: s + table[h, (j - i).clamp(-2, 2) + 2])


SCORES: dict[str, Callable[[Tensor], fj.Score]] = {
    "RelativeBias": fj.RelativeBias,
    "BucketedBias": lambda t: fj.BucketedBias(t, BOUNDARIES),
    "TimeBias": lambda t: fj.TimeBias(t, TIMES, BOUNDARIES),
    "Alibi": lambda t: fj.Alibi(t[:, 0]),
    "ScoreMod": _clipped,
    "two": lambda t: fj.RelativeBias(t) >> _clipped(t * 0.5),
}


def gradient(backend: str, score: str, normalizer: str, table: Tensor) -> Tensor:
    """Of a table, of a loss that weighs in float64 and stays in the range of float16."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(sum(LENGTHS), 2, 16, generator=g).to(torch.bfloat16).to(torch.float64)
    precise = table.dtype == torch.float64
    x = fj.Jagged.from_lengths(values if precise else values.to(table.dtype), LENGTHS)
    leaf = table.detach().requires_grad_()
    made = SCORES[score](leaf)
    kinds = {"softmax": fj.Softmax(), "silu": fj.SiLU(1 / 64), "sigmoid": fj.Sigmoid(leaf[:, 0])}
    out = fj.attention(x, x, x, mask=fj.Causal(), score=made, normalizer=kinds[normalizer], backend=backend).values
    (found,) = torch.autograd.grad((out.to(torch.float64) * values).sum() / 64, leaf)
    return found


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "silu", "sigmoid"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", "auto", CPP_SLOWLY])
def test_half_precision_tables(backend: str, score: str, normalizer: str, dtype: torch.dtype) -> None:
    """Within the rounding of half-precision inputs and outputs, which is two units in the last place of the largest."""
    if backend == "segments" and score in ("ScoreMod", "two") and normalizer == "softmax":
        pytest.skip("not additive")
    table = torch.linspace(-0.5, 0.5, 10).view(2, 5).to(dtype)
    wanted = gradient("reference", score, normalizer, table.to(torch.float64))
    got = gradient(backend, score, normalizer, table)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert float((got.to(torch.float64) - wanted).abs().max()) <= 2 * unit * float(wanted.abs().max())


@pytest.mark.parametrize("backend", ["tiled", "reference", CPP_SLOWLY])
def test_a_table_is_rounded_once_not_once_per_segment(backend: str) -> None:
    """Of 300 segments, whose gradients of 1 / 512 and less would each be lost next to a sum of 1."""
    x = fj.Jagged.from_lengths(torch.ones(600, 1, 4), [2] * 300)
    table = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    score = fj.ScoreMod(lambda s, b, h, i, j: s + table[h] * j)
    _, lse = fj.attention(x, x, x, score=score, backend=backend, return_lse=True)
    (got,) = torch.autograd.grad(lse.values.sum() / 256, table)  # each row's derivative is 1 / 2
    assert float(got[0]) == float(torch.tensor(600 / 512).to(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_half_precision_tables_in_a_graph(normalizer: str) -> None:
    """Built-in scores and users' functions, in one graph for several batches."""
    table = torch.linspace(-0.5, 0.5, 10).view(2, 5).to(torch.bfloat16).requires_grad_()
    kind = {"softmax": fj.Softmax(), "sigmoid": fj.Sigmoid(table[:, 0].detach())}[normalizer]
    score = fj.RelativeBias(table) >> _clipped(table)

    def loss(x: fj.Jagged) -> Tensor:
        out = fj.attention(x, x, x, mask=fj.Causal(), score=score, normalizer=kind).values
        return (out.float() * x.values.float()).sum()

    def check(index: int, total: Tensor) -> None:
        got, table.grad = table.grad, None
        assert got is not None
        x, wide = batches[index][0], table.detach().to(torch.float64).requires_grad_()
        y = x.with_values(x.values.to(torch.float64))
        both = fj.RelativeBias(wide) >> _clipped(wide)
        precise = fj.Sigmoid(wide[:, 0].detach()) if normalizer == "sigmoid" else fj.Softmax()
        out = fj.attention(y, y, y, mask=fj.Causal(), score=both, normalizer=precise, backend="reference").values
        (wanted,) = torch.autograd.grad((out * y.values).sum(), wide)
        unit = torch.finfo(torch.bfloat16).eps
        assert float((got.to(torch.float64) - wanted).abs().max()) <= 2 * unit * float(wanted.abs().max())

    batches = [
        (fj.Jagged.from_lengths(torch.randn(sum(n), 2, 16).to(torch.bfloat16), n),) for n in ([300, 200], [90, 8, 410])
    ]
    assert_compiles(loss, batches, after_each=check)


@pytest.mark.parametrize("normalizer", ["softmax", "silu"])
@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", CPP_SLOWLY])
def test_autocast_changes_nothing(backend: str, normalizer: str) -> None:
    """Outputs and gradients are bitwise those without it: q, k and v say in which precision they are attended."""
    x = fj.Jagged.from_lengths(torch.randn(500, 2, 16), LENGTHS)
    table = torch.linspace(-0.5, 0.5, 10).view(2, 5)
    kind = {"softmax": fj.Softmax(), "silu": fj.SiLU(1 / 64)}[normalizer]

    def run(autocast: bool) -> tuple[Tensor, ...]:
        leaves = x.values.clone().requires_grad_(), table.clone().requires_grad_()
        y = x.with_values(leaves[0])
        # Lengths of a mask that is no shared bias, so that each run has its own
        mask = fj.Causal() & fj.Prefix(torch.tensor([250, 1, 150]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            score = fj.RelativeBias(leaves[1])
            out = fj.attention(y, y, y, mask=mask, score=score, normalizer=kind, backend=backend)
        return out.values, *torch.autograd.grad(out.values.sin().sum(), leaves)

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
def test_autocast_changes_nothing_in_a_graph() -> None:
    x = fj.Jagged.from_lengths(torch.randn(50, 2, 16), [20, 30])
    attend = torch.compile(
        lambda y: fj.attention(y, y, y, mask=fj.Causal(), normalizer=fj.SiLU(1 / 64)).values, fullgraph=True
    )
    plain = attend(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend(x), plain, rtol=0, atol=0)
