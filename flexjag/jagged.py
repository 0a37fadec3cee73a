"""The jagged batch: packed values and the offsets that cut them into segments."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from flexjag.arithmetic import Arithmetic
from flexjag.errors import LayoutError, SegmentError, ShapeError, explain_values, shown
from flexjag.offsets import (
    can_look,
    check_ends,
    check_offsets,
    check_tensor,
    listed,
    mark_varying,
    offsets_from,
    offsets_of,
    same_size,
    segment_ids,
)
from flexjag.padding import pad, unpad


@dataclass(frozen=True, eq=False)
class Jagged(Arithmetic):
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
        values, offsets = self.values, self.offsets
        if not (isinstance(values, Tensor) and isinstance(offsets, Tensor)):
            check_tensor(LayoutError, "values", values)
            check_tensor(LayoutError, "offsets", offsets)
        if values.layout != torch.strided or values.is_nested:
            rule = (
                "must be packed; Jagged.from_list(nested.unbind()) packs a NestedTensor, values.to_dense() a sparse one"
            )
            raise ShapeError(explain_values("values", rule, layout=values.layout, nested=values.is_nested))
        if values.ndim < 1:
            raise ShapeError(explain_values("values", "must have a token dimension", shape=()))
        if offsets.dtype not in (torch.int32, torch.int64):
            raise LayoutError(explain_values("offsets", "must be int32 or int64", dtype=offsets.dtype))
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            text = explain_values("offsets", "must be 1-D with S+1 entries", shape=tuple(offsets.shape))
            raise LayoutError(f"{text}; those of no segments are a single 0")
        if offsets.device != values.device:
            seen = {"offsets": str(offsets.device), "values": str(values.device)}
            raise LayoutError(explain_values("offsets", "must be on the device of values", **seen))
        mark_varying(values, 0)
        mark_varying(offsets, 0)

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor | Sequence[int]) -> Jagged:
        """Cut packed `values` ``[T, ...]`` into segments of the given `lengths` ``[S]``.

        Raises:
            LayoutError: If the lengths are not integers, are negative, or do not sum to T.
                (A tensor that lives on a GPU is not looked at; see :meth:`validate`.)

        >>> Jagged.from_lengths(torch.arange(5), [2, 0, 3]).offsets.tolist()
        [0, 2, 2, 5]
        """
        check_tensor(ShapeError, "values", values)
        offsets, total = offsets_from(lengths, values.device)
        out = Jagged(values, offsets)
        if total is not None and total != values.shape[0]:
            rule = "must sum to the number of packed tokens"
            raise LayoutError(explain_values("lengths", rule, sum=total, tokens=values.shape[0]))
        return out

    @staticmethod
    def from_list(tensors: Sequence[Tensor]) -> Jagged:
        """Pack a list of ``[n_s, ...]`` tensors. An empty list gives a batch of no segments.

        Raises:
            ShapeError: If the tensors differ in anything but their first dimension.
        """
        tensors = listed("tensors", tensors)
        if not tensors:
            return Jagged(torch.zeros(0), torch.zeros(1, dtype=torch.int64))
        first = tensors[0]
        for s, t in enumerate(tensors):
            check_tensor(ShapeError, f"tensors[{s}]", t)
            if t.ndim < 1 or t.shape[1:] != first.shape[1:] or t.dtype != first.dtype:
                rule = "must agree with tensors[0] in dtype and in all dimensions but the first"
                seen = {"first_shape": tuple(first.shape), "first_dtype": first.dtype}
                raise ShapeError(explain_values(f"tensors[{s}]", rule, shape=tuple(t.shape), dtype=t.dtype, **seen))
        return Jagged.from_lengths(torch.cat(tensors), [t.shape[0] for t in tensors])

    @staticmethod
    def concat(batches: Sequence[Jagged]) -> Jagged:
        """The segments of all batches, one batch after the other; ``default_collate`` of a DataLoader does this, too.

        :func:`flexjag.ops.jagged_concat` joins each segment with that of the same number instead.

        Args:
            batches: At least one, alike in dtype, device and all dimensions but the first.

        Raises:
            LayoutError: If there is none, or one has rows behind its last offset.
            ShapeError: If they are not alike.

        >>> a, b = Jagged.from_lengths(torch.arange(3), [1, 2]), Jagged.from_lengths(torch.arange(4), [4])
        >>> Jagged.concat([a, b]).lengths.tolist()
        [1, 2, 4]
        """
        batches = listed("batches", batches)
        if not batches:
            raise LayoutError(explain_values("batches", "must hold at least one batch", batches=batches))
        first = batches[0]
        for i, x in enumerate(batches):
            if not isinstance(x, Jagged):
                raise ShapeError(explain_values(f"batches[{i}]", "must be a Jagged", type=type(x).__name__))
            if x.values.shape[1:] != first.values.shape[1:] or x.dtype != first.dtype or x.device != first.device:
                rule = "must agree with batches[0] in dtype, device and all dimensions but the first"
                raise ShapeError(explain_values(f"batches[{i}]", rule, **{f"batches[{i}]": x, "batches[0]": first}))
            check_ends(x.offsets, x.values.shape[0], f"batches[{i}].offsets")
        return Jagged(torch.cat([x.values for x in batches]), offsets_of(torch.cat([x.lengths for x in batches])))

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
        return Jagged(*unpad(dense, lengths, total))

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
        check_ends(self.offsets, self.values.shape[0], spare=True)
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
        flags = dict(zip(("non_blocking", "copy"), (flag for flag in args if isinstance(flag, bool)), strict=False))
        flags |= {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return Jagged(values, self.offsets.to(values.device, **flags))

    def cpu(self) -> Jagged:
        """The batch on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | int | str | None = None, non_blocking: bool = False) -> Jagged:
        """The batch on a GPU; arguments as for ``Tensor.cuda``."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self) -> Jagged:
        """The batch in page-locked memory; a DataLoader with ``pin_memory=True`` calls it."""
        return Jagged(self.values.pin_memory(), self.offsets.pin_memory())

    def clone(self) -> Jagged:
        """A copy of values and offsets. Gradients flow through it, as through ``Tensor.clone``."""
        return Jagged(self.values.clone(), self.offsets.clone())

    def contiguous(self) -> Jagged:
        """The batch with values and offsets that are contiguous, copied where they are not."""
        return Jagged(self.values.contiguous(), self.offsets.contiguous())

    def detach(self) -> Jagged:
        """The same values without their gradient history, on the same offsets."""
        return Jagged(self.values.detach(), self.offsets)

    def requires_grad_(self, requires_grad: bool = True) -> Jagged:
        """Let autograd record what happens to the values, and return the batch itself."""
        self.values.requires_grad_(requires_grad)
        return self

    def __len__(self) -> int:
        return self.num_segments

    def __bool__(self) -> bool:
        return True  # `x or other` must not drop a batch of no segments

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_list())

    def __getitem__(self, index: int | slice) -> Any:
        """Segment number `index` as a view ``[n, ...]``; or a batch of the segments in a slice.

        The values of a slice without a step are a view. Reads the offsets, so it waits for a GPU; in a compiled graph
        use :func:`flexjag.ops.jagged_index_select`, which also takes a tensor of indices.

        Raises:
            SegmentError: If there is no such segment, or the index is neither an integer nor a slice.

        >>> x = Jagged.from_list([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])])
        >>> x[-1], x[:2], x[::-2].to_list()
        (tensor([4, 5]), Jagged(segments=2, tokens=3, values=[3] int64, device=cpu), [tensor([4, 5]), tensor([1, 2])])
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
        if isinstance(index, slice):
            first, end, step = index.indices(self.num_segments)
            if step != 1:
                chosen = list(range(self.num_segments))[index]
                parts = [self.values[:0], *map(self.__getitem__, chosen)]
                return Jagged(torch.cat(parts), offsets_of(self.lengths[chosen]))
            offsets = self.offsets[first : max(first, end) + 1]
            low, high = torch.stack((offsets[0], offsets[-1])).tolist()
            return Jagged(self.values[low:high], offsets - low)
        try:
            s = operator.index(index)
        except TypeError:
            raise SegmentError(explain_values("index", "must be an integer or a slice", index=index)) from None
        if not -self.num_segments <= s < self.num_segments:
            raise SegmentError(explain_values("index", "must be that of a segment", index=s, segments=len(self)))
        low, high = self.offsets[s % self.num_segments :][:2].tolist()
        return self.values[low:high]

    def unbind(self) -> tuple[Tensor, ...]:
        """The S segments, each ``[n_s, ...]``, as views that share one step of autograd.

        Faster than :meth:`to_list` in a backward pass. As after ``Tensor.split``, autograd refuses changes in place.
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
        sizes = self.lengths.tolist()
        return self.values.split([*sizes, self.values.shape[0] - sum(sizes)])[:-1]

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
        if values.ndim < 1 or not same_size(values.shape[0], self.values.shape[0]):
            seen = {"shape": tuple(values.shape), "tokens": self.values.shape[0]}
            raise ShapeError(explain_values("values", "must keep the number of tokens", **seen))
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
        check_ends(self.offsets, self.values.shape[0], spare=True)
        return [self.values[lo:hi] for lo, hi in itertools.pairwise(self.offsets.tolist())]

    def to_padded(self, fill: float = 0.0, max_length: int | None = None) -> Tensor:
        """A dense ``[S, N, ...]`` tensor with `fill` behind each segment's end.

        Args:
            fill: The padding value.
            max_length: N. Default: the longest segment, which costs a device sync. Longer segments
                are cut to N, as FBGEMM's ``jagged_to_padded_dense`` does.
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
        if max_length is None:
            max_length = int(self.lengths.max()) if self.num_segments else 0
        if max_length < 0:
            raise ShapeError(explain_values("max_length", "must not be negative", max_length=max_length))
        return pad(self.values, self.offsets, max_length, fill)

    def __repr__(self) -> str:
        return (
            f"Jagged(segments={self.num_segments}, tokens={self.values.shape[0]}, "
            f"values={shown(list(self.values.shape))} {str(self.dtype)[6:]}, device={self.values.device})"
        )

    def _combine(self, other: Any, fn: Callable[[Any, Any], Tensor]) -> Jagged:
        if isinstance(other, Jagged):
            check_same_layout(self, other)
            other = other.values
        elif isinstance(other, Tensor):  # Dynamo cannot trace it, so eager mode does not offer it either
            rule = "must be a Jagged or a number; use x.map(lambda v: ...) for tensors"
            raise ShapeError(explain_values("other", rule, shape=tuple(other.shape)))
        return self.with_values(fn(self.values, other))


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
    if a.offsets.shape != b.offsets.shape or not same_size(a.values.shape[0], b.values.shape[0]):
        raise LayoutError(explain_values(name, rule, **seen))
    if can_look(a.offsets, b.offsets):
        differs = (a.offsets != b.offsets).nonzero()
        if differs.numel():
            at = int(differs[0])
            seen |= {f"left.offsets[{at}]": int(a.offsets[at]), f"right.offsets[{at}]": int(b.offsets[at])}
            raise LayoutError(explain_values(name, rule, **seen))


def _unflatten(children: Iterable[Any], _: Any) -> Jagged:
    values, offsets = children
    if isinstance(values, Tensor) and isinstance(offsets, Tensor):
        return Jagged(values, offsets)
    tree = object.__new__(Jagged)  # of what pytree functions put in place of tensors
    tree.__dict__.update(values=values, offsets=offsets)
    return tree


pytree.register_pytree_node(
    Jagged,
    lambda x: ([x.values, x.offsets], None),
    _unflatten,
    serialized_type_name="flexjag.Jagged",
    flatten_with_keys_fn=lambda x: ([(pytree.GetAttrKey(n), getattr(x, n)) for n in ("values", "offsets")], None),  # pyright: ignore[reportArgumentType]
)
torch.serialization.add_safe_globals([Jagged])  # so that torch.load takes it by default
default_collate_fn_map[Jagged] = lambda batch, *, collate_fn_map=None: Jagged.concat(batch)
