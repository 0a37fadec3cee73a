"""What a call reads besides q, k and v, and a backward reads again: whether it learns, and whether it is the same."""

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
    """What mask, score and normalizer of a call read.

    Attributes:
        learned: What needs gradients, as the score knows it.
        wide: The same in the precision of the scores, in which the gradients add up.
        fixed: What needs none. A backward reads it again, so autograd has to hear of writes to it.
        trials: The users' functions.
    """

    learned: list[Tensor]
    wide: list[Tensor]
    fixed: list[Tensor]
    trials: list[functions.RecordedCall]

    @staticmethod
    def of(recipe: Recipe, compute: torch.dtype) -> Held:
        """That of a plan, whose names are frozen. Functions are called once."""
        nodes = (*recipe.kernel_masks, *(() if recipe.score is None else (recipe.score,)), recipe.normalizer)
        tried = [x for node in nodes for x in functions.trials(node, compute, recipe.place)]
        held = [x for node in nodes[len(recipe.kernel_masks) :] for x in functions.held_tensors(node)]
        found = {id(x): x for x in (*held, *(x for trial in tried for x in trial.given))}.values()
        learned = [x for x in found if x.requires_grad and torch.is_grad_enabled()]
        fixed = [x for x in found if not x.requires_grad and not x.is_inference()]  # those count no writes
        return Held(learned, [functions.widened(x, compute) for x in learned], fixed, tried)

    def check(self) -> None:
        """Check that the functions mean what they meant.

        Raises:
            DifferentiationError: If one does not: its attributes, say, have changed.
        """
        for trial in self.trials:
            if trial.has_changed():
                name = getattr(trial.fn, "__name__", type(trial.fn).__name__)
                rule = "reads something else in the backward, which calls it again, than it did in the forward"
                raise DifferentiationError(f"fn: {name} {rule}; bind what it reads to names of its own, or to closures")

    def read_as(self, others: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Let the score read `others` instead of what is learned."""
        return functions.Substitute(self.learned, others) if self.learned else nullcontext()


def differentiable_gradients(
    attend: Callable[..., Sequence[Tensor | None]],
    held: Held,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for ``create_graph=True``.

    Args:
        attend: Of q, k and v in plain operations.
        held: What the score reads.
        tensors: What it learns, then q, k and v.
        grads: Of what `attend` returns.

    Returns:
        The gradients of `tensors`.
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
