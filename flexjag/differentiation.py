"""How far derivatives go: backwards that are differentiable once, and transforms that need plain torch operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import DifferentiationError

Gradients = Sequence[Tensor | None]


def first_order_only(what: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Make ``backward(ctx, saved, *grad_outputs)`` the backward of an autograd.Function that ends differentiation.

    ``torch.autograd.function.once_differentiable`` hangs its error on a leaf of its own, which nothing reaches when
    another path keeps the graph alive: the second order is then dropped without a word. Here the gradients hang on
    all that they were made from, so whoever differentiates them meets the error.

    Args:
        what: What cannot be differentiated twice, and what can instead, for the error.

    Returns:
        A decorator. The function it takes gets ``ctx.saved_tensors`` as its second argument: reading them makes
        checkpointing compute the forward again, so they are read once.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors
            with torch.no_grad():
                found = backward(ctx, saved, *grad_outputs)
            if not torch.is_grad_enabled():
                return found
            sources = [x for x in (*grad_outputs, *saved) if x is not None and x.requires_grad]
            return _Last.apply(what, len(found), *found, *sources)  # type: ignore[no-any-return]

        return run

    return decorate


class _Last(torch.autograd.Function):
    """Gradients whose own gradients are an error."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        return tuple(x if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise DifferentiationError(ctx.what)


def needs_plain_operations() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is at work, which know plain torch operations only."""
    if torch.compiler.is_compiling():
        return False
    level: int = torch.autograd.forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    return level >= 0 or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def is_mapped(x: Tensor) -> bool:
    """Whether ``torch.vmap`` maps over a tensor, so that it stands for several."""
    if torch.compiler.is_compiling():
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return functorch.is_batchedtensor(x)
