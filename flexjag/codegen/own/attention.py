"""The kernels of the backend ``triton`` for normalizers that are no softmax, for compilers that run without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import normalizers as nz
from flexjag.algebra import scores as s
from flexjag.jagged import Jagged
from flexjag.kernels.launch import KernelCase, note_launches
from flexjag.lowering.outline import outline, with_tiles
from flexjag.lowering.recipe import Recipe

TOKENS, HEADS, GROUPS = 4096, 8, 2
"""Sizes of the examples; only whether they are 1 or divisible by 16 shows in the code."""


def list_kernels(features: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """Every kernel, for values of so many features: those of one normalizer after the other.

    Args:
        features: D and E.
        dtype: Of q, k and v: float32, bfloat16 or float16.

    >>> list_kernels()[0].name
    'pointwise_forward'
    """
    found: dict[object, KernelCase] = {}
    for example, launches in _examples(features, dtype).items():
        for case in note_launches(example, launches):
            found.setdefault(case.key, case)
    return list(found.values())


def _examples(features: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    bias = s.RelativeBias(torch.empty(HEADS, 257))
    times = s.TimeBias(torch.empty(HEADS, 129), torch.zeros(TOKENS, dtype=torch.int64), torch.arange(128))
    plans = {
        "silu": made(mask=m.Causal(), normalizer=nz.SiLU()),
        "silu, position and time bias": made(mask=m.Causal(), score=bias >> times, normalizer=nz.SiLU()),
        "silu, sinks, cap": made(
            mask=m.Causal() & (m.Window(64, 0) | m.Prefix(4)), score=s.SoftCap(30.0), normalizer=nz.SiLU()
        ),
        "gelu": made(mask=m.Causal(), normalizer=nz.GELU()),
        "gelu, tanh": made(mask=m.Causal(), normalizer=nz.GELU(approximate="tanh")),
        "identity": made(mask=m.Causal(), normalizer=nz.Identity()),
        "sigmoid": made(mask=m.Causal(), normalizer=nz.Sigmoid()),
    }
    launches: dict[str, Callable[[], object]] = {
        name: partial(_launch_pointwise, p, features, dtype) for name, p in plans.items()
    }
    sticks = {
        "stick_breaking": made(mask=m.Causal(), normalizer=nz.StickBreaking()),
        "stick_breaking, sinks, cap": made(
            mask=m.Causal() & (m.Window(64, 0) | m.Prefix(4)),
            score=s.SoftCap(30.0),
            normalizer=nz.StickBreaking(),
        ),
        "stick_breaking, own key, remainder, slopes": made(
            mask=m.Causal(), score=s.Alibi.from_heads(HEADS), normalizer=nz.StickBreaking(True, True)
        ),
        "stick_breaking, position and time bias": made(
            mask=m.Causal(), score=bias >> times, normalizer=nz.StickBreaking()
        ),
    }
    return launches | {name: partial(_launch_stick_breaking, p, features, dtype) for name, p in sticks.items()}


def made(mask: m.Mask, normalizer: nz.Normalizer | None = None, score: s.Score | None = None) -> Recipe:
    """A plan of one segment."""
    tokens = Jagged.from_lengths(torch.empty(TOKENS), [TOKENS])
    return with_tiles(outline(Recipe, tokens, None, mask, score, normalizer))


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of which only the shape is known."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch_pointwise(p: Recipe, features: int, dtype: torch.dtype) -> None:
    from flexjag.backends.triton import pointwise as triton
    from flexjag.backends.triton import pointwise_launch as triton_launch

    printed = triton.printed(p)
    captures = [x.to("meta") for x in printed.captures]
    q = meta(TOKENS, HEADS, features, dtype=dtype)
    k = v = meta(TOKENS, GROUPS, features, dtype=dtype)
    tables, transposed = ([x.to("meta") for x in some] for some in triton.tables_of(p))
    given = captures, printed.numbers, printed.source
    rest = {"name": triton.name_of(p.normalizer), "scale": 0.125, "factor": 1.0, "tile": p.block_size}
    triton_launch.pointwise_out(q, k, v, torch.empty_like(q), *given, tables, **rest)
    triton_launch.pointwise_gradients(q, q, k, v, *given, tables=tables, transposed=transposed, **rest)


def _launch_stick_breaking(p: Recipe, features: int, dtype: torch.dtype) -> None:
    from flexjag.backends.triton import stick_breaking as sticks
    from flexjag.backends.triton.stick_breaking_launch import Call, run_backward, run_forward

    printed = sticks.printed(p)
    captures, tiles = ([x.to("meta") for x in some] for some in (printed.captures, sticks.tiles_of(p)))
    q = meta(TOKENS, HEADS, features, dtype=dtype)
    k = v = meta(TOKENS, GROUPS, features, dtype=dtype)
    is_wide = isinstance(p.normalizer, nz.StickBreaking) and p.normalizer.remainder
    call = Call(q, k, v, captures, printed.numbers, printed.source, tiles, 0.125, p.block_size, p.layout.is_self)
    out = torch.empty_like(q, dtype=torch.float32 if is_wide else dtype)
    left = meta(TOKENS, HEADS, dtype=torch.float32)
    run_forward(call, out, left)
    run_backward(call, out, left, ())
