"""Launches of the pointwise kernels of the backend ``triton``: grids, step sizes and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.backends.triton.modules import load
from flexjag.backends.triton.pointwise_kernels import (
    ACTIVATIONS,
    pointwise_forward,
    pointwise_of_keys,
    pointwise_of_queries,
)
from flexjag.kernels.launch import ALL_REGISTERS, ceil_div, launch, power_of_2, precision

CAREFUL = 16
"""Queries and keys per step of the CAREFUL kernels, which rarely run: small enough to fit, not tuned for speed."""


_SIZES: dict[tuple[str, bool, bool], dict[int, tuple[int, int, int]]] = {
    ("forward", True, False): {64: (64, 64, 4), 128: (128, 32, 8), 256: (64, 32, 8)},
    ("forward", True, True): {64: (64, 32, 4), 128: (32, 32, 4), 256: (32, 32, 8)},
    ("queries", True, False): {64: (64, 64, 4), 128: (64, 32, 4), 256: (32, 32, 8)},
    ("queries", True, True): {64: (32, 32, 4), 128: (32, 32, 4), 256: (32, 32, 8)},
    ("keys", True, False): {64: (32, 64, 4), 128: (32, 32, 4), 256: (32, 32, 8)},
    ("keys", True, True): {64: (32, 32, 4), 128: (32, 32, 4), 256: (32, 32, 8)},
    ("forward", False, False): {64: (32, 32, 8), 128: (32, 16, 8), 256: (16, 16, 8)},
    ("forward", False, True): {64: (32, 32, 8), 128: (32, 16, 8), 256: (16, 16, 8)},
    ("queries", False, False): {64: (32, 32, 8), 128: (32, 16, 8), 256: (16, 16, 8)},
    ("queries", False, True): {64: (16, 16, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
    ("keys", False, False): {64: (32, 16, 8), 128: (16, 32, 8), 256: (16, 16, 8)},
    ("keys", False, True): {64: (16, 16, 4), 128: (16, 16, 8), 256: (16, 16, 8)},
}
"""Queries and keys per step, and warps; keyed by kernel, `has_cores`, `is_heavy` (a read per query-key pair) and number
of features. The largest tried with which registers do not run out on sm_80, sm_90, sm_100 and gfx942, up to 128
features; exact products of float32 go through registers."""


def block_sizes(kernel: str, dtype: torch.dtype, width: int, is_heavy: bool) -> tuple[int, int, int]:
    """Queries and keys per step, and number of warps.

    Args:
        kernel: ``"forward"``, ``"queries"`` or ``"keys"``.
        dtype: Of q, k and v.
        width: The larger of D and E.
        is_heavy: A tensor is read for each query-key pair.
    """
    return _SIZES[kernel, has_cores(dtype), is_heavy][power_of_2(width, 64, 256)]


def has_cores(dtype: torch.dtype) -> bool:
    """True if tensor cores multiply numbers of a dtype."""
    return dtype != torch.float32 or precision(dtype) != "ieee"


def _common(q: Tensor, k: Tensor, v: Tensor, captures: Any, numbers: Any, tables: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments common to all kernels."""
    count, partial, full_count, full = tables
    heads = 0 if count.shape[0] == 1 else 1
    return {
        "q": q,
        "k": k,
        "v": v,
        "partial_count": count,
        "partial_index": partial,
        "full_count": full_count,
        "full_index": full,
        "captures": tuple(captures),
        "numbers": tuple(numbers),
        "num_q": q.shape[0],
        "num_kv": k.shape[0],
        "count_head": heads * count.stride(0),
        "partial_head": heads * partial.stride(0),
        "partial_row": partial.stride(1),
        "full_head": heads * full.stride(0),
        "full_row": full.stride(1),
        **strides(q=q, k=k, v=v),
    }


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of each tensor's tokens and heads, in elements."""
    return {f"{name}_{axis}": x.stride(dim) for name, x in tensors.items() for dim, axis in enumerate("th")}


def packed(x: Tensor) -> Tensor:
    """The tensor with contiguous features; itself if they are."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _run(
    name: str,
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: int,
    is_heavy: bool,
    arguments: dict[str, Any],
    **functions: Any,
) -> None:
    """Launch a kernel, and again with CAREFUL for the programs whose sums are not finite."""
    d, e = q.shape[2], v.shape[2]
    block_d, block_e = power_of_2(d, 16), power_of_2(e, 16)
    rows, columns, warps = block_sizes(name, q.dtype, max(d, e), is_heavy)
    blocks = {"BLOCK_M": min(rows, tile), "BLOCK_N": min(columns, tile)}
    side, axis, heads = (k, "BLOCK_N", k.shape[1]) if name == "keys" else (q, "BLOCK_M", q.shape[1])
    spoiled = torch.empty((heads, side.shape[0]), dtype=torch.int32, device=q.device)
    constants = {"GROUP": q.shape[1] // k.shape[1], "D": d, "E": e, "BLOCK_D": block_d, "BLOCK_E": block_e}
    constants |= {"TILE": tile, "PRECISION": precision(q.dtype), **functions}
    given = {**arguments, "spoiled": spoiled}
    grid = (ceil_div(side.shape[0], blocks[axis]), heads)
    constants["maxnreg"] = ALL_REGISTERS
    launch(kernel, grid, given, **constants, **blocks, CAREFUL=False, num_warps=warps)
    blocks = dict.fromkeys(blocks, CAREFUL)
    grid = (ceil_div(side.shape[0], CAREFUL), heads)
    launch(
        kernel, grid, given, **constants, **blocks, CAREFUL=True, num_warps=4 if has_cores(q.dtype) else 8, num_stages=1
    )


def pointwise_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    captures: Sequence[Tensor],
    numbers: Sequence[int],
    source: str,
    tables: Sequence[Tensor],
    *,
    name: str,
    scale: float,
    factor: float,
    tile: int,
) -> Tensor:
    """Compute :func:`flexjag.backends.triton.pointwise.attend` into `out`."""
    q, k, v = packed(q), packed(k), packed(v)
    mods = load(source)
    functions = {"F": ACTIVATIONS[name][0], "MASK": mods.mask, "SCORE": mods.score}
    more = {"out": out, "scale": scale, "factor": factor, **strides(out=out)}
    arguments = _common(q, k, v, captures, numbers, tables) | more
    _run("forward", pointwise_forward, q, k, v, tile, mods.is_heavy, arguments, **functions)
    return out


def pointwise_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    numbers: Sequence[int],
    source: str,
    *,
    tables: Sequence[Tensor],
    transposed: Sequence[Tensor],
    name: str,
    scale: float,
    factor: float,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV of :func:`flexjag.backends.triton.pointwise.differentiate`."""
    grad, q, k, v = packed(grad), packed(q), packed(k), packed(v)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    mods, (f, df) = load(source), ACTIVATIONS[name]
    functions = {"DF": df, "MASK": mods.mask, "SCORE": mods.score, "DSCORE": mods.dscore}
    more = {"grad": grad, "scale": scale, "factor": factor, **strides(g=grad)}
    arguments = _common(q, k, v, captures, numbers, tables) | more | {"dq": dq, **strides(dq=dq)}
    _run("queries", pointwise_of_queries, q, k, v, tile, mods.is_heavy, arguments, **functions)
    arguments = _common(q, k, v, captures, numbers, transposed) | more | {"dk": dk, "dv": dv, **strides(dk=dk, dv=dv)}
    _run("keys", pointwise_of_keys, q, k, v, tile, mods.is_heavy, arguments, F=f, **functions)
    return dq, dk, dv
