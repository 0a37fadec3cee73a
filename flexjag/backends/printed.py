"""A plan's mask and score as printed source, for backends whose kernels call it.

The text is an argument of a backend's operators, which load it where they run. A traced graph holds no functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.algebra import scores as s
from flexjag.lowering.recipe import Recipe
from flexjag.printing import has_functions


@dataclass(frozen=True, eq=False)
class Printed:
    """A mask and a score as source, with the values that they read.

    Attributes:
        source: The printed functions.
        captures: The tensors that the functions read.
        numbers: The integers that they read.
        learned: Indices of the captures that need gradients.
        masks_heads: True if the mask reads the head. Of backends that ask for it.
    """

    source: str
    captures: list[Tensor]
    numbers: list[int]
    learned: list[int]
    masks_heads: bool = False


_known: WeakKeyDictionary[Recipe, dict[tuple[object, ...], Printed]] = WeakKeyDictionary()


def once(plan: Recipe, backend: str, write: Callable[[bool], Printed]) -> Printed:
    """The printed source of a plan, cached for all layers that share it.

    A plan whose score has users' functions is printed on each call: they may close over values that change. What a
    mask's functions read must not: :attr:`Recipe.reading` notices.

    Args:
        plan: The plan, whose kernels' source `write` prints.
        backend: Name of the backend.
        write: ``write(is_checked)``; True if the plan has users' functions, whose lookups may be out of range.
    """
    is_checked = has_functions(plan.mask, plan.score)
    if has_functions(None, plan.score) or torch.compiler.is_compiling():
        return write(is_checked)
    learns = [x.requires_grad for x in (*s.tensors(plan.score), *nz.tensors(plan.normalizer))]
    known, key = _known.setdefault(plan, {}), (backend, torch.is_grad_enabled(), *learns)
    if key not in known:
        known[key] = write(is_checked)
    return known[key]
