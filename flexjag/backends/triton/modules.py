"""A plan's mask and score as a printed module: Triton functions for kernels, torch functions for learned gradients."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flexjag.backends.printed import Printed
from flexjag.printing import (
    MaskFunction,
    ScoreFunction,
    Torch,
    Triton,
    emit_gradient,
    emit_mask,
    emit_score,
    emit_slopes,
    trace,
)


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
        is_scored: There is a score.
        is_heavy: A tensor is read for each query-key pair, which takes registers.
    """

    mask: Any
    score: Any
    dscore: Any
    plain_mask: Callable[..., Any]
    plain_score: Callable[..., Any]
    plain_slopes: Callable[..., Any]
    is_scored: bool
    is_heavy: bool


def emit(mask: MaskFunction | None, score: ScoreFunction | None, is_checked: bool = False) -> Printed:
    """Print the module of a mask and a score on packed indices. TorchDynamo can trace it.

    Args:
        mask: ``mask(b, h, q, kv)``, called on symbols; None for kernels that call none.
        score: ``score(s, b, h, q, kv)``, likewise, or None.
        is_checked: Lookups may be out of range, as in users' functions.

    Raises:
        NotImplementedError: If one of them uses an operation that cannot be printed.
    """
    traced, triton, plain = trace(mask, score, is_checked), Triton(), Torch()
    if mask is not None and not traced.captures:
        raise NotImplementedError("it reads no tensor of the plan")
    parts = [
        f"{plain.header}\n{triton.header}",
        emit_mask(traced, triton, "mask"),
        emit_score(traced, triton, "score"),
        emit_gradient(traced, triton, "dscore"),
        emit_mask(traced, plain, "plain_mask"),
        emit_score(traced, plain, "plain_score"),
        emit_slopes(traced, plain, "plain_slopes"),
        f"IS_SCORED = {score is not None}\nIS_HEAVY = {traced.is_heavy}\n",
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
    known = {x.lower(): namespace[x] for x in ("IS_SCORED", "IS_HEAVY")}
    return Functions(**{x: namespace[x] for x in names}, **known)
