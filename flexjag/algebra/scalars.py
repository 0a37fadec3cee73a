"""Vectorization of users' scalar functions by nested vmap, with errors that name the function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexjag.errors import FlexjagError, explain_values
from flexjag.upstream import holds_no_numbers

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv")
_MENDED = {
    *(f"__{kind}{name}__" for kind in ("", "r", "i") for name in _ARITHMETIC),
    *(*_ARITHMETIC, "subtract", "multiply", "divide", "true_divide"),
}
"""Functions that fail in vmap with a symbolic size as operand (seen in torch 2.11 to 2.13)."""


def apply(fn: Callable[..., Tensor], error: type[FlexjagError], *args: Tensor) -> Tensor:
    """Apply a function of scalars elementwise to tensors that broadcast together.

    The function may close over whatever FlexAttention allows: in a traced graph also scalar tensors used as an index,
    and symbolic sizes.

    Args:
        fn: The user's function.
        error: Class of the error to raise if it fails, for instance by an index out of range.
        *args: The score, if the function takes it, then b, h, and the positions of query and key.

    Raises:
        error: If the function fails, naming it and the positions; neither in a traced graph nor on a GPU.
    """
    if max(a.ndim for a in args) == 0:  # FlexAttention's scalars
        return fn(*args)
    if holds_no_numbers(args[-1]):
        in_graph = _as_in_a_graph(fn)
        if torch.compiler.is_exporting():  # strict export fails if a parameter first occurs under vmap
            in_graph(*(x.new_zeros(()) for x in args))
        return _elementwise(in_graph, *args)
    with blamed(fn, error, *args[-4:]):
        return _elementwise(fn, *args)


@contextmanager
def blamed(fn: Callable[..., Tensor], error: type[FlexjagError], *at: Tensor) -> Iterator[None]:
    """Re-raise exceptions as `error`, naming the user's function and the ranges of b, h, q_pos and kv_pos."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as reason:
        rule = f"{name_of(fn)} must work for all positions of all segments, with every lookup inside its table"
        seen = {key: _range(x) for key, x in zip(("b", "h", "q_pos", "kv_pos"), at, strict=True)}
        raise error(explain_values("fn", rule, error=str(reason).split("\n")[0], **seen)) from reason


def name_of(fn: Callable[..., Tensor]) -> str:
    """Name of a user's function for messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def _range(x: Tensor) -> str:
    """Smallest and largest value of a tensor, as text."""
    return f"{int(x.min())}..{int(x.max())}" if x.numel() else "none"


def _elementwise(fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Apply `fn` by one vmap per dimension of the result."""
    ndim = max(a.ndim for a in args)
    aligned = [a.reshape((1,) * (ndim - a.ndim) + tuple(a.shape)) for a in args]
    # A dimension of size 1 broadcasts: it is not mapped, and if it is 1 in all arguments there is no vmap for it.
    varies = [[a.shape[d] != 1 for a in aligned] for d in range(ndim)]
    for d in reversed(range(ndim)):
        if any(varies[d]):
            fn = torch.vmap(fn, in_dims=tuple(0 if v else None for v in varies[d]))
    squeezed = [a.squeeze([d for d in range(ndim) if not varies[d][i]]) for i, a in enumerate(aligned)]
    out = fn(*squeezed)
    return out.reshape([max(a.shape[d] for a in aligned) for d in range(ndim)])


def _as_in_a_graph(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*scalars: Tensor) -> Tensor:
        with _Traceable():
            return fn(*scalars)

    return called


class _Traceable(TorchFunctionMode):
    """Rewrites operations of a scalar function that cannot be traced under vmap.

    Indexing by a 0-D tensor reads its value, unless vmap maps it; indexing by a tensor ``[1]`` does not. Arithmetic
    with a symbolic size fails in vmap; with a tensor holding the size it does not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")  # by name, as Dynamo substitutes other functions for parameters
        if name in ("__getitem__", "getitem"):
            return _index(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        if name in _MENDED:
            like = next(x for x in args if isinstance(x, Tensor))
            args = tuple([like.new_full((), x, dtype=torch.int64) if _is_size(x) else x for x in args])
        return func(*args, **(kwargs or {}))


def _is_size(x: Any) -> bool:
    """True if `x` is a symbolic size."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(x)


def _index(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """``x[index]`` with 0-D index tensors replaced by 1-D ones."""
    is_number = [isinstance(i, Tensor) and i.ndim == 0 and i.dtype != torch.bool for i in index]
    is_advanced = [isinstance(i, (int, Tensor)) for i in index]
    if not any(is_number) or sum(is_number) < sum([isinstance(i, Tensor) for i in index]):
        return x[index]
    found = x[tuple([i[None] if n else i for i, n in zip(index, is_number, strict=True)])]
    first, last = is_advanced.index(True), len(is_advanced) - is_advanced[::-1].index(True)
    if not all(is_advanced[first:last]):
        return found[0]  # advanced indices that are not adjacent put the indexed dimension first
    named = sum([i is not None and i is not ... for i in index])
    return found.squeeze(sum([x.ndim - named if i is ... else 1 for i in index[:first]]))
