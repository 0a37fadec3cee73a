"""Python objects between processes, with their tensors apart.

What is computed (nodes, functions, modules) and what it holds (tensors) travel separately, so that making kernels needs
no tensor data, the structure alone keys the cache, and the worker puts other tensors in the places of the caller's.
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
    """All that a kernel may depend on of a tensor that is given to it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_parameter: bool
    varying: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Meta:
        """What is seen of `x`."""
        varying = sorted(getattr(x, "_dynamo_weak_dynamic_indices", ()))
        is_parameter = isinstance(x, torch.nn.Parameter)
        return Meta(tuple(x.shape), x.stride(), x.dtype, x.requires_grad, is_parameter, tuple(varying))


@dataclass(frozen=True, eq=False)
class Payload:
    """A pickled object and the tensors it refers to.

    Attributes:
        structure: The pickle, in which tensors are numbers.
        tensors: The tensors, each once.
    """

    structure: bytes
    tensors: tuple[Tensor, ...]

    @property
    def metas(self) -> tuple[Meta, ...]:
        """What is seen of each tensor."""
        return tuple(Meta.of(x) for x in self.tensors)

    def digest(self) -> str:
        """A hash of everything but the tensors' data."""
        return hashlib.sha256(self.structure + repr(self.metas).encode()).hexdigest()


def same(x: Any) -> Any:
    """What it is given: how a pickle names an object that it holds."""
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
    """Give a function of the caller's script its globals also where TorchDynamo looks for them, in ``__main__``."""
    set_state(function, state)
    if function.__module__ == "__main__":
        vars(sys.modules["__main__"]).update(function.__globals__)


def pack(obj: Any) -> Payload:
    """Take an object apart.

    Raises:
        CodegenError: If something in it cannot be sent to another process.
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
    """Put an object together again, with these tensors in it."""
    return _Unpickler(io.BytesIO(structure), tensors.__getitem__).load()
