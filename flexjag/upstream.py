"""Workarounds for bugs of the supported PyTorch releases: one function per bug, deleted with the fix."""

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
    """Fix name clashes of sizes that keep Inductor's CPU FlexAttention kernels from compiling (torch 2.11 to 2.14).

    The template represents its split sizes by two unbacked symbols, for instance ``ks1``, and replaces that name
    textually in the generated C++, also inside ``ks18``, the size of a captured tensor. With the name ``ku1_size`` they
    are a substring of no other name. Only names of size arguments change, in all kernels.
    """
    from torch._inductor.codegen.common import KernelArgs

    plain = KernelArgs.size

    def size(self: Any, name: Any) -> str:
        if name.name.startswith("u"):
            return self.sizevars.setdefault(name, f"k{name.name}_size")
        return plain(self, name)

    KernelArgs.size = size


def running_max(x: Tensor) -> Tensor:
    """Cumulative maximum along dimension 0. The shape function of ``cummax`` guards on unbacked sizes (torch 2.13)."""
    if torch.compiler.is_compiling():
        return torch.stack(list(accumulate(x.unbind(0), torch.maximum)))
    return x.cummax(dim=0).values


def number(x: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor of a number, which may be an argument of a graph.

    Inductor folds ``torch.full`` of such a number to a constant, the first one that the graph is given (torch 2.13).
    """
    return torch.zeros((), dtype=dtype, device=device) + x


ROWS = "FlexAttention's CPU kernel mixes up the dimensions of rows that are looked up by position"
"""Error message for functions that :func:`cpu_flex_misplaces` or :func:`mend_cpu_flex_rows` reject."""


PACKAGED = "FlexAttention's CPU kernel cannot be in a package of AOTInductor; export with backend='cpp' or 'tiled'"
"""Error message for packages that :func:`mend_cpu_flex_rows` rejects."""


class _Shapes(TorchFunctionMode):
    """Records whether watched tensors, or results of them, meet tensors with dimensions, other than as an index."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.watched = {id(x): x for x in watched}  # holding the tensors keeps their ids unique
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
    """Whether compiled FlexAttention miscomputes a user's function on a CPU (torch 2.11 to 2.14).

    The function is traced with scalars, but Inductor's CPU template substitutes queries ``[Q, 1]`` and keys
    ``[1, K]``, and the segment, looked up by query, becomes ``[Q, 1]``. A row ``s = span[j]`` of 2 entries is
    ``[1, K, 2]`` there, and ``s[0]`` the row of the first key: any operation that counts dimensions from the left is
    wrong, silently or by reading outside a table. Heads stay scalars, so rows by head are right. Detected by calling
    the function once, on zeros, and inspecting the shapes of tensors derived from positions.

    Args:
        fn: ``fn(b, h, i, j)``, or ``fn(score, b, h, i, j)``.
        is_score: Whether `fn` takes the score.
    """
    b, h, i, j = (torch.zeros((), dtype=torch.int32, device="cpu") for _ in range(4))
    score = [torch.zeros((), device="cpu")] if is_score else []
    with _Shapes([*score, b, i, j]) as shapes:
        try:
            fn(*score, b, h, i, j)
        except Exception:  # an empty table, perhaps; running it raises
            return False
    return shapes.has_rows


def _misplaced(module: torch.fx.GraphModule, num_scores: int) -> bool:
    """:func:`cpu_flex_misplaces` of a traced function, by the shapes in its graph."""
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
    """Make lowering a function that :func:`cpu_flex_misplaces` detects an error, also in compiled graphs.

    So is lowering for AOTInductor, whose C++ for that kernel does not compile. Covers users' own nodes, and every
    caller of FlexAttention in this process. A few functions with correct results are rejected as well: those that only
    sum a row over its last dimension, or add a dimension of 1 to it.
    """
    from torch._inductor.virtualized import V

    lowering: Any = import_module("torch._inductor.kernel.flex.flex_attention")
    plain = lowering.lower_cpu

    def lower_cpu(query: Any, key: Any, value: Any, subgraph: Any, block_mask: Any, *rest: Any) -> Any:
        if V.graph.aot_mode:
            raise NotImplementedError(PACKAGED)
        if _misplaced(subgraph.graph_module, 1) or _misplaced(block_mask[-1].graph_module, 0):
            raise NotImplementedError(ROWS)
        return plain(query, key, value, subgraph, block_mask, *rest)

    lowering.lower_cpu = lower_cpu


RANGED = ("constant", "index_expr", "add", "sub", "maximum", "minimum", "where", "to_dtype")
"""Inductor operations whose value ranges are tracked: those of clamped indices."""


@cache
def mend_flex_negative_indices() -> None:
    """Make negative indices count from the end in FlexAttention's Triton kernels (torch 2.11 to 2.14 do not).

    Without this, ``t[i, -1]`` reads, and in the backward adds to, memory before the table: wrong numbers or a corrupted
    heap. Other Inductor kernels use ``tl.where(index < 0, index + size, index)``; this emits the same, except for
    indices that cannot be negative, so that loops cost nothing. Templates do not track value ranges, so this does.
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
    """Remove FlexAttention's guard on fewer than 128 queries where no choice depends on it (torch 2.11 to 2.14).

    The comparison selects the decoding kernel, unless ``BACKEND="TRITON"`` excludes it. It is evaluated nevertheless
    and becomes a guard: batches of fewer tokens recompile once (seen on an H100).
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
    """Let Dynamo trace ``~`` of objects that define ``__invert__`` (needed in torch 2.11 to 2.13, not in 2.14).

    Dynamo looks up a method ``call_invert``, which it lacks. Dynamo is not imported for this: if it is not loaded yet,
    it is patched on import.
    """
    builtin = "torch._dynamo.variables.builtin"

    def mend(module: Any) -> None:
        from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

        def call_invert(self: Any, tx: Any, given: Any) -> Any:
            return given.call_method(tx, "__invert__", [], {}) if isinstance(given, UserDefinedObjectVariable) else None

        module.BuiltinVariable.call_invert = call_invert

    if not dynamo_traces_invert():
        _when_imported(builtin, mend)


def on_recompiling(told: Callable[[Any, list[str]], None]) -> Callable[[], None]:
    """Have TorchDynamo call a function whenever it is about to compile a function anew (torch 2.11 to 2.14).

    Dynamo says why in its logs only. Its own search for the reasons is wrapped, on its import if it is not loaded yet.

    Args:
        told: Called with the Python frame of the function, of which ``f_code`` and ``f_locals`` can be read, and one
            text per graph compiled before: the first of its guards that fails.

    Returns:
        A function that ends this.
    """
    _told.append(told)
    _watch_recompiling()
    return lambda: _told.remove(told)


_told: list[Callable[[Any, list[str]], None]] = []


@cache
def _watch_recompiling() -> None:
    name, function = "torch._dynamo.convert_frame", "get_and_maybe_log_recompilation_reasons"

    def mend(module: Any) -> None:
        plain = getattr(module, function)

        def reasons_of(entries: Any, frame: Any, backend: Any, skip_logging: bool = False) -> list[str]:
            reasons = plain(entries, frame, backend, skip_logging)
            for told in () if skip_logging else tuple(_told):
                told(frame, reasons)
            return reasons

        setattr(module, function, reasons_of)

    _when_imported(name, mend)


def dynamo_traces_invert() -> bool:
    """Whether this release's Dynamo traces ``~`` of user-defined objects."""
    return _release() >= (2, 14)


def dynamo_differentiates_varying_sizes() -> bool:
    """Whether ``torch.func.grad`` inside a graph takes tensors of sizes that vary (torch 2.11 fails an assertion)."""
    return _release() >= (2, 13)


def opcheck_reads_grads() -> bool:
    """Whether ``torch.library.opcheck`` reads ``grad`` of non-leaf tensors, which warns (torch 2.14)."""
    return _release() >= (2, 14)


def _release() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call a function on a module, at once if it is loaded."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _After(name, then))


class _After(MetaPathFinder):
    """Import hook that calls a function on a module once, directly after its import."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the module's spec with the call appended to its execution; None for other modules."""
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
    """Whether a tensor has a shape but no readable values: in a traced graph, or a meta or fake tensor."""
    return torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor) or _is_proxied()


