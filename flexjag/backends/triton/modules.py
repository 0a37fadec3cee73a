"""A plan's mask and score as printed source: Triton functions for kernels, torch functions for learned gradients.

The text is an argument of this backend's operators, which load it where they run.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexjag.algebra import normalizers as nz
from flexjag.algebra import scores as s
from flexjag.lowering.recipe import Recipe
from flexjag.printing import (
    MaskFunction,
    ScoreFunction,
    Torch,
    Triton,
    emit_gradient,
    emit_mask,
    emit_score,
    emit_slopes,
    has_functions,
    trace,
)


@dataclass(frozen=True, eq=False)
class Printed:
    """A mask and a score as source, with the values that they read.

    Attributes:
        source: Source of a module, for :func:`load`.
        captures: The tensors that the functions read, at least one.
        numbers: The integers that they read, at least one.
        learned: Indices of the captures that need gradients.
    """

    source: str
    captures: list[Tensor]
    numbers: list[int]
    learned: list[int]


@dataclass(frozen=True, eq=False)
class Functions:
    """The functions of a printed module. `h`, `q`, `kv` and `s` are numbers or tensors that broadcast.

    Attributes:
        mask: ``mask(h, q, kv, captures, numbers)``, a Triton function.
        score: ``score(s, h, q, kv, captures, numbers)``, a Triton function; `s` itself without a score.
        dscore: ``dscore(ds, s, h, q, kv, captures, numbers)``, a Triton function: the gradient of `s` from the score's.
        plain_mask: `mask` for torch tensors.
        plain_score: `score` for torch tensors.
        plain_slopes: ``(s, h, q, kv, captures, numbers)`` of torch tensors: for each lookup in a capture that needs a
            gradient, the capture's index, the flat indices, and the score's derivative by the value.
        is_heavy: A tensor is read for each query-key pair, which takes registers.
    """

    mask: Any
    score: Any
    dscore: Any
    plain_mask: Callable[..., Any]
    plain_score: Callable[..., Any]
    plain_slopes: Callable[..., Any]
    is_heavy: bool


_known: WeakKeyDictionary[Recipe, dict[tuple[bool, ...], Printed]] = WeakKeyDictionary()


def once(plan: Recipe, write: Callable[[bool], Printed]) -> Printed:
    """The printed source of a plan, cached for all layers that share it.

    A plan with users' functions is printed on each call: they may close over values that change.

    Args:
        plan: The plan, whose kernels' source `write` prints.
        write: ``write(is_checked)``; True if the plan has users' functions, whose lookups may be out of range.
    """
    is_checked = has_functions(plan.mask, plan.score)
    if is_checked or torch.compiler.is_compiling():
        return write(is_checked)
    learns = [x.requires_grad for x in (*s.tensors(plan.score), *nz.tensors(plan.normalizer))]
    known, key = _known.setdefault(plan, {}), (torch.is_grad_enabled(), *learns)
    if key not in known:
        known[key] = write(is_checked)
    return known[key]


def emit(mask: MaskFunction, score: ScoreFunction | None, is_checked: bool = False) -> Printed:
    """Print the module of a mask and a score on packed indices. TorchDynamo can trace it.

    Args:
        mask: ``mask(b, h, q, kv)``, called on symbols.
        score: ``score(s, b, h, q, kv)``, likewise, or None.
        is_checked: Lookups may be out of range, as in users' functions.

    Raises:
        NotImplementedError: If one of them uses an operation that cannot be printed.
    """
    traced, triton, plain = trace(mask, score, is_checked), Triton(), Torch()
    parts = [
        f"{plain.header}\n{triton.header}",
        emit_mask(traced, triton, "mask"),
        emit_score(traced, triton, "score"),
        emit_gradient(traced, triton, "dscore"),
        emit_mask(traced, plain, "plain_mask"),
        emit_score(traced, plain, "plain_score"),
        emit_slopes(traced, plain, "plain_slopes"),
        f"IS_HEAVY = {traced.is_heavy}\n",
    ]
    return Printed("\n\n".join(parts), traced.captures, traced.numbers, traced.learned)


@lru_cache(maxsize=1024)
def load(source: str) -> Functions:
    """Execute a printed module. Triton reads the functions' source from `linecache`."""
    name = f"flexjag_mods_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, file, "exec"), namespace)
    names = ("mask", "score", "dscore", "plain_mask", "plain_score", "plain_slopes")
    return Functions(**{x: namespace[x] for x in names}, is_heavy=namespace["IS_HEAVY"])
