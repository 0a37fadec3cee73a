"""Tracing of a plan's mask and score into one program, and printing of the program's functions.

Equal structures print the same source: all that changes from batch to batch (tensors, sizes, strides) is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexjag.printing.derivative import derivative, times
from flexjag.printing.language import Language
from flexjag.printing.program import (
    Instruction,
    Program,
    Symbol,
    Value,
    convert,
    looks_up_pairs,
    needed,
    reads,
)
from flexjag.printing.tracer import as_symbol, new_program

MaskFunction = Callable[[Any, Any, Any, Any], Any]
ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Traced:
    """A mask and a score as a program of a head `h`, the packed indices `q` and `kv`, and ``q·k``, called `s`.

    Attributes:
        program: Program.
        at: Symbols h, q and kv.
        s: Symbol of ``q·k``.
        ds: Symbol of the gradient by the score.
        allowed: Result of the mask; True without one.
        scored: Result of the score; `s` itself without a score.
        by_score: Gradient by `s`, computed from `ds`.
        slopes: Lookups in captures that need gradients, each with the score's derivative by the entry.
        captures: Tensors that the program reads.
        learned: Indices of the captures that need gradients.
    """

    program: Program
    at: tuple[Symbol, Symbol, Symbol]
    s: Symbol
    ds: Symbol
    allowed: Value
    scored: Symbol
    by_score: Symbol
    slopes: list[tuple[Instruction, Value]]
    captures: list[Tensor]
    learned: list[int]

    @property
    def numbers(self) -> list[int]:
        """Integers that the program reads, at least one."""
        return [*self.program.numbers, 0]

    @property
    def is_heavy(self) -> bool:
        """True if a table is read for each (query, key) pair, which takes registers."""
        return looks_up_pairs(needed(self.program, [self.scored, self.allowed]), "q", "kv")


def trace(
    mask: MaskFunction | None, score: ScoreFunction | None, is_checked: bool = False, dtype: torch.dtype = torch.float32
) -> Traced:
    """Trace a mask and a score by calling them on symbols. TorchDynamo can trace this function itself.

    Args:
        mask: Function ``mask(b, h, q, kv)`` of packed indices, or None; b is 0.
        score: Function ``score(s, b, h, q, kv)`` of packed indices, or None.
        is_checked: True if lookups may be out of range, as those of a user's functions.
        dtype: Dtype of the scores.

    Raises:
        NotImplementedError: If one of them uses an operation that programs do not have.
    """
    program = new_program(is_checked)
    h, q, kv = (program.symbol(name, torch.int32) for name in ("h", "q", "kv"))
    q.is_place = kv.is_place = True  # users' functions see positions in a segment instead
    s, ds = program.symbol("s", dtype), program.symbol("ds", dtype)
    allowed = True if mask is None else as_symbol(mask(0, h, q, kv), program)
    scored = s if score is None else convert(as_symbol(score(s, 0, h, q, kv), program), dtype, program)
    by_score = convert(times(ds, derivative(program, scored, s)), dtype, program)
    learned = [i for i, x in enumerate(program.captures) if x.requires_grad and torch.is_grad_enabled()]
    lookups = [x for x in needed(program, [scored]) if x.op == "load" and x.args[0] in learned]
    slopes = [(x, derivative(program, scored, x.result)) for x in lookups]
    return Traced(program, (h, q, kv), s, ds, allowed, scored, by_score, slopes, list(program.captures), learned)


def emit_mask(traced: Traced, language: Language, name: str) -> str:
    """Source of ``name(h, q, kv, captures, numbers)``, which returns the mask."""
    lines = language.lines(needed(traced.program, [traced.allowed]))
    return language.function(name, traced.at, lines, language.value(traced.allowed, torch.bool), torch.bool)


def emit_score(traced: Traced, language: Language, name: str) -> str:
    """Source of ``name(s, h, q, kv, captures, numbers)``, which returns the score."""
    return _emit_tile(traced, language, name, (traced.s, *traced.at), traced.scored)


def emit_gradient(traced: Traced, language: Language, name: str) -> str:
    """Source of ``name(ds, s, h, q, kv, captures, numbers)``, which returns the gradient by `s`."""
    return _emit_tile(traced, language, name, (traced.ds, traced.s, *traced.at), traced.by_score)


def _emit_tile(traced: Traced, language: Language, name: str, parameters: tuple[Symbol, ...], result: Symbol) -> str:
    """Source of a function whose result has the shape of its first parameter."""
    lines, returned = needed(traced.program, [result]), language.value(result)
    if result.name != parameters[0].name and not reads(lines, parameters[0]):  # it may be the same for a whole row
        returned = language.spread(returned, traced.s.name)
    return language.function(name, parameters, language.lines(lines), returned, traced.s.dtype)


def emit_slopes(traced: Traced, language: Language, name: str) -> str:
    """Source of a function of the score's derivatives by captures that need gradients.

    In Python, ``name(s, h, q, kv, captures, numbers)`` returns for each lookup the capture's index,
    :meth:`Language.place`, and the score's derivative by the entry. Languages without lists of tensors add the
    gradients to totals instead.
    """
    wanted = [x for line, slope in traced.slopes for x in (*line.indices, slope)]
    lines = language.lines(needed(traced.program, wanted))
    return language.slopes(name, (traced.ds, traced.s, *traced.at), lines, traced.slopes, traced.learned)
