"""FBGEMM's functions as plain loops over segments, and the batches they loop over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

D, E, M, H = 4, 3, 2, 2


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


class Arguments(NamedTuple):
    """What calls take besides their operands, as a graph takes it."""

    offsets: Tensor
    n: Tensor
    two: list[Tensor]
    squares: tuple[Tensor, Tensor]
    fewer: Tensor
    chosen: Tensor
    chosen_total: int
    keys: Tensor
    total: int
    size: int


@dataclass(frozen=True)
class Batch:
    """Lengths, and a padded length N that may be smaller.

    With a second jagged dimension every token is a segment of its own; `inner` repeats to give their lengths.
    """

    lengths: tuple[int, ...]
    size: int
    dtype: torch.dtype = torch.int64
    inner: tuple[int, ...] = (2, 0, 3, 1)

    @cached_property
    def inner_lengths(self) -> list[int]:
        return [self.inner[i % len(self.inner)] for i in range(sum(self.lengths))]

    @cached_property
    def chosen(self) -> list[int]:
        """Every segment backwards, then every other one again."""
        order = list(range(len(self.lengths)))
        return [*order[::-1], *order[::2]]

    @cached_property
    def arguments(self) -> Arguments:
        n = torch.tensor(self.lengths, dtype=self.dtype)
        offsets = offsets_of(self.lengths, self.dtype)
        return Arguments(
            offsets=offsets,
            n=n,
            two=[offsets, offsets_of(self.inner_lengths, self.dtype)],
            squares=(n * n, offsets_of([k * k for k in self.lengths], self.dtype)),
            fewer=offsets_of([max(k - 1, 0) ** 2 for k in self.lengths], self.dtype),
            chosen=torch.tensor(self.chosen, dtype=self.dtype),
            chosen_total=sum(self.lengths[i] for i in self.chosen),
            keys=torch.stack([n, n.flip(0)]),
            total=sum(self.lengths),
            size=self.size,
        )

    @property
    def cuts(self) -> bool:
        return max(self.lengths, default=0) > self.size

    @property
    def keep(self) -> Tensor:
        """[T] bool: the tokens before position N."""
        return torch.tensor([i < self.size for n in self.lengths for i in range(n)], dtype=torch.bool)

    def sizes(self) -> dict[str, int]:
        return {
            "S": len(self.lengths),
            "R": len(self.lengths) * H,
            "T": sum(self.lengths),
            "U": sum(self.inner_lengths),
            "P": sum(n * n for n in self.lengths),
            "N": self.size,
            "L": max(self.lengths, default=0),
            "C": sum(self.lengths[i] for i in self.chosen),
        }

    def cut(self, x: Tensor) -> list[Tensor]:
        return [x[a:b] for a, b in pairwise(offsets_of(self.lengths).tolist())]

    def matrices(self, p: Tensor) -> list[Tensor]:
        return [m.view(n, n) for m, n in zip(p.split([n * n for n in self.lengths]), self.lengths, strict=True)]


def _stack(parts: list[Tensor], like: Tensor, *shape: int) -> Tensor:
    return torch.stack(parts) if parts else like.reshape(-1)[:0].reshape(0, *shape)


def _cat(parts: list[Tensor], like: Tensor, *shape: int) -> Tensor:
    return torch.cat(parts) if parts else like.reshape(-1)[:0].reshape(0, *shape)


def _fill(x: Tensor, size: int, fill: float) -> Tensor:
    """[n, ...] cut and padded to [size, ...]."""
    return pad(x[:size], [0, 0] * (x.ndim - 1) + [0, max(size - x.shape[0], 0)], value=fill)


def _zero(x: Tensor, size: int) -> Tensor:
    """[n, ...] with zeros from `size` on."""
    return torch.cat([x[:size], torch.zeros_like(x[size:])])


def padded(b: Batch, x: Tensor, fill: float = 0.0) -> Tensor:
    return _stack([_fill(s, b.size, fill) for s in b.cut(x)], x, b.size, *x.shape[1:])


def padded_two(b: Batch, x: Tensor, fill: float = 0.0) -> Tensor:
    rows = [_fill(part, 2, fill) for part in x.split(b.inner_lengths)] if b.inner_lengths else []
    inner = _stack(rows, x, 2, *x.shape[1:])
    return padded(b, inner, fill)


def packed(b: Batch, y: Tensor) -> Tensor:
    return _cat([_fill(row, n, 0.0) for n, row in zip(b.lengths, y.unbind(0), strict=True)], y, *y.shape[2:])


def packed_two(b: Batch, y: Tensor) -> Tensor:
    rows = packed(b, y)
    parts = [_fill(row, n, 0.0) for n, row in zip(b.inner_lengths, rows.unbind(0), strict=True)]
    return _cat(parts, y, *y.shape[3:])


def vectors(b: Batch, v: Tensor, a: Tensor) -> Tensor:
    out = []
    for s, tokens in enumerate(b.cut(a)):
        for h in range(H):
            n = min(tokens.shape[0], b.size)
            out.append(v[s * H + h, :n] @ tokens[:n, h * E : (h + 1) * E])
    return _stack(out, a, E) if b.lengths else a.new_zeros(0, H * E)


def softmax(b: Batch, x: Tensor) -> Tensor:
    parts = [torch.cat([torch.softmax(s[: b.size], 0), torch.zeros_like(s[b.size :])]) for s in b.cut(x)]
    return _cat(parts, x, D)


def gram(b: Batch, x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(b.cut(x), b.cut(y), strict=True)
    return _stack([p[: b.size].T @ q[: b.size] for p, q in pairs], x, x.shape[1], y.shape[1])


def times_dense(b: Batch, x: Tensor, y: Tensor) -> Tensor:
    return _cat([_zero(s @ w, b.size) for s, w in zip(b.cut(x), y.unbind(0), strict=True)], x, y.shape[2])


def selected(b: Batch, x: Tensor) -> Tensor:
    parts = b.cut(x)
    return _cat([parts[i] for i in b.chosen], x, *x.shape[1:])


def added(b: Batch, y: Tensor) -> Tensor:
    """Rows of the chosen segments, added up where they came from."""
    out = [torch.zeros(n, *y.shape[1:], dtype=y.dtype) for n in b.lengths]
    for i, part in zip(b.chosen, y.split([b.lengths[i] for i in b.chosen]), strict=True) if b.lengths else ():
        out[i] = out[i] + part
    return _cat(out, y, *y.shape[1:])


def selected_keys(b: Batch, x: Tensor, y: Tensor) -> Tensor:
    """Of one key, and of another with the same lengths backwards."""
    back = Batch(b.lengths[::-1], b.size).cut(y)
    return torch.cat([selected(b, x), _cat([back[i] for i in b.chosen], y)])


def sliced(b: Batch, x: Tensor) -> Tensor:
    """From the middle of each segment on."""
    return _cat([s[s.shape[0] // 2 :][: b.size] for s in b.cut(x)], x)


def truncated(b: Batch, x: Tensor) -> Tensor:
    return _cat([s[: b.size] for s in b.cut(x)], x)


def accumulated(b: Batch, w: Tensor, index: Tensor, count: int) -> Tensor:
    rows = [torch.stack([w[index == i].float().sum(), (index == i).sum().float()]) for i in range(count)]
    return _stack(rows, w.float(), 2)


def stacked(b: Batch, x: Tensor, fill: float) -> tuple[Tensor, ...]:
    """Two keys: all segments, and the same backwards."""
    total = sum(b.lengths)
    back = Batch(b.lengths[::-1], 3)
    return padded(b, x[:total], fill), padded(back, x[total:], fill)


def outer(b: Batch, x: Tensor, y: Tensor) -> Tensor:
    return _cat([(p @ q.T).flatten() for p, q in zip(b.cut(x), b.cut(y), strict=True)], x)


def times_array(b: Batch, p: Tensor, y: Tensor) -> Tensor:
    out = []
    for m, s in zip(b.matrices(p), b.cut(y), strict=True):
        top = m[: b.size, : b.size] @ s[: b.size]
        out.append(torch.cat([top, torch.zeros_like(s[b.size :])]))
    return _cat(out, y, y.shape[1])


def matrix_softmax(b: Batch, p: Tensor, dim: int) -> Tensor:
    return _cat([torch.softmax(m, dim).flatten() for m in b.matrices(p)], p)


def squares_padded(b: Batch, p: Tensor) -> Tensor:
    filled = [_fill(_fill(m, b.size, -1.5).T, b.size, -1.5).T for m in b.matrices(p)]
    return _stack(filled, p, b.size, b.size)


def masked(b: Batch, p: Tensor, y: Tensor) -> Tensor:
    out = []
    for m in b.matrices(p):
        n, width = m.shape[0], min(m.shape[0], y.shape[0])
        out.append((m * pad(y[:width, :width], (0, n - width, 0, n - width))).flatten())
    return _cat(out, p)


def differences(b: Batch, a: Tensor) -> Tensor:
    return _cat([(s[:-1, None] - s[None, 1:]).flatten() for s in b.cut(a) if s.shape[0]], a)


def concatenated(b: Batch, a: Tensor, x: Tensor) -> Tensor:
    return _cat([part for s, own in enumerate(b.cut(x)) for part in (a[s : s + 1], own)], x)


def basic(b: Batch, q: Tensor, k: Tensor, v: Tensor, use_mask: bool = False) -> Tensor:
    out = []
    for x, y, z in zip(b.cut(q), b.cut(k), b.cut(v), strict=True):
        p = torch.softmax(x @ y.T, 1) / b.size
        p = p.triu() if use_mask else p
        out.append(_zero(p[:, : b.size] @ z[: b.size], b.size))
    return _cat(out, v, v.shape[1])


def multi_head(b: Batch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for x, y, z in zip(*(b.cut(t.transpose(0, 1)) for t in (q, k, v)), strict=True):
        x, y, top = (t[: b.size].transpose(0, 1) for t in (x, y, z))
        own = (torch.softmax(x @ y.mT, -1) / b.size @ top).transpose(0, 1)
        out.append(torch.cat([own, torch.zeros_like(z[b.size :])]))
    return _cat(out, v.transpose(0, 1), *v.transpose(0, 1).shape[1:]).transpose(0, 1)


def target(b: Batch, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = []
    for s, (x, z) in enumerate(zip(b.cut(q), b.cut(v), strict=True)):
        scores = x @ k[s] + _fill(bias[s], x.shape[0], 0.0)
        out.append(torch.softmax(scores[: b.size], 0).T @ z[: b.size])
    return _stack(out, v, k.shape[2], v.shape[1])
