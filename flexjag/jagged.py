"""The jagged batch: packed values and the offsets that cut them into segments."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flexjag.errors import LayoutError, ShapeError, explain_values, shown
from flexjag.upstream import holds_no_numbers


def mark_varying(tensor: Tensor, *dims: int) -> None:
    """Tell TorchDynamo, if it is in use, that these dims change from batch to batch.

    Without this the first batch compiles a graph of its own. The mark is weak: a size of 0 or 1 is
    still specialised instead of rejected. Dynamo is never imported for it (that takes a second).
    """
    if torch.compiler.is_compiling():
        return
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo, "maybe_mark_dynamic"):
        dynamo.maybe_mark_dynamic(tensor, list(dims))


def check_offsets(offsets: Tensor, total: int, name: str = "offsets") -> None:
    """Check the *contents* of offsets. Costs a device sync, so hot paths never call it.

    Args:
        offsets: ``[S+1]`` integers.
        total: The number of packed tokens they must end at.
        name: The argument's name, for the message.

    Raises:
        LayoutError: If the offsets do not start at 0, decrease, or do not end at `total`.
    """
    values = offsets.tolist()
    if values[0] != 0:
        raise LayoutError(explain_values(name, "must start at 0", first=values[0]))
    for s, (lo, hi) in enumerate(itertools.pairwise(values)):
        if hi < lo:
            seen = {f"{name}[{s}]": lo, f"{name}[{s + 1}]": hi}
            raise LayoutError(explain_values(name, "must not decrease", **seen))
    if values[-1] != total:
        raise LayoutError(
            explain_values(name, "must end at the number of packed tokens", last=values[-1], tokens=total)
        )


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """``[total]`` int64: the segment of each packed token; S for tokens behind the last offset.

    Searches all S+1 offsets rather than the S ends: a slice of S would make S = 1 a graph of its own.
    """
    token = torch.arange(total, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets.contiguous(), token, right=True) - 1


def _offsets_of(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(lengths.dtype)])


def _lengths_tensor(lengths: Tensor | Sequence[int], device: torch.device) -> Tensor:
    given = lengths
    if not isinstance(lengths, Tensor):
        if any(not isinstance(n, int) for n in lengths):
            raise LayoutError(explain_values("lengths", "must be integers", lengths=list(lengths)))
        lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.ndim != 1:
        raise LayoutError(
            explain_values("lengths", "must be 1-D int32 or int64", dtype=lengths.dtype, shape=tuple(lengths.shape))
        )
    if lengths.device.type == "cpu" and not holds_no_numbers(lengths) and bool((lengths < 0).any()):
        raise LayoutError(explain_values("lengths", "must not be negative", lengths=given))
    return lengths.to(device)


@dataclass(frozen=True, eq=False)
class Jagged:
    """A batch of S segments of different lengths, packed back to back with no padding.

    Segment s is ``values[offsets[s]:offsets[s+1]]``. A frozen pytree of two tensors: it passes through
    ``torch.compile``, autograd and ``tree_map`` like any tensor.

    The constructor checks shapes, dtypes and devices only. The contents of `offsets` are checked by the
    ``from_*`` constructors and by :meth:`validate`, because looking at them would stall a GPU.

    Args:
        values: ``[T, ...]``, all tokens of all segments.
        offsets: ``[S+1]`` int32 or int64 on the same device, 0 first, non-decreasing, T last.

    Raises:
        LayoutError: If `offsets` is not a 1-D integer tensor on the device of `values`.

    >>> x = Jagged.from_list([torch.zeros(2, 4), torch.ones(3, 4)])
    >>> x
    Jagged(segments=2, tokens=5, values=[5, 4] float32, device=cpu)
    >>> x.offsets.tolist()
    [0, 2, 5]
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name in ("values", "offsets"):
            if type(getattr(self, name)) in (list, tuple):
                rule = "must be a tensor; Jagged.from_list and Jagged.from_lengths take Python lists"
                raise LayoutError(explain_values(name, rule, type=type(getattr(self, name)).__name__))
        if not isinstance(self.values, Tensor) or not isinstance(self.offsets, Tensor):
            return  # pytree transformations put placeholders here
        if self.values.ndim < 1:
            raise ShapeError(explain_values("values", "must have a token dimension", shape=()))
        if self.offsets.dtype not in (torch.int32, torch.int64):
            raise LayoutError(explain_values("offsets", "must be int32 or int64", dtype=self.offsets.dtype))
        if self.offsets.ndim != 1 or self.offsets.shape[0] < 1:
            raise LayoutError(
                explain_values("offsets", "must be 1-D with S+1 entries", shape=tuple(self.offsets.shape))
            )
        if self.offsets.device != self.values.device:
            raise LayoutError(
                explain_values(
                    "offsets",
                    "must be on the device of values",
                    offsets=str(self.offsets.device),
                    values=str(self.values.device),
                )
            )
        mark_varying(self.values, 0)
        mark_varying(self.offsets, 0)

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor | Sequence[int]) -> Jagged:
        """Cut packed `values` ``[T, ...]`` into segments of the given `lengths` ``[S]``.

        Raises:
            LayoutError: If the lengths are not integers, are negative, or do not sum to T.
                (Lengths that live on a GPU are not looked at; see :meth:`validate`.)

        >>> Jagged.from_lengths(torch.arange(5), [2, 0, 3]).offsets.tolist()
        [0, 2, 2, 5]
        """
        out = Jagged(values, _offsets_of(_lengths_tensor(lengths, values.device)))
        if values.device.type == "cpu" and not holds_no_numbers(values):
            total = int(out.offsets[-1])
            if total != values.shape[0]:
                raise LayoutError(
                    explain_values(
                        "lengths", "must sum to the number of packed tokens", sum=total, tokens=values.shape[0]
                    )
                )
        return out

    @staticmethod
    def from_list(tensors: Sequence[Tensor]) -> Jagged:
        """Pack a list of ``[n_s, ...]`` tensors. An empty list gives a batch of no segments.

        Raises:
            ShapeError: If the tensors differ in anything but their first dimension.
        """
        tensors = list(tensors)
        if not tensors:
            return Jagged(torch.zeros(0), torch.zeros(1, dtype=torch.int64))
        first = tensors[0]
        for s, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise ShapeError(explain_values(f"tensors[{s}]", "must be a tensor", type=type(t).__name__))
            if t.ndim < 1 or t.shape[1:] != first.shape[1:] or t.dtype != first.dtype:
                raise ShapeError(
                    explain_values(
                        f"tensors[{s}]",
                        "must agree with tensors[0] in dtype and in all dimensions but the first",
                        shape=tuple(t.shape),
                        dtype=t.dtype,
                        first_shape=tuple(first.shape),
                        first_dtype=first.dtype,
                    )
                )
        return Jagged.from_lengths(torch.cat(tensors), [t.shape[0] for t in tensors])

    @staticmethod
    def from_padded(dense: Tensor, lengths: Tensor | Sequence[int], total: int | None = None) -> Jagged:
        """Drop the padding of `dense` ``[S, N, ...]``: row s keeps its first ``lengths[s]`` entries.

        Args:
            dense: ``[S, N, ...]``.
            lengths: ``[S]``, each at most N.
            total: The sum of the lengths, if known: saves a device sync and makes the call traceable.

        Raises:
            LayoutError: If there are not S lengths, or one is over N.
        """
        n = _lengths_tensor(lengths, dense.device)
        if dense.ndim < 2 or n.shape[0] != dense.shape[0]:
            raise LayoutError(
                explain_values(
                    "lengths", "must have one entry per row of dense", lengths=tuple(n.shape), dense=tuple(dense.shape)
                )
            )
        offsets = _offsets_of(n)
        if n.device.type == "cpu" and not holds_no_numbers(n) and bool((n > dense.shape[1]).any()):
            raise LayoutError(
                explain_values(
                    "lengths", "must not exceed the padded length", longest=int(n.max()), padded=dense.shape[1]
                )
            )
        count = int(offsets[-1]) if total is None else total
        segment = segment_ids(offsets, count)
        index = segment * dense.shape[1] + torch.arange(count, device=dense.device) - offsets[segment]
        return Jagged(dense.flatten(0, 1).index_select(0, index), offsets)

    @property
    def lengths(self) -> Tensor:
        """``[S]``: the number of tokens of each segment."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def num_segments(self) -> int:
        """S, known on the host without a sync."""
        return self.offsets.shape[0] - 1

    @property
    def segment_ids(self) -> Tensor:
        """``[T]`` int64: the segment of each token.

        >>> Jagged.from_lengths(torch.zeros(5), [2, 0, 3]).segment_ids.tolist()
        [0, 0, 2, 2, 2]
        """
        return segment_ids(self.offsets, self.values.shape[0])

    @property
    def positions(self) -> Tensor:
        """``[T]`` int64: the position of each token in its segment, as positional embeddings want it.

        >>> Jagged.from_lengths(torch.zeros(5), [2, 0, 3]).positions.tolist()
        [0, 1, 0, 1, 2]
        """
        token = torch.arange(self.values.shape[0], device=self.offsets.device)
        return token - self.offsets[self.segment_ids].long()

    @property
    def device(self) -> torch.device:
        """Where values and offsets live."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def to(self, *args: Any, **kwargs: Any) -> Jagged:
        """The batch on another device or with values of another dtype; arguments as for ``Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        return Jagged(values, self.offsets.to(values.device))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Jagged:
        """Apply `fn` to the values; it must keep the number of tokens.

        >>> Jagged.from_lengths(torch.ones(3, 2), [1, 2]).map(lambda v: v.sum(-1)).to_list()
        [tensor([2.]), tensor([2., 2.])]
        """
        return self.with_values(fn(self.values))

    def with_values(self, values: Tensor) -> Jagged:
        """The same layout around other `values` ``[T, ...]``.

        Raises:
            ShapeError: If the number of tokens differs.

        >>> x = Jagged.from_lengths(torch.ones(3, 2), [1, 2])
        >>> x.with_values(x.values.sum(-1)).to_list()
        [tensor([2.]), tensor([2., 2.])]
        """
        if values is self.values:
            return self
        if values.ndim < 1 or values.shape[0] != self.values.shape[0]:
            raise ShapeError(
                explain_values(
                    "values", "must keep the number of tokens", shape=tuple(values.shape), tokens=self.values.shape[0]
                )
            )
        return Jagged(values, self.offsets)

    def validate(self) -> Jagged:
        """Check the contents of `offsets` (one device sync) and return the batch itself.

        Raises:
            LayoutError: If they do not start at 0, decrease, or do not end at T.
        """
        check_offsets(self.offsets, self.values.shape[0])
        return self

    def to_list(self) -> list[Tensor]:
        """The S segments as views of `values`, each ``[n_s, ...]``."""
        return [self.values[lo:hi] for lo, hi in itertools.pairwise(self.offsets.tolist())]

    def to_padded(self, fill: float = 0.0, max_length: int | None = None) -> Tensor:
        """A dense ``[S, N, ...]`` tensor with `fill` behind each segment's end.

        Args:
            fill: The padding value.
            max_length: N. Default: the longest segment, which costs a device sync. Longer segments
                are cut to N, as FBGEMM's ``jagged_to_padded_dense`` does.
        """
        s = self.num_segments
        if max_length is None:
            max_length = int(self.lengths.max()) if s else 0
        if max_length < 0:
            raise ShapeError(explain_values("max_length", "must not be negative", max_length=max_length))
        total, rest = self.values.shape[0], self.values.shape[1:]
        segment = segment_ids(self.offsets, total)
        pos = torch.arange(total, device=self.values.device) - self.offsets[segment]
        spare = s * max_length  # one row past the end takes what is cut off
        index = torch.where((pos < max_length) & (segment < s), segment * max_length + pos, spare)
        flat = self.values.new_full((spare + 1, *rest), fill).index_copy(0, index, self.values)
        return flat[:spare].reshape(s, max_length, *rest)

    def __repr__(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return (
            f"Jagged(segments={self.num_segments}, tokens={self.values.shape[0]}, "
            f"values={shown(list(self.values.shape))} {dtype}, device={self.values.device})"
        )

    def _combine(self, other: Any, fn: Callable[[Any, Any], Tensor]) -> Jagged:
        if isinstance(other, Jagged):
            check_same_layout(self, other)
            other = other.values
        elif isinstance(other, Tensor):  # Dynamo cannot trace it, so eager mode does not offer it either
            raise ShapeError(
                explain_values(
                    "other",
                    "must be a Jagged or a number; use x.map(lambda v: ...) for tensors",
                    shape=tuple(other.shape),
                )
            )
        return self.with_values(fn(self.values, other))

    def __add__(self, other: Jagged | float) -> Jagged:
        return self._combine(other, operator.add)

    def __sub__(self, other: Jagged | float) -> Jagged:
        return self._combine(other, operator.sub)

    def __mul__(self, other: Jagged | float) -> Jagged:
        return self._combine(other, operator.mul)

    def __truediv__(self, other: Jagged | float) -> Jagged:
        return self._combine(other, operator.truediv)

    def __radd__(self, other: float) -> Jagged:
        return self._combine(other, operator.add)

    def __rmul__(self, other: float) -> Jagged:
        return self._combine(other, operator.mul)

    def __rsub__(self, other: float) -> Jagged:
        return self._combine(other, lambda a, b: b - a)

    def __rtruediv__(self, other: float) -> Jagged:
        return self._combine(other, lambda a, b: b / a)

    def __neg__(self) -> Jagged:
        return self.with_values(-self.values)


def check_same_layout(
    a: Jagged, b: Jagged, name: str = "other", rule: str = "must have the same offsets for elementwise arithmetic"
) -> None:
    """Check that two batches are cut alike: by identity, by shape, and on CPU by content.

    Raises:
        LayoutError: Naming `name`, `rule` and what differs.
    """
    if a.offsets is b.offsets:
        return
    seen: dict[str, object] = {"left": a, "right": b}
    if a.offsets.shape != b.offsets.shape or a.values.shape[0] != b.values.shape[0]:
        raise LayoutError(explain_values(name, rule, **seen))
    if a.offsets.device.type == "cpu" and not holds_no_numbers(a.offsets):
        differs = (a.offsets != b.offsets).nonzero()
        if differs.numel():
            at = int(differs[0])
            seen |= {f"left.offsets[{at}]": int(a.offsets[at]), f"right.offsets[{at}]": int(b.offsets[at])}
            raise LayoutError(explain_values(name, rule, **seen))


pytree.register_pytree_node(
    Jagged,
    lambda x: ([x.values, x.offsets], None),
    lambda children, _: Jagged(*children),
    serialized_type_name="flexjag.Jagged",
)
