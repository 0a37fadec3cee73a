"""Layer norm and RMS norm of jagged batches, with statistics per token or per segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.ops.checks import check_jagged, check_like
from flexjag.ops.packed import cut, lengths_of, wide
from flexjag.ops.register import define
from flexjag.ops.segment import add_up, spread


def jagged_layer_norm(
    x: Jagged, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, per: str = "token"
) -> Jagged:
    """Layer normalization: ``(x − mean) / sqrt(variance + eps) · weight + bias``.

    Args:
        x: ``[T, ...]`` floating point, with at least one feature dimension.
        weight: ``x.values.shape[1:]``, in the dtype of `x`, or in float32 beside half precision.
        bias: Like `weight`; beside half precision each may have either dtype.
        eps: Added to the variance.
        per: ``"token"`` for statistics over each token's features, ``"segment"`` for statistics over all features
            of all tokens of a segment (the jagged layer norm of Helion's and TritonBench's examples).

    Returns:
        ``[T, ...]`` with the offsets and dtype of `x`. Half precision is computed in float32, and the gradients of
        `weight` and `bias` are rounded once, to their own dtypes.

    Raises:
        LayoutError: If `x` is not a Jagged.
        ShapeError: If shape, dtype or device of `weight` or `bias` do not match, or `per` is neither of the two.

    >>> x = Jagged.from_lengths(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), [2])
    >>> jagged_layer_norm(x, eps=0.0).values.tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    >>> [[round(v, 3) for v in row] for row in jagged_layer_norm(x, eps=0.0, per="segment").values.tolist()]
    [[-1.342, -0.447], [0.447, 1.342]]
    """
    features = _check(x, per, weight=weight, bias=bias)
    if per == "token":
        return x.with_values(layer_norm(x.values, features, weight, bias, eps))
    return _per_segment(x, weight, bias, eps, center=True)


def jagged_rms_norm(x: Jagged, weight: Tensor | None = None, *, eps: float = 1e-6, per: str = "token") -> Jagged:
    """Root mean square normalization: ``x / sqrt(mean(x²) + eps) · weight``.

    Args:
        x: ``[T, ...]`` floating point, with at least one feature dimension.
        weight: As for :func:`jagged_layer_norm`.
        eps: Added to the mean square.
        per: ``"token"`` or ``"segment"``, as for :func:`jagged_layer_norm`.

    Returns:
        ``[T, ...]`` with the offsets and dtype of `x`; half precision as for :func:`jagged_layer_norm`.

    Raises:
        LayoutError: If `x` is not a Jagged.
        ShapeError: If shape, dtype or device of `weight` do not match, or `per` is neither of the two.

    >>> x = Jagged.from_lengths(torch.tensor([[1.0, 1.0], [7.0, 7.0]]), [2])
    >>> jagged_rms_norm(x, eps=0.0).values.tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    >>> [[round(v, 1) for v in row] for row in jagged_rms_norm(x, eps=0.0, per="segment").values.tolist()]
    [[0.2, 0.2], [1.4, 1.4]]
    """
    features = _check(x, per, weight=weight)
    if per == "token":
        values = torch.nn.functional.rms_norm(wide(x.values), features, _wide(weight), eps)
        return x.with_values(values.to(x.dtype))
    return _per_segment(x, weight, None, eps, center=False)


def _check(x: Jagged, per: str, **parameters: Tensor | None) -> tuple[int, ...]:
    check_jagged(x, "x", floating=True)
    if per not in ("token", "segment"):
        raise ShapeError(explain_values("per", "must be 'token' or 'segment'", per=per))
    features = tuple(x.values.shape[1:])
    if not features:
        raise ShapeError(explain_values("x", "its values must have a feature dimension", shape=tuple(x.values.shape)))
    for name, parameter in parameters.items():
        if parameter is not None:
            check_like(parameter, name, x, or_float32=True)
            if tuple(parameter.shape) != features:
                seen = {name: tuple(parameter.shape), "x": tuple(x.values.shape)}
                raise ShapeError(explain_values(name, "must have the feature shape of x", **seen))
    return features


def layer_norm(
    values: Tensor, features: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """PyTorch's layer norm, in float32 for half precision: its CPU kernel sums parameter gradients in half."""
    return torch.nn.functional.layer_norm(wide(values), features, _wide(weight), _wide(bias), eps).to(values.dtype)


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else wide(parameter)


