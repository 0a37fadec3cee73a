"""Argument conversion and checks shared by the FBGEMM functions, and their handling of rows outside the offsets."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged, segment_ids
from flexjag.ops import checks
from flexjag.ops.checks import can_look

Integer: TypeAlias = int | numpy.integer[Any] | Tensor
"""An ``int`` argument of FBGEMM: a Python or NumPy integer, or an integer tensor of one entry."""

Integers: TypeAlias = Sequence[Integer] | numpy.ndarray[Any, Any] | Tensor
"""An ``int[]`` argument of FBGEMM: a sequence of integers, or a 1-D NumPy array or tensor."""


def integer(given: Integer, name: str) -> int:
    """Convert an ``int`` argument. A symbolic size is returned unchanged; a GPU tensor costs a sync.

    Raises:
        ShapeError: If it is not an integer.

    >>> [integer(n, "n") for n in (3, numpy.int64(4), torch.tensor(5))]
    [3, 4, 5]
    """
    if isinstance(given, Tensor) and torch.compiler.is_compiling():
        return _traced(int(given.item()))
    if isinstance(given, (int, torch.SymInt)) and not isinstance(given, bool):
        return given
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except TypeError:
        pass
    raise ShapeError(explain_values(name, "must be an integer", **{name: given}))


def _traced(size: int) -> int:
    """Mark an unbacked symbol as a size in a traced graph."""
    if torch.compiler.is_compiling():
        torch._check(size >= 0)
    return size


def size_of(given: Integer, name: str) -> int:
    """Convert a number of rows.

    Raises:
        ShapeError: If it is not a non-negative integer.
    """
    size = integer(given, name)
    if size < 0:
        raise ShapeError(explain_values(name, "must not be negative", **{name: size}))
    return size


def integers(given: Integers, name: str, size: int) -> list[int]:
    """Convert an ``int[]`` argument of `size` numbers.

    Raises:
        LayoutError: If it is not a sequence, or its length is not `size`.
        ShapeError: If one is not an integer.

    >>> integers(numpy.array([1, 2]), "max_lengths", 2), integers(torch.tensor([3]), "max_lengths", 1)
    ([1, 2], [3])
    """
    numbers = given
    if isinstance(given, (Tensor, numpy.ndarray)):
        numbers = given.tolist()
        numbers = [_traced(n) for n in numbers] if isinstance(numbers, list) else numbers
    check_list(numbers, name, "numbers", size)
    return [integer(n, f"{name}[{i}]") for i, n in enumerate(numbers)]


def check_tensor(tensor: object, name: str, *ndims: int) -> None:
    """Check that an argument is a tensor, of one of the ranks `ndims` if any are given.

    Raises:
        ShapeError: If it is not.
    """
    if not isinstance(tensor, Tensor):
        raise ShapeError(explain_values(name, "must be a tensor", type=type(tensor).__name__))
    if ndims and tensor.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise ShapeError(explain_values(name, f"must have {wanted} dimensions", shape=tuple(tensor.shape)))


def check_index(tensor: object, name: str, like: object = None) -> None:
    """Check that offsets, lengths or indices are a 1-D integer tensor, on the device of `like` if given.

    Raises:
        LayoutError: If they are not.
    """
    owner = tensor if like is None else like
    checks.check_index(tensor, name, owner.device if isinstance(owner, Tensor) else torch.device("cpu"))


def check_lengths(lengths: Tensor, name: str, like: Tensor | None = None) -> None:
    """Check that lengths are a 1-D integer tensor and, on a CPU, not negative.

    Raises:
        LayoutError: If they are not.
    """
    check_index(lengths, name, like)
    if can_look(lengths):
        wrong = (lengths < 0).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            raise LayoutError(explain_values(name, "must not be negative", **{f"{name}[{at}]": int(lengths[at])}))


def check_range(indices: Tensor, name: str, size: int, letter: str = "S") -> None:
    """Check on a CPU that indices are from 0 to `size` - 1; the message names the size by `letter`.

    Raises:
        LayoutError: If they are not.
    """
    if can_look(indices) and indices.shape[0]:
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= size:
            seen: dict[str, object] = {"smallest": low, "largest": high, letter: size}
            raise LayoutError(explain_values(name, f"must be from 0 to {letter} - 1", **seen))


def check_list(given: object, name: str, of: str, size: int | None = None) -> None:
    """Check that an argument is a non-empty sequence, or one of `size` entries.

    Raises:
        LayoutError: If it is not.
    """
    if not isinstance(given, Sequence):
        raise LayoutError(explain_values(name, f"must be a list of {of}", type=type(given).__name__))
    if size is None and not given:
        raise LayoutError(explain_values(name, "must not be empty"))
    if size is not None and len(given) != size:
        raise LayoutError(explain_values(name, f"must have {size} entries", entries=len(given)))


def check_equal(given: Tensor, name: str, wanted: Tensor, rule: str) -> None:
    """Check the shape and, on a CPU, the contents of offsets or lengths against the expected ones.

    Raises:
        LayoutError: If they differ.
    """
    if given.shape != wanted.shape:
        seen: dict[str, object] = {"shape": tuple(given.shape), "expected": tuple(wanted.shape)}
        raise LayoutError(explain_values(name, rule, **seen))
    if can_look(given, wanted):
        differs = (given != wanted).nonzero()
        if differs.numel():
            at = int(differs[0])
            seen = {f"{name}[{at}]": int(given[at]), "expected": int(wanted[at])}
            raise LayoutError(explain_values(name, rule, **seen))


def kept(offsets: Tensor, total: int, max_length: int | None) -> Tensor:
    """Boolean mask ``[total]`` of the rows among the first `max_length` of a segment.

    >>> kept(torch.tensor([1, 4, 4]), 6, 2).tolist()
    [False, True, True, False, False, False]
    """
    segment = segment_ids(offsets, total)
    inside = (segment >= 0) & (segment < offsets.shape[0] - 1)
    if max_length is None:
        return inside
    position = torch.arange(total, device=offsets.device) - offsets[segment.clamp(min=0)]
    return inside & (position < max_length)


def only(keep: Tensor, values: Tensor, fill: float = 0.0) -> Tensor:
    """Replace the rows not in `keep` by `fill`; they get no gradient, whatever they hold."""
    return torch.where(keep.view(-1, *[1] * (values.ndim - 1)), values, fill)


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, some of which may be ignored.

    The ops need every row in a segment, so rows before the first offset and behind the last one, if there may be any,
    become two extra segments at the ends: `enclosed`.

    Attributes:
        x: All rows, each in a segment.
        keep: Boolean mask ``[T]`` of the rows not ignored. None for all.
        enclosed: Whether `x` has the two extra segments.
    """

    x: Jagged
    keep: Tensor | None
    enclosed: bool

    def only(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Replace the ignored rows by `fill`."""
        return values if self.keep is None else only(self.keep, values, fill)

    def widen(self, dense: Tensor) -> Tensor:
        """Append zeros ``[S, ...]`` to ``[S + 2, ...]`` for the two extra segments, if any."""
        return torch.nn.functional.pad(dense, [0, 0] * (dense.ndim - 1) + [1, 1]) if self.enclosed else dense

    def narrow(self, dense: Tensor) -> Tensor:
        """Drop the entries of the two extra segments, if any."""
        return dense[1:-1] if self.enclosed else dense


def read(values: Tensor, offsets: Tensor, max_length: Integer | None = None, *, mask: bool = True) -> Rows:
    """Select rows as FBGEMM does: from the first offset to the last, at most `max_length` rows per segment.

    Args:
        values: ``[T, ...]``.
        offsets: ``[S+1]``.
        max_length: Maximal number of rows per segment; None for no limit.
        mask: Whether to compute `keep`.

    Raises:
        LayoutError: If the offsets are not 1-D integers, decrease or exceed the number of rows. Contents are checked
            here on a CPU, and elsewhere by the op.
        ShapeError: If `max_length` is not an integer.
    """
    total = values.shape[0]
    x = Jagged(values, offsets)
    max_length = None if max_length is None else integer(max_length, "max_length")
    exact, short = False, max_length is None
    if can_look(offsets):
        ends = offsets.tolist()
        exact = ends[0] == 0 and ends[-1] == total
        lengths = [hi - lo for lo, hi in itertools.pairwise(ends)]
        check_ends(ends, lengths, total)
        short = max_length is None or max(lengths, default=0) <= max_length
    keep = kept(offsets, total, max_length) if mask and not (exact and short) else None
    if exact:
        return Rows(x, keep, False)
    around = torch.cat([offsets.new_zeros(1), offsets, offsets.new_full((1,), total)])
    return Rows(Jagged(values, around), keep, True)


def check_ends(ends: list[int], lengths: list[int], total: int) -> None:
    """Check that offsets do not decrease and lie from 0 to the number of rows.

    Raises:
        LayoutError: If they do not.
    """
    if ends[0] < 0 or ends[-1] > total:
        seen: dict[str, object] = {"first": ends[0], "last": ends[-1], "rows": total}
        raise LayoutError(explain_values("offsets", "must be from 0 to the number of rows", **seen))
    if min(lengths, default=0) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        seen = {f"offsets[{at}]": ends[at], f"offsets[{at + 1}]": ends[at + 1]}
        raise LayoutError(explain_values("offsets", "must not decrease", **seen))
