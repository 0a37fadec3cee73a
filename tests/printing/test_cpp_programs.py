"""The C++ printer: what a compiled unit computes is what the torch printer's functions compute, lane by lane."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from printed_cpp import REALS, compiled, in_torch, printed, run, unit
from test_languages import CASES
from torch import Tensor
from triton_normalizers import HEADS, LENGTHS, MASKS, SCORES, TOTAL

import flexjag as fj
from flexjag.algebra import scores as s
from flexjag.lowering import mods
from flexjag.printing import OPERATIONS, Traced, has_functions, read, trace

KEYS, ROWS = 9, 83  # rows: five vectors and a part of one
SPECIAL = [0.0, -0.0, 1.0, -1.5, 0.3, 2.5, -100.0, 1e30, torch.inf, -torch.inf, torch.nan]
WHOLES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (torch.bool, *WHOLES, *FLOATS)


def fractions(seed: int, count: int) -> Tensor:
    """Special values, then random ones."""
    made = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3
    for i, x in enumerate(SPECIAL if seed % 2 else SPECIAL[::-1]):
        made[i::13] = x
    return made


def wholes(dtype: torch.dtype, seed: int, count: int = ROWS) -> Tensor:
    """Random numbers of a dtype, its extremes among them."""
    info = torch.iinfo(dtype)
    made = torch.randint(-9 if info.min else 0, 99, (count,), generator=torch.Generator().manual_seed(seed))
    made[seed % 3 :: 7], made[1::8] = info.max, info.min
    return made.to(dtype)


X, Y, I = fractions(1, ROWS), fractions(2, ROWS), torch.arange(ROWS) % 19 - 9  # noqa: E741
EVERY = torch.ones(ROWS, dtype=torch.bool)


def every(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return read(EVERY, q)


Score = Callable[[Any, Any, Any, Any, Any], Any]
PROGRAMS: dict[str, Callable[[torch.dtype], Traced]] = {}
"""Programs, each traced with the dtype of its scores."""


def program(name: str, score: Score, is_checked: bool = False) -> None:
    PROGRAMS[name] = lambda dtype: trace(every, score, is_checked, dtype)


def _operation(op: str, which: int) -> Score:
    """A case of an operation on tensors that vary by query, by key, or both."""

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        x, y, i = (read(t, (q, kv)[(which >> n) & 1]) for n, t in enumerate((X, Y, I)))
        if op == "to":  # of numbers that have one
            x = torch.where(abs(x) < 1000, x, 0.5)
        return CASES[op](x, y, i.int())

    return score


for _op in OPERATIONS:
    for _which in (2, 7):
        program(f"op_{_op}_{_which}", _operation(_op, _which))


def _arithmetic(dtype: torch.dtype, name: str, is_uniform: bool) -> Score:
    a, c = wholes(dtype, 1), wholes(dtype, 2)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        x, y = read(a, kv if is_uniform else q), read(c, kv)
        y_ = torch.where((y == 0) | (y == -1), 3, y)
        return {
            "sums": lambda: (x + y * 5 - 3) * x + -y,
            "bits": lambda: ((x & y) | 5) ^ x,
            "quotients": lambda: x // y_ + x % y_ + y // 7,
            "bounds": lambda: torch.minimum(x, y) + torch.maximum(x, y + 1) + x.clamp(2, 50) + torch.abs(x),
            "comparisons": lambda: ((x < y) ^ (x >= 7)).to(dtype) + (x != y).long() + torch.where(x == y, x, 1),
            "fractions": lambda: x / 2 + torch.sqrt(y.float() + 300),
        }[name]()

    return score


for _dtype in WHOLES:
    for _name in ("sums", "bits", "quotients", "bounds", "comparisons", "fractions"):
        for _uniform in (False, True):
            _title = f"{str(_dtype)[6:]}_{_name}{'_uniform' if _uniform else ''}"
            program(_title, _arithmetic(_dtype, _name, _uniform))


def data(dtype: torch.dtype, seed: int) -> Tensor:
    if dtype in WHOLES:
        return wholes(dtype, seed).clamp(max=100)
    made = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed)) * 20
    return made > 0 if dtype == torch.bool else made.to(dtype)


def _casts(dtype: torch.dtype) -> Score:
    a = data(dtype, 3)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        total = s * 0
        for other in DTYPES:
            value = read(a, q).to(torch.int32) if other == torch.uint8 else read(a, q)
            total = total + value.to(other).to(torch.float32) / 64 + read(a, kv).bool().to(other).float()
        return torch.where(read(a, q).bool() == read(a, kv).bool(), total, -total)

    return score


def _half(dtype: torch.dtype) -> Score:
    a, c = fractions(3, ROWS).to(dtype), fractions(4, ROWS).to(dtype)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        x, y = read(a, q), read(c, kv)
        return torch.where(x > y, x * y + 0.1, abs(x)) + s.to(dtype) * 1e-5 + (s * 1e5).to(dtype)

    return score


for _dtype in DTYPES:
    program(f"casts_{str(_dtype)[6:]}", _casts(_dtype))
for _dtype in FLOATS[:2]:
    program(f"halves_{str(_dtype)[6:]}", _half(_dtype))

GENERATOR = torch.Generator().manual_seed(5)
SHUFFLED = torch.randperm(ROWS, generator=GENERATOR)
PATTERNS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "uniform": lambda t, h, q, kv: t(h, kv),
    "run": lambda t, h, q, kv: t(h, q),
    "run_of_columns": lambda t, h, q, kv: t(q % 2, q),
    "shifted": lambda t, h, q, kv: t(h, (q - kv).clamp(-20, 20) + 20),
    "reversed": lambda t, h, q, kv: t(h, (kv - q).clamp(-70, 70) + 70),
    "broadcast": lambda t, h, q, kv: t(h, (q // 16).int()),
    "shuffled": lambda t, h, q, kv: t(h, read(SHUFFLED, q)),
    "two_shuffled": lambda t, h, q, kv: t((q + kv) % 2, read(SHUFFLED, q)),
    "every_other": lambda t, h, q, kv: t(h, (2 * q + kv) % 83),
    "narrow_index": lambda t, h, q, kv: t(h, (q + kv).to(torch.uint8) // 2),
    "of_64_bits": lambda t, h, q, kv: t(h, q.long() + 0 * kv),
}


def _lookup(pattern: str, table: Tensor) -> Score:
    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return s * 0.5 + PATTERNS[pattern](lambda *at: read(table, *at), h, q, kv).float() / 32 * torch.tanh(s)

    return score


TABLES = {
    "rows": lambda: torch.randn(2, ROWS + 67, generator=GENERATOR),
    "columns": lambda: torch.randn(ROWS + 67, 2, generator=GENERATOR).t(),
    "expanded": lambda: torch.randn(1, ROWS + 67, generator=GENERATOR).expand(2, -1),
}
for _pattern in PATTERNS:
    for _kind, _table in TABLES.items():
        program(f"at_{_pattern}_{_kind}", _lookup(_pattern, _table().requires_grad_(_kind != "expanded")))
    for _dtype in DTYPES if _pattern in ("uniform", "run", "reversed", "shuffled") else ():
        _entries = torch.randint(0, 2 if _dtype == torch.bool else 99, (2, 150), generator=GENERATOR).to(_dtype)
        program(f"at_{_pattern}_{str(_dtype)[6:]}", _lookup(_pattern, _entries))


def _buckets(dtype: torch.dtype, count: int, spread: int) -> Score:
    bounds = (torch.arange(count) * spread - 20).to(dtype)

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        x = read(I, q) * spread + kv if dtype in WHOLES else read(X, q) * spread + kv
        found = torch.bucketize(x, bounds, right=True) + torch.bucketize(q - kv, bounds, right=True)
        return found.float() + torch.bucketize(kv, bounds, right=True) * s

    return score


for _dtype in (torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64):
    for _count in (0, 1, 31, 400):
        program(f"buckets_{str(_dtype)[6:]}_{_count}", _buckets(_dtype, _count, 3 if _count < 400 else 1))


def _random_score(seed: int) -> Score:
    """A random expression of numbers of all kinds."""

    def score(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        choose = random.Random(seed)
        table = data(choose.choice(DTYPES), seed)
        known = [s, q, kv, h, read(table, q), read(table, kv), q - kv, s * 0.5]

        def number() -> Any:
            return choose.choice(known)

        for _ in range(12):
            x, y, z = number(), number(), number()
            one: Callable[[], Any] = choose.choice(
                [
                    lambda x=x, y=y: x.float() + y,
                    lambda x=x, y=y: x * 2 - y.float(),
                    lambda x=x, y=y: torch.minimum(x, y.float()) * torch.sigmoid(y),
                    lambda x=x, y=y, z=z: torch.where(x.float() > y, z, x),
                    lambda x=x, y=y: ((x.float() <= y) | (y.float() < 3)).to(torch.int32),
                    lambda x=x, y=y: torch.tanh(x.float() / 8) + torch.cos(y / 4.0),
                    lambda x=x: torch.clamp(x.float(), -5, 5),
                    lambda x=x, y=y: torch.exp(-abs(x.float()) / 16) * y,
                ]
            )
            known.append(one())
        return known[-1].float() + known[-2].float() / 2

    return score


for _seed in range(16):
    program(f"random_{_seed}", _random_score(_seed))


def plan_of(mask: str, score: str, dtype: torch.dtype) -> Traced:
    """A plan's program. All tensors of its score learn."""
    x = fj.Jagged.from_lengths(torch.zeros(TOTAL), LENGTHS)
    made = SCORES[score](TOTAL)
    for part in s.parts(made):
        for leaf in (getattr(part, name, None) for name in ("slopes", "table")):
            if isinstance(leaf, Tensor):
                leaf.requires_grad_()
    plan = fj.plan(x, mask=MASKS[mask](TOTAL), score=made, block_size=16)
    scored = mods.score_mod(plan.kernel_score, replace(plan.tables, look_up=read))
    return trace(plan.mask_mod, scored, has_functions(plan.mask, plan.score), dtype)


