"""Users' functions in masks and scores: whether there are any, and whether they can be made programs of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexjag import masks as m
from flexjag import scores as s
from flexjag.printing.language import Language
from flexjag.printing.tracer import as_symbol, new_program


def functions(mask: m.Mask, score: s.Score | None) -> list[tuple[Callable[..., Any], bool]]:
    """The user's functions in a mask and a score, and whether each is a score's."""
    found: list[tuple[Callable[..., Any], bool]] = []
    match mask:
        case m.MaskMod():
            found = [(mask.fn, False)]
        case m.And() | m.Or():
            found = functions(mask.left, None) + functions(mask.right, None)
        case m.Not():
            found = functions(mask.mask, None)
        case m.PerHead():
            found = [x for one in mask.masks for x in functions(one, None)]
    return found + [(x.fn, True) for x in s.parts(score) if isinstance(x, s.ScoreMod)]


def has_functions(mask: m.Mask, score: s.Score | None) -> bool:
    """Whether a mask or a score calls functions of the user's."""
    return bool(functions(mask, score))


def _parts(mask: m.Mask) -> list[m.Mask]:
    match mask:
        case m.And() | m.Or():
            return _parts(mask.left) + _parts(mask.right)
        case m.Not():
            return _parts(mask.mask)
        case m.PerHead():
            return [x for one in mask.masks for x in _parts(one)]
        case _:
            return [mask]


def objection(
    mask: m.Mask, score: s.Score | None, device: torch.device, tracing: bool, languages: Sequence[Language]
) -> str | None:
    """Why a mask and a score cannot be printed; None if they can.

    Args:
        mask: The mask.
        score: The score, or None.
        device: Where the kernels run.
        tracing: TorchDynamo is tracing, which knows less of symbols than Python.
        languages: What they are to be printed in.
    """
    for node in (*_parts(mask), *s.parts(score)):
        if not type(node).__module__.startswith("flexjag."):
            return f"its kernels cannot be printed from a node of your own, {type(node).__name__}"
    for fn, is_score in functions(mask, score):
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
    elsewhere = [x.device for x in program.captures if x.device != device]
    return f"it reads a tensor on {elsewhere[0]}" if elsewhere else None
