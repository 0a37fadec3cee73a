"""Custom operators of ``torch.library`` that import no compiler, and in eager mode mostly bypass the dispatcher."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad, profiler

from flexjag.differentiation import needs_plain_operations
from flexjag.errors import DifferentiationError, explain_values

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., Any]

LIBRARY = torch.library.Library("flexjag", "FRAGMENT")

OPERATORS: dict[str, Operator[Any, Any]] = {}
"""All defined operators, by name."""

PLAIN = (Tensor, torch.nn.Parameter)


class Operator(Generic[P, R]):
    """The operator ``torch.ops.flexjag.<name>``: a plain-torch kernel for all devices, optionally others by device.

    Equivalent to ``torch.library.custom_op`` with two differences. The first call of a custom op imports TorchDynamo,
    which takes seconds; this does not. And its dispatcher and autograd cost about 5 and 20 µs a call, as much as a
    small batch takes: in eager mode, with CPU tensors and no mode, tracer or profiler active, the kernel is called
    directly, and its gradient formula by an ``autograd.Function``, which ``torch.func`` supports as well.

    >>> from flexjag.ops.segment import add_up
    >>> add_up.overload._schema
    flexjag::add_up(Tensor values, Tensor offsets) -> Tensor
    """

    def __init__(self, name: str, kernel: Callable[P, R]) -> None:
        schema = torch.library.infer_schema(kernel, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _untraced(kernel), "CompositeExplicitAutograd")
        self.name, self.kernel = name, kernel
        self.on_cpu: Function = kernel  # called with plain CPU tensors if no mode, tracer or profiler is active
        self.formula: Any = None
        self.record: Any = None
        self.overload = getattr(torch.ops.flexjag, name).default
        self.launcher: Function | None = None
        OPERATORS[name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the operator; while a graph is traced, record it as one node."""
        if torch.compiler.is_compiling() or kwargs:
            return self.overload(*args, **kwargs)
        if needs_plain_operations():
            return self.formula.apply(*unwrap_dead_wrappers(tuple(_flat(args))))  # of ended transforms
        if _is_watched() or not _are_plain(args):
            return self.overload(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):  # pyright: ignore[reportPrivateUsage]
            return self.record(*_flat(args))
        return self.on_cpu(*args)

    def register_fake(self, fake: Function) -> Function:
        """Register the fake kernel, which computes shapes only; usable as a decorator."""
        torch.library.register_fake(f"flexjag::{self.name}", fake, lib=LIBRARY)
        return fake

    def register_kernel(self, module: str, device: Literal["CPU", "CUDA"] = "CUDA") -> None:
        """Register the function of the operator's name in `module` as the kernel of a device.

        The module is imported on the first call. If it needs Triton and that is missing, or the function returns
        NotImplemented because it has no kernel for the arguments, the plain kernel runs.
        """
        function: Function | None = None

        def find() -> Function:
            nonlocal function
            found: Function = _without_kernel
            try:
                found = getattr(importlib.import_module(module), self.name)
            except ModuleNotFoundError as missing:
                if missing.name != "triton":
                    raise
            function = found
            return found

        def launch(*args: Any, **kwargs: Any) -> Any:
            return (function or find())(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            found = (function or find())(*args, **kwargs)
            return self.kernel(*args, **kwargs) if found is NotImplemented else found

        if device == "CPU":
            self.on_cpu = run
        else:
            self.launcher = launch
        LIBRARY.impl(self.name, _untraced(run), device)

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """Register the gradient formula; see ``torch.library.register_autograd``.

        Derivatives of all orders follow from it: it is composed of differentiable operators, and it is linear in the
        output gradients, so that its transpose gives forward mode.
        """
        self.formula = _make_function(self, backward, setup_context)
        # Function.apply also checks for transforms (none are active here) and binds defaults, which takes 10 µs.
        self.record = record = super(torch.autograd.Function, self.formula).apply  # pyright: ignore[reportAttributeAccessIssue]

        def differentiate(*args: Any) -> Any:
            if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
                rule = "derivatives by torch.func are for eager mode, not for compiled graphs"
                raise DifferentiationError(explain_values(self.name, rule))
            return record(*_flat(args))

        LIBRARY.impl(self.name, differentiate, "Autograd")

    def run(self, args: Sequence[Any]) -> Any:
        """Run the operator below autograd, without gradients and transforms."""
        run = self.on_cpu if not _is_watched() and _are_plain(args) else self.overload
        with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
            return run(*args)


def _without_kernel(*args: Any, **kwargs: Any) -> Any:
    return NotImplemented


def define(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator that defines an operator by an annotated plain-torch kernel."""
    return lambda kernel: Operator(name, kernel)


def interpret_kernels() -> None:
    """Run the Triton kernels on CPU tensors as well, instead of the plain kernels.

    For a process started with TRITON_INTERPRET=1; it cannot be undone.
    """
    for op in OPERATORS.values():
        if op.launcher is not None:
            LIBRARY.impl(op.name, _untraced(op.launcher), "CPU")
            op.on_cpu = op.launcher


def _make_function(op: Operator[Any, Any], backward: Function, setup_context: Function) -> Any:
    """Make an operator's ``autograd.Function``. Lists of tensors are flattened; the last argument is their number."""

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op.run(_nested(args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, _nested(inputs), output)
            if needs_plain_operations():
                ctx.save_for_forward(*ctx.to_save)
                outputs, fixed = (output,) if isinstance(output, Tensor) else output, ctx.non_differentiable or ()
                ctx.zeros = [torch.zeros_like(x) for x in outputs]
                ctx.varies = [all(x is not y for y in fixed) for x in outputs]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            return *(chain(*found) if found and isinstance(found[0], list) else found), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            given = [(at, x) for at, x in enumerate(tangents) if x is not None]
            seen = _Seen(ctx, [x is not None for x in tangents])

            def transposed(*grads: Tensor) -> tuple[Tensor, ...]:
                found = Formula.backward(seen, *grads)
                return tuple(torch.zeros_like(x) if found[at] is None else found[at] for at, x in given)

            pull = torch.func.vjp(transposed, *ctx.zeros)[1]
            found = pull(tuple(x for _, x in given))
            found = [x if varies else None for x, varies in zip(found, ctx.varies, strict=True)]
            return tuple(found) if len(found) > 1 else found[0]

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            def at(i: int) -> Any:
                pairs = zip(args, in_dims, strict=True)
                return Formula.apply(*[x if dim is None else x.select(dim, i) for x, dim in pairs])

            found = [at(i) for i in range(info.batch_size)]
            if isinstance(found[0], Tensor):
                return torch.stack(found), 0
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])

    return type(op.name, (Formula,), {})  # autograd names its graph nodes after the class


class _Seen:
    """A backward context with other `needs_input_grad`: those of the inputs with tangents, for forward mode."""

    def __init__(self, ctx: Any, needs_input_grad: list[bool]) -> None:
        self._ctx = ctx
        self.needs_input_grad = needs_input_grad
        self.saved_tensors = [None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _flat(args: Sequence[Any]) -> list[Any]:
    return [*chain(*args), len(args)] if isinstance(args[0], list | tuple) else [*args, None]


def _nested(args: Sequence[Any]) -> Sequence[Any]:
    parts = args[-1]
    if parts is None:
        return args[:-1]
    size = (len(args) - 1) // parts
    return [list(args[i : i + size]) for i in range(0, len(args) - 1, size)]


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether all tensors are on a CPU and neither subclasses nor wrappers left by a transform that has ended."""
    for x in args:
        if isinstance(x, Tensor):
            if type(x) not in PLAIN or not x.is_cpu or is_functorch_wrapped_tensor(x):
                return False
        elif type(x) is list and not _are_plain(x):
            return False
    return True


def _is_watched() -> bool:
    """Whether a mode, a tracer, Dynamo's frame evaluation or a profiler is active and must see the call."""
    c = torch._C  # pyright: ignore[reportPrivateUsage]
    return (
        c._len_torch_dispatch_stack() > 0
        or c._len_torch_function_stack() > 0
        or c._get_tracing_state() is not None
        or _is_traced()
        or profiler._is_profiler_enabled
    )


def _is_traced() -> bool:
    """Whether Dynamo's frame evaluation is active."""
    return get_eval_frame_callback() is not None


def _untraced(kernel: Function) -> Function:
    """Wrap a kernel so that TorchDynamo does not trace its loops."""
    hidden: list[Function] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _is_traced():
            return kernel(*args, **kwargs)
        if not hidden:
            hidden.append(torch._dynamo.disable(kernel))
        return hidden[0](*args, **kwargs)

    return call
