"""Launches of the softmax kernels: the sizes of their tiles, grids and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexjag.backends.triton.modules import Functions, load
from flexjag.backends.triton.softmax_gradients import softmax_of_keys, softmax_of_queries
from flexjag.backends.triton.softmax_kernels import softmax_forward
from flexjag.kernels.launch import ALL_REGISTERS, launch, power_of_2, precision

LEAST, MOST_PACKED = 16, 8
"""The fewest rows of tiles on tensor cores, whose columns may be 8; and the most heads of a token in a tile."""


KINDS = ("forward", "queries", "keys")
"""The kernels: forward, dQ, and dK with dV."""


class Tile(NamedTuple):
    """The sizes of one kernel's tiles.

    Attributes:
        rows: Rows of a program: tokens times packed heads for queries, keys for keys.
        step: Rows of the other side in a step whose scores are tested.
        wide: The same in one whose scores are not.
        warps: Warps of a program.
    """

    rows: int
    step: int
    wide: int
    warps: int


_TILES: dict[tuple[bool, int], dict[str, tuple[Tile, ...]]] = {
    (True, 64): {
        "forward": (Tile(8, 16, 16, 1), Tile(16, 16, 32, 1), Tile(32, 16, 32, 2), Tile(64, 32, 64, 4)),
        "queries": (Tile(8, 16, 16, 1), Tile(16, 16, 16, 1), Tile(32, 16, 32, 2), Tile(64, 32, 32, 4)),
        "keys": (Tile(16, 16, 16, 1), Tile(32, 16, 32, 2), Tile(64, 32, 32, 4)),
    },
    (True, 128): {
        "forward": (Tile(8, 16, 16, 2), Tile(16, 16, 16, 2), Tile(32, 16, 32, 4), Tile(64, 32, 32, 4)),
        "queries": (Tile(8, 16, 16, 2), Tile(16, 16, 16, 2), Tile(32, 16, 32, 4), Tile(64, 32, 32, 8)),
        "keys": (Tile(16, 16, 16, 2), Tile(32, 16, 16, 4), Tile(64, 32, 32, 8)),
    },
    (True, 256): {
        "forward": (Tile(8, 16, 16, 2), Tile(16, 16, 16, 4), Tile(32, 16, 16, 4)),
        "queries": (Tile(8, 16, 16, 2), Tile(16, 16, 16, 4), Tile(32, 16, 16, 8)),
        "keys": (Tile(16, 16, 16, 4), Tile(32, 16, 16, 8)),
    },
    (False, 64): {kind: (Tile(16, 16, 16, 4), Tile(32, 16, 16, 8)) for kind in KINDS},
    (False, 128): {kind: (Tile(16, 16, 16, 8), Tile(32, 16, 16, 8)) for kind in KINDS},
    (False, 256): {kind: (Tile(16, 16, 16, 8),) for kind in KINDS},
}
"""Tiles by whether tensor cores multiply the dtype, the larger of D and E, and the kernel: the largest tried with which
registers do not run out on sm_80, sm_90 and sm_100 up to 128 features. Exact products of float32 go through registers.
"""


def tiles_of(kind: str, dtype: torch.dtype, width: int, is_heavy: bool = False) -> Sequence[Tile]:
    """The tiles of a kernel, of ascending heights; those of ``"forward"`` and ``"queries"`` have the same heights.

    Args:
        kind: ``"forward"``, ``"queries"`` or ``"keys"``.
        dtype: Of q, k and v.
        width: The larger of D and E.
        is_heavy: A tensor is read for each query-key pair: narrower steps and more warps, but the same heights.
    """
    tiles = _TILES[has_cores(dtype), power_of_2(width, 64, 256)][kind]
    if not is_heavy:
        return tiles
    return [Tile(x.rows, 16, 16, min(8, x.warps * (1 if x.rows < LEAST else 2))) for x in tiles]


def has_cores(dtype: torch.dtype) -> bool:
    """True if tensor cores multiply numbers of a dtype."""
    return dtype != torch.float32


def packed_heads(group: int, has_masks: bool) -> int:
    """The query heads of a token that are in one tile: those share a key head and, here, a mask."""
    pack = group & -group
    return 1 if has_masks else min(pack, MOST_PACKED)


def heights_of(kind: str, dtype: torch.dtype, width: int, pack: int) -> list[int]:
    """The tiles' heights in tokens; arguments as for :func:`tiles_of` and from :func:`packed_heads`."""
    return [tile.rows // (1 if kind == "keys" else pack) for tile in tiles_of(kind, dtype, width)]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one attention call, as :func:`flexjag.backends.triton.softmax.attend` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    captures: Sequence[Tensor]
    numbers: Sequence[int]
    source: str
    spans: Tensor
    mask_of: Tensor | None
    scale: float

    @property
    def functions(self) -> Functions:
        """The functions of mask and score."""
        return load(self.source)

    def by_row(self) -> Call:
        """The same with adjacent features."""
        return replace(self, q=adjacent(self.q), k=adjacent(self.k), v=adjacent(self.v))

    def launch(self, kernel: Any, kind: str, items: Sequence[Tensor], **more: Any) -> None:
        """Launch a kernel for the items of each height, with those of the arguments that it takes."""
        q, k, v, functions = self.q, self.k, self.v, self.functions
        heads, d, e = *q.shape[1:], v.shape[2]
        group, pack = heads // k.shape[1], packed_heads(heads // k.shape[1], self.mask_of is not None)
        given = {"q": q, "k": k, "v": v, **strides(q=q, k=k, v=v), **more}
        given |= {"captures": tuple(self.captures) or (self.spans,), "numbers": tuple(self.numbers)}
        given |= {"spans": self.spans, "mask_of": self.spans if self.mask_of is None else self.mask_of}
        given |= {"scale": self.scale, "num_q": q.shape[0], "num_kv": k.shape[0], "heads": heads}
        given |= {"MASK": functions.mask, "SCORE": functions.score, "DSCORE": functions.dscore}
        given |= {"SCORED": functions.is_scored, "MASKS": self.mask_of is not None}
        given |= {"KINDS": self.spans.shape[1], "SPANS": self.spans.shape[2], "GROUP": group, "PACK": pack}
        given |= {"D": d, "E": e, "BLOCK_D": power_of_2(d, 16), "BLOCK_E": power_of_2(e, 16)}
        given["PRECISION"] = precision(q.dtype)
        programs = k.shape[1] if kind == "keys" else heads // pack
        for tile, some in zip(tiles_of(kind, q.dtype, max(d, e), functions.is_heavy), items, strict=True):
            given |= {"items": some, "num_items": some.shape[1], "ROWS": tile.rows, "STEP": tile.step}
            given |= {"WIDE": tile.wide, "FLIPPED": tile.rows < LEAST}
            chosen = {name: given[name] for name in kernel.arg_names}
            constants = {name: x for name, x in chosen.items() if name.isupper()}
            arguments = {name: x for name, x in chosen.items() if not name.isupper()}
            options = {"num_warps": tile.warps, "num_stages": 2, "maxnreg": ALL_REGISTERS}
            launch(kernel, (some.shape[1], programs), arguments, **constants, **options)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of each tensor's tokens and heads, in elements."""
    return {f"{name}_{axis}": x.stride(dim) for name, x in tensors.items() for dim, axis in enumerate("th")}


def adjacent(x: Tensor) -> Tensor:
    """The tensor with adjacent features; itself if they are."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def run_forward(call: Call, items: Sequence[Tensor], out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the output ``[T_q, H, E]`` and the log-sum-exp ``[T_q, H]`` of the items' rows."""
    call.by_row().launch(softmax_forward, "forward", items, out=out, lse=lse, **strides(out=out))
    return out, lse


def run_backward(
    call: Call,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    items: Sequence[Tensor],
    keys: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, and ``[T_q, H]`` float32: each row's sum of weights times their gradients."""
    call, grad, out = call.by_row(), adjacent(grad), adjacent(out)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    given = {"grad": grad, "lse": lse, "delta": delta, **strides(g=grad)}
    more = {"out": out, "dq": dq, **strides(out=out, dq=dq)}
    more |= {"grad_lse": lse if grad_lse is None else grad_lse.contiguous(), "WITH_LSE": grad_lse is not None}
    call.launch(softmax_of_queries, "queries", items, **given, **more)
    call.launch(softmax_of_keys, "keys", keys, **given, dk=dk, dv=dv, **strides(dk=dk, dv=dv))
    return dq, dk, dv, delta
