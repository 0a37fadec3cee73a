"""Limits of differentiation: first-order backwards, and detection of ``torch.func`` transforms and forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import DifferentiationError

Gradients = Sequence[Tensor | None]


def first_order_only(what: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate the backward of an ``autograd.Function`` so that differentiating its gradients raises an error.

    ``torch.autograd.function.once_differentiable`` attaches its error to a leaf of its own, which is not reached if
    another path keeps the graph alive: second-order terms are then dropped silently. Here the gradients depend on all
    tensors they were computed from, so that differentiating them for any of these raises.

    Args:
        what: The error message: the operation that is not twice differentiable, and an alternative.

    Returns:
        A decorator of ``backward(ctx, saved, *grad_outputs)``. `saved` is ``ctx.saved_tensors``, read only once because
        reading them makes checkpointing recompute the forward.
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
    """Identity on gradients whose backward raises :class:`DifferentiationError`."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        return tuple(x if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise DifferentiationError(ctx.what)


def needs_plain_operations() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active, which support plain torch operations only."""
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return True
    level: int = torch.autograd.forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
    return level >= 0 and not torch.compiler.is_compiling()


def is_forward_mode() -> bool:
    """Whether ``torch.func.jvp`` is active, or a transform that is made of it; a constant in a traced graph."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    stack = functorch.get_interpreter_stack() or ()
    return any(x.key() == functorch.TransformType.Jvp for x in stack)


# What torch.compiler.assume_constant_result does, which would import TorchDynamo.
is_forward_mode._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor is batched by ``torch.vmap``."""
    if torch.compiler.is_compiling():
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return functorch.is_batchedtensor(x)
