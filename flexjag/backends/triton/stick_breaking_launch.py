"""Launches of the stick-breaking kernels: grids, step sizes and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexjag.backends.blocks import TiledCall, allowed_in, indices, matmul, tiles_at_once, to_blocks
from flexjag.backends.normalized.stick_breaking import EXACT
from flexjag.backends.triton.modules import Functions, load
from flexjag.backends.triton.pointwise import add_up
from flexjag.backends.triton.stick_breaking_kernels import find_spoiled, of_keys, of_queries, stick_breaking, sum_right
from flexjag.kernels.launch import ALL_REGISTERS, launch, power_of_2, precision
from flexjag.lowering.layout import blocks

NOTES = 2**28
"""Bytes of intermediate sums (notes) that the backward may hold at once, unless one group's heads need more."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one attention call.

    Attributes:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        captures: Tensors that the printed functions read.
        numbers: Integers that they read.
        source: The printed functions.
        tiles: Row, column, full and live, as in :class:`~flexjag.lowering.tiles.TileList`. FULL ones are not masked.
        scale: Factor on ``q·k``.
        block: Tile size, in tokens.
        is_self: No row has a key of a larger packed index, as in self-attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    captures: Sequence[Tensor]
    numbers: Sequence[int]
    source: str
    tiles: Sequence[Tensor]
    scale: float
    block: int
    is_self: bool

    @property
    def functions(self) -> Functions:
        """The functions of mask and score."""
        return load(self.source)

    @property
    def group(self) -> int:
        """Number of query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    def launch(self, kernel: Any, kind: str, programs: int, **more: Any) -> None:
        """Launch a kernel for `programs` heads or groups, with those of the arguments that it takes."""
        d, e = self.q.shape[2], self.v.shape[2]
        functions = self.functions
        given = {"q": self.q, "k": self.k, "v": self.v, **_strides(q=self.q, k=self.k, v=self.v), **more}
        given |= {"captures": tuple(self.captures), "numbers": tuple(self.numbers), "scale": self.scale}
        given |= {"T_Q": self.q.shape[0], "T_KV": self.k.shape[0]}
        given |= {"GROUP": self.group, "SELF": self.is_self, "D": d, "E": e, "BLOCK": self.block}
        given |= {"MASK": functions.mask, "SCORE": functions.score, "DSCORE": functions.dscore}
        given |= {"BLOCK_D": power_of_2(d, 16), "BLOCK_E": power_of_2(e, 16), "PRECISION": precision(self.q.dtype)}
        sizes = step_sizes(kind, self.q.dtype, power_of_2(max(d, e), 16), self.block, functions.is_heavy)
        given |= sizes
        rows = (
            blocks(self.k.shape[0], sizes["BLOCK_N"]) if kind == "keys" else blocks(self.q.shape[0], sizes["BLOCK_M"])
        )
        chosen = {name: given[name] for name in kernel.arg_names}
        constants = {name: x for name, x in chosen.items() if name in CONSTANT}
        arguments = {name: x for name, x in chosen.items() if name not in CONSTANT}
        options = {"num_warps": sizes["num_warps"], "num_stages": sizes["num_stages"], "maxnreg": ALL_REGISTERS}
        launch(kernel, (rows, programs), arguments, **constants, **options)

    def row_lists(self) -> dict[str, Tensor]:
        """The tiles by row as ``2 * column + is_full``, and each row's first index in that list."""
        row, col, full, live = self.tiles
        rows = blocks(self.q.shape[0], self.block)
        return {"entries": (col * 2 + full).to(torch.int32), "begin": _begins(torch.where(live, row, rows), rows)}

    def column_lists(self) -> dict[str, Tensor]:
        """The tiles by column as ``2 * row + is_full``, each column's first index, and the tiles' indices by row."""
        row, col, full, live = self.tiles
        columns = blocks(self.k.shape[0], self.block)
        column, order = torch.where(live, col, columns).sort(stable=True)
        entries = (row * 2 + full).to(torch.int32)[order]
        return {"entries": entries, "begin": _begins(column, columns), "tiles": order.to(torch.int32)}


