"""Division of an attention call into pieces: some query rows with all keys that they attend.

A piece is either a list of whole tile rows (backend ``tiled``), or a run of one segment's queries with the keys from
the first to the last that they may attend (backend ``segments``): few large products, which are fast on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.algebra.facts import diagonal_align
from flexjag.backends import blocks
from flexjag.backends.gathers import add_at
from flexjag.lowering.layout import INT32_MAX
from flexjag.lowering.recipe import Recipe

ROWS = 128  # queries of a run: enough for a product, few enough that a causal mask skips keys
RUN_SCORES = 2**22  # scores of a run at most, unless 16 queries have more

At = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """The rows `start` to `end`, packed queries or tile rows, with all keys that they attend.

    Attributes:
        start: First row.
        end: One past the last row.
        keys: ``(first, end)`` packed keys, or ``[N]`` tile columns.
        local: ``[N]`` tile rows counted from `start`; None for a run.
        at: Packed indices b, h, q and kv of the scores, which broadcast.
        allowed: The mask of the scores; None if all are allowed.
    """

    start: int
    end: int
    keys: tuple[int, int] | Tensor
    local: Tensor | None
    at: At
    allowed: Tensor | None


@dataclass(frozen=True, eq=False)
class Walk:
    """The division of a call into pieces.

    Attributes:
        pieces: ``pieces(heads)`` iterates over the pieces.
        open: ``open(x, is_query)`` converts packed ``[T, heads, D]`` to the form from which pieces are sliced,
            ``[1, heads, T, D]`` or ``[C, heads, B, D]``.
        close: ``close(x, T)`` converts back.
        dim: The dimension of that form along which rows are sliced.
    """

    pieces: Callable[[int], Iterator[Piece]]
    open: Callable[[Tensor, bool], Tensor]
    close: Callable[[Tensor, int], Tensor]
    dim: int

    def rows(self, x: Tensor, piece: Piece) -> Tensor:
        """The piece's rows of a tensor in the form of `open`; a view."""
        return x.narrow(self.dim, piece.start, piece.end - piece.start)

    def keys(self, x: Tensor, piece: Piece) -> Tensor:
        """The piece's keys or values, of a tensor in the form of `open`."""
        if isinstance(piece.keys, Tensor):
            return x.index_select(0, piece.keys)
        return x.narrow(self.dim, piece.keys[0], piece.keys[1] - piece.keys[0])

    def add_keys(self, total: Tensor, piece: Piece, part: Tensor) -> None:
        """Add `part` to the piece's keys or values in `total`, in place."""
        if isinstance(piece.keys, Tensor):
            add_at(total, piece.keys, part)
        else:
            self.keys(total, piece).add_(part)


def excludes_own_key(normalizer: nz.Normalizer) -> bool:
    """True if a normalizer leaves out each row's own (aligned) key."""
    return isinstance(normalizer, nz.StickBreaking) and not normalizer.attend_current


def own_key(recipe: Recipe) -> Tensor | None:
    """Packed index ``[T_q]`` of each row's own (aligned) key if the normalizer excludes it, else None."""
    layout = recipe.layout
    if not excludes_own_key(recipe.normalizer):
        return None
    at = layout.kv_start + layout.q_pos
    if layout.is_self or diagonal_align(recipe.mask, layout.is_self) == "start":
        return at
    return at + layout.kv_length() - layout.q_length()


def tested(recipe: Recipe, own: Tensor | None) -> Callable[..., Tensor]:
    """The plan's ``mask_mod`` on packed indices, without each row's `own` key unless that is None."""
    mask = recipe.mask_mod
    return mask if own is None else lambda b, h, q, kv: mask(b, h, q, kv) & (kv != own[q])


