"""Layout: segment, local position and key range of each packed token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.differentiation import is_mapped, needs_plain_operations
from flexjag.errors import LayoutError, PlanError, assert_on_device, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.later import Later
from flexjag.offsets import assert_ends, can_look, check_offsets, same_size, surely
from flexjag.upstream import holds_no_numbers, is_watched

INT32_MAX = 2**31 - 1


_stands_in = False


def runs_on_gpu(device: torch.device) -> bool:
    """True if tensors on a device are read by GPU kernels: off the CPU, or under :func:`cpu_stands_in_for_gpu`."""
    return _stands_in or device.type != "cpu"


@contextlib.contextmanager
def cpu_stands_in_for_gpu() -> Iterator[None]:
    """Context manager: layouts on a CPU are built as for GPU kernels, so that those can be compiled without a GPU."""
    global _stands_in
    before, _stands_in = _stands_in, True
    try:
        yield
    finally:
        _stands_in = before


def blocks(tokens: int, block: int) -> int:
    """Number of tiles of `block` tokens that cover so many tokens; at least 1."""
    count = (tokens + block - 1) // block
    if surely(count == 0):
        return 1
    return count if surely(count > 0) else max(1, count)  # so that a traced size stays a plain quotient if it can


@dataclass(frozen=True, eq=False)
class Layout:
    """Per-token coordinates of a query batch and the key/value batch it attends to.

    Everything is per token, so a new number of segments changes no shape that a kernel sees.
    Query rows behind the last offset (the spare rows of a fixed-capacity batch) belong to segment S
    and have the empty range ``kv_start == kv_end``.

    Attributes:
        q_offsets: ``[S+1]`` int32.
        kv_offsets: ``[S+1]`` int32; the same tensor object as `q_offsets` in self-attention.
        q_segment: ``[T_q]`` int32.
        kv_segment: ``[T_kv]`` int32; the same tensor object as `q_segment` in self-attention.
        q_pos: ``[T_q]`` int32, position inside the segment.
        kv_start: ``[T_q]`` int32, first packed key of the row's own segment.
        kv_end: ``[T_q]`` int32, one past its last.
        is_self: Queries and keys share their offsets.
        has_spare: T_q may exceed ``q_offsets[-1]``.
        on_gpu: GPU kernels will read this, which round the rows up to a tile. See :func:`runs_on_gpu`.
    """

    q_offsets: Tensor
    kv_offsets: Tensor
    q_segment: Tensor
    kv_segment: Tensor
    q_pos: Tensor
    kv_start: Tensor
    kv_end: Tensor
    is_self: bool
    has_spare: bool
    on_gpu: bool

    @property
    def num_q(self) -> int:
        """T_q, the number of packed query tokens."""
        return self.q_segment.shape[0]

    @property
    def num_kv(self) -> int:
        """T_kv, the number of packed key/value tokens."""
        return self.kv_segment.shape[0]

    @property
    def num_segments(self) -> int:
        """S, the number of segments."""
        return self.q_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """The device of the coordinates."""
        return self.q_offsets.device

    @property
    def may_look(self) -> bool:
        """True if the coordinates may be read on the host: on a CPU outside of graphs, unless capacity is fixed.

        Plans of fixed capacity promise to read nothing, on a GPU as well as here.
        """
        return not self.on_gpu and not self.has_spare and not holds_no_numbers(self.q_offsets)

    def in_whole_tiles(self, block: int) -> bool:
        """True if T_q and T_kv are fixed at multiples of a tile, so that kernels need no bounds checks.

        Always False without fixed capacity: if T varies, its divisibility must not decide which graph is taken.
        """
        return self.has_spare and self.num_q % block == 0 and self.num_kv % block == 0

    def q_length(self) -> Tensor:
        """``[T_q]`` int32: the query length n of each row's segment."""
        starts, ends = (_gather(self.q_offsets, self.q_segment + i, self.has_spare) for i in (0, 1))
        return ends - starts

    def kv_length(self) -> Tensor:
        """``[T_q]`` int32: the key length m of each row's segment."""
        return self.kv_end - self.kv_start

    def per_row(self, per_segment: Tensor) -> Tensor:
        """Spread one value per segment ``[S]`` to query rows ``[T_q]``; spare rows get 0."""
        return torch.cat([per_segment, per_segment.new_zeros(1)])[self.q_segment.long()]