CONSTANT = {
    "GROUP", "MASK", "SCORE", "DSCORE", "SELF", "D", "E", "BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_E",
    "PRECISION",
}  # fmt: skip
"""The kernels' compile-time arguments."""


def step_sizes(kind: str, dtype: torch.dtype, width: int, tile: int, is_heavy: bool) -> dict[str, Any]:
    """Rows and keys per step, warps and stages: the largest that fit the registers of every target.

    Args:
        kind: ``"forward"``, ``"sums"``, ``"queries"`` or ``"keys"``.
        dtype: Of q, k and v.
        width: The larger of D and E, a power of 2.
        tile: The plan's tile size.
        is_heavy: A tensor is read for each query-key pair.
    """
    if dtype == torch.float32:  # whose products go through registers
        rows, warps, stages = 16, 8 if kind == "sums" else 4, 1 if kind == "keys" else 2
    else:
        forward, queries = 32 if is_heavy else 64, 32 if is_heavy or width > 64 else 64
        rows = {"forward": forward, "sums": queries, "queries": queries, "keys": 32}[kind]
        rows, warps, stages = rows if width <= 128 else 16, 4, 2
    return {"BLOCK_M": min(rows, tile), "BLOCK_N": keys_of(dtype, tile), "num_warps": warps, "num_stages": stages}


def keys_of(dtype: torch.dtype, tile: int) -> int:
    """Keys per step, the same in all kernels. With more, the sums along them exceed the registers."""
    return min(16 if dtype == torch.float32 else 32, tile)


def _begins(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device), out_int32=True)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of each tensor's tokens and heads, in elements."""
    return {f"{name}_{axis}": x.stride(at) for name, x in tensors.items() for at, axis in enumerate("th")}


def _side_by_side(x: Tensor) -> Tensor:
    """The tensor with contiguous features; itself if they are."""
    return x if x.stride(2) == 1 else x.contiguous()


