"""Batching of whole segments into few calls: adjacent ones of one shape as views, short ones gathered and padded.

A call costs tens of microseconds before it computes anything, more with gradients; so segments of up to SHORT numbers,
many tokens of one head or few tokens of many heads, share calls. They are padded to a multiple of ROUND by copies of
their own last token: a causal mask or a bias masks the copies as keys, and their results as queries are dropped. So no
segment reads another's values. (An infinite number in a segment's last value becomes NaN by this, as 0 · inf.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]

SHORT = 12288  # numbers of a segment's queries up to which gathering costs less than a call of its own
LONGEST = 192  # tokens of such a segment: with one narrow head, what padding adds to the scores counts as well
ROUND = 16  # a vector of floats
FEWEST = 4  # segments that are worth gathering
GATHERED = 2**19  # numbers gathered at once: their copies stay in a core's cache
ADJACENT = 8192  # tokens of adjacent segments at once: bounds what the kernel allocates


class Cut:
    """One split of the packed tokens at the bounds of disjoint ranges: cheaper than a slice per range."""

    def __init__(self, ranges: list[Range], total: int) -> None:
        bounds = sorted({0, total, *itertools.chain.from_iterable(ranges)})
        self.sizes = [b - a for a, b in itertools.pairwise(bounds)]
        self.number = {start: number for number, start in enumerate(bounds)}


class Packed:
    """Packed tokens ``[T, heads, ...]``, and views ``[1, heads, tokens, ...]`` of all ranges."""

    def __init__(self, tokens: Tensor, cut: Cut) -> None:
        self.tokens, self._number = tokens, cut.number
        self._views = tokens.transpose(0, 1)[None].split_with_sizes(cut.sizes, 2)

    def view(self, at: Range) -> Tensor:
        """The view ``[1, heads, tokens, ...]`` of one of the cut's ranges."""
        return self._views[self._number[at[0]]]


@dataclass(frozen=True, eq=False)
class SegmentBatch:
    """Segments that share one call of the kernel, each of `n` queries and `m` keys.

    Attributes:
        count: Number of segments.
        n: Queries per segment, padding included.
        m: Keys per segment, padding included.
        q: Packed queries: a range if they are adjacent, else ``[count * n]`` indices.
        kv: Packed keys: a range if they are adjacent, else ``[count * m]`` indices.
        own_q: Indices of the gathered queries that are not padding; None without padding.
        own_kv: Indices of the gathered keys that are not padding; None without padding.
        key_bias: ``[count, 1, 1, m]`` float32, -inf for padding keys, else 0; None without padding.
    """

    count: int
    n: int
    m: int
    q: Range | Tensor
    kv: Range | Tensor
    own_q: Tensor | None = None
    own_kv: Tensor | None = None
    key_bias: Tensor | None = None

    def take(self, x: Packed, is_query: bool, groups: int | None) -> Tensor:
        """The tokens as ``[count * groups, heads / groups, tokens, ...]``.

        Without `groups`, as ``[count, heads, tokens, ...]``. A view if the tokens are a range and `groups` is None or
        `count` is 1.
        """
        at, tokens = (self.q, self.n) if is_query else (self.kv, self.m)
        if isinstance(at, Tensor):
            return self._by_head(x.tokens.index_select(0, at), tokens, groups)
        view = x.view(at)
        if self.count == 1:
            return _grouped(view, groups)
        view = view[0].unflatten(1, (self.count, tokens)).transpose(0, 1)
        return view if groups is None else view.reshape(self.count * groups, -1, *view.shape[2:])

    def take_gradient(self, x: Packed, groups: int | None) -> Tensor:
        """Like :meth:`take`, of a gradient of the queries' outputs: 0 in padding."""
        if self.own_q is None:
            return self.take(x, True, groups)
        assert isinstance(self.q, Tensor)
        flat = x.tokens.new_zeros(self.q.shape[0], *x.tokens.shape[1:])
        flat.index_copy_(0, self.own_q, x.tokens.index_select(0, self.q[self.own_q]))
        return self._by_head(flat, self.n, groups)

    def bias(self, dtype: torch.dtype, groups: int | None) -> Tensor | None:
        """`key_bias` as ``[count * groups, 1, 1, m]``, in float32 or, for operands of that `dtype`, float64."""
        if self.key_bias is None:
            return None
        bias = self.key_bias.to(torch.promote_types(dtype, torch.float32))
        return bias if groups is None else bias.repeat_interleave(groups, 0)

    def _by_head(self, x: Tensor, tokens: int, groups: int | None) -> Tensor:
        """Convert gathered tokens ``[count * tokens, heads, ...]`` to the shape of :meth:`take`."""
        x = x.view(self.count, tokens, *x.shape[1:]).transpose(1, 2)
        return x if groups is None else x.reshape(self.count * groups, -1, *x.shape[2:])

    def put(self, out: Packed, x: Tensor, is_query: bool) -> None:
        """Write a result of :meth:`take`'s shape to the packed tokens, without its padding."""
        at, tokens, own = (self.q, self.n, self.own_q) if is_query else (self.kv, self.m, self.own_kv)
        if isinstance(at, tuple):
            view = out.view(at)
            if self.count == 1:
                _grouped(view, x.shape[0]).copy_(x)
            else:
                view = view[0].unflatten(1, (self.count, tokens))
                view.copy_(x.reshape(self.count, -1, *x.shape[2:]).transpose(0, 1))
            return
        x = x.reshape(self.count, -1, *x.shape[2:]).transpose(1, 2).reshape(self.count * tokens, *out.tokens.shape[1:])
        out.tokens.index_copy_(0, *((at, x) if own is None else (at[own], x.index_select(0, own))))


