"""A plan's mask and score as a printed module: functions of Triton tiles for kernels, of torch tensors for what learns.

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
    """A mask and a score, printed.

    Attributes:
        source: Of a module, see :func:`load`.
        captures: The tensors that the functions read, never none.
        numbers: The whole numbers that they read, never none.
        learned: Which of the tensors need gradients.
    """

    source: str
    captures: list[Tensor]
    numbers: list[int]
    learned: list[int]


@dataclass(frozen=True, eq=False)
class Functions:
    """What a printed module defines. `h`, `q`, `kv` and `s` may be anything that broadcasts.

    Attributes:
        mask: ``mask(h, q, kv, captures, numbers)``, a Triton function.
        score: ``score(s, h, q, kv, captures, numbers)``, likewise; `s` itself if there is no score.
        dscore: ``dscore(ds, s, h, q, kv, captures, numbers)``, likewise: the gradient by `s` from that by the score.
        plain_mask: As `mask`, of torch tensors.
        plain_score: As `score`, of torch tensors.
        plain_slopes: Of torch tensors ``(s, h, q, kv, captures, numbers)``, what the score takes from captures that
            need gradients: for each lookup the capture's number, the flat indices, and the score's derivative by it.
        is_heavy: Something is looked up for each query and key, which takes registers.
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
    """What `write` prints of a plan, printed once for all layers.

    But a user's function may close over what changes, and is printed anew each time.

    Args:
        plan: The plan, whose kernels' source `write` prints.
        write: Told whether the plan has users' functions, whose lookups may be out of range.
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
        is_checked: Lookups may be out of range, as those of a user's functions.

    Raises:
        NotImplementedError: If one of them does what cannot be printed.
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
    """The functions of a printed module. Triton reads their source from the cache of Python's tracebacks."""
    name = f"flexjag_mods_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, file, "exec"), namespace)
    names = ("mask", "score", "dscore", "plain_mask", "plain_score", "plain_slopes")
    return Functions(**{x: namespace[x] for x in names}, is_heavy=namespace["IS_HEAVY"])