def _gather(offsets: Tensor, index: Tensor, has_spare: bool) -> Tensor:
    """Entries of the offsets; the last one for spare rows, which have index S or S + 1."""
    return offsets.index_select(0, index.clamp(max=offsets.shape[0] - 1) if has_spare else index)


def _next_segments(offsets: Tensor, token: Tensor) -> Tensor:
    """One past the segment index of each token, int32; the index is :func:`flexjag.offsets.segment_ids`."""
    return torch.searchsorted(offsets, token, right=True, out_int32=True)


def _are_offsets(x: Jagged, has_spare: bool) -> Tensor:
    """Bool scalar: x's offsets start at 0, never decrease and end at its number of rows, or before spare rows.

    It slices nothing: a slice to S differences would make S = 1 a separate graph.
    """
    rows = x.values.shape[0]
    end = x.offsets[-1] <= rows if has_spare else x.offsets[-1] == rows
    return (x.offsets[0] == 0) & end & (x.offsets.cummax(0).values == x.offsets).all()


def _looks_right(x: Jagged, max_length: int | None) -> bool:
    """True if x's offsets are valid and no segment is longer than `max_length`, as a quick look by NumPy tells.

    It takes a tenth of the time of torch's operations, and is not taken at tensors that ``torch.func`` or a dispatch
    mode stand before.
    """
    if type(x.offsets) is not Tensor or is_watched() or needs_plain_operations():
        return False
    offsets, rows = x.offsets.numpy(), x.values.shape[0]
    lengths = offsets[1:] - offsets[:-1]
    right = offsets[0] == 0 and offsets[-1] == rows and (lengths >= 0).all()
    return bool(right) and (max_length is None or bool((lengths <= max_length).all()))


