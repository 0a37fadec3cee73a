"""Serialization of Python objects for another process, with their tensors separate.

The structure (nodes, functions, modules) and its tensors travel separately, so that making kernels needs no tensor
data, the structure alone keys the cache, and the worker substitutes other tensors for the caller's.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import CodegenError, explain_values
from flexjag.extras import needs


@dataclass(frozen=True)
class Meta:
    """Properties of a tensor on which a kernel's code may depend."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_parameter: bool
    varying: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Meta:
        """Properties of `x`."""
        varying = sorted(getattr(x, "_dynamo_weak_dynamic_indices", ()))
        is_parameter = isinstance(x, torch.nn.Parameter)
        return Meta(tuple(x.shape), x.stride(), x.dtype, x.requires_grad, is_parameter, tuple(varying))


@dataclass(frozen=True, eq=False)
class Payload:
    """A pickled object and the tensors it refers to.

    Attributes:
        structure: The pickle, in which a tensor is its index in `tensors`.
        tensors: The tensors, without duplicates.
    """

    structure: bytes
    tensors: tuple[Tensor, ...]

    @property
    def metas(self) -> tuple[Meta, ...]:
        """Properties of each tensor."""
        return tuple(Meta.of(x) for x in self.tensors)

    def digest(self) -> str:
        """Hash of the structure and of the tensors' properties, without their data."""
        return hashlib.sha256(self.structure + repr(self.metas).encode()).hexdigest()


def same(x: Any) -> Any:
    """Return the argument: the constructor by which a pickle refers to an object that it contains."""
    return x


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, put: Callable[[int], Tensor]) -> None:
        super().__init__(file)
        self.put = put

    def persistent_load(self, pid: int) -> Tensor:
        return self.put(pid)

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return partial(_at_home, found) if name == "_function_setstate" else found


def _at_home(set_state: Callable[..., None], function: Any, state: Any) -> None:
    """Restore a function; add the globals of the caller's script to ``__main__``, where TorchDynamo looks for them."""
    set_state(function, state)
    if function.__module__ == "__main__":
        vars(sys.modules["__main__"]).update(function.__globals__)


def pack(obj: Any) -> Payload:
    """Pickle an object, and collect its tensors separately.

    Raises:
        CodegenError: If a part of it cannot be pickled.
        MissingExtraError: If cloudpickle is not installed.
    """
    needs("codegen", "cloudpickle")
    from flexjag.codegen.pickler import Pickler

    file = io.BytesIO()
    pickler = Pickler(file)
    try:
        pickler.dump(obj)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as reason:
        rule = "everything it refers to must be picklable, to be compiled in a process of its own"
        raise CodegenError(explain_values("fn", rule, error=str(reason).split("\n")[0])) from reason
    return Payload(file.getvalue(), tuple(pickler.tensors))


def unpack(structure: bytes, tensors: Sequence[Tensor]) -> Any:
    """Unpickle an object, with `tensors` in place of the original ones."""
    return _Unpickler(io.BytesIO(structure), tensors.__getitem__).load()
