"""A plan's mask and score as source: functions of Triton tiles for kernels, and of torch tensors for learned tensors.

Equal structures print the same source: what changes from batch to batch (tensors, sizes, strides) are arguments.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexjag import normalizers as nz
from flexjag import scores as s
from flexjag.expressions import (
    Instruction,
    Program,
    Symbol,
    Value,
    as_symbol,
    convert,
    derivative,
    has_functions,
    looks_up_pairs,
    needed,
    times,
)
from flexjag.recipe import Recipe

MaskFunction = Callable[[Any, Any, Any, Any], Any]
ScoreFunction = Callable[[Any, Any, Any, Any, Any], Any]

DTYPES = {
    torch.bool: "int1",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
"""What Triton calls the dtypes."""


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
    """Print a mask and a score on packed indices. TorchDynamo can trace it.

    Args:
        mask: ``mask(b, h, q, kv)``, called on symbols.
        score: ``score(s, b, h, q, kv)``, likewise, or None.
        is_checked: Lookups may be out of range, as those of a user's functions.

    Raises:
        NotImplementedError: If one of them does what cannot be printed.
    """
    program = Program(is_checked)
    h, q, kv = (program.symbol(name, torch.int32) for name in ("h", "q", "kv"))
    s, ds = program.symbol("s", torch.float32), program.symbol("ds", torch.float32)
    allowed = as_symbol(mask(0, h, q, kv), program)
    scored = s if score is None else convert(as_symbol(score(s, 0, h, q, kv), program), torch.float32, program)
    by_score = times(ds, derivative(program, scored, s))
    learned = [i for i, x in enumerate(program.captures) if x.requires_grad and torch.is_grad_enabled()]
    taken = [(x, derivative(program, scored, x.result)) for x in needed(program, [scored]) if _is_learned(x, learned)]
    captures = list(program.captures)
    if not captures:
        raise NotImplementedError("it reads no tensor of the plan")
    at = "h, q, kv, captures, numbers"
    parts = [
        _HEAD,
        _function("mask", at, allowed, program, _TRITON),
        _function("score", f"s, {at}", scored, program, _TRITON),
        _function("dscore", f"ds, s, {at}", by_score, program, _TRITON),
        _function("plain_mask", at, allowed, program, _PLAIN),
        _function("plain_score", f"s, {at}", scored, program, _PLAIN),
        _slopes(f"s, {at}", taken, program),
        f"IS_HEAVY = {looks_up_pairs(needed(program, [scored, allowed]), 'q', 'kv')}\n",
    ]
    return Printed("\n\n".join(parts), captures, [*program.numbers, 0], learned)


def _is_learned(line: Instruction, learned: list[int]) -> bool:
    return line.op == "load" and line.args[0] in learned


_HEAD = """import torch
import triton.language as tl

