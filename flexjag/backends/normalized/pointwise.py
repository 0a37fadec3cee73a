"""Attention by a pointwise normalizer, over tiles or runs: ``(f(scores) ⊙ mask) V``, without any sum over a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.algebra import normalizers as nz
from flexjag.algebra.dispatch import Interpretation
from flexjag.backends.blocks import matmul, matmul_heads, sum_groups
from flexjag.backends.gathers import add_tiles, look_up
from flexjag.lowering.layout import Layout

Score = Callable[..., Tensor]


class Activation(NamedTuple):
    """The elementwise function of a pointwise normalizer, without its scale.

    Attributes:
        fn: The elementwise function, differentiable.
        backward: ``backward(grad, score, fn(score))``, the gradient of the score. Default: by autograd.
        neutral: A score whose weight is exactly 0, to which masked scores are set.
    """

    fn: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    neutral: float = 0.0


activation = Interpretation("activation", nz.Pointwise)
"""``activation(normalizer) -> Activation``."""


@activation.register(nz.SiLU)
def _(normalizer: nz.SiLU) -> Activation:
    return Activation(functional.silu, lambda grad, s, w: torch.ops.aten.silu_backward(grad, s))


@activation.register(nz.GELU)
def _(normalizer: nz.GELU) -> Activation:
    kind = normalizer.approximate
    return Activation(
        lambda s: functional.gelu(s, approximate=kind),
        lambda grad, s, w: torch.ops.aten.gelu_backward(grad, s, approximate=kind),
    )


@activation.register(nz.Identity)
def _(normalizer: nz.Identity) -> Activation:
    return Activation(lambda s: s, lambda grad, s, w: grad)


@activation.register(nz.Sigmoid)
def _(normalizer: nz.Sigmoid) -> Activation:
    return Activation(torch.sigmoid, lambda grad, s, w: torch.ops.aten.sigmoid_backward(grad, w), -torch.inf)


def weighed(
    normalizer: nz.Pointwise, score: Score | None, layout: Layout, look_up: Callable[..., Tensor] = look_up
) -> Score | None:
    """The score function plus the normalizer's bias, on packed indices; None if there is neither.

    The bias is read by `look_up`. A score of -inf gives weight 0, as the mask does.
    """
    add = _bias(normalizer, layout, look_up)
    if score is None:
        return add
    neutral = activation(normalizer).neutral

    def whole(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        s = score(s, b, h, q, kv)
        s = s if neutral == -torch.inf else torch.where(s == -torch.inf, neutral, s)
        return s if add is None else add(s, b, h, q, kv)

    return whole


def _bias(normalizer: nz.Pointwise, layout: Layout, look_up: Callable[..., Tensor]) -> Score | None:
    if not isinstance(normalizer, nz.Sigmoid):
        return None
    bias = normalizer.bias
    if bias is None:
        rows = -layout.kv_length().clamp(min=1).to(torch.float64).log()
        return lambda s, b, h, q, kv: s + rows[q].to(s.dtype)
    if isinstance(bias, Tensor):
        return lambda s, b, h, q, kv: s + look_up(bias, h).to(s.dtype)
    return lambda s, b, h, q, kv: s + float(bias)


def _masked(act: Activation, in_place: bool, s: Tensor, banned: Tensor) -> Tensor:
    fill = s.masked_fill_ if in_place and not s.requires_grad else s.masked_fill
    return fill(banned, act.neutral)


def attend(
    act: Activation, in_place: bool, s: Tensor, allowed: Tensor | None, z: Tensor, local: Tensor | None, rows: int
) -> tuple[Tensor, None]:
    """Attention of a list of tiles: the values' sums, weighted by the function of the scores.

    Args:
        act: The normalizer's function.
        in_place: The scores may be overwritten.
        s: Scores ``[N, H, B, C]``.
        allowed: The mask, which broadcasts; None if all keys are allowed.
        z: Values ``[N, G, C, E]``.
        local: ``[N]``, row block of each tile, 0 to ``rows - 1``; None if there is one tile and one row block.
        rows: Number of row blocks.

    Returns:
        ``[rows, H, B, E]``, and None in place of a remainder.
    """
    if allowed is not None:
        s = _masked(act, in_place, s, ~allowed)
    out = matmul(act.fn(s), z)
    return (out if local is None else add_tiles(out, local, rows)), None


def differentiate(
    act: Activation, in_place: bool, s: Tensor, allowed: Tensor | None, z: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`attend`, given the output's gradient per tile.

    Args:
        act: The normalizer's function.
        in_place: The scores may be overwritten.
        s: Scores ``[N, H, B, C]``.
        allowed: The mask, which broadcasts; None if all keys are allowed.
        z: Values ``[N, G, C, E]``.
        grad: Gradient of the output ``[N, H, B, E]``, of each tile's row block.

    Returns:
        The gradients of the scores and of the values.
    """
    banned = None if allowed is None else ~allowed
    s = s if banned is None else _masked(act, in_place, s, banned)
    weights = act.fn(s)
    by_weight = matmul(grad, z.transpose(2, 3))
    if act.backward is not None:
        by_score = act.backward(by_weight, s, weights)
    else:
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            by_score = torch.autograd.grad(act.fn(s), s, by_weight)[0]
    if banned is not None:
        by_score = by_score.masked_fill_(banned, 0.0)
    return by_score, sum_groups(matmul_heads(weights, grad), z.shape[1])