for _n, _mask in enumerate(MASKS):
    PROGRAMS[f"mask_{_n}"] = lambda dtype, mask=_mask: plan_of(mask, "none", dtype)
for _n, _score in enumerate(SCORES):
    PROGRAMS[f"score_{_n}"] = lambda dtype, score=_score: plan_of("causal", score, dtype)


WITHOUT_REAL = re.compile(r"(u?int\d+_|at_\w+_\D+\d+$)")
"""Programs that the width of ``real`` hardly concerns."""
NAMES = {real: [name for name in PROGRAMS if real == torch.float32 or not WITHOUT_REAL.match(name)] for real in REALS}


class Unit:
    """Programs in one library."""

    def __init__(self, real: torch.dtype, folder: Any) -> None:
        self.real = real
        self.traced = {name: PROGRAMS[name](real) for name in NAMES[real]}
        self.library = compiled(unit(real, printed(self.traced)), folder, "-O1")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Unit]:
    return cache(lambda real: Unit(real, tmp_path_factory.mktemp("unit")))


def precision(traced: Traced) -> float:
    """The spacing at 1 of the coarsest dtype that a program computes in; numbers that it looks up are exact."""
    dtypes = {line.result.dtype for line in traced.program.lines if line.op != "load"} | {traced.s.dtype}
    eps = [torch.finfo(x).eps for x in dtypes if x in (torch.float32, torch.float64)]  # half precision rounds a float
    return max(eps)


