"""Packed tensors in blocks of tokens, and products and masks of a list of tiles: for all that goes by tiles."""

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
    """One attention call in block form.

    Attributes:
        row: ``[N]`` tile rows, ascending.
        col: ``[N]`` tile columns.
        block: Tile size B.
        num_q: T_q.
        num_kv: T_kv.
        scale: Factor on ``q·k``.
        allowed: The mask, on packed indices that broadcast.
        score: The score, likewise, or None.
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
        """Number of tile columns; one more block, all zeros, stands behind them for unused tiles."""
        return blocks(self.num_kv, self.block)


def in_dtype(score: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
    """The score, kept in the dtype it is given: its tensors may be wider than the inputs."""
    return None if score is None else lambda s, *at: score(s, *at).to(s.dtype)


def to_blocks(x: Tensor, count: int, block: int) -> Tensor:
    """[T, H, D] to [count, H, B, D], padded with zeros."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count * block - x.shape[0]))
    # From one dimension to two, and on: splitting one of several guards on N % count, which torch.export cannot prove.
    flat = x.flatten().view(count, block * x.shape[1] * x.shape[2])
    return flat.view(count, block, *x.shape[1:]).transpose(1, 2)


def from_blocks(x: Tensor, tokens: int) -> Tensor:
    """[count, H, B, D] to [T, H, D]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if torch.compiler.is_exporting():  # a slice guards on the tokens being no more than the rows
        return x.index_select(0, torch.arange(tokens, device=x.device))
    return x[:tokens]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[N, H, i, j] @ [N, G, j, k] to [N, H, i, k], each of the G shared by H / G heads. May be overwritten."""
    n, h, i, j = a.shape
    g = b.shape[1]
    return _owned_bmm(a.reshape(n * g, h // g * i, j), b.reshape(n * g, j, b.shape[3])).view(n, h, i, b.shape[3])


def _owned_bmm(a: Tensor, b: Tensor) -> Tensor:
    """A product that nobody else holds. A dispatch mode may: selective checkpointing keeps what it is told to save."""
    out = torch.bmm(a, b)
    return out.clone() if not holds_no_numbers(out) and is_watched() else out


def sum_groups(x: Tensor, groups: int) -> Tensor:
    """[N, H, ...] to [N, G, ...], the sum over the heads that share a group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def indices(p: TiledCall, row: Tensor, col: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The b, h, q and kv of every score of these tiles, shaped to broadcast to [N, H, B, B]."""
    step = torch.arange(p.block, device=row.device)
    q = (row[:, None] * p.block + step).clamp(max=p.num_q - 1)[:, None, :, None]
    kv = (col[:, None] * p.block + step)[:, None, None, :]
    h = torch.arange(heads, device=row.device)[None, :, None, None]
    return h.new_zeros(()), h, q, kv.clamp(max=p.num_kv - 1)


def allowed_in(p: TiledCall, row: Tensor, col: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The mask of every score of these tiles, False outside the batch."""
    step = torch.arange(p.block, device=row.device)
    q, kv = row[:, None] * p.block + step, col[:, None] * p.block + step
    inside = (q < p.num_q)[:, None, :, None] & (kv < p.num_kv)[:, None, None, :]
    return p.allowed(*at) & inside


def matmul_heads(a: Tensor, b: Tensor) -> Tensor:
    """[N, H, i, j]ᵀ @ [N, H, i, k] to [N, H, j, k]. May be overwritten."""
    n, h, i, j = a.shape
    return _owned_bmm(a.reshape(n * h, i, j).transpose(1, 2), b.reshape(n * h, i, b.shape[3])).view(n, h, j, b.shape[3])


def tiles_at_once(device: torch.device, heads: int, block: int) -> int:
    """Tiles of `heads` heads whose scores are held at once."""
    return max(1, (CHUNK_SCORES if device.type == "cpu" else CHUNK_SCORES_GPU) // (heads * block**2))


def chunks(p: TiledCall, heads: int) -> list[tuple[int, int]]:
    """Slices of the tile list, each of whole tile rows and of about as many scores as are held at once."""
    most = tiles_at_once(p.row.device, heads, p.block)
    counts = torch.bincount(p.row[p.col < p.cols], minlength=p.rows).tolist()
    out, start, size = [], 0, 0
    for n in counts:
        if size and size + n > most:
            out.append((start, start + size))
            start, size = start + size, 0
        size += n
    return [*out, (start, start + size)] if size else out
