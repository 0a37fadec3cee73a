"""Assertion that batches of different sizes share one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo  # at import: batches made before Dynamo is loaded are not marked as dynamic
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves

BACKENDS = ("inductor", "aot_eager")


@dataclass(frozen=True, eq=False)
class Graphs:
    """Indices of the batches that compiled a graph, per direction.

    Attributes:
        forward: Batch indices of forward graphs that save tensors for a backward.
        backward: Batch indices of backward graphs.
        inference: Batch indices of graphs of calls without gradients.
    """

    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    inference: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        rows = (("forward", self.forward), ("backward", self.backward), ("inference", self.inference))
        return (
            ", ".join(f"{len(at)} {name} graph{'s' * (len(at) != 1)} (batches {at})" for name, at in rows if at)
            or "no graph"
        )


class _Counter:
    """Compiler backends, Inductor or AOTAutograd, that record the batch each graph is compiled for."""

    def __init__(self) -> None:
        self.graphs = Graphs()
        self.batch = 0

    def note(self, kind: str) -> None:
        getattr(self.graphs, kind).append(self.batch)

    def inductor(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: torch.fx.GraphModule, example: Any, **keywords: Any) -> Any:
            kinds = {"is_backward": "backward", "is_inference": "inference"}
            self.note(next((kind for flag, kind in kinds.items() if keywords.get(flag)), "forward"))
            return compile_fx_inner(graph, example, **keywords)

        return compile_fx(module, inputs, inner_compile=inner)

    def aot_eager(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch._aot_autograd.utils import make_boxed_func

        def compiler(kind: str) -> Callable[..., Any]:
            def compile_graph(graph: torch.fx.GraphModule, example: Any) -> Any:
                self.note(kind)
                return make_boxed_func(graph.forward)

            return compile_graph

        kinds = {"fw_compiler": "forward", "bw_compiler": "backward", "inference_compiler": "inference"}
        return aot_autograd(**{name: compiler(kind) for name, kind in kinds.items()})(module, inputs)


def assert_compiles(
    fn: Callable[..., Any],
    batches: Iterable[tuple[Any, ...]],
    *,
    max_graphs: int = 1,
    backward: bool = True,
    backend: str = "inductor",
    after_each: Callable[[int, Any], None] | None = None,
) -> Graphs:
    """Assert that `fn` compiles without graph breaks, and into few graphs for all batches together.

    Runs ``torch.compile(fn, fullgraph=True)`` on every batch, followed by a backward of the sum of its outputs, so that
    gradients accumulate in the leaves' ``grad``. Resets TorchDynamo before and afterwards.

    Args:
        fn: A function or module.
        batches: The arguments of each call.
        max_graphs: The most graphs allowed in each direction (forward, backward, inference). PyTorch specializes on
            sizes 0 and 1, so batches of T = 0 or T = 1 need one more graph each.
        backward: Whether to run backwards. Otherwise the calls run under ``torch.no_grad()``.
        backend: ``"inductor"``, or ``"aot_eager"`` to trace both directions without generating code, which is faster.
        after_each: Called with the index and the outputs after each batch, to check them.

    Returns:
        The indices of the batches that compiled a graph.

    Raises:
        AssertionError: If one direction has more than `max_graphs` graphs, naming the batch of each; or if nothing was
            compiled.

    >>> assert_compiles(lambda x: x.sin(), [(torch.randn(n),) for n in (5, 5)], backward=False, backend="aot_eager")
    Graphs(forward=[], backward=[], inference=[0])
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}; got backend={backend!r}")
    counter = _Counter()
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=getattr(counter, backend))
    # Cached graphs would bypass the counter, and Dynamo's recompile limit would cap the count.
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    limits = torch._dynamo.config.patch(recompile_limit=max(8, max_graphs + 1), accumulated_recompile_limit=10_000)
    try:
        with caches, limits:
            for index, batch in enumerate(batches):
                counter.batch = index
                with torch.set_grad_enabled(backward):
                    out = compiled(*batch)
                if backward:
                    _backward(out, index)
                _check(counter.graphs, max_graphs, index)
                if after_each is not None:
                    after_each(index, out)
    finally:
        torch._dynamo.reset()
    if not counter.graphs.forward and not counter.graphs.inference:
        raise AssertionError("nothing was compiled: there were no batches, or the function does not use torch")
    return counter.graphs


def _backward(out: Any, index: int) -> None:
    leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        raise AssertionError(f"backward: no output of batch {index} needs a gradient; pass backward=False")
    torch.stack([x.float().sum() for x in leaves]).sum().backward()


def _check(graphs: Graphs, most: int, index: int) -> None:
    if max(len(graphs.forward), len(graphs.backward), len(graphs.inference)) > most:
        raise AssertionError(f"{graphs} after batch {index}, but at most {most} allowed in each direction")
