"""Operators of ``torch.library`` that load no compiler when they are called eagerly."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import torch

from flexjag.errors import BackendError, explain_values

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., Any]

LIBRARY = torch.library.Library("flexjag", "FRAGMENT")

OPERATORS: dict[str, Operator[Any, Any]] = {}
"""All that were defined, by name."""


class Operator(Generic[P, R]):
    """A plain-torch kernel as the operator ``torch.ops.flexjag.<name>``, for all devices; with others for some.

    What ``torch.library.custom_op`` makes, but for one thing: the first call of a kernel of that imports TorchDynamo,
    which takes seconds.

    >>> from flexjag.ops.segment import add_up
    >>> add_up.overload._schema
    flexjag::add_up(Tensor values, Tensor offsets) -> Tensor
    """

    def __init__(self, name: str, kernel: Callable[P, R]) -> None:
        schema = torch.library.infer_schema(kernel, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _untraced(kernel), "CompositeExplicitAutograd")
        self.name, self.kernel = name, kernel
        self.overload = getattr(torch.ops.flexjag, name).default
        self.launcher: Function | None = None
        OPERATORS[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the operator, as an entry of a graph if one is being traced."""
        return self.overload(*args, **kwargs)

    def register_fake(self, fake: Function) -> Function:
        """A decorator: the shapes of the results, without data."""
        torch.library.register_fake(f"flexjag::{self.name}", fake, lib=LIBRARY)
        return fake

    def register_kernel(self, module: str) -> None:
        """Let the function of this name in `module` run the operator on CUDA tensors.

        The module is imported with the first such tensor. Where Triton is missing, or the function answers
        NotImplemented as it has no kernel for a dtype, the plain kernel runs.
        """

        def launch(*args: Any, **kwargs: Any) -> Any:
            try:
                function = getattr(importlib.import_module(module), self.name)
            except ModuleNotFoundError as missing:
                if missing.name != "triton":
                    raise
                return NotImplemented
            return function(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            found = launch(*args, **kwargs)
            return self.kernel(*args, **kwargs) if found is NotImplemented else found

        self.launcher = launch
        LIBRARY.impl(self.name, _untraced(run), "CUDA")

    def register_autograd(self, backward: Function, *, setup_context: Function | None = None) -> None:
        """The gradient formula; see ``torch.library.register_autograd``."""
        torch.library.register_autograd(self.overload, backward, setup_context=setup_context, lib=LIBRARY)


def define(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """A decorator that makes an operator of an annotated plain-torch kernel."""
    return lambda kernel: Operator(name, kernel)


def interpret_kernels() -> None:
    """Send CPU tensors to the Triton kernels as well, never to the plain ones.

    For a process that was started with TRITON_INTERPRET=1; nothing undoes it.
    """
    for op in OPERATORS.values():
        if op.launcher is not None:
            LIBRARY.impl(op.name, _untraced(op.launcher), "CPU")


def refuse(ctx: Any, *grads: Any) -> NoReturn:
    """The gradient formula of a gradient formula that has none."""
    raise BackendError(explain_values("backward", "there is no autograd formula for second derivatives of this op"))


def _untraced(kernel: Function) -> Function:
    """The kernel, hidden from TorchDynamo if that is in use: its loops must not be traced."""
    hidden: list[Function] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not hasattr(dynamo, "disable"):
            return kernel(*args, **kwargs)
        if not hidden:
            hidden.append(dynamo.disable(kernel))
        return hidden[0](*args, **kwargs)

    return call
