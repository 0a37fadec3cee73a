"""Mends for bugs of the PyTorch releases we support: one function per bug, deleted with the fix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@cache
def mend_cpu_flex_size_names() -> None:
    """Inductor's CPU FlexAttention kernels do not compile for some sizes (seen in torch 2.11 to 2.14).

    The template stands for its split sizes by two unbacked symbols, ``ks1`` say, and textually replaces that name in
    the generated C++, also inside ``ks18``, the size of a captured tensor. Named ``ku1_size``, they are part of no
    other name. Nothing but the names of size arguments changes, for any kernel.
    """
    from torch._inductor.codegen.common import KernelArgs

    plain = KernelArgs.size

    def size(self: Any, name: Any) -> str:
        if name.name.startswith("u"):
            return self.sizevars.setdefault(name, f"k{name.name}_size")
        return plain(self, name)

    KernelArgs.size = size


def running_max(x: Tensor) -> Tensor:
    """``x.cummax(0).values``, whose shape function guards on a size that was read from data (seen in torch 2.13)."""
    if torch.compiler.is_compiling():
        return torch.stack(list(accumulate(x.unbind(0), torch.maximum)))
    return x.cummax(dim=0).values


ROWS = "FlexAttention's CPU kernel mixes up the dimensions of rows that are looked up by position"
"""Why :func:`cpu_flex_misplaces` and :func:`mend_cpu_flex_rows` refuse a function."""


class _Shapes(TorchFunctionMode):
    """Notes whether the tensors that are watched become part of anything with dimensions, other than as an index."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched = {id(x): x for x in watched}  # the values keep the ids from being reused
        self.has_rows = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        if any(id(x) in self.watched for x in given):
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.watched.update({id(x): x for x in made})
            seen = made if func is Tensor.__getitem__ else given + made
            self.has_rows |= any(x.ndim for x in seen)
        return out


def cpu_flex_misplaces(fn: Callable[..., Tensor], is_score: bool) -> bool:
    """Whether compiled FlexAttention computes something else than a user's function on a CPU (torch 2.11 to 2.14).

    The function is written for scalars and traced with them, but Inductor's CPU template puts queries ``[Q, 1]`` and
    keys ``[1, K]`` in their place, and the segment, which is looked up by the query, is ``[Q, 1]`` then. A row
    ``s = span[j]`` of 2 is ``[1, K, 2]`` there, and ``s[0]`` the row of the first key: any operation that counts
    dimensions from the left is wrong, silently or by reading outside a table. Heads stay scalars, so rows by head are
    right. Found by calling the function once, on zeros, and looking at the shapes of what it makes of positions.

    Args:
        fn: ``fn(b, h, i, j)``, or ``fn(score, b, h, i, j)``.
        is_score: Which of them.
    """
    b, h, i, j = (torch.zeros((), dtype=torch.int32) for _ in range(4))
    score = [torch.zeros(())] if is_score else []
    with _Shapes([*score, b, i, j]) as shapes:
        try:
            fn(*score, b, h, i, j)
        except Exception:  # a table without entries, perhaps; who runs it will be told
            return False
    return shapes.has_rows