def _grouped(x: Tensor, groups: int | None) -> Tensor:
    """View a segment's ``[1, heads, tokens, ...]`` as ``[groups, heads / groups, tokens, ...]``."""
    return x if groups is None or groups == 1 else x[0].unflatten(0, (groups, -1))


def list_batches(
    q_ends: list[int], kv_ends: list[int], width: int, pad_keys: bool
) -> tuple[list[SegmentBatch], list[Range], list[Range]]:
    """Group segments into calls of the kernel.

    Args:
        q_ends: The queries' offsets ``[S+1]``.
        kv_ends: The keys' offsets ``[S+1]``.
        width: Numbers per query: heads times features, at least 1.
        pad_keys: Allow padding keys. They must be masked then: by a causal mask over as many keys as queries, or by
            :meth:`SegmentBatch.bias`.

    Returns:
        The batches, and the ranges of packed queries and keys in none of them: their segment has no key, or no query.
    """
    batches: list[SegmentBatch] = []
    short: dict[tuple[int, int], list[int]] = {}
    alone_q: list[Range] = []
    alone_kv: list[Range] = []
    index, segments = 0, len(q_ends) - 1
    longest = min(SHORT // width, LONGEST)
    while index < segments:
        first = index
        n, m = q_ends[first + 1] - q_ends[first], kv_ends[first + 1] - kv_ends[first]
        index += 1
        if n == 0 or m == 0:
            alone_q.append((q_ends[first], q_ends[index]))
            alone_kv.append((kv_ends[first], kv_ends[index]))
            continue
        padded = _rounded(n), _rounded(m) if pad_keys else m
        most = ADJACENT // max(n, m)
        while (
            index < segments
            and index - first < most
            and q_ends[index + 1] - q_ends[index] == n
            and kv_ends[index + 1] - kv_ends[index] == m
        ):
            index += 1
        alike = index - first  # of which many share a call as they are
        if max(n, m) * alike <= longest and (padded != (n, m) or alike == 1):
            short.setdefault(padded, []).extend(range(first, index))
            continue
        at = (q_ends[first], q_ends[index]), (kv_ends[first], kv_ends[index])
        batches.append(SegmentBatch(index - first, n, m, *at))
    for (n, m), members in short.items():
        each = max(1, GATHERED // width // max(n, m))
        for start in range(0, len(members), each):
            chunk = members[start : start + each]
            if len(chunk) < FEWEST:
                pairs = [((q_ends[s], q_ends[s + 1]), (kv_ends[s], kv_ends[s + 1])) for s in chunk]
                batches += [SegmentBatch(1, q[1] - q[0], kv[1] - kv[0], q, kv) for q, kv in pairs]
            else:
                batches.append(_gathered(n, m, chunk, q_ends, kv_ends))
    return batches, alone_q, alone_kv


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def _gathered(n: int, m: int, members: list[int], q_ends: list[int], kv_ends: list[int]) -> SegmentBatch:
    q, own_q = _indices(n, members, q_ends)
    kv, own_kv = (q, own_q) if kv_ends is q_ends and m == n else _indices(m, members, kv_ends)
    bias = None
    if own_kv is not None:
        bias = torch.full((len(members), 1, 1, m), -torch.inf, device="cpu")
        bias.view(-1)[own_kv] = 0.0
    return SegmentBatch(len(members), n, m, q, kv, own_q, own_kv, bias)


def _indices(tokens: int, members: list[int], ends: list[int]) -> tuple[Tensor, Tensor | None]:
    """Packed indices ``[count * tokens]``, padded by each member's last token, and the places that are no padding.

    The second is None without padding.
    """
    bounds = torch.tensor([(ends[s], ends[s + 1]) for s in members], device="cpu")
    at = bounds[:, :1] + torch.arange(tokens, device="cpu")
    own = (at < bounds[:, 1:]).flatten()
    return torch.minimum(at, bounds[:, 1:] - 1).flatten(), None if bool(own.all()) else own.nonzero()[:, 0]
