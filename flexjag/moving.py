"""Moves of objects that hold tensors to another device or to page-locked memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from flexjag.errors import ShapeError, explain_values

Change = Callable[[Tensor], Tensor]


class Movable:
    """Mixin with ``to``, ``cpu``, ``cuda`` and ``pin_memory`` for immutable holders of tensors.

    A tensor that an object holds in several places is moved once, so that what was one tensor stays one.
    """

    @abstractmethod
    def changed(self, change: Change) -> Self:
        """The same object with `change` of every tensor in it; `change` keeps shapes and dtypes."""

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> Self:
        """Move all tensors to another device; returns a copy that shares what is there already.

        Args:
            device: The device.
            non_blocking: Do not wait for copies from page-locked memory, see :meth:`pin_memory`.

        Raises:
            ShapeError: If `device` is none: a dtype would also convert offsets, marks and ids.
        """
        if not isinstance(device, torch.device | str | int):  # pyright: ignore[reportUnnecessaryIsInstance]
            rule = "must be a device; what is held keeps its dtypes"
            raise ShapeError(explain_values("device", rule, device=device))
        return self.changed(once(lambda x: x.to(device, non_blocking=non_blocking)))

    def cpu(self) -> Self:
        """Move all tensors to the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | int | str | None = None, non_blocking: bool = False) -> Self:
        """Move all tensors to a GPU; arguments as for ``Tensor.cuda``."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory; called by a DataLoader with ``pin_memory=True``."""
        return self.changed(once(Tensor.pin_memory))


def once(change: Change) -> Change:
    """`change`, but called once for each tensor, and on memory that a tensor's entries share instead of its entries.

    Copies of tensors such as those of ``expand`` or overlapping ``as_strided`` would write out every entry.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the originals stay alive, so that their ids stay theirs

    def apply(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = x, _compact(x, change)
        return made[id(x)][1]

    return apply


def _compact(x: Tensor, change: Change) -> Tensor:
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    if x.numel() <= extent or x.requires_grad:
        return change(x)
    memory = change(x.as_strided((extent,), (1,)))
    return memory.as_strided(x.shape, x.stride(), memory.storage_offset())


def changed_value(value: Any, change: Change) -> Any:
    """`change` of a tensor, or of all tensors in a Movable; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    return value.changed(change) if isinstance(value, Movable) else value