def _misplaced(module: torch.fx.GraphModule, num_scores: int) -> bool:
    """The same of a function that was traced, by the shapes in its graph."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    b, _, i, j = inputs[num_scores : num_scores + 4]
    derived = {*inputs[:num_scores], b, i, j}
    for node in module.graph.nodes:
        if derived.isdisjoint(node.all_input_nodes) or node.op == "output":
            continue
        derived.add(node)
        if any(x.ndim for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)):
            return True
    return False


@cache
def mend_cpu_flex_rows() -> None:
    """What :func:`cpu_flex_misplaces` says of a function is an error when it is lowered, in graphs that call it, too.

    It sees users' own nodes, too, and holds for whoever calls FlexAttention in this process. A few rows that happen to
    come out right are refused with the others: those only summed over their last dimension, or given a dimension of 1.
    """
    lowering: Any = import_module("torch._inductor.kernel.flex.flex_attention")
    plain = lowering.lower_cpu

    def lower_cpu(query: Any, key: Any, value: Any, subgraph: Any, block_mask: Any, *rest: Any) -> Any:
        if _misplaced(subgraph.graph_module, 1) or _misplaced(block_mask[-1].graph_module, 0):
            raise NotImplementedError(ROWS)
        return plain(query, key, value, subgraph, block_mask, *rest)

    lowering.lower_cpu = lower_cpu


RANGED = ("constant", "index_expr", "add", "sub", "maximum", "minimum", "where", "to_dtype")
"""Operations of Inductor that clamped indices are made of."""


@cache
def mend_flex_negative_indices() -> None:
    """FlexAttention's Triton kernels do not count negative indices from the end (torch 2.11 to 2.14).

    Inductor has ``t[i, -1]`` read, and in the backward add to, what lies before the table: wrong numbers or a spoiled
    heap. Elsewhere it writes ``tl.where(index < 0, index + size, index)``; here, too, unless the index cannot be
    negative, which costs nothing in a loop. Its templates do not follow the ranges of indices, so this does.
    """
    from torch._inductor.bounds import ValueRangeAnalysis
    from torch._inductor.codegen.common import CSEVariable
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    select: Any = import_module("torch._inductor.select_algorithm")
    analysis = ValueRangeAnalysis()

    def range_of(x: Any) -> Any:
        if isinstance(x, CSEVariable):
            return x.bounds
        return bound_sympy(x) if hasattr(x, "free_symbols") else x

    class Wrapping(select.ModificationWrapper):
        def load(self, name: str, index: Any) -> Any:
            out = super().load(name, index)
            if name in self.fixed_inputs and name in ("b", "h", "m", "n"):
                out.bounds = ValueRanges(0, int_oo)
            return out

        def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = super()._default(name, args, kwargs)
            if name in RANGED and not kwargs:
                out.bounds = getattr(analysis, name)(*map(range_of, args))
            return out

        def indirect_indexing(self, index_var: Any, size: Any, check: bool, wrap_neg: bool = True) -> Any:
            if wrap_neg and not index_var.bounds.lower >= 0:
                line = f"tl.where({index_var} < 0, {index_var} + ({self._process_indexing(size)}), {index_var})"
                shape = {"dtype": index_var.dtype, "shape": index_var.shape}
                index_var = self.kernel.cse.generate(self.kernel.compute, line, **shape)
            return super().indirect_indexing(index_var, size, check, wrap_neg)

    select.ModificationWrapper = Wrapping


@cache
def mend_flex_short_queries() -> None:
    """FlexAttention asks whether there are fewer than 128 queries where nothing depends on it (torch 2.11 to 2.14).

    The answer may choose its decoding kernel, but not if ``BACKEND="TRITON"`` has chosen already. It is asked all the
    same, and becomes a guard: batches of fewer tokens compile once more (seen on an H100).
    """
    lowering: Any = import_module("torch._inductor.kernel.flex.flex_attention")
    settle, decide = lowering._sanitize_kernel_options_for_triton, lowering._use_flex_decoding

    def settled(kernel_options: dict[str, Any]) -> tuple[dict[str, Any], str]:
        options, backend = settle(kernel_options)
        return options | ({"FORCE_USE_FLEX_ATTENTION": True} if backend == "TRITON" else {}), backend

    def use_decoding(query: Any, kv_indices: Any, value: Any, kernel_options: Any, enable_gqa: Any) -> bool:
        forced = kernel_options.get("FORCE_USE_FLEX_ATTENTION", False)
        return not forced and decide(query, kv_indices, value, kernel_options, enable_gqa)

    lowering._sanitize_kernel_options_for_triton, lowering._use_flex_decoding = settled, use_decoding


@cache
def mend_dynamo_invert() -> None:
    """Dynamo cannot trace ``~`` of an object with an ``__invert__`` of its own (torch 2.11 to 2.13; 2.14 can).

    It looks for a method ``call_invert`` beside those that it has for ``-`` and ``&``. Dynamo is not imported for this:
    where it is not yet, it is mended when it will be.
    """
    builtin = "torch._dynamo.variables.builtin"

    def mend(module: Any) -> None:
        from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

        def call_invert(self: Any, tx: Any, given: Any) -> Any:
            return given.call_method(tx, "__invert__", [], {}) if isinstance(given, UserDefinedObjectVariable) else None

        module.BuiltinVariable.call_invert = call_invert

    if dynamo_traces_invert():
        return
    if builtin in sys.modules:
        mend(sys.modules[builtin])
    else:
        sys.meta_path.insert(0, _After(builtin, mend))


def dynamo_traces_invert() -> bool:
    """Whether this torch's Dynamo traces ``~`` of any object by itself."""
    return _release() >= (2, 14)


def opcheck_reads_grads() -> bool:
    """Whether ``torch.library.opcheck`` asks tensors that are no leaves for their ``grad``: a warning (torch 2.14)."""
    return _release() >= (2, 14)


def _release() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


class _After(MetaPathFinder):
    """Calls a function on a module as soon as that has been imported, once."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own specification, with the call added to its execution; None for any other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.then(module)

            loader.exec_module = exec_module
        return spec


@torch.library.custom_op("flexjag::fence", mutates_args=())
def _fence(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_fence.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def holds_no_numbers(x: Tensor) -> bool:
    """Whether only shapes are known of a tensor: a graph is being traced, or it is a meta or a fake tensor."""
    return torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor) or _is_proxied()


def _is_proxied() -> bool:
    """Whether ``make_fx`` is tracing, which gives real tensors real values but cannot read them."""
    mode = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return torch._C._get_dispatch_mode(mode) is not None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def is_watched() -> bool:
    """Whether a dispatch mode sees every operation, and may keep what it returns."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def fence(x: Tensor) -> Tensor:
    """In a traced graph a contiguous copy that Inductor cannot see through; else `x` itself. Without gradients.

    Inductor's CPU FlexAttention takes no view of a tensor of another rank, and no operation fused behind it. Its Triton
    one inlines a tensor that a mod reads and that the graph has not yet written, and fails if that one is padded
    (seen in torch 2.11 to 2.14).
    """
    return _fence(x) if torch.compiler.is_compiling() else x
