"""The jagged batch: packed values, and offsets that delimit its segments."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from flexjag.arithmetic import Arithmetic
from flexjag.conversions import cut_by_positions, join, join_batches, nest, remove_padding, select, unnest
from flexjag.errors import LayoutError, SegmentError, ShapeError, explain_values, shown
from flexjag.moving import Change, Movable
from flexjag.offsets import (
    check_ends,
    check_offsets,
    check_same_layout,
    check_tensor,
    index_tensor,
    mark_varying,
    offsets_from,
    same_size,
    segment_ids,
)
from flexjag.padding import pad, unpad


@dataclass(frozen=True, eq=False)
class Jagged(Arithmetic, Movable):
    """A batch of S segments of different lengths, concatenated without padding.

    Segment s is ``values[offsets[s]:offsets[s+1]]``. An immutable pytree of two tensors, supported by
    ``torch.compile``, autograd and ``tree_map``.

    The constructor checks shapes, dtypes and devices only. The contents of `offsets`, which cost a device
    sync on a GPU, are checked by the ``from_*`` constructors and by :meth:`validate`.

    Args:
        values: ``[T, ...]``, the tokens of all segments.
        offsets: ``[S+1]`` int32 or int64 on the same device, 0 first, non-decreasing, T last; other libraries'
            ``cu_seqlens``. A NumPy array is copied.

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
            offsets = index_tensor(offsets)
            object.__setattr__(self, "offsets", offsets)
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
        """Build a batch from packed `values` ``[T, ...]`` and segment `lengths` ``[S]``.

        Raises:
            LayoutError: If the lengths are not integers, are negative, or do not sum to T.
                (A tensor on a GPU is not checked; see :meth:`validate`.)

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
        """Pack a list of ``[n_s, ...]`` tensors. An empty list gives a batch without segments.

        Raises:
            ShapeError: If the tensors differ in anything but their first dimension.
        """
        return Jagged.from_lengths(*join(tensors))

    @staticmethod
    def concat(batches: Sequence[Jagged]) -> Jagged:
        """Concatenate the segments of all batches; also used by ``default_collate`` of a DataLoader.

        :func:`flexjag.ops.jagged_concat` concatenates the tokens of segments with equal index instead.

        Args:
            batches: At least one batch, equal in dtype, device and all dimensions but the first.

        Raises:
            LayoutError: If `batches` is empty, or one has rows behind its last offset.
            ShapeError: If dtypes, devices or other dimensions differ.

        >>> a, b = Jagged.from_lengths(torch.arange(3), [1, 2]), Jagged.from_lengths(torch.arange(4), [4])
        >>> Jagged.concat([a, b]).lengths.tolist()
        [1, 2, 4]
        """
        return Jagged(*join_batches(batches, Jagged))

    @staticmethod
    def from_padded(dense: Tensor, lengths: Tensor | Sequence[int], total: int | None = None) -> Jagged:
        """Remove the padding of `dense` ``[S, N, ...]``: segment s is ``dense[s, :lengths[s]]``.

        Args:
            dense: ``[S, N, ...]``.
            lengths: ``[S]``, each at most N.
            total: Sum of the lengths, if known: saves a device sync and makes the call traceable.

        Raises:
            LayoutError: If there are not S lengths, or one exceeds N (checked on a CPU).
        """
        return Jagged(*unpad(dense, lengths, total))

    @staticmethod
    def from_position_ids(values: Tensor, position_ids: Tensor) -> Jagged:
        """Cut packed values where the positions inside their segments start again at 0.

        Each 0 begins a segment, so that padding with position 0 becomes segments of one token. Segments without tokens
        have no position and are lost. Reading where segments begin is a device sync.

        Args:
            values: ``[T, ...]``, or ``[B, N, ...]`` for rows of packed segments, as libraries for training have them.
            position_ids: Integers ``[T]`` or ``[B, N]``; every row begins a segment.

        Raises:
            LayoutError: If the positions do not begin with 0, or neither count on by 1 nor start again at 0.

        >>> Jagged.from_position_ids(torch.arange(5), torch.tensor([0, 1, 0, 1, 2])).lengths.tolist()
        [2, 3]
        """
        return Jagged(*cut_by_positions(values, position_ids))

    @staticmethod
    def from_padding_mask(dense: Tensor, mask: Tensor, *, compact: bool = False) -> Jagged:
        """Remove the padding of `dense` ``[S, N, ...]``, wherever it is: on the right, on the left, on both sides.

        Args:
            dense: ``[S, N, ...]``.
            mask: ``[S, N]``, True or 1 for tokens, as an ``attention_mask``.
            compact: Leave out padding between tokens, too, which changes the positions of those after it.

        Raises:
            LayoutError: If `mask` does not fit, has other entries than 0 and 1, or padding between tokens.

        >>> mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
        >>> Jagged.from_padding_mask(torch.arange(6).view(2, 3), mask).to_list()
        [tensor([1, 2]), tensor([3])]
        """
        return Jagged(*remove_padding(dense, mask, compact))

    @staticmethod
    def from_nested(nested: Tensor, *, compact: bool = False) -> Jagged:
        """Take over the values and offsets of a NestedTensor, without a copy if its layout is jagged.

        Args:
            nested: ``[S, jagged, ...]``.
            compact: Copy segments together that have other rows between or behind them, as those of ``narrow`` do.

        Raises:
            LayoutError: If there are such rows.
            ShapeError: If it is no NestedTensor, or ragged in another dimension.
        """
        return Jagged(*unnest(nested, compact))

    def to_nested(self) -> Tensor:
        """A NestedTensor of the jagged layout that shares the values (one device sync)."""
        return nest(self.values, self.offsets)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each segment, ``[S]`` in the dtype of `offsets`."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def num_segments(self) -> int:
        """Number of segments S, without a device sync."""
        return self.offsets.shape[0] - 1

    @property
    def segment_ids(self) -> Tensor:
        """Segment index of each token, ``[T]`` int64.

        >>> Jagged.from_lengths(torch.zeros(5), [2, 0, 3]).segment_ids.tolist()
        [0, 0, 2, 2, 2]
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
        return segment_ids(self.offsets, self.values.shape[0])

    @property
    def positions(self) -> Tensor:
        """Position of each token in its segment, ``[T]`` int64, for instance for positional embeddings.

        >>> Jagged.from_lengths(torch.zeros(5), [2, 0, 3]).positions.tolist()
        [0, 1, 0, 1, 2]
        """
        token = torch.arange(self.values.shape[0], device=self.offsets.device)
        return token - self.offsets[self.segment_ids].long()

    @property
    def device(self) -> torch.device:
        """Device of values and offsets."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    def to(self, *args: Any, **kwargs: Any) -> Jagged:
        """Move the batch to another device, or convert its values to another dtype; arguments as for ``Tensor.to``."""
        values = self.values.to(*args, **kwargs)
        flags = dict(zip(("non_blocking", "copy"), (flag for flag in args if isinstance(flag, bool)), strict=False))
        flags |= {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        return Jagged(values, self.offsets.to(values.device, **flags))

    def changed(self, change: Change) -> Jagged:
        """The batch with `change` of values and offsets."""
        return Jagged(change(self.values), change(self.offsets))

    def clone(self) -> Jagged:
        """Copy values and offsets; differentiable, as ``Tensor.clone``."""
        return Jagged(self.values.clone(), self.offsets.clone())

    def contiguous(self) -> Jagged:
        """Return the batch with contiguous values and offsets, copied if necessary."""
        return Jagged(self.values.contiguous(), self.offsets.contiguous())

    def detach(self) -> Jagged:
        """Detach the values from the autograd graph; the offsets are shared."""
        return Jagged(self.values.detach(), self.offsets)

    def requires_grad_(self, requires_grad: bool = True) -> Jagged:
        """Set ``requires_grad`` of the values, and return the batch itself."""
        self.values.requires_grad_(requires_grad)
        return self

    def __len__(self) -> int:
        return self.num_segments

    def __bool__(self) -> bool:
        return True  # `x or other` must not drop a batch of no segments

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_list())

    def __getitem__(self, index: int | slice) -> Any:
        """Segment `index` as a view ``[n, ...]``, or for a slice the batch of its segments.

        The values of a slice without a step are a view. Reading the offsets is a sync on a GPU; in a compiled graph
        use :func:`flexjag.ops.jagged_index_select`, which also takes a tensor of indices.

        Raises:
            SegmentError: If the index is out of range, or neither an integer nor a slice.

        >>> x = Jagged.from_list([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])])
        >>> x[-1], x[:2], x[::-2].to_list()
        (tensor([4, 5]), Jagged(segments=2, tokens=3, values=[3] int64, device=cpu), [tensor([4, 5]), tensor([1, 2])])
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
        if isinstance(index, slice):
            return Jagged(*select(self.values, self.offsets, index))
        try:
            s = operator.index(index)
        except TypeError:
            raise SegmentError(explain_values("index", "must be an integer or a slice", index=index)) from None
        if not -self.num_segments <= s < self.num_segments:
            raise SegmentError(explain_values("index", "must be that of a segment", index=s, segments=len(self)))
        low, high = self.offsets[s % self.num_segments :][:2].tolist()
        return self.values[low:high]

    def unbind(self) -> tuple[Tensor, ...]:
        """Split the values into the S segments, views ``[n_s, ...]`` made by one autograd operation.

        Faster than :meth:`to_list` in the backward. As with ``Tensor.split``, the views cannot be modified in place.
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
        """Replace the values by others ``[T, ...]`` on the same offsets.

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
            LayoutError: If the offsets do not start at 0, decrease, or do not end at T.
        """
        check_offsets(self.offsets, self.values.shape[0])
        return self

    def to_list(self) -> list[Tensor]:
        """List the S segments as views of `values`, each ``[n_s, ...]``."""
        check_ends(self.offsets, self.values.shape[0], spare=True)
        return [self.values[lo:hi] for lo, hi in itertools.pairwise(self.offsets.tolist())]

    def to_padded(self, fill: float = 0.0, max_length: int | None = None) -> Tensor:
        """Pad every segment to the same length: a dense ``[S, N, ...]`` tensor.

        Args:
            fill: The padding value.
            max_length: N. Default: the longest segment, which costs a device sync. Longer segments
                are truncated to N, as in FBGEMM's ``jagged_to_padded_dense``.
        """
        check_ends(self.offsets, self.values.shape[0], spare=True)
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
        elif isinstance(other, Tensor | np.ndarray):  # not traceable by Dynamo, so not supported in eager mode either
            rule = "must be a Jagged or a number; use x.map(lambda v: ...) for tensors"
            raise ShapeError(explain_values("other", rule, shape=tuple(other.shape)))
        return self.with_values(fn(self.values, other))


def _unflatten(children: Iterable[Any], _: Any) -> Jagged:
    values, offsets = children
    if isinstance(values, Tensor) and isinstance(offsets, Tensor):
        return Jagged(values, offsets)
    tree = object.__new__(Jagged)  # pytree functions also unflatten placeholders
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
