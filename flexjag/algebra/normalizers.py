"""Normalizers: functions from masked scores to attention weights.

A pointwise normalizer weighs each key by its own score alone: the weights of a row need not sum to one, a key that is
not allowed weighs nothing, and there is no log-sum-exp. To add one, subclass :class:`Pointwise` and register its case
of :data:`flexjag.backends.normalized.pointwise.activation`, and of :data:`flexjag.backends.reference.weigh` for tests.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from flexjag.algebra.node import Node, along, node
from flexjag.algebra.tree import head_counts, held_tensors
from flexjag.errors import PlanError, explain_values


class Normalizer(Node):
    """Base class of every normalizer."""


@node
class Softmax(Normalizer):
    """Weights ``exp(s_ij) / sum_k exp(s_ik)`` over the allowed keys; a row without any gets zeros.

    >>> Softmax()
    Softmax()
    """


class Pointwise(Normalizer):
    """Base class of normalizers that weigh a key by its own score: ``scale * f(s_ij)``.

    Attributes:
        scale: A number, or a floating-point tensor: 0-d, or ``[T_q]`` with a factor per packed query token. A tensor
            may need gradients, and may change from batch to batch without a new compiled graph.
    """

    scale: float | Tensor


@node
class SiLU(Pointwise):
    """Weights ``scale * s * sigmoid(s)``: HSTU's attention (generative-recommenders; scale is 1 / maximal length).

    Args:
        scale: As in :class:`Pointwise`.

    >>> SiLU(scale=1 / 256)
    SiLU(0.00390625)
    """

    scale: float | Tensor = along("query token", default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scale(self.scale)


@node
class GELU(Pointwise):
    """Weights ``scale * gelu(s)``: generalized dot-product attention.

    Args:
        scale: As in :class:`Pointwise`.
        approximate: ``"none"`` for the error function, ``"tanh"`` for its usual approximation.

    >>> GELU(approximate="tanh")
    GELU(1.0, 'tanh')
    """

    scale: float | Tensor = along("query token", default=1.0)
    approximate: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scale(self.scale)
        if self.approximate not in ("none", "tanh"):
            raise PlanError(explain_values("approximate", "must be 'none' or 'tanh'", approximate=self.approximate))


@node
class Identity(Pointwise):
    """Weights ``scale * s``: attention without any nonlinearity but the mask.

    Args:
        scale: As in :class:`Pointwise`.

    >>> Identity(scale=0.5)
    Identity(0.5)
    """

    scale: float | Tensor = along("query token", default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scale(self.scale)


@node
class Sigmoid(Pointwise):
    """Weights ``scale * sigmoid(s + bias)`` (Theory, Analysis, and Best Practices for Sigmoid Self-Attention).

    Args:
        bias: A number, or a floating-point tensor ``[H]`` that may need gradients. Default: the paper's ``-log m``, m
            the number of keys in the row's segment, with which a row's weights start out summing to about one.
        scale: As in :class:`Pointwise`.

    >>> Sigmoid(bias=-3.0)
    Sigmoid(-3.0, 1.0)
    """

    bias: float | Tensor | None = along("query head", default=None)
    scale: float | Tensor = along("query token", default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scale(self.scale)
        if isinstance(self.bias, Tensor):
            _check_floating("bias", self.bias, (1,), "[H]")
        elif self.bias is not None:
            _check_number("bias", self.bias)


@node
class StickBreaking(Normalizer):
    """Weights ``b_ij * prod_{j < k < i} (1 - b_ik)``, ``b = sigmoid(s)``: the nearest key breaks off its share first.

    From "Stick-breaking Attention" (arXiv 2410.17980; stickbreaking-attention). The product runs over allowed keys
    only. What no key took, ``prod_k (1 - b_ik)``, is the remainder: with it the weights sum to one. It needs a mask
    that allows no later key, such as ``Causal()``, ``Window(w, 0)``, or either of them ``&`` anything.

    On a GPU the backward notes 8 bytes for each query, step of 32 to 128 keys in a tile, and head, for as many groups
    of heads at once as fit 256 MiB, but at least one: 2 GB a head for one causal segment of 131,072 tokens.

    Args:
        attend_current: Whether a query may attend the key it lines up with (j = i). The paper's does not.
        remainder: Add ``remainder * v_i`` to the output, so that the weights of every row sum to one. Self-attention
            only. :func:`flexjag.attention` returns the remainder itself with ``return_remainder=True``.

    >>> StickBreaking()
    StickBreaking(False, False)
    """

    attend_current: bool = False
    remainder: bool = False


def tensors(normalizer: Normalizer) -> list[Tensor]:
    """The tensors that a normalizer holds."""
    return held_tensors(normalizer)


def num_bias_heads(normalizer: Normalizer) -> int | None:
    """Number of query heads of the normalizer's bias; None if it is not per head."""
    return max(head_counts(normalizer), default=None)


def _check_scale(scale: object) -> None:
    if isinstance(scale, Tensor):
        _check_floating("scale", scale, (0, 1), "0-d or [T_q]")
    else:
        _check_number("scale", scale)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PlanError(explain_values(name, "must be a finite number or a tensor", value=value))


def _check_floating(name: str, tensor: Tensor, ndims: tuple[int, ...], shape: str) -> None:
    if tensor.ndim not in ndims or not tensor.dtype.is_floating_point:
        rule = f"must be floating point, {shape}"
        raise PlanError(explain_values(name, rule, shape=tuple(tensor.shape), dtype=tensor.dtype))
