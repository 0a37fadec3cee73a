"""Detection of users' functions in masks and scores, and of those that cannot be printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.tree import walk
from flexjag.printing.language import Language
from flexjag.printing.tracer import as_symbol, new_program


def functions(mask: m.Mask | None, score: s.Score | None) -> list[tuple[Callable[..., Any], bool]]:
    """Users' functions in a mask and a score, as pairs ``(function, is_score)``."""
    nodes = [*walk(mask), *walk(score)]
    return [(one.fn, isinstance(one, s.ScoreMod)) for one in nodes if isinstance(one, (m.MaskMod, s.ScoreMod))]


def has_functions(mask: m.Mask | None, score: s.Score | None) -> bool:
    """True if a mask or a score has functions or nodes of the user's."""
    return not all(one.printable for one in (*walk(mask), *walk(score)))


def objection(
    fns: Iterable[tuple[Callable[..., Any], bool]], device: torch.device, tracing: bool, languages: Sequence[Language]
) -> str | None:
    """Reason why functions cannot be printed; None if they can.

    Args:
        fns: The functions, in FlexAttention's signatures, as pairs ``(function, is_score)``.
        device: Device of the kernels.
        tracing: True while TorchDynamo traces, which supports fewer operations on symbols than Python.
        languages: Languages to print the functions in.
    """
    for fn, is_score in fns:
        name = getattr(fn, "__name__", type(fn).__name__)
        if tracing:
            return f"{name} cannot be made part of its kernels while a graph is being traced"
        why = _objection(fn, is_score, device, languages)
        if why is not None:
            return f"{name} cannot be made part of its kernels: {why}"
    return None


def _objection(
    fn: Callable[..., Any], is_score: bool, device: torch.device, languages: Sequence[Language]
) -> str | None:
    program = new_program(is_checked=True)
    places = [program.symbol(name, torch.int32) for name in ("b", "h", "q", "kv")]
    args = [program.symbol("s", torch.float32), *places] if is_score else places
    try:
        as_symbol(fn(*args), program)
        for language in languages:
            language.lines(program.lines)
    except Exception as reason:  # a user's function may do anything with what is not a tensor
        return str(reason).split("\n")[0] or type(reason).__name__
    elsewhere = [x.device for x in program.captures if x.device not in (device, torch.device("meta"))]
    return f"it reads a tensor on {elsewhere[0]}" if elsewhere else None
