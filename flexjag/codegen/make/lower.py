"""Lowering of FX graphs to Inductor's wrappers with their Triton kernels. For the worker only, after `pretend`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from flexjag.codegen.make.capture import Graph

CUDA = "cuda:0"


def lower(graphs: Sequence[Graph]) -> dict[str, str]:
    """Return the Python source of each graph's wrapper, by phase."""
    return {graph.phase: _lower(graph) for graph in graphs}


def _lower(graph: Graph) -> str:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def keep(lowering: Any) -> Any:
        code = lowering.codegen()[0]
        found.append(getattr(code, "value", code))
        return types.SimpleNamespace(call=lambda _: None, __file__="offline", runner=None)

    mode, inputs = _rehome(graph)
    with mock.patch.object(GraphLowering, "compile_to_module", keep), tracing(TracingContext(mode)), mode:
        compile_fx_inner(graph.module, inputs, is_backward=graph.phase == "backward")
    return found[0]


def _rehome(graph: Graph) -> tuple[FakeTensorMode, list[Any]]:
    """Move a graph, in place, and its inputs to the pretended device."""
    symbols = [x.node.shape_env for x in pytree.tree_leaves(graph.inputs) if isinstance(x, torch.SymInt)]
    held = [x.fake_mode.shape_env for x in graph.inputs if isinstance(x, torch._subclasses.FakeTensor)]
    envs = symbols + [x for x in held if x is not None]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=envs[0] if envs else None)

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)

    with mode:
        for module in graph.module.modules():
            if not isinstance(module, torch.fx.GraphModule):
                continue
            for node in module.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device(CUDA)}
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map(move, node.meta["val"])
            module.recompile()
        return mode, [move(x) for x in graph.inputs]