def build_layout(
    q: Jagged,
    k: Jagged,
    *,
    max_tokens: int | None = None,
    max_length: int | None = None,
    validate: bool = False,
    later: bool = False,
) -> Layout:
    """Lay out queries `q` against keys `k`. O(T) time and memory; no device sync unless `validate`.

    Args:
        q: The query batch; only its offsets and its number of tokens matter.
        k: The key/value batch, with as many segments.
        max_tokens: The fixed number of query rows; ``q.values`` must have exactly this many, of which
            the first ``offsets[-1]`` are used.
        max_length: A bound on every segment's length, checked as the offsets are.
        validate: Check the contents of the offsets (one device sync; in a traced graph an assertion). Outside
            of graphs, those on a CPU are always checked, but with `max_tokens`.
        later: Make the tokens' coordinates when they are first read; not in a graph.

    Raises:
        LayoutError: If an argument is no Jagged, the numbers of segments or the devices differ, T exceeds int32,
            `torch.vmap` maps the offsets, or checked offsets do not start at 0, decrease, or end at another number.
        PlanError: If `max_tokens` is not the number of rows, or a checked segment is longer than `max_length`.
    """
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Jagged):
            raise LayoutError(explain_values(name, "must be a flexjag.Jagged", type=type(x).__name__))
        if is_mapped(x.offsets):
            raise LayoutError(f"{name}.offsets: must not be mapped by torch.vmap, which may map values only")
    if q.num_segments != k.num_segments:
        raise LayoutError(explain_values("k", "must have as many segments as q", q=q.num_segments, k=k.num_segments))
    if q.offsets.device != k.offsets.device:
        raise LayoutError(
            explain_values("k", "must be on the device of q", q=str(q.offsets.device), k=str(k.offsets.device))
        )
    num_q, num_kv = q.values.shape[0], k.values.shape[0]
    if not torch.compiler.is_compiling() and max(num_q, num_kv) > INT32_MAX - 4096:
        raise LayoutError(explain_values("q", "packed indices must fit in int32", tokens_q=num_q, tokens_kv=num_kv))
    if max_tokens is not None and num_q != max_tokens:
        raise PlanError(
            explain_values("max_tokens", "must equal the rows of q.values", max_tokens=max_tokens, rows=num_q)
        )
    tracing, has_spare = holds_no_numbers(q.offsets), max_tokens is not None
    may_look = can_look(q.offsets, k.offsets) and not has_spare  # fixed capacity promises not to, so nowhere
    is_self = q.offsets is k.offsets and same_size(num_q, num_kv)
    sides = (("q", q),) if is_self else (("q", q), ("k", k))
    if tracing and validate:  # a bound on the lengths is asserted by the caller
        for name, x in sides:
            rule = "must start at 0, not decrease, and end at the number of packed tokens"
            assert_on_device(_are_offsets(x, has_spare), f"{name}.offsets: {rule}")
    elif not validate and not may_look:
        for name, x in sides:
            assert_ends(x.offsets, x.values.shape[0], f"{name}.offsets", spare=has_spare)
    elif validate or not all(_looks_right(x, max_length) for _, x in sides):
        for name, x in sides:
            total = int(x.offsets[-1]) if has_spare else x.values.shape[0]
            check_offsets(x.offsets, total, f"{name}.offsets")
            if total > x.values.shape[0]:
                raise LayoutError(
                    explain_values(f"{name}.offsets", "must not pass max_tokens", last=total, rows=x.values.shape[0])
                )
            longest = int(x.lengths.max()) if x.num_segments else 0
            if max_length is not None and longest > max_length:
                raise PlanError(
                    explain_values(
                        "max_length", f"must bound every segment of {name}", max_length=max_length, longest=longest
                    )
                )
    q_offsets = q.offsets.to(torch.int32).contiguous()
    kv_offsets = q_offsets if is_self else k.offsets.to(torch.int32).contiguous()
    facts: dict[str, Any] = {"is_self": is_self, "has_spare": has_spare, "on_gpu": runs_on_gpu(q_offsets.device)}
    if later:
        return LaterLayout.without(sizes=(num_q, num_kv), q_offsets=q_offsets, kv_offsets=kv_offsets, **facts)
    return Layout(
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        **_coordinates(q_offsets, kv_offsets, num_q, num_kv, has_spare),
        **facts,
    )


def _coordinates(q_offsets: Tensor, kv_offsets: Tensor, num_q: int, num_kv: int, has_spare: bool) -> dict[str, Tensor]:
    """What a layout has per token, by its attributes' names. In self-attention both offsets are the same tensor."""
    is_self = kv_offsets is q_offsets
    token = torch.arange(num_q, device=q_offsets.device, dtype=torch.int32)
    keys = token if is_self else torch.arange(num_kv, device=q_offsets.device, dtype=torch.int32)
    following = _next_segments(q_offsets, token)
    q_segment = following - 1
    kv_segment = q_segment if is_self else _next_segments(kv_offsets, keys) - 1
    kv_start = _gather(kv_offsets, q_segment, has_spare)
    q_pos = token - (kv_start if is_self else _gather(q_offsets, q_segment, has_spare))
    return {
        "q_segment": q_segment,
        "kv_segment": kv_segment,
        "q_pos": q_pos,
        "kv_start": kv_start,
        "kv_end": _gather(kv_offsets, following, has_spare),
    }


class LaterLayout(Later, Layout):
    """A layout for one eager call: the coordinates of its tokens are made when one of them is first read.

    Attributes:
        sizes: T_q and T_kv.
    """

    later = ("q_segment", "kv_segment", "q_pos", "kv_start", "kv_end")
    sizes: tuple[int, int]

    @property
    def num_q(self) -> int:
        """T_q, the number of packed query tokens."""
        return self.sizes[0]

    @property
    def num_kv(self) -> int:
        """T_kv, the number of packed key/value tokens."""
        return self.sizes[1]

    def make(self) -> dict[str, Tensor]:
        """The coordinates, by name."""
        return _coordinates(self.q_offsets, self.kv_offsets, *self.sizes, self.has_spare)