@pytest.mark.parametrize(("real", "name"), [(real, name) for real in REALS for name in NAMES[real]], ids=str)
def test_a_program_is_torchs(built: Callable[[torch.dtype], Unit], real: torch.dtype, name: str) -> None:
    made = built(real)
    is_plan = name.startswith(("mask_", "score_"))
    shape = (HEADS, TOTAL, TOTAL) if is_plan else (2, KEYS, ROWS)
    generator = torch.Generator().manual_seed(7)
    raw, ds = (torch.randn(shape, generator=generator, dtype=real) for _ in range(2))
    traced = made.traced[name]
    found, wanted = run(made.library, name, traced, raw, ds), in_torch(traced, raw, ds)
    limit = {"rtol": 24 * precision(traced), "atol": 24 * precision(traced), "equal_nan": True}
    assert set(found.allowed.unique().tolist()) <= {0, -1}
    assert torch.equal(found.allowed != 0, wanted.allowed != 0)
    torch.testing.assert_close(found.scored, wanted.scored.to(real), **limit)
    torch.testing.assert_close(found.by_score, wanted.by_score.to(real), **limit)
    assert len(found.totals) == len(wanted.totals)
    for one, other in zip(found.totals, wanted.totals, strict=True):
        limit["atol"] = limit["rtol"] * max(1.0, float(ds.abs().sum()) / 8)
        torch.testing.assert_close(one, other, **limit)
