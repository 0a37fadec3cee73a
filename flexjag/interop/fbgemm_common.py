"""How FBGEMM's functions read packed rows: what they ignore, and what they are not given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged, segment_ids
from flexjag.ops.checks import can_look


def check_tensor(tensor: object, name: str, *ndims: int) -> None:
    """Check that an argument is a tensor with one of the numbers of dimensions.

    Raises:
        ShapeError: If it is not.
    """
    if not isinstance(tensor, Tensor):
        raise ShapeError(explain_values(name, "must be a tensor", type=type(tensor).__name__))
    if tensor.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise ShapeError(explain_values(name, f"must have {wanted} dimensions", shape=tuple(tensor.shape)))


def check_list(given: object, name: str, of: str, size: int | None = None) -> None:
    """Check that an argument is a list with an entry, or `size` entries.

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
    """Check the contents of offsets or lengths that follow from others, where they can be looked at (on a CPU).

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
    """``[total]`` bool: the rows that stand in a segment, among its first `max_length`.

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
    """The rows to keep, `fill` in the others; no gradient flows to those, whatever they hold."""
    return torch.where(keep.view(-1, *[1] * (values.ndim - 1)), values, fill)


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows of which some may be ignored.

    Ops want every row in a segment. So rows before the first offset and behind the last one, if there may be any, are
    segments of their own at both ends: `enclosed`.

    Attributes:
        x: The rows, each in a segment.
        keep: ``[T]`` bool, the rows that count. None for all.
        enclosed: Whether `x` has two segments more than the offsets that were given.
    """

    x: Jagged
    keep: Tensor | None
    enclosed: bool

    def only(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """`fill` in place of the rows that do not count."""
        return values if self.keep is None else only(self.keep, values, fill)

    def widen(self, dense: Tensor) -> Tensor:
        """Zeros for the segments at both ends."""
        return torch.nn.functional.pad(dense, [0, 0] * (dense.ndim - 1) + [1, 1]) if self.enclosed else dense

    def narrow(self, dense: Tensor) -> Tensor:
        """Without the segments at both ends."""
        return dense[1:-1] if self.enclosed else dense


def read(values: Tensor, offsets: Tensor, max_length: int | None = None, *, mask: bool = True) -> Rows:
    """Values as FBGEMM reads them: from the first offset to the last, at most `max_length` rows per segment.

    Args:
        values: ``[T, ...]``.
        offsets: ``[S+1]``.
        max_length: Of the segments; None for no limit.
        mask: Whether `keep` is needed.

    Raises:
        LayoutError: If the offsets are no offsets, decrease or leave the values. Contents are checked where they can
            be looked at (on a CPU), and elsewhere by the op.
    """
    total = values.shape[0]
    x = Jagged(values, offsets)
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
    """Check that segments lie inside the values, in order.

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
