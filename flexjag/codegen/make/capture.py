"""Capture of the FX graphs that Inductor would compile for a function, forward and backward. For the worker only.

Nothing is computed: the tensors are fake ones on the CPU, so a batch of a million tokens is captured as fast as one of
a hundred. FlexAttention refuses gradients and the log-sum-exp on the CPU; those two checks are lifted.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from flexjag.codegen.payload import Meta, pack, unpack
from flexjag.lowering.layout import cpu_stands_in_for_gpu


@dataclass(frozen=True)
class Graph:
    """One FX graph, before it is rehomed: ``"forward"`` or ``"backward"``."""

    phase: str
    module: torch.fx.GraphModule
    inputs: list[Any]


@dataclass(frozen=True)
class Wiring:
    """Mapping of values between the caller, the forward graph and the backward graph, by position and name.

    Attributes:
        inputs: For each forward input ``("tensor", index in the payload)`` or ``("size", value)``.
        output_names: Names of the forward graph's outputs.
        num_outputs: Number of outputs that the function returns; the others are saved for the backward.
        backward_inputs: Names of the backward graph's inputs. Those that are no forward output are tangents.
        structure: The function's result, pickled, with tensors as indices into `result`.
        result: For each tensor in `structure`: ``("output", i)`` or ``("input", index in the payload)``.
        needs_grad: True for each output that has a tangent.
    """

    inputs: tuple[tuple[str, int], ...]
    output_names: tuple[str, ...]
    num_outputs: int
    backward_inputs: tuple[str, ...]
    structure: bytes
    result: tuple[tuple[str, int], ...]
    needs_grad: tuple[bool, ...]


@dataclass
class _Recorder:
    """A Dynamo backend that records graphs instead of compiling them."""

    fakes: Sequence[Tensor]
    graphs: list[Graph] = field(default_factory=list)
    inputs: tuple[tuple[str, int], ...] = ()
    outputs: list[Any] = field(default_factory=list)
    needs_grad: tuple[bool, ...] = ()
    problem: str | None = None

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.compile_fx import partition_fn
        from torch._inductor.decomposition import select_decomp_table

        if self.graphs:
            raise RuntimeError("the function was traced twice; it must be one graph")
        (returned,) = (n for n in module.graph.nodes if n.op == "output")
        shown = [n.meta["example_value"] if isinstance(n, torch.fx.Node) else n for n in returned.args[0]]
        self.needs_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in shown)
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            aot_autograd(
                fw_compiler=self.keep("forward"),
                bw_compiler=self.keep("backward"),
                inference_compiler=self.keep("forward", is_whole=True),
                decompositions=select_decomp_table(),
                partition_fn=partition_fn,
            )(module, inputs)
        self.problem = _problem(len(shown))

        def run(*given: Any) -> list[Any]:
            self.inputs = tuple(self.source(x) for x in given)
            self.outputs = [torch.empty(0) for _ in shown]  # only their places in the result matter
            return self.outputs

        return run

    def keep(self, phase: str, is_whole: bool = False) -> Callable[..., Any]:
        """Compiler that records a graph of this phase.

        If `is_whole`, it first runs Inductor's passes over the joint graph: lowering relies on them, and the
        partitioner, which otherwise runs them before it partitions, is not used.
        """
        from torch._inductor.compile_fx import _recursive_joint_graph_passes

        def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            if is_whole:
                module = _recursive_joint_graph_passes(module)
            self.graphs.append(Graph(phase, module, list(inputs)))

            def never(_: list[Any]) -> Any:
                raise AssertionError("a captured graph is not run")

            never._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
            return never

        return compiler

    def source(self, given: Any) -> tuple[str, int]:
        if isinstance(given, int):
            return "size", given
        found = [i for i, x in enumerate(self.fakes) if x is given]
        if not found:
            rule = "the function reads a tensor that it was not given: pass it in, or close over it in a local function"
            raise RuntimeError(f"{rule}; globals of an imported module are not sent along")
        return "tensor", found[0]


def fake(meta: Meta, mode: FakeTensorMode) -> Tensor:
    """Fake tensor with the properties of the caller's."""
    with mode:
        x = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype)
    if meta.is_parameter:
        x = torch.nn.Parameter(x, meta.requires_grad)
    else:
        x.requires_grad_(meta.requires_grad)
    for dim in meta.varying:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def _problem(num_outputs: int) -> str | None:
    """Reason why the wiring cannot represent the graphs: mutated inputs, or outputs that are views; else None.

    AOTAutograd returns and differentiates other tensors for these, and corrects the results outside the graphs.
    """
    context = TracingContext.try_get()
    meta = None if context is None else context.fw_metadata
    if meta is None:
        return None
    if meta.num_mutated_inp_runtime_indices:
        return "the function changes one of its inputs or buffers in place, which cannot be followed"
    if meta.num_outputs_aliased or len(meta.output_info) != num_outputs:
        return "the function returns two views of one tensor or a view of an input; return a clone"
    return None


