"""Packed tensors in blocks of tokens, and products and masks of a list of tiles; shared by all tiled computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.lowering.layout import blocks
from flexjag.upstream import holds_no_numbers, is_watched

CHUNK_SCORES = 2**20  # scores held at once on a CPU: about what a core's L2 cache holds
CHUNK_SCORES_GPU = 2**24  # 64 MB of float32: fills a GPU, where smaller operations only wait for launches; unmeasured


@dataclass(frozen=True, eq=False)
class TiledCall:
    """The tiles, mask and score of one attention call over a list of tiles.

    Attributes:
        row: ``[N]`` tile rows, ascending.
        col: ``[N]`` tile columns.
        block: Tile size B, in tokens.
        num_q: T_q.
        num_kv: T_kv.
        scale: Factor on ``q·k``.
        allowed: The mask ``allowed(b, h, q, kv)``, on packed indices that broadcast.
        score: The score ``score(s, b, h, q, kv)``, likewise, or None.
    """

    row: Tensor
    col: Tensor
    block: int
    num_q: int
    num_kv: int
    scale: float
    allowed: Callable[..., Tensor]
    score: Callable[..., Tensor] | None

    @property
    def rows(self) -> int:
        """Number of tile rows."""
        return blocks(self.num_q, self.block)

    @property
    def cols(self) -> int:
        """Number of tile columns, not counting the block of zeros behind them that unused tiles point to."""
        return blocks(self.num_kv, self.block)


def in_dtype(score: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    """The score function with its result cast to the dtype of its input: its tensors may be wider than that."""
    return None if score is None else lambda s, *at: score(s, *at).to(s.dtype)


def to_blocks(x: Tensor, count: int, block: int) -> Tensor:
    """Convert [T, H, D] to [count, H, B, D], padded with zeros."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * block - x.shape[0]))
    # From one dimension to two, and on: splitting one of several guards on N % count, which torch.export cannot prove.
    flat = x.flatten().view(count, block * x.shape[1] * x.shape[2])
    return flat.view(count, block, *x.shape[1:]).transpose(1, 2)


def from_blocks(x: Tensor, tokens: int) -> Tensor:
    """Convert [count, H, B, D] to [T, H, D]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if torch.compiler.is_exporting():  # a slice guards on the tokens being no more than the rows
        return x.index_select(0, torch.arange(tokens, device=x.device))
    return x[:tokens]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product [N, H, i, j] @ [N, G, j, k] -> [N, H, i, k], each of G shared by H / G heads. Safe to overwrite."""
    n, h, i, j = a.shape
    g = b.shape[1]
    return _owned_bmm(a.reshape(n * g, h // g * i, j), b.reshape(n * g, j, b.shape[3])).view(n, h, i, b.shape[3])


def _owned_bmm(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm`, cloned if a dispatch mode may keep it, as selective checkpointing does. So safe to overwrite."""
    out = torch.bmm(a, b)
    return out.clone() if not holds_no_numbers(out) and is_watched() else out


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """Sum [N, H, ...] over the heads of each group, to [N, G, ...]."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def indices(p: TiledCall, row: Tensor, col: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed indices b, h, q and kv of all scores of these tiles; they broadcast to [N, H, B, B]."""
    step = torch.arange(p.block, device=row.device)
    q = (row[:, None] * p.block + step).clamp(max=p.num_q - 1)[:, None, :, None]
    kv = (col[:, None] * p.block + step)[:, None, None, :]
    h = torch.arange(heads, device=row.device)[None, :, None, None]
    return h.new_zeros(()), h, q, kv.clamp(max=p.num_kv - 1)


def allowed_in(p: TiledCall, row: Tensor, col: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The mask of these tiles, which broadcasts to [N, H, B, B]; False beyond T_q and T_kv."""
    step = torch.arange(p.block, device=row.device)
    q, kv = row[:, None] * p.block + step, col[:, None] * p.block + step
    inside = (q < p.num_q)[:, None, :, None] & (kv < p.num_kv)[:, None, None, :]
    return p.allowed(*at) & inside


def matmul_heads(a: Tensor, b: Tensor) -> Tensor:
    """Product [N, H, i, j]ᵀ @ [N, H, i, k] -> [N, H, j, k]. Safe to overwrite."""
    n, h, i, j = a.shape
    return _owned_bmm(a.reshape(n * h, i, j).transpose(1, 2), b.reshape(n * h, i, b.shape[3])).view(n, h, j, b.shape[3])


def tiles_at_once(device: torch.device, heads: int, block: int) -> int:
    """Number of tiles, each of `heads` heads, whose scores are held at once; at least 1."""
    return max(1, (CHUNK_SCORES if device.type == "cpu" else CHUNK_SCORES_GPU) // (heads * block**2))


def chunks(p: TiledCall, heads: int) -> list[tuple[int, int]]:
    """Slices ``(start, end)`` of the tile list: whole tile rows, several only up to :func:`tiles_at_once` tiles."""
    most = tiles_at_once(p.row.device, heads, p.block)
    counts = torch.bincount(p.row[p.col < p.cols], minlength=p.rows).tolist()
    out, start, size = [], 0, 0
    for n in counts:
        if size and size + n > most:
            out.append((start, start + size))
            start, size = start + size, 0
        size += n
    return [*out, (start, start + size)] if size else out
