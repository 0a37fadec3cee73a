"""The softmax kernels of the backend ``triton`` as they are launched, for compilers that run without a GPU."""

from __future__ import annotations

from functools import partial

import torch

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.codegen.own.attention import GROUPS, HEADS, TOKENS, made, meta
from flexjag.kernels.launch import KernelCase, note_launches
from flexjag.lowering.recipe import Recipe


def list_kernels(features: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """Every kernel in every height, for values of so many features: those of one example after the other.

    Args:
        features: D and E.
        dtype: Of q, k and v: float32, bfloat16 or float16.

    >>> list_kernels()[0].name
    'softmax_forward'
    """
    found: dict[object, KernelCase] = {}
    for example, plan in _examples().items():
        for case in note_launches(example, partial(_launch, plan, features, dtype)):
            found.setdefault(case.key, case)
    return list(found.values())


def _examples() -> dict[str, Recipe]:
    sinks = m.Causal() & (m.Window(64, 0) | m.Prefix(4))
    groups = m.Causal() & m.SameGroup(torch.arange(TOKENS) % 9)
    bias = s.RelativeBias(torch.empty(HEADS, 257))
    times = s.TimeBias(torch.empty(HEADS, 129), torch.zeros(TOKENS, dtype=torch.int64), torch.arange(128))
    return {
        "causal": made(m.Causal()),
        "sinks, cap": made(sinks, score=s.SoftCap(30.0)),
        "groups, slopes": made(groups, score=s.Alibi.from_heads(HEADS)),
        "causal, position and time bias": made(m.Causal(), score=bias >> times),
    }


def _launch(p: Recipe, features: int, dtype: torch.dtype) -> None:
    from flexjag.backends.triton import softmax, softmax_launch, softmax_tables

    printed = softmax.printed(p)
    captures = [x.to("meta") for x in printed.captures]
    q = meta(TOKENS, HEADS, features, dtype=dtype)
    k = v = meta(TOKENS, GROUPS, features, dtype=dtype)
    pack = softmax_launch.packed_heads(HEADS // GROUPS, p.head_of is not None)
    heights = [softmax_launch.heights_of(kind, dtype, features, pack) for kind in ("forward", "keys")]
    items = [x.to("meta") for x in softmax_tables.query_items(p, heights[0])]
    keys = [x.to("meta") for x in softmax_tables.key_items(p, heights[1])]
    spans, lse = softmax_tables.spans_of(p).to("meta"), meta(TOKENS, HEADS, dtype=torch.float32)
    call = softmax_launch.Call(q, k, v, captures, printed.numbers, printed.source, spans, None, 0.125)
    softmax_launch.run_forward(call, items, torch.empty_like(q), lse)
    softmax_launch.run_backward(call, q, None, q, lse, items, keys)