def _per_segment(x: Jagged, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool) -> Jagged:
    values = standardize(wide(x.values), x.offsets, eps, center)[0]
    weight, bias = _wide(weight), _wide(bias)
    if weight is not None and bias is not None:
        values = torch.addcmul(bias, values, weight)
    elif weight is not None:
        values = values * weight
    elif bias is not None:
        values = values + bias
    return x.with_values(values.to(x.dtype))


@define("standardize")
def standardize(values: Tensor, offsets: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """Normalized segments ``[T, ...]``, centered if `center`, and ``1 / sqrt(mean square + eps)`` of each ``[S]``."""
    lengths = lengths_of(offsets, values.shape[0], "x.offsets")
    values = values.contiguous()
    out, factors = values.new_empty(values.shape), values.new_zeros((len(lengths),))
    for x, y, factor in zip(cut(values, lengths), cut(out, lengths), factors.unbind(0), strict=True):
        if x.numel():
            x, y = x.view(-1), y.view(-1)
            if center:
                x = torch.sub(x, x.mean(), out=y)
            factor.copy_(torch.dot(x, x)).div_(x.shape[0]).add_(eps).rsqrt_()
            torch.mul(x, factor, out=y)
    return out, factors


@standardize.register_fake
def _(values: Tensor, offsets: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty((offsets.shape[0] - 1,))


@define("standardize_backward")
def standardize_backward(grad: Tensor, out: Tensor, factors: Tensor, offsets: Tensor, center: bool) -> Tensor:
    """Gradient of :func:`standardize`: ``factor · (g − y mean(g y) − mean(g))``, the last term only if `center`."""
    lengths = lengths_of(offsets, out.shape[0])
    grad, result = grad.contiguous(), out.new_empty(out.shape)
    for g, y, dx, factor in zip(*(cut(t, lengths) for t in (grad, out, result)), factors.unbind(0), strict=True):
        if g.numel():
            g, y, dx = g.view(-1), y.view(-1), dx.view(-1)
            torch.addcmul(g, y, torch.dot(g, y).div_(-g.shape[0]), out=dx)
            if center:
                dx.sub_(g.mean())
            dx.mul_(factor)
    return result


@standardize_backward.register_fake
def _(grad: Tensor, out: Tensor, factors: Tensor, offsets: Tensor, center: bool) -> Tensor:
    return out.new_empty(out.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, offsets, _, center = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, offsets)
    ctx.center = center


def _backward(ctx: Any, grad: Tensor | None, of_factors: Tensor | None) -> tuple[Tensor | None, ...]:
    out, factors, offsets = ctx.saved_tensors
    found = None if grad is None else standardize_backward(grad, out, factors, offsets, ctx.center)
    if of_factors is not None:  # second derivatives only: ∂factor/∂x = −factor² y / n
        numbers = offsets.diff() * out.shape[1:].numel()
        rows = _rows(of_factors * factors.square() / numbers.clamp(min=1), offsets, out)
        found = -rows * out if found is None else found - rows * out
    return found, None, None, None


def _rows(factors: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """Per-segment numbers ``[S]`` repeated for every token, with the rank of `like`."""
    return spread(factors, offsets, like.shape[0]).view(-1, *[1] * (like.ndim - 1))


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.center = inputs[4]


def _backward_twice(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    grad, out, factors, offsets = ctx.saved_tensors

    def mean(x: Tensor) -> Tensor:
        return x - standardize_backward(x, torch.ones_like(x), torch.ones_like(factors), offsets, False)

    along, above_along = mean(grad * out), mean(above * out)
    of_out = -_rows(factors, offsets, out) * (above * along + grad * above_along)
    inner = grad - out * along - (mean(grad) if ctx.center else 0.0)
    of_factors = add_up((above * inner).flatten(1).sum(1), offsets)
    return standardize_backward(above, out, factors, offsets, ctx.center), of_out, of_factors, None, None


standardize.register_autograd(_backward, setup_context=_setup)
standardize_backward.register_autograd(_backward_twice, setup_context=_setup_twice)
standardize.register_kernel("flexjag.ops.triton.norm")
standardize_backward.register_kernel("flexjag.ops.triton.norm")
