"""Validation and conversion of offsets and lengths, and predicates on sizes in traced graphs."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, assert_on_device, explain_values
from flexjag.upstream import holds_no_numbers

CUT = "take segments a to b of a batch by Jagged(values, offsets)[a:b], in a graph by flexjag.ops.jagged_index_select"
"""Advice in errors about offsets that are a slice of a larger batch's."""


def mark_varying(tensor: Tensor, *dims: int) -> None:
    """Mark dimensions as dynamic for TorchDynamo, if it has been imported.

    Without the mark the first batch compiles a static graph. The mark is weak: sizes 0 and 1 are specialized
    instead of rejected. Dynamo is not imported for this, as that takes a second.
    """
    if torch.compiler.is_compiling():
        return
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo, "maybe_mark_dynamic"):
        marked = getattr(tensor, "_dynamo_weak_dynamic_indices", ())  # a lookup is faster than marking again
        for dim in dims:
            if dim not in marked:
                dynamo.maybe_mark_dynamic(tensor, dim)


def can_look(*tensors: Tensor) -> bool:
    """Whether all tensors are on the CPU and readable: values cost no device sync, and no graph is traced."""
    return all(t.device.type == "cpu" and not holds_no_numbers(t) for t in tensors)


def surely(condition: bool) -> bool:
    """Evaluate a condition on sizes; False if it depends on unbacked sizes in a traced graph."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def is_fixed(x: float) -> bool:
    """Whether a number is the same on every call: False of one that a traced graph holds as a symbol."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(x)


def fixed(x: Any) -> Any:
    """The number, or the value of one that a traced graph holds as a symbol: another value then needs another graph."""
    if not torch.compiler.is_compiling():
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(x)


def same_size(a: int, b: int) -> bool:
    """Whether two sizes are equal. In a traced graph, equality of unbacked sizes is asserted."""
    if not torch.compiler.is_compiling():
        return a == b
    if surely(a != b):
        return False
    torch._check(a == b)
    return True


def is_empty(rows: int) -> bool:
    """Whether a size is 0. In a traced graph, an unbacked size is asserted to be positive."""
    if surely(rows == 0):
        return True
    if torch.compiler.is_compiling():
        torch._check(rows > 0, lambda: "a size read from data inside the graph must not be 0")
    return False


def check_offsets(offsets: Tensor, total: int, name: str = "offsets") -> None:
    """Check the *contents* of offsets. Costs a device sync: not for hot paths.

    Args:
        offsets: ``[S+1]`` integers.
        total: The number of packed tokens, the required last offset.
        name: The argument's name, for the message.

    Raises:
        LayoutError: If the offsets do not start at 0, decrease, or do not end at `total`.
    """
    values = offsets.tolist()
    if values[0] != 0:
        raise LayoutError(f"{explain_values(name, 'must start at 0', first=values[0])}; {CUT}")
    for s, (lo, hi) in enumerate(itertools.pairwise(values)):
        if hi < lo:
            seen = {f"{name}[{s}]": lo, f"{name}[{s + 1}]": hi}
            raise LayoutError(explain_values(name, "must not decrease", **seen))
    if values[-1] != total:
        rule = "must end at the number of packed tokens"
        raise LayoutError(f"{explain_values(name, rule, last=values[-1], tokens=total)}; {CUT}")


def check_ends(offsets: Tensor, rows: int, name: str = "offsets", *, spare: bool = False) -> None:
    """Check the first and last offset, which are wrong in a slice of a larger batch's offsets.

    In a traced graph and on a GPU this is an asynchronous assertion: no sync, and a later call reports the
    failure.

    Args:
        offsets: ``[S+1]`` integers.
        rows: The number of packed rows.
        name: The argument's name, for the message.
        spare: Whether rows behind the last offset are allowed.

    Raises:
        LayoutError: If the offsets do not start at 0, or do not end at `rows` (with `spare`: end behind them).
    """
    if can_look(offsets):
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last > rows or (last < rows and not spare):
            rule = f"must start at 0 and end at {'most ' if spare else ''}the number of rows"
            raise LayoutError(f"{explain_values(name, rule, first=first, last=last, rows=rows)}; {CUT}")
    else:
        assert_ends(offsets, rows, name, spare=spare)


def assert_ends(offsets: Tensor, rows: int, name: str = "offsets", *, spare: bool = False) -> None:
    """:func:`check_ends` as an asynchronous assertion, for a GPU or a traced graph."""
    if offsets.device.type != "meta":
        holds = (offsets[0] == 0) & (offsets[-1] <= rows if spare else offsets[-1] == rows)
        assert_on_device(holds, f"{name}: must start at 0 and end at the number of rows; {CUT}")


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """Segment index of each packed token, ``[total]`` int64; S for tokens behind the last offset.

    Searches all S+1 offsets rather than the S ends: a slice of size S would specialize the graph on S = 1.
    """
    token = torch.arange(total, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets.contiguous(), token, right=True) - 1


class HasOffsets(Protocol):
    """Packed values with offsets: a Jagged, which this module is below of."""

    @property
    def values(self) -> Tensor:
        """Packed rows."""
        ...

    @property
    def offsets(self) -> Tensor:
        """Their offsets."""
        ...


