"""Whole segments in few calls: those of one shape that lie side by side as they are, short ones gathered and padded.

A call costs about 30 µs before it computes anything, and 80 with gradients (costs.json); so segments of up to
SHORT tokens share calls. They are padded to a multiple of ROUND by copies of their own last token: a mask rules the
copies out as keys, and what they compute as queries is dropped. So no segment reads another's values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Range = tuple[int, int]

SHORT = 128  # tokens of a segment up to which gathering costs less than a call of its own
ROUND = 16  # a vector of floats
GATHERED = 2048  # tokens gathered at once: their copies stay in a core's cache
ADJACENT = 8192  # tokens of adjacent segments at once: bounds what the kernel allocates


@dataclass(frozen=True, eq=False)
class Batch:
    """Segments that go through one call, each of `n` queries and `m` keys.

    Attributes:
        count: How many.
        n: Queries of each.
        m: Keys of each.
        q: Packed queries: a range if they lie side by side, else ``[count * n]`` indices.
        kv: Packed keys, likewise.
        own_q: Which of the gathered queries are no padding; None if all are.
        own_kv: Which of the gathered keys are no padding; None if all are.
    """

    count: int
    n: int
    m: int
    q: Range | Tensor
    kv: Range | Tensor
    own_q: Tensor | None = None
    own_kv: Tensor | None = None

    def take(self, x: Tensor, is_query: bool, groups: int | None) -> Tensor:
        """From packed tokens ``[1, heads, T, D]`` to ``[count * groups, heads / groups, tokens, D]``.

        Without `groups` to ``[count, heads, tokens, D]``. A view where tokens are a range and `groups` is None or
        `count` is 1. The heads are in front in all arguments here, as views of ``[T, heads, D]``; D may be missing.
        """
        at, tokens = (self.q, self.n) if is_query else (self.kv, self.m)
        if isinstance(at, tuple):
            if self.count == 1:
                return _one(x, at, groups)
            x = x.narrow(2, at[0], at[1] - at[0]).unflatten(2, (self.count, tokens))[0].transpose(0, 1)
            return x if groups is None else x.reshape(self.count * groups, -1, *x.shape[2:])
        return self._by_head(x[0].transpose(0, 1).index_select(0, at), tokens, groups)

    def take_gradient(self, g: Tensor, groups: int | None) -> Tensor:
        """As :meth:`take` of a gradient of the queries' outputs, 0 in padding."""
        if self.own_q is None:
            return self.take(g, True, groups)
        assert isinstance(self.q, Tensor)
        g = g[0].transpose(0, 1)
        flat = g.new_zeros(self.q.shape[0], *g.shape[1:])
        flat.index_copy_(0, self.own_q, g.index_select(0, self.q[self.own_q]))
        return self._by_head(flat, self.n, groups)

    def _by_head(self, x: Tensor, tokens: int, groups: int | None) -> Tensor:
        """From gathered tokens ``[count * tokens, heads, D]``."""
        x = x.view(self.count, tokens, *x.shape[1:]).transpose(1, 2)
        return x if groups is None else x.reshape(self.count * groups, -1, *x.shape[2:])

    def put(self, out: Tensor, x: Tensor, is_query: bool) -> None:
        """Write ``[..., tokens, D]``, with the batch and the heads in front, to packed ``[1, heads, T, D]``."""
        at, tokens, own = (self.q, self.n, self.own_q) if is_query else (self.kv, self.m, self.own_kv)
        heads = out.shape[1]
        if isinstance(at, tuple) and self.count == 1:
            _one(out, at, x.shape[0]).copy_(x)
            return
        x = x.reshape(self.count, heads, tokens, *out.shape[3:])
        if isinstance(at, tuple):
            out.narrow(2, at[0], at[1] - at[0]).unflatten(2, (self.count, tokens))[0].copy_(x.transpose(0, 1))
            return
        x = x.transpose(1, 2).reshape(self.count * tokens, heads, *out.shape[3:])
        packed = out[0].transpose(0, 1)
        packed.index_copy_(0, *((at, x) if own is None else (at[own], x.index_select(0, own))))


def _one(x: Tensor, at: Range, groups: int | None) -> Tensor:
    """One segment's tokens ``[groups or 1, ..., tokens, D]``: few operations, as each costs a microsecond."""
    x = x.narrow(2, at[0], at[1] - at[0])
    return x if groups is None or groups == 1 else x[0].unflatten(0, (groups, -1))


def list_batches(q_ends: list[int], kv_ends: list[int], pad_keys: bool) -> tuple[list[Batch], list[Range], list[Range]]:
    """Cut a batch of segments into calls.

    Args:
        q_ends: The queries' offsets.
        kv_ends: The keys' offsets.
        pad_keys: Whether keys behind a segment's last may be padded; needs a mask that rules them out by position,
            and as many keys as queries.

    Returns:
        The calls, and the packed queries and keys that are in none: their segment has no key, or no query.
    """
    batches: list[Batch] = []
    short: dict[tuple[int, int], list[int]] = {}
    alone_q: list[Range] = []
    alone_kv: list[Range] = []
    index, segments = 0, len(q_ends) - 1
    while index < segments:
        first = index
        n, m = q_ends[first + 1] - q_ends[first], kv_ends[first + 1] - kv_ends[first]
        index += 1
        if n == 0 or m == 0:
            alone_q.append((q_ends[first], q_ends[index]))
            alone_kv.append((kv_ends[first], kv_ends[index]))
            continue
        rounded = -(-n // ROUND) * ROUND
        most = ADJACENT // max(n, m)
        while (
            index < segments
            and index - first < most
            and q_ends[index + 1] - q_ends[index] == n
            and kv_ends[index + 1] - kv_ends[index] == m
        ):
            index += 1
        if max(n, m) <= SHORT and (rounded != n or index == first + 1):
            short.setdefault((rounded, rounded if pad_keys else m), []).extend(range(first, index))
            continue
        at = (q_ends[first], q_ends[index]), (kv_ends[first], kv_ends[index])
        batches.append(Batch(index - first, n, m, *at))
    for (n, m), members in short.items():
        if len(members) == 1:
            q, kv = ((ends[members[0]], ends[members[0] + 1]) for ends in (q_ends, kv_ends))
            batches.append(Batch(1, q[1] - q[0], kv[1] - kv[0], q, kv))
            continue
        each = max(1, GATHERED // max(n, m))
        for start in range(0, len(members), each):
            batches.append(_gathered(n, m, members[start : start + each], q_ends, kv_ends))
    return batches, alone_q, alone_kv


def _gathered(n: int, m: int, members: list[int], q_ends: list[int], kv_ends: list[int]) -> Batch:
    q, own_q = _indices(n, members, q_ends)
    kv, own_kv = (q, own_q) if kv_ends is q_ends and m == n else _indices(m, members, kv_ends)
    return Batch(len(members), n, m, q, kv, own_q, own_kv)


def _indices(tokens: int, members: list[int], ends: list[int]) -> tuple[Tensor, Tensor | None]:
    """``[count * tokens]``: the members' packed tokens, the last of each repeated; and which are not repeated."""
    bounds = torch.tensor([(ends[s], ends[s + 1]) for s in members])
    at = bounds[:, :1] + torch.arange(tokens)
    own = (at < bounds[:, 1:]).flatten()
    return torch.minimum(at, bounds[:, 1:] - 1).flatten(), None if bool(own.all()) else own.nonzero()[:, 0]