from flexjag.backends.gathers import look_up
from flexjag.backends.plain_math import cast, flat_index, maximum, minimum
from flexjag.backends.triton_math import bucketize, floor_divide, jit, sigmoid, tanh
"""

_OPERATORS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "neg": "-{}",
    "detach": "{}",
    "not": "{} == 0",
}
_UNARY = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "floor", "ceil")
_TRITON = {
    **_OPERATORS,
    **{name: f"tl.{name}({{}})" for name in _UNARY},
    "tanh": "tanh({})",
    "sigmoid": "sigmoid({})",
    "floordiv": "floor_divide({}, {})",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "where": "tl.where({}, {}, {})",
}
_TRITON |= {"clamp_min": _TRITON["maximum"], "clamp_max": _TRITON["minimum"], "relu": _TRITON["maximum"]}
_PLAIN = {
    **_OPERATORS,
    **{name: f"torch.{name}({{}})" for name in (*_UNARY, "tanh", "sigmoid")},
    "floordiv": "{} // {}",
    "minimum": "minimum({}, {})",
    "maximum": "maximum({}, {})",
    "where": "torch.where({}, {}, {})",
}
_PLAIN |= {"clamp_min": _PLAIN["maximum"], "clamp_max": _PLAIN["minimum"], "relu": _PLAIN["maximum"]}


def _function(name: str, parameters: str, result: Value, program: Program, words: dict[str, str]) -> str:
    """The source of one function."""
    needs = needed(program, [result])
    lines = [_line(line, words) for line in needs]
    head, returned = ["@jit"] if words is _TRITON else [], _text(result)
    if name.endswith("score") and result.name != parameters.split(",")[0] and not _reads(needs, parameters):
        # A score that ignores q·k may be the same for a whole row, but kernels want a tile.
        returned = f"tl.broadcast_to({returned}, s.shape)" if words is _TRITON else f"{returned}.expand(s.shape)"
    return "\n".join([*head, f"def {name}({parameters}):", *lines, f"    return {returned}", ""])


def _reads(lines: Sequence[Instruction], parameters: str) -> bool:
    """Whether some line reads the first parameter."""
    first = parameters.split(",")[0]
    return any(isinstance(x, Symbol) and x.name == first for line in lines for x in line.args)


def _slopes(parameters: str, taken: list[tuple[Instruction, Value]], program: Program) -> str:
    """The source of `plain_slopes`."""
    indices = [_text_of_indices(line) for line, _ in taken]
    wanted = [x for line, slope in taken for x in (*line.args[1::2], slope)]
    lines = [_line(line, _PLAIN) for line in needed(program, wanted)]
    entries = [
        f"({line.args[0]}, flat_index({index}), {_text(slope)})"
        for index, (line, slope) in zip(indices, taken, strict=True)
    ]
    return "\n".join([f"def plain_slopes({parameters}):", *lines, f"    return [{', '.join(entries)}]", ""])


def _text_of_indices(line: Instruction) -> str:
    return ", ".join([f"captures[{line.args[0]}]", *(_text(x) for x in line.args[1::2])])


def _text(x: Value) -> str:
    if isinstance(x, Symbol):
        return x.name
    if isinstance(x, float):
        return f"{x!r}" if x - x == 0.0 else f'float("{x!r}")'
    return f"{x!r}" if isinstance(x, bool) or x >= 0 else f"({x!r})"


def _line(line: Instruction, words: dict[str, str]) -> str:
    """One instruction, in the words of a language."""
    is_triton, dtype = words is _TRITON, line.result.dtype
    args = [_text(x) for x in line.args]
    if line.op == "load":
        made = _load(line.args, is_triton)
    elif line.op == "bucketize":
        at = f"{args[1]}, captures[{args[0]}]"
        made = f"bucketize({at}, {args[2]}, {args[3]})" if is_triton else f"torch.bucketize({at}, right=True)"
    elif line.op == "to" and dtype == torch.bool:
        made = f"{args[0]} != 0"
    elif line.op == "to":
        made = f"tl.cast({args[0]}, tl.{DTYPES[dtype]})" if is_triton else f"cast({args[0]}, {dtype})"
    elif line.op == "full":
        made = (
            f"tl.full((), {args[0]}, tl.{DTYPES[dtype]})"
            if is_triton
            else f"torch.full_like(q, {args[0]}, dtype={dtype})"
        )
    else:
        made = words[line.op].format(*args)
    return f"    {line.result.name} = {made}"


def _load(args: Sequence[Value], is_triton: bool) -> str:
    tensor, places = f"captures[{args[0]}]", args[1:]
    index = [_text(x) for x in places[::2]]
    if not is_triton:
        return f"look_up({', '.join([tensor, *index])})" if index else tensor
    at = tensor
    for x, stride in zip(index, places[1::2], strict=True):
        at += f" + {x}" if isinstance(stride, int) else f" + tl.cast({x}, tl.int64) * {_text(stride)}"
    return f"tl.load({at})"


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
