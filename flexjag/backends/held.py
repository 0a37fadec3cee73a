"""Tensors and functions that a call reads besides q, k and v: their gradients, and checks for changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import user_functions as functions
from flexjag.errors import DifferentiationError
from flexjag.lowering.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Held:
    """Tensors and functions that mask, score and normalizer of a call hold; the backward reads them again.

    Attributes:
        learned: The tensors that require gradients, as the score holds them.
        wide: The same tensors in the precision of the scores, in which the gradients are summed.
        fixed: The other tensors but inference tensors, saved for the backward so that autograd notices writes.
        trials: The users' functions, each called once.
    """

    learned: list[Tensor]
    wide: list[Tensor]
    fixed: list[Tensor]
    trials: list[functions.RecordedCall]

    @staticmethod
    def of(recipe: Recipe, compute: torch.dtype) -> Held:
        """Collect the tensors and functions of a frozen recipe; calls each function once."""
        nodes = (*recipe.kernel_masks, *(() if recipe.score is None else (recipe.score,)), recipe.normalizer)
        tried = [x for node in nodes for x in functions.trials(node, compute, recipe.place)]
        held = [x for node in nodes[len(recipe.kernel_masks) :] for x in functions.held_tensors(node)]
        found = {id(x): x for x in (*held, *(x for trial in tried for x in trial.given))}.values()
        learned = [x for x in found if x.requires_grad and torch.is_grad_enabled()]
        fixed = [x for x in found if not x.requires_grad and not x.is_inference()]  # those count no writes
        return Held(learned, [functions.widened(x, compute) for x in learned], fixed, tried)

    def check(self) -> None:
        """Check that the functions have not changed since the forward.

        Raises:
            DifferentiationError: If one reads other values, such as a changed attribute.
        """
        for trial in self.trials:
            if trial.has_changed():
                name = getattr(trial.fn, "__name__", type(trial.fn).__name__)
                rule = "reads something else in the backward, which calls it again, than it did in the forward"
                raise DifferentiationError(f"fn: {name} {rule}; bind what it reads to names of its own, or to closures")

    def read_as(self, others: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Context manager under which the score reads `others` in place of `learned`."""
        return functions.Substitute(self.learned, others) if self.learned else nullcontext()


def differentiable_gradients(
    attend: Callable[..., Sequence[Tensor | None]],
    held: Held,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for ``create_graph=True``.

    Args:
        attend: Attention of q, k and v in plain operations.
        held: The score's tensors and functions.
        tensors: The learned tensors, then q, k and v.
        grads: Gradients of the results of `attend`; None for zeros.

    Returns:
        The gradients of `tensors`; None where none is required.
    """
    tensors = [x.view_as(x) for x in tensors]  # nodes of their own: one may have been computed from another
    with held.read_as(tensors[:-3]):
        outs = attend(*tensors[-3:])
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    wanted = [x for x in tensors if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(tensors)
    outs, grads = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors]
