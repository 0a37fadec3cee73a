"""Printers: every operation has a word in every language, and one more language is one small class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from triton_normalizers import HEADS, LENGTHS, MASKS, SCORES, TOTAL

import flexjag as fj
from flexjag.algebra import scores as s
from flexjag.lowering import mods
from flexjag.printing import (
    OPERATIONS,
    Cpp,
    Instruction,
    Language,
    Program,
    Torch,
    Triton,
    emit_gradient,
    emit_mask,
    emit_score,
    emit_slopes,
    functions,
    has_functions,
    new_program,
    objection,
    read,
    trace,
)
from flexjag.printing.language import OPERATORS, with_bounds
from flexjag.printing.program import needed

EPS = torch.finfo(torch.float32).eps


class Scalar(Language):
    """Python functions of numbers, computed in float64, or in whole numbers of which those of 32 bits wrap around."""

    name = "Python"
    header = "import bisect, math\n"
    words = with_bounds(
        {
            **OPERATORS,
            **{name: f"math.{name}({{}})" for name in ("exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "erf")},
            **{name: f"math.{name}({{}})" for name in ("floor", "ceil", "tanh")},
            "abs": "abs({})",
            "rsqrt": "1 / math.sqrt({})",
            "sigmoid": "1 / (1 + math.exp(-{}))",
            "floordiv": "{} // {}",
            "minimum": "{0} if {0} != {0} or {0} < {1} else {1}",
            "maximum": "{0} if {0} != {0} or {0} > {1} else {1}",
            "where": "{1} if {0} else {2}",
            "to": "{dtype}({})",
            "full": "{dtype}({})",
            "bucketize": "bisect.bisect_right({0}.tolist(), {1})",
        }
    )

    def dtype(self, dtype: torch.dtype) -> str:
        return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"

    def load(self, line: Instruction) -> str:
        return f"{self.capture(line)}[{self.place(line)}].item()"

    def expression(self, line: Instruction) -> str:
        text = super().expression(line)
        wraps = line.result.dtype == torch.int32 and line.op in ("add", "sub", "mul")
        return f"(({text}) + 2**31) % 2**32 - 2**31" if wraps else text


LANGUAGES = (Scalar(), Torch(), Triton(), Cpp())


def load(language: Language, *functions: str) -> dict[str, Any]:
    """What a module of printed functions defines."""
    namespace: dict[str, Any] = {}
    exec("\n".join([language.header, *functions]), namespace)
    return namespace


TABLE = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -0.5]])
BOUNDARIES = torch.tensor([-1.0, 0.0, 0.5])
CASES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda x, y, i: x + y,
    "sub": lambda x, y, i: x - 2,
    "mul": lambda x, y, i: 3 * x,
    "div": lambda x, y, i: x / i,
    "floordiv": lambda x, y, i: i // 3,
    "and": lambda x, y, i: (x > 0) & (y > 0),
    "or": lambda x, y, i: (x > 0) | (y > 0),
    "xor": lambda x, y, i: (x > 0) ^ (y > 0),
    "not": lambda x, y, i: ~(x > 0),
    "rshift": lambda x, y, i: (i * 0x61C88647 >> 15) + (i.long() >> 1),
    "eq": lambda x, y, i: i == 2,
    "ne": lambda x, y, i: i.bool(),
    "lt": lambda x, y, i: x < y,
    "le": lambda x, y, i: i <= 2.5,
    "gt": lambda x, y, i: x > -1,
    "ge": lambda x, y, i: x >= y,
    "minimum": lambda x, y, i: torch.minimum(x, y),
    "maximum": lambda x, y, i: torch.maximum(x, y),
    "clamp_min": lambda x, y, i: x.clamp(min=-0.5),
    "clamp_max": lambda x, y, i: x.clamp(max=0.5),
    "relu": lambda x, y, i: torch.relu(x),
    "where": lambda x, y, i: torch.where(x > y, x, 0.0),
    "neg": lambda x, y, i: -i,
    "abs": lambda x, y, i: abs(x),
    "exp": lambda x, y, i: torch.exp(x),
    "exp2": lambda x, y, i: torch.exp2(x),
    "log": lambda x, y, i: torch.log(abs(x)),
    "log2": lambda x, y, i: torch.log2(abs(x)),
    "sqrt": lambda x, y, i: torch.sqrt(abs(x)),
    "rsqrt": lambda x, y, i: torch.rsqrt(abs(x)),
    "sin": lambda x, y, i: torch.sin(x),
    "cos": lambda x, y, i: torch.cos(x),
    "erf": lambda x, y, i: torch.erf(x),
    "tanh": lambda x, y, i: torch.tanh(x),
    "sigmoid": lambda x, y, i: torch.sigmoid(x),
    "floor": lambda x, y, i: torch.floor(x),
    "ceil": lambda x, y, i: torch.ceil(x),
    "detach": lambda x, y, i: x.detach(),
    "to": lambda x, y, i: x.int() + i.long(),
    "full": lambda x, y, i: torch.full_like(x, float("inf")),
    "load": lambda x, y, i: TABLE[1, abs(i) % 3] + TABLE[abs(i) % 2, 0],
    "bucketize": lambda x, y, i: torch.bucketize(x, BOUNDARIES, right=True),
}
"""A function for each operation, of two floating-point numbers and a whole one that is not 0."""


def case(op: str) -> tuple[Program, Any, list[Any]]:
    """The program of a case, what it returns and its arguments."""
    program = new_program()
    dtypes = {"x": torch.float32, "y": torch.float32, "q": torch.int32}
    given = [program.symbol(name, dtype) for name, dtype in dtypes.items()]
    return program, CASES[op](*given), given


def run(op: str, language: Language, *at: Tensor) -> Tensor:
    """A printed case of one place, in float64."""
    program, result, given = case(op)
    text = language.function(
        "made", given, language.lines(needed(program, [result])), language.value(result), result.dtype
    )
    values = at if isinstance(language, Torch) else [x.item() for x in at]
    return torch.as_tensor(load(language, text)["made"](*values, program.captures, program.numbers)).double()


def test_every_operation_is_one_that_programs_make() -> None:
    assert set(CASES) == set(OPERATIONS)
    for op in CASES:
        program, _, _ = case(op)
        assert op in {line.op for line in program.lines}
    with pytest.raises(AssertionError, match="sort"):
        new_program().note("sort", (), torch.float32)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda x: x.name)
def test_every_operation_has_a_word_in_every_language(language: Language) -> None:
    assert {*language.words, "load"} == set(OPERATIONS)
    for op in CASES:
        program, _, _ = case(op)
        assert len(language.lines(program.lines)) == len(program.lines)


@pytest.mark.parametrize("language", LANGUAGES[:2], ids=lambda x: x.name)
@pytest.mark.parametrize("op", CASES)
def test_a_printed_operation_is_torchs(op: str, language: Language) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x, y = torch.randn(2, generator=generator).round(decimals=1)
        i = torch.randint(-9, 9, (), generator=generator, dtype=torch.int32)
        i = torch.where(i == 0, 1, i)
        found = run(op, language, x, y, i)
        torch.testing.assert_close(found, CASES[op](x, y, i).double(), rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("op", ["minimum", "maximum", "clamp_min", "relu"])
@pytest.mark.parametrize("language", LANGUAGES[:2], ids=lambda x: x.name)
def test_bounds_of_nan_are_nan(op: str, language: Language) -> None:
    nan, one = torch.tensor(torch.nan), torch.tensor(1.0)
    assert run(op, language, nan, one, one).isnan()
    assert run(op, language, one, nan, one).isnan() == (op in ("minimum", "maximum"))


def points(mask: str, score: str) -> tuple[Any, Any, list[tuple[Any, ...]], list[Tensor]]:
    """A plan, its program, random points ``(s, ds, h, q, kv)``, and the leaves of its score."""
    x = fj.Jagged.from_lengths(torch.zeros(TOTAL), LENGTHS)
    made = SCORES[score](TOTAL)
    found = [getattr(part, name, None) for part in s.parts(made) for name in ("slopes", "table")]
    leaves = [t.requires_grad_() for t in found if isinstance(t, Tensor)]
    plan = fj.plan(x, mask=MASKS[mask](TOTAL), score=made, block_size=16)
    scored = mods.score_mod(plan.kernel_score, replace(plan.tables, look_up=read))
    traced = trace(plan.mask_mod, scored, has_functions(plan.mask, plan.score))
    generator = torch.Generator().manual_seed(3)
    at = [torch.randint(0, size, (40,), generator=generator) for size in (HEADS, TOTAL, TOTAL)]
    s_, ds = torch.randn(2, 40, generator=generator).unbind()
    return plan, traced, list(zip(s_, ds, *at, strict=True)), leaves


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_in_one_more_language(mask: str) -> None:
    plan, traced, where, _ = points(mask, "none")
    allowed = load(Scalar(), emit_mask(traced, Scalar(), "mask"))["mask"]
    for _, _, *at in where:
        wanted = bool(plan.mask_mod(torch.zeros(()), *at))
        assert allowed(*(x.item() for x in at), traced.captures, traced.numbers) is wanted, at


@pytest.mark.parametrize("score", SCORES)
def test_a_score_and_its_derivatives_in_one_more_language(score: str) -> None:
    """By the product of query and key, and by every tensor that learns."""
    plan, traced, where, leaves = points("causal", score)
    writers = {"score": emit_score, "dscore": emit_gradient, "slopes": emit_slopes}
    made = load(Scalar(), *(write(traced, Scalar(), name) for name, write in writers.items()))
    assert len(traced.learned) == len(leaves)
    for raw, ds, *at in where:
        leaf = raw.double().requires_grad_()
        wanted = leaf if plan.score_mod is None else plan.score_mod(leaf, torch.zeros(()), *at).to(leaf.dtype)
        grads = [None] * (1 + len(leaves))
        if wanted.requires_grad:
            grads = torch.autograd.grad(wanted, [leaf, *leaves], ds.double(), allow_unused=True)
        given = (*(x.item() for x in at), traced.captures, traced.numbers)
        check(made["score"](raw.item(), *given), wanted)
        check(made["dscore"](ds.item(), raw.item(), *given), grads[0])
        totals = [torch.zeros(x.shape, dtype=torch.float64) for x in traced.captures]
        for capture, place, slope in made["slopes"](raw.item(), *given):
            totals[capture][place] += slope * ds.item()
        for i in traced.learned:
            which = next(n for n, x in enumerate(leaves) if torch.equal(x, traced.captures[i]))  # maybe a dense copy
            check(totals[i], grads[1 + which])


def check(found: Any, wanted: Tensor | None) -> None:
    """A few roundings apart; no gradient is one of zeros."""
    found = torch.as_tensor(found, dtype=torch.float64)
    wanted = torch.zeros_like(found) if wanted is None else wanted.detach().double()
    if torch.equal(found, wanted):  # infinite ones, too
        return
    limit = 16 * EPS * float(wanted.abs().max().clamp(min=1.0))
    assert float((found - wanted).abs().max()) <= limit, (found, wanted)


class Poor(Scalar):
    name = "poor Python"
    words: ClassVar[dict[str, str]] = {op: word for op, word in Scalar.words.items() if op != "erf"}


def test_what_has_no_word_is_an_objection() -> None:
    def error_function(x: Tensor, *at: Tensor) -> Tensor:
        return torch.erf(x)

    cpu, score = torch.device("cpu"), fj.ScoreMod(error_function)
    assert objection(functions(None, score), cpu, False, LANGUAGES) is None
    why = objection(functions(None, score), cpu, False, [*LANGUAGES, Poor()])
    assert why == (
        "error_function cannot be made part of its kernels: "
        "it needs erf, the error function, for which there is no word in poor Python"
    )


def test_a_dtype_that_a_language_lacks_is_an_objection() -> None:
    score = fj.ScoreMod(lambda x, b, h, q, kv: x + q.to(torch.uint16).to(x.dtype))
    cpu = torch.device("cpu")
    assert "it makes torch.uint16, which Triton does not have" in str(
        objection(functions(None, score), cpu, False, [Triton()])
    )
    assert objection(functions(None, score), cpu, False, [Torch()]) is None