def _is_proxied() -> bool:
    """Whether ``make_fx`` is tracing: its tensors have values, but reading them cannot be traced."""
    mode = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return torch._C._get_dispatch_mode(mode) is not None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def is_watched() -> bool:
    """Whether a dispatch mode is active, which sees every operation and may keep its results."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


_PLAIN = (Tensor, torch.nn.Parameter)


def is_unobserved(*tensors: Tensor) -> bool:
    """Whether an operator's call with these tensors does nothing but to call its function: gradients aside.

    That is, no graph is traced, the tensors are no subclass's, and neither a dispatch mode, a ``torch.func`` transform
    nor the profiler is active.
    """
    if torch.compiler.is_compiling() or is_watched() or not all(type(x) in _PLAIN for x in tensors):
        return False
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    return not transformed and not torch.autograd.profiler._is_profiler_enabled  # pyright: ignore[reportPrivateUsage]


def fence(x: Tensor) -> Tensor:
    """Contiguous copy by an opaque operator in a traced graph, otherwise `x` itself. Has no gradients.

    Inductor's CPU FlexAttention accepts no view of a tensor of another rank, and no operation fused behind it. Its
    Triton FlexAttention inlines an unrealized tensor that a mod reads, and fails if that tensor is padded (seen in
    torch 2.11 to 2.14).
    """
    return _fence(x) if torch.compiler.is_compiling() else x