def check_same_layout(
    a: HasOffsets,
    b: HasOffsets,
    name: str = "other",
    rule: str = "must have the same offsets for elementwise arithmetic",
) -> None:
    """Check that two batches have equal offsets: by identity, by shape, and on a CPU by content.

    Raises:
        LayoutError: If they differ. The message has `name`, `rule` and the first difference.
    """
    if a.offsets is b.offsets:
        return
    seen: dict[str, object] = {"wanted": a, name: b}
    if a.offsets.shape != b.offsets.shape or not same_size(a.values.shape[0], b.values.shape[0]):
        raise LayoutError(explain_values(name, rule, **seen))
    if can_look(a.offsets, b.offsets):
        differs = (a.offsets != b.offsets).nonzero()
        if differs.numel():
            at = int(differs[0])
            seen |= {f"wanted.offsets[{at}]": int(a.offsets[at]), f"{name}.offsets[{at}]": int(b.offsets[at])}
            raise LayoutError(explain_values(name, rule, **seen))


def offsets_of(lengths: Tensor) -> Tensor:
    """Offsets ``[S+1]`` of lengths ``[S]``, in their dtype."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def offsets_from(lengths: Tensor | Sequence[int], device: torch.device) -> tuple[Tensor, int | None]:
    """Offsets ``[S+1]`` on `device`, and the last of them, or None if reading it needs a sync.

    Raises:
        LayoutError: As :func:`lengths_tensor`.
    """
    if isinstance(lengths, Tensor) or torch.compiler.is_compiling():
        offsets = offsets_of(lengths_tensor(lengths, device))
        return offsets, int(offsets[-1]) if can_look(offsets) else None
    ends = [0, *itertools.accumulate(_integers(lengths))]
    return torch.tensor(ends, dtype=torch.int64, device=device), ends[-1]


def as_int(given: Any) -> Any:
    """A NumPy integer as a Python int; anything else as it is, for a check that names it."""
    return int(given) if isinstance(given, np.integer) else given


def index_tensor(given: Any) -> Any:
    """A NumPy array as a new tensor, integers of less than 64 bits other than int32 as int64; else as it is."""
    if not isinstance(given, np.ndarray):
        return given
    narrow = given.dtype.kind in "iu" and given.dtype not in (np.int32, np.uint64)
    return torch.tensor(given.astype(np.int64) if narrow else given)


def lengths_tensor(lengths: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Convert lengths to a tensor ``[S]`` on `device`, int32 or int64; a sequence becomes int64.

    Raises:
        LayoutError: If they are not 1-D integers, or negative (tensors are checked on a CPU only).
    """
    if not isinstance(lengths, Tensor):
        return torch.tensor(_integers(lengths), dtype=torch.int64, device=device)
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.ndim != 1:
        seen = {"dtype": lengths.dtype, "shape": tuple(lengths.shape)}
        raise LayoutError(explain_values("lengths", "must be 1-D int32 or int64", **seen))
    if can_look(lengths) and lengths.shape[0] and int(lengths.min()) < 0:
        at = int(lengths.argmin())
        raise LayoutError(explain_values("lengths", "must not be negative", **{f"lengths[{at}]": int(lengths[at])}))
    return lengths.to(device)


def _index(given: Any) -> Any:
    if isinstance(given, bool) or (isinstance(given, Tensor) and given.dtype == torch.bool):
        raise TypeError("a truth value is no length")
    return given if isinstance(given, int | torch.SymInt) else operator.index(given)


def _integers(lengths: object) -> list[int]:
    """Convert a sequence of Python or NumPy integers, or tensors of one element, to non-negative ints."""
    try:
        entries = list(lengths)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
    except (TypeError, ValueError):  # ValueError: a tracer's proxy
        rule = "must be a 1-D tensor or a sequence of integers, one per segment"
        seen = {"lengths": lengths if isinstance(lengths, int | float) else type(lengths).__name__}
        raise LayoutError(explain_values("lengths", rule, **seen)) from None
    try:
        found = [n if type(n) is int else _index(n) for n in entries]
    except TypeError:
        raise LayoutError(explain_values("lengths", "must be integers", lengths=entries)) from None
    if not torch.compiler.is_compiling() and (least := min(found, default=0)) < 0:
        seen = {f"lengths[{found.index(least)}]": least}
        raise LayoutError(explain_values("lengths", "must not be negative", **seen))
    return found


def check_tensor(error: type[ValueError], name: str, given: object) -> None:
    """Check that an argument is a tensor; the error suggests a conversion of common other types.

    Args:
        error: Class of the error to raise.
        name: Name of the argument.
        given: Value of the argument.
    """
    if isinstance(given, Tensor):
        return
    kind, hint = type(given).__name__, ""
    if isinstance(given, list | tuple):
        hint = "; torch.tensor makes one of numbers, Jagged.from_lengths offsets of a list of lengths"
    elif kind == "ndarray":
        hint = "; torch.from_numpy shares the memory of an array"
    elif kind == "Proxy":
        hint = "; torch.fx.symbolic_trace cannot read data: use torch.export or make_fx, or torch.fx.wrap the call"
    raise error(explain_values(name, f"must be a tensor{hint}", type=kind))


def check_computable(name: str, values: Tensor) -> None:
    """Check that the dtype of values supports arithmetic, which float8 does not.

    Raises:
        ShapeError: If it is float8.
    """
    if values.dtype.itemsize == 1 and values.dtype.is_floating_point:
        rule = "float8 values are stored and moved, not computed with; convert them, as by x.to(torch.bfloat16)"
        raise ShapeError(explain_values(name, rule, dtype=values.dtype))


def listed(name: str, given: Any) -> list[Any]:
    """Convert an iterable argument to a list.

    Raises:
        ShapeError: If it is not iterable.
    """
    try:
        return list(given)
    except (TypeError, ValueError):
        raise ShapeError(explain_values(name, "must be a list", type=type(given).__name__)) from None
