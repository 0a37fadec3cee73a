"""Second order, transforms and forward mode: right, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CPP_SLOWLY, make_qkv
from torch import Tensor
from torch.autograd import forward_ad

import flexjag as fj
from flexjag.backends.choose import BACKENDS
from flexjag.errors import BackendError, DifferentiationError, FlexjagError

F64 = torch.float64
NORMALIZERS = [fj.Softmax(), fj.SiLU(0.5), fj.Sigmoid(-1.0), fj.StickBreaking()]
LENGTHS = [5, 0, 20, 1]


def problem(backend: str, normalizer: fj.Normalizer) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """A loss of values and a learned table, with a residual path that keeps the graph alive."""
    x, _, _ = make_qkv(LENGTHS, dim=8)
    table = torch.randn(2, 5, dtype=F64)

    def loss(values: Tensor, bias: Tensor) -> Tensor:
        y = x.with_values(values)
        score = fj.RelativeBias(bias) >> fj.ScoreMod(lambda s, b, h, i, j: s + bias[h, 0] * torch.cos(s))
        score = fj.RelativeBias(bias) if backend == "segments" else score
        out = fj.attention(y, y, y, mask=fj.Causal(), score=score, normalizer=normalizer, backend=backend)
        return (y + out).values.pow(2).sum()

    return loss, x.values.detach(), table


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_second_order_equals_the_reference(normalizer: fj.Normalizer) -> None:
    found = []
    for backend in [x.name for x in BACKENDS.values() if x.promises.second_order]:
        loss, values, table = problem(backend, normalizer)
        torch.manual_seed(1)
        values, table = values.requires_grad_(), torch.randn(2, 5, dtype=F64, requires_grad=True)
        first = torch.autograd.grad(loss(values, table), (values, table), create_graph=True)
        weigh = sum((g * torch.sin(g.detach())).sum() for g in first)
        found.append((*first, *torch.autograd.grad(weigh, (values, table))))
    assert len(found) > 1
    for other in found[1:]:
        for wanted, got in zip(found[0], other, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize("score", [None, "bias"])
@pytest.mark.parametrize("backend", ["segments", CPP_SLOWLY])
def test_second_order_of_segments_is_refused_on_every_path(
    backend: str, score: str | None, normalizer: fj.Normalizer
) -> None:
    x, k, v = make_qkv(LENGTHS, dim=8)
    values, held = x.values.requires_grad_(), None if score is None else fj.Alibi(torch.ones(2, dtype=F64))
    y = x.with_values(values)
    out = fj.attention(y, k, v, mask=fj.Causal(), score=held, normalizer=normalizer, backend=backend)
    (first,) = torch.autograd.grad((y + out).values.pow(2).sum(), values, create_graph=True)
    refused = r"'(segments|cpp)' has no second-order gradients; use backend='tiled'"
    with pytest.raises(DifferentiationError, match=refused):
        torch.autograd.grad(first.sum(), values)
    torch.testing.assert_close(  # the first order itself is as without a graph
        first.detach(),
        torch.autograd.grad(
            (y + fj.attention(y, k, v, mask=fj.Causal(), score=held, normalizer=normalizer, backend=backend))
            .values.pow(2)
            .sum(),
            values,
        )[0],
        rtol=0,
        atol=0,
    )


def test_merge_has_a_second_order() -> None:
    x, k, v = make_qkv([3, 6], dim=8)

    def merged(values: Tensor) -> Tensor:
        y = x.with_values(values)
        parts = [
            fj.attention(y, k, v, mask=mask, return_lse=True, backend="reference")
            for mask in (fj.Causal(), ~fj.Causal())
        ]
        return fj.merge(parts)[0].values

    assert torch.autograd.gradgradcheck(merged, x.values.requires_grad_())


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
@pytest.mark.parametrize("backend", ["tiled", "auto"])
def test_transforms_equal_autograd(backend: str, normalizer: fj.Normalizer) -> None:
    loss, values, table = problem(backend, normalizer)
    reference, _, _ = problem("reference", normalizer)
    leaf = values.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(leaf, table), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(values, table), wanted, rtol=1e-9, atol=1e-9)
    direction = torch.cos(torch.arange(values.numel(), dtype=F64)).view(values.shape)
    slope = (wanted * direction).sum()
    got = torch.func.jvp(lambda v: loss(v, table), (values,), (direction,))[1]
    torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-9)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(values, direction), table)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope, rtol=1e-9, atol=1e-9)
    many = torch.stack([values, 2 * values])
    alone = torch.stack([loss(v, table) for v in many])
    torch.testing.assert_close(torch.vmap(lambda v: loss(v, table))(many), alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [x.name for x in BACKENDS.values() if not x.promises.second_order])
def test_transforms_of_other_backends_are_refused(backend: str) -> None:
    x, k, v = make_qkv([3, 6], dim=16, dtype=torch.float32)
    with pytest.raises(BackendError, match=r"cannot run this plan: torch.func transforms and forward-mode AD know"):
        torch.func.grad(lambda q: fj.attention(x.with_values(q), k, v, backend=backend).values.sum())(x.values)


def test_offsets_under_vmap_are_refused() -> None:
    values, offsets = torch.randn(2, 5, 1, 8), torch.tensor([[0, 2, 5], [0, 1, 5]])

    def attend(x: Tensor, ends: Tensor) -> Tensor:
        y = fj.Jagged(x, ends)
        return fj.attention(y, y, y).values

    with pytest.raises(FlexjagError, match="offsets: must not be mapped"):
        torch.vmap(attend)(values, offsets)
