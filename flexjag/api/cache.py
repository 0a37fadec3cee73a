"""KVCache: keys and values of growing segments in pages, read as ordinary jagged batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexjag.api.pages import Integers, PageTable, indices_of, is_integer, per_segment
from flexjag.errors import (
    DifferentiationError,
    KVCacheError,
    LayoutError,
    ShapeError,
    explain_values,
)
from flexjag.jagged import Jagged
from flexjag.offsets import as_int, check_ends, check_same_layout, mark_varying

Count = int | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class _Step:
    """What all layers of a step share.

    Attributes:
        new: The storage's rows of the new tokens ``[T]``, on the offsets of the tokens.
        held: The storage's rows of all tokens ``[T_kv]``, on the offsets of the keys.
        low: The first of those rows if they follow one another, else None.
    """

    new: Jagged
    held: Jagged
    low: int | None


class KVCache:
    """Keys and values of S growing segments, for decoding: what is appended is not copied again, and can be shared.

    A step extends all segments by any number of tokens, prompts and single tokens alike; the segments of a batch may
    differ in that, and in their lengths. What :meth:`append` returns are ordinary :class:`~flexjag.jagged.Jagged`, for
    any plan, mask and backend. Masks and scores line up the new queries with the last keys by ``align="end"``; then a
    step equals the last rows of attention over the whole segments.

    Inside, tokens are in pages, so that a segment grows, is forked or dropped without moving the others. Which pages,
    is kept on the host: :meth:`extend` and the methods that change segments are called outside of compiled functions,
    :meth:`append` inside or outside. There is no gradient through a cache.

    Args:
        layers: Number of layers.
        heads: Number of key/value heads G.
        dim: Head dimension D of the keys.
        value_dim: Head dimension E of the values. Default: D.
        segments: Number of segments S to begin with, without tokens. See also :meth:`add`.
        dtype: Of keys and values. Default: ``torch.get_default_dtype()``.
        device: Where they are stored. Default: PyTorch's default device.
        page: Tokens per page.
        pages: The number of pages, made at once and never more. Default: as many as are needed, doubled when they run
            out, which copies all pages once.

    Raises:
        ShapeError: If a size is no positive integer, or the dtype is not floating-point.

    >>> import flexjag as fj
    >>> cache = KVCache(layers=1, heads=2, dim=16, segments=2)
    >>> for lengths in ([5, 3], [1, 1]):  # two prompts, then a token each
    ...     tokens = Jagged.from_lengths(torch.randn(sum(lengths), 2, 16), lengths)  # here also q, k and v
    ...     plan = fj.plan(tokens, cache.extend(tokens), mask=fj.Causal("end"))  # one for all layers
    ...     k, v = cache.append(0, tokens, tokens)
    ...     out = fj.attention(tokens, k, v, plan=plan)
    >>> out.lengths.tolist(), k.lengths.tolist()
    ([1, 1], [6, 4])
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        dim: int,
        value_dim: int | None = None,
        *,
        segments: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        page: int = 16,
        pages: int | None = None,
    ) -> None:
        value_dim = dim if value_dim is None else value_dim
        sizes = {"layers": layers, "heads": heads, "dim": dim, "value_dim": value_dim, "page": page, "pages": pages}
        for name, size in (sizes | {"segments": segments}).items():
            least = 0 if name == "segments" else 1
            if (name, size) != ("pages", None) and not (is_integer(size) and size >= least):  # pyright: ignore[reportOptionalOperand]
                raise ShapeError(explain_values(name, f"must be an int of at least {least}", **{name: size}))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not dtype.is_floating_point:
            raise ShapeError(explain_values("dtype", "must be floating point", dtype=dtype))
        self._fixed = pages is not None
        self._capacity = 0 if pages is None else int(pages)
        self._table = PageTable.empty(int(page), int(segments))
        self._shapes = (int(heads), int(dim)), (int(heads), int(value_dim))
        rows = self._capacity * int(page)
        with torch.inference_mode(False):  # so that the storage may be written to in any mode
            self._keys, self._values = (
                [torch.empty(rows, *shape, dtype=dtype, device=device) for _ in range(layers)] for shape in self._shapes
            )
        for storage in (*self._keys, *self._values):
            mark_varying(storage, 0)
        self._step: _Step | None = None
        self._appended = [True] * int(layers)
        self._starts = self._tensor(self._table.seen)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._keys)

    @property
    def num_segments(self) -> int:
        """Number of segments S."""
        return len(self._table.lengths)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens that each segment holds, ``[S]`` int64, those of the present step included."""
        return self._tensor(self._table.lengths)

    @property
    def starts(self) -> Tensor:
        """Position of each segment's first new token, ``[S]`` int64, for :func:`flexjag.rope`.

        After :meth:`extend` this is the number of tokens before that step, otherwise before the next one, counting
        those that were trimmed.
        """
        return self._starts

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._keys[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of keys and values."""
        return self._keys[0].device

    @property
    def free_pages(self) -> int:
        """Number of pages that no segment holds."""
        return self._capacity - int(np.count_nonzero(self._table.holders(self._capacity)))

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of all layers, free pages included."""
        return sum(x.nbytes for x in (*self._keys, *self._values))

    def extend(self, tokens: Jagged) -> Jagged:
        """Begin a step: make room for new tokens behind those of each segment, in all layers.

        On a GPU this reads the offsets (one device sync).

        Args:
            tokens: The new tokens, any number for each of the S segments, also none. Only its offsets are used.

        Returns:
            The layout of the keys that :meth:`append` will return, ``[T_kv]``: for ``fj.plan(tokens, keys, ...)``.

        Raises:
            LayoutError: If `tokens` has other segments than the cache, or rows behind its last offset.
            KVCacheError: If a layer lacks the tokens of the step before, or the fixed number of pages is too small. The
                cache is as it was, so that segments can be evicted and the step tried again.
        """
        self._check_order("extend")
        if not isinstance(tokens, Jagged):
            raise LayoutError(explain_values("tokens", "must be a flexjag.Jagged", type=type(tokens).__name__))
        if tokens.num_segments != self.num_segments or tokens.device != self.device:
            rule = "must have the segments of the cache, empty where nothing is new, on its device"
            seen = {"segments": tokens.num_segments, "cache": self.num_segments, "device": str(tokens.device)}
            raise LayoutError(explain_values("tokens", rule, **seen, cache_device=str(self.device)))
        check_ends(tokens.offsets, tokens.values.shape[0], "tokens.offsets")
        new = np.diff(tokens.offsets.cpu().numpy()).astype(np.int64)
        if len(new) and new.min() < 0:
            raise LayoutError(explain_values("tokens.offsets", "must not decrease", least=int(new.min())))
        starts = self._table.seen
        with torch.inference_mode(False), torch.no_grad():
            self._table, (old, own) = self._table.extended(new, self._capacity, self._grow)
            if len(old):
                old, own = self._tensor(old), self._tensor(own)
                for storage in (*self._keys, *self._values):
                    by_page = storage.unflatten(0, (self._capacity, self._table.page))
                    by_page[own] = by_page[old]
            self._step = self._begin(tokens, new)
            self._starts = self._tensor(starts)
        if int(new.sum()):
            self._appended = [False] * self.num_layers
        return self._step.held

    def append(self, layer: int, k: Jagged, v: Jagged) -> tuple[Jagged, Jagged]:
        """Append a layer's keys and values of the step that :meth:`extend` began.

        Args:
            layer: Index of the layer.
            k: The new keys ``[T, G, D]``, on the offsets that the cache was extended by; rotated, if they are to be.
            v: The new values ``[T, G, E]``, on the same offsets.

        Returns:
            The keys ``[T_kv, G, D]`` and values ``[T_kv, G, E]`` of all tokens held. Treat them as read-only and use
            them before the next step: where no copy is needed, they are views of the storage.

        Raises:
            KVCacheError: If there is no such layer, or no step has begun.
            ShapeError: If shapes, dtypes or devices do not fit.
            LayoutError: If the offsets are others than those the cache was extended by.
            DifferentiationError: If gradients are enabled and k or v needs one.
        """
        if not is_integer(layer) or not 0 <= layer < self.num_layers:
            raise KVCacheError(explain_values("layer", "must be that of a layer", layer=layer, layers=self.num_layers))
        step = self._step
        if step is None:
            raise KVCacheError("append: extend(tokens) begins a step, once for all layers and after segments change")
        for name, x, storage in (("k", k, self._keys[layer]), ("v", v, self._values[layer])):
            _check_new(name, x, storage, step.new)
        self._appended[layer] = True
        return self._put(step, self._keys[layer], k), self._put(step, self._values[layer], v)

    def add(self, count: int = 1) -> None:
        """Add segments without tokens, behind the others.

        Raises:
            KVCacheError: If `count` is no integer of at least 0, or a layer lacks the tokens of the step.
        """
        self._check_order("add")
        if not is_integer(count) or count < 0:
            raise KVCacheError(explain_values("count", "must be an int of at least 0", count=count))
        self._change(self._table.added(int(count)))

    def select(self, segments: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these segments only, in this order. Nothing is copied.

        A segment that is named more than once is forked: all share their tokens, and when they are extended each gets
        its own copy of the last page, if that is not full. So a beam search is reordered, and a prefix shared.

        Args:
            segments: Indices ``[N]`` or one bool per segment ``[S]``, a tensor, an array or a list.

        Raises:
            SegmentError: If an index is out of range, or they are neither integers nor S bools.
            KVCacheError: If a layer lacks the tokens of the step.
        """
        self._check_order("select")
        self._change(self._table.selected(indices_of(segments, self.num_segments)))

    def evict(self, segments: int | Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Drop segments and free their pages; the others move up.

        Args:
            segments: Indices or one bool per segment, as in :meth:`select`; or one index.

        Raises:
            SegmentError: As :meth:`select`.
            KVCacheError: If a layer lacks the tokens of the step.
        """
        self._check_order("evict")
        dropped = indices_of([segments] if is_integer(segments) else segments, self.num_segments)
        self._change(self._table.selected(np.setdiff1d(np.arange(self.num_segments), dropped)))

    def trim(self, keep_last: Count, keep_first: int = 0) -> None:
        """Drop all but the last tokens of each segment, and its first; for windows, behind which no key is needed.

        A query's window needs the tokens it reaches back to: before a step of n tokens keep W for ``Window(W, 0)``.
        What counts from the end (``align="end"``) and rotated positions stay right. What counts from the start, such as
        ``Prefix``, ``Chunked`` and keys in functions, counts from the first token that is held; between the first and
        the last tokens a distance in masks and scores is shorter by what was dropped.

        Args:
            keep_last: How many of the last tokens are kept, int or ``[S]``.
            keep_first: How many of the first are kept as well, as for ``Window(64, 0, align="end") | Prefix(4)``; the
                same in all trims of a segment.

        Raises:
            ShapeError: If the numbers are no integers of at least 0, or not one per segment.
            KVCacheError: If more first tokens are to be kept than are still there, or a layer lacks the tokens of the
                step.
        """
        self._check_order("trim")
        first = as_int(keep_first)
        if not is_integer(first) or first < 0:
            raise ShapeError(explain_values("keep_first", "must be an int of at least 0", keep_first=keep_first))
        self._change(self._table.trimmed(per_segment("keep_last", keep_last, self.num_segments), first))

    def rewind(self, count: Count) -> None:
        """Take back the last tokens of each segment: drafts that were rejected, or a step that failed.

        Args:
            count: How many, int or ``[S]``.

        Raises:
            ShapeError: If the numbers are no integers of at least 0, or not one per segment.
            KVCacheError: If a segment has fewer tokens, or would keep some that a layer lacks.
        """
        counts = per_segment("count", count, self.num_segments)
        table = self._table.rewound(counts)
        if self._step is not None and (counts < np.diff(self._step.new.offsets.cpu().numpy())).any():
            self._check_order("rewind")
        self._change(table)

    def __repr__(self) -> str:
        (heads, dim), (_, value_dim) = self._shapes
        return (
            f"KVCache(layers={self.num_layers}, heads={heads}, dim={dim}, value_dim={value_dim}, "
            f"segments={self.num_segments}, tokens={int(self._table.lengths.sum())}, "
            f"pages={self._capacity} of {self._table.page}, {str(self.dtype)[6:]}, device={self.device})"
        )

    def _begin(self, tokens: Jagged, new: Integers) -> _Step:
        """The step's rows, made on the device from one run of rows per page."""
        lengths = self._table.lengths
        shift, count = self._table.runs()
        ends, total = np.cumsum(lengths), int(lengths.sum())
        used = shift[count > 0]
        low = int(used[0]) if len(used) and used.min() == used.max() else None
        rows = _spread(self._tensor(shift), self._tensor(count), total)
        last = _spread(self._tensor(ends - np.cumsum(new)), self._tensor(new), int(new.sum()))
        offsets = self._tensor(np.concatenate([[0], ends])).to(tokens.offsets.dtype)
        return _Step(Jagged(rows[last], tokens.offsets), Jagged(rows, offsets), low)

    def _put(self, step: _Step, storage: Tensor, x: Jagged) -> Jagged:
        storage.index_copy_(0, step.new.values, x.values.detach())
        if not torch.compiler.is_compiling() and step.low is not None:  # a graph would be made for each row
            values = storage[step.low : step.low + step.held.values.shape[0]]
        else:
            values = storage.index_select(0, step.held.values)
        return Jagged(values, step.held.offsets)

    def _grow(self, lacking: int) -> int:
        """Have at least so many more pages; returns how many there are."""
        if self._fixed:
            seen = {"pages": self._capacity, "page": self._table.page, "lacking": lacking}
            raise KVCacheError(explain_values("pages", "are all in use; evict or trim segments, or make more", **seen))
        self._capacity += max(self._capacity, lacking)
        for layers in (self._keys, self._values):
            for i, old in enumerate(layers):
                layers[i] = old.new_empty(self._capacity * self._table.page, *old.shape[1:])
                layers[i][: len(old)] = old
                mark_varying(layers[i], 0)
        return self._capacity

    def _change(self, table: PageTable) -> None:
        self._table, self._step = table, None
        self._appended = [True] * self.num_layers
        self._starts = self._tensor(table.seen)

    def _check_order(self, name: str) -> None:
        if torch.compiler.is_compiling():
            raise KVCacheError(f"{name}: call it outside of compiled functions; only append() is for graphs")
        if not all(self._appended):
            rule = "layers lack the tokens of the step: append them, or rewind() the step"
            lacking = [i for i, done in enumerate(self._appended) if not done]
            raise KVCacheError(explain_values(name, rule, lacking=lacking, layers=self.num_layers))

    def _tensor(self, found: Integers) -> Tensor:
        with torch.inference_mode(False):
            made = torch.tensor(found, device=self.device)
        mark_varying(made, 0)
        return made


def _spread(shift: Tensor, count: Tensor, total: int) -> Tensor:
    """The packed indices ``[total]``, to each of which its run's shift is added."""
    return torch.repeat_interleave(shift, count, output_size=total) + torch.arange(total, device=shift.device)


def _check_new(name: str, x: Jagged, storage: Tensor, new: Jagged) -> None:
    if not isinstance(x, Jagged):
        raise ShapeError(explain_values(name, "must be a flexjag.Jagged", type=type(x).__name__))
    if x.values.shape[1:] != storage.shape[1:] or x.dtype != storage.dtype or x.device != storage.device:
        dim = "D" if name == "k" else "E"
        rule = f"values must be [T, G, {dim}] with the heads, dimension, dtype and device of the cache"
        seen = {"shape": tuple(x.values.shape), "cache": tuple(storage.shape[1:]), "dtype": x.dtype}
        seen |= {"cache_dtype": storage.dtype, "device": str(x.device), "cache_device": str(storage.device)}
        raise ShapeError(explain_values(name, rule, **seen))
    if torch.is_grad_enabled() and x.values.requires_grad:
        rule = "needs a gradient, which a KVCache does not pass on: decode under torch.no_grad(), or detach it"
        raise DifferentiationError(explain_values(name, rule))
    check_same_layout(new, x, name, "must have the offsets that the cache was extended by")