def _by_row(call: Call) -> Call:
    q, k, v = (_side_by_side(x) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def _spoiled(x: Tensor) -> Tensor:
    """``[H, T]`` float32: NaN for each row ``x[t, h]`` with a non-finite entry, else 0."""
    spoiled = torch.empty((x.shape[1], x.shape[0]), dtype=torch.float32, device=x.device)
    arguments = {"x": x, "spoiled": spoiled, "T": x.shape[0], **_strides(x=x)}
    constants = {"D": x.shape[2], "BLOCK": 32, "BLOCK_D": power_of_2(x.shape[2], 16), "num_warps": 4}
    launch(find_spoiled, (blocks(x.shape[0], 32), x.shape[1]), arguments, **constants)
    return spoiled


def run_forward(call: Call, out: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the output ``[T_q, H, E]`` and the log of the remainder, ``[T_q, H]`` float32."""
    call = _by_row(call)
    heads, spoiled = call.q.shape[1], _spoiled(call.v)
    call.launch(stick_breaking, "forward", heads, spoiled=spoiled, out=out, left=left, **call.row_lists())
    return out, left


def run_backward(call: Call, grad: Tensor, grad_left: Tensor, learned: Sequence[int]) -> list[Tensor]:
    """The gradients of q, k and v, and of the captures that need them.

    Args:
        call: The call.
        grad: Gradient of the output.
        grad_left: Gradient of the log-remainder.
        learned: Indices of the captures that need gradients.
    """
    call = _by_row(call)
    q, k, v = call.q, call.k, call.v
    grad, groups, count = _side_by_side(grad.to(q.dtype)), k.shape[1], call.tiles[0].shape[0]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    totals = [torch.zeros(call.captures[i].numel(), dtype=torch.float32, device=q.device) for i in learned]
    steps = call.block // keys_of(q.dtype, call.block)
    turn = max(1, min(groups, NOTES // (8 * count * steps * call.block * call.group)))
    notes = q.new_empty((2, turn * call.group, count, steps, call.block), dtype=torch.float32)
    right, left = notes.zero_() if learned else notes  # a row's walk may begin later than where its tile ends
    given = {"grad": grad, "grad_left": grad_left.to(torch.float32).contiguous(), "dq": dq, "dk": dk, "dv": dv}
    given |= {"right": right, "left": left, "TILES": count, "heads": q.shape[1], "groups": groups, **_strides(g=grad)}
    given |= {"spoiled": _spoiled(call.k), "spoiled_q": _spoiled(call.q), "spoiled_g": _spoiled(grad)}
    by_row, by_column = call.row_lists(), call.column_lists()
    for first in range(0, groups, turn):
        some = min(turn, groups - first)
        given["head"] = first * call.group
        call.launch(sum_right, "sums", some * call.group, **given, **by_row)
        call.launch(of_queries, "queries", some * call.group, **given, **by_row)
        call.launch(of_keys, "keys", some, **given, **by_column)
        if learned:
            heads = slice(some * call.group)
            with torch.autocast(q.device.type, enabled=False):
                _add_learned(totals, learned, call, grad, first, right[heads, :, -1], left[heads, :, 0])
    shaped = (t.view(call.captures[i].shape).to(call.captures[i].dtype) for t, i in zip(totals, learned, strict=True))
    return [dq, dk, dv, *shaped]


def _add_learned(
    totals: list[Tensor], learned: Sequence[int], call: Call, grad: Tensor, first: int, right: Tensor, left: Tensor
) -> None:
    """Add the captures' gradients from some heads, from group `first` on, in plain torch over chunks of tiles.

    Args:
        totals: Flat float32 gradients, added to in place.
        learned: Indices of the captures that need gradients.
        call: The call.
        grad: Gradient of the output.
        first: The first group.
        right: Sums carried into each tile from its right, ``[heads, N, B]``.
        left: Gradients carried into each tile from its left, ``[heads, N, B]``.
    """
    functions, block, heads = call.functions, call.block, right.shape[0]
    head, groups = first * call.group, slice(first, first + heads // call.group)
    row, col, *_ = call.tiles
    given = call.captures, call.numbers

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return functions.plain_mask(h + head, i, j, *given)

    p = TiledCall(row, col, block, call.q.shape[0], call.k.shape[0], call.scale, allowed, None)
    x, g, y, z = (
        to_blocks(t.float(), n, block)
        for t, n in (
            (call.q[:, head : head + heads], p.rows),
            (grad[:, head : head + heads], p.rows),
            (call.k[:, groups], p.cols + 1),
            (call.v[:, groups], p.cols + 1),
        )
    )
    step = tiles_at_once(row.device, heads, block)
    for start in range(0, row.shape[0], step):
        some = slice(start, start + step)
        at = indices(p, row[some], col[some], heads)
        place = at[1] + head, *at[2:]
        banned = ~allowed_in(p, row[some], col[some], at)
        raw = matmul(x[row[some]] * call.scale, y[col[some]].transpose(2, 3))
        s = functions.plain_score(raw, *place, *given)
        taken = functional.softplus(s, threshold=EXACT).masked_fill_(banned, 0.0)
        since = taken.flip(3).cumsum(3).flip(3) + right[:, some].transpose(0, 1)[..., None]
        flow = torch.exp(s - since) * matmul(g[row[some]], z[col[some]].transpose(2, 3))
        flow = flow.masked_fill_(banned, 0.0)
        ds = flow - torch.sigmoid(s) * (flow.cumsum(3) + left[:, some].transpose(0, 1)[..., None])
        for i, index, slope in functions.plain_slopes(raw, *place, *given):
            add_up(totals[learned.index(i)], index, (ds * slope).masked_fill_(banned, 0.0))