def walk_tiles(recipe: Recipe, whole: bool = False) -> Walk:
    """Division into lists of whole tile rows, or, if `whole`, into one piece of all tiles."""
    tiles, block = recipe.tiles.all_heads, recipe.block_size
    num_q, num_kv = recipe.layout.num_q, recipe.layout.num_kv
    test = tested(recipe, own_key(recipe))
    p = blocks.TiledCall(tiles.row, tiles.col, block, num_q, num_kv, 1.0, test, None)
    # A spare one, so that no size of a graph can be 1: Dynamo would compile that case anew.
    rows = p.rows + 1 if whole else p.rows

    def pieces(heads: int) -> Iterator[Piece]:
        for start, end in [(0, p.row.shape[0])] if whole else blocks.chunks(p, heads):
            row, col = p.row[start:end], p.col[start:end]
            first, last = (0, rows) if whole else (int(row[0]), int(row[-1]) + 1)
            b, h, q, kv = blocks.indices(p, row, col, heads)
            # Expanded, a lookup by head alone is undone by its own backward, not by a sum over all tiles, which
            # Inductor would compile anew when there are many.
            at = (b, h.expand(row.shape[0], -1, -1, -1), q, kv) if whole else (b, h, q, kv)
            yield Piece(first, last, col, row - first, at, blocks.allowed_in(p, row, col, at))

    def opened(x: Tensor, is_query: bool) -> Tensor:
        return blocks.to_blocks(x, rows if is_query else p.cols + 1, block)

    return Walk(pieces, opened, blocks.from_blocks, 0)


def walk_runs(recipe: Recipe, heads: int) -> Walk:
    """Division into runs of one segment's queries. Reads the offsets and spans on the host."""
    own = own_key(recipe)
    test = tested(recipe, own)
    q_ranges, kv_ranges, full = _runs(recipe, heads, own)
    device = recipe.layout.device

    def pieces(heads: int) -> Iterator[Piece]:
        h = torch.arange(heads, device=device)[None, :, None, None]
        for (start, end), keys, whole in zip(q_ranges, kv_ranges, full, strict=True):
            if keys[0] == keys[1]:
                continue
            q = torch.arange(start, end, device=device)[None, None, :, None]
            kv = torch.arange(*keys, device=device, dtype=torch.int32)[None, None, None]
            at = (h.new_zeros(()), h, q, kv)
            allowed = None if whole else test(*at).expand(-1, -1, end - start, keys[1] - keys[0])
            yield Piece(start, end, keys, None, at, allowed)

    return Walk(pieces, lambda x, is_query: x.transpose(0, 1)[None], lambda x, tokens: x[0].transpose(0, 1), 2)


def _runs(
    recipe: Recipe, heads: int, own: Tensor | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[bool]]:
    """Query ranges of the runs, their key ranges from first to last allowed, and True for runs without masked pairs."""
    layout = recipe.layout
    q_ranges: list[tuple[int, int]] = []
    ends = zip(itertools.pairwise(layout.q_offsets.tolist()), layout.kv_offsets.diff().tolist(), strict=True)
    for (start, end), keys in ends:
        step = max(16, min(ROWS, RUN_SCORES // max(1, heads * keys)))
        q_ranges += [(at, min(at + step, end)) for at in range(start, end, step)]
    used = layout.q_offsets[-1]
    run = torch.repeat_interleave(torch.tensor([b - a for a, b in q_ranges], device=used.device, dtype=torch.int64))
    lo, hi = (torch.cat([getattr(x.outer, end)[:, : run.shape[0]] for x in recipe.sandwiches]) for end in ("lo", "hi"))
    some = hi > lo
    first = lo.new_full((len(q_ranges),), INT32_MAX)
    first = first.scatter_reduce(0, run, torch.where(some, lo, INT32_MAX).amin(0), "amin")
    last = hi.new_zeros(len(q_ranges)).scatter_reduce(0, run, torch.where(some, hi, 0).amax(0), "amax")
    last = torch.maximum(first, last).where(first < INT32_MAX, first)
    low, high = first[run], last[run]
    whole = torch.ones_like(run, dtype=torch.bool)
    for x in recipe.sandwiches:
        inner = (x.inner.lo[:, : run.shape[0]] <= low) & (x.inner.hi[:, : run.shape[0]] >= high)
        whole &= inner.any(0)
    if own is not None:
        own = own[: run.shape[0]]
        whole &= (own < low) | (own >= high)
    full = torch.ones(len(q_ranges), dtype=torch.int32, device=run.device)
    full = full.scatter_reduce(0, run, whole.to(torch.int32), "amin")
    return q_ranges, list(zip(first.tolist(), last.tolist(), strict=True)), [bool(x) for x in full.tolist()]