def _accept(*_: Any) -> None:
    """Accept anything, in place of a check. A plain function, which Dynamo can trace."""


def merged(own: dict[str, Any], callers: dict[str, Any]) -> dict[str, Any]:
    """Merge kernel options; the caller's take precedence, and those without a prefix apply to forward and backward.

    >>> merged({"fwd_num_warps": 8, "bwd_num_warps": 8}, {"num_warps": 4, "bwd_num_warps": 2})
    {'num_warps': 4, 'bwd_num_warps': 2}
    """
    kept = {k: v for k, v in own.items() if k.removeprefix("fwd_").removeprefix("bwd_") not in callers}
    return {**kept, **callers}


@contextlib.contextmanager
def as_on_gpu(kernel_options: dict[str, Any]) -> Iterator[None]:
    """Make FlexAttention and flexjag behave as for tensors on a GPU, within the context."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    backend = importlib.import_module("flexjag.backends.flex.options")
    apply, options = flex._apply_kernel_options, backend.kernel_options

    def apply_kernel_options(q: Any, k: Any, v: Any, lse: bool, given: Any, aux: Any = None) -> dict[str, Any]:
        made = apply(q, k, v, lse, given, aux)
        wanted = lse if aux is None else aux.lse
        made["OUTPUT_LOGSUMEXP"] = wanted or torch.is_grad_enabled()
        return made

    def with_callers(*args: Any) -> dict[str, Any]:
        return merged(options(*args), kernel_options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_stands_in_for_gpu())
        stack.enter_context(mock.patch.object(flex, "_validate_device", _accept))
        stack.enter_context(mock.patch.object(flex, "_apply_kernel_options", apply_kernel_options))
        stack.enter_context(mock.patch.object(backend, "kernel_options", with_callers))
        yield


def capture(
    structure: bytes, metas: Sequence[Meta], backward: bool, kernel_options: dict[str, Any]
) -> tuple[list[Graph], Wiring]:
    """Trace ``fn(*args)`` into its graphs and their wiring.

    Args:
        structure: The pickled ``(fn, args)``.
        metas: Properties of its tensors.
        backward: Capture the backward graph, too.
        kernel_options: Kernel options of FlexAttention, added to the plan's own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake(meta, mode) for meta in metas]
    fn, args = unpack(structure, fakes)
    recorder = _Recorder(fakes)
    with as_on_gpu(kernel_options), torch.set_grad_enabled(backward):
        returned = torch.compile(fn, backend=recorder, fullgraph=True)(*args)
    if recorder.problem is not None:
        raise RuntimeError(recorder.problem)
    graphs = {g.phase: g for g in recorder.graphs}
    if "forward" not in graphs:
        raise RuntimeError("the function does nothing to a tensor, so there is no kernel to make")
    result = pack(returned)
    places = [_place(x, recorder) for x in result.tensors]
    names = _names(graphs["forward"].module)
    num = len(recorder.outputs)
    taken = [n.name for g in (graphs.get("backward"),) if g for n in g.module.graph.nodes if n.op == "placeholder"]
    wiring = Wiring(recorder.inputs, names, num, tuple(taken), result.structure, tuple(places), recorder.needs_grad)
    return [graphs[p] for p in ("forward", "backward") if p in graphs], wiring


def _names(module: torch.fx.GraphModule) -> tuple[str, ...]:
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    return tuple(x.name if isinstance(x, torch.fx.Node) else repr(x) for x in pytree.tree_leaves(output.args[0]))


def _place(x: Tensor, recorder: _Recorder) -> tuple[str, int]:
    for i, out in enumerate(recorder.outputs):
        if x is out:
            return "output", i
    return "input", recorder.source(x)[1]
