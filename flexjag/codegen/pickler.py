"""Pickler of :func:`flexjag.codegen.payload.pack`, in its own module: only compiling needs cloudpickle."""

from __future__ import annotations

import io
from typing import Any

import cloudpickle
from torch import Tensor

from flexjag.codegen.payload import same
from flexjag.lowering.outline import for_gpu
from flexjag.lowering.recipe import Recipe


class Pickler(cloudpickle.Pickler):
    """Pickler that extracts tensors, and rounds a plan's tables up to the sizes that GPU kernels expect."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.index: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.rounded: dict[int, Recipe] = {}  # also keeps the new tables alive while their ids are keys

    def persistent_id(self, obj: Any) -> int | None:
        """Index of a tensor, which is stored separately; None for any other object."""
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self.index:
            self.index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self.index[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        """Reduce a plan to the form it would have on a GPU."""
        if isinstance(obj, Recipe) and not obj.layout.on_gpu:
            return same, (self.rounded.setdefault(id(obj), for_gpu(obj)),)
        return super().reducer_override(obj)
