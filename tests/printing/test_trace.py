"""Tracing: scores of float32 and float64, plans without a mask, and functions that read no tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from printed_cpp import REALS, Result, compiled, in_torch, printed, run, unit
from torch import Tensor
from torch.nn import functional

from flexjag.backends.triton.modules import emit
from flexjag.printing import (
    Cpp,
    Language,
    Torch,
    Traced,
    Triton,
    emit_gradient,
    emit_mask,
    emit_score,
    emit_slopes,
    trace,
)

KEYS, ROWS = 5, 83  # rows: five vectors and a part of one
TABLE = torch.linspace(-1, 1, ROWS)
LEARNED = torch.linspace(0.5, 2, ROWS).requires_grad_()

Score = Callable[[Any, Any, Any, Any, Any], Any]
SCORES: dict[str, Score] = {
    "as_it_is": lambda s, b, h, q, kv: s,
    "silu": lambda s, b, h, q, kv: functional.silu(s),
    "gelu": lambda s, b, h, q, kv: functional.gelu(s),
    "gelu_tanh": lambda s, b, h, q, kv: functional.gelu(s, approximate="tanh"),
    "factor": lambda s, b, h, q, kv: torch.where(q > kv, s, 0.0) * 0.5**0.5,
    "factors": lambda s, b, h, q, kv: torch.where(q > kv, s * 0.3, s * 0.7),
    "whole_factors": lambda s, b, h, q, kv: torch.where(q > kv, 3 * s, 0) / 7,
    "bounds": lambda s, b, h, q, kv: torch.maximum(s.clamp(-0.7, 0.7), s * 0.1) * 0.3,
    "float32_terms": lambda s, b, h, q, kv: s * 0.1 + TABLE[q] + (q - kv) * 0.1,
    "in_float32": lambda s, b, h, q, kv: torch.tanh(s.float()) * 0.3,
    "in_float64": lambda s, b, h, q, kv: torch.tanh(s.double()) * 0.3,
    "learned": lambda s, b, h, q, kv: functional.gelu(s * LEARNED[q]) * 0.3,
}
"""Scores on symbols, and on tensors. Terms of float32 have one rounding each, which is the same everywhere."""


def traced(name: str, dtype: torch.dtype) -> Traced:
    return trace(None, SCORES[name], False, dtype)


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    @cache
    def library(dtype: torch.dtype) -> Any:
        source = printed({f"of_{name}": traced(name, dtype) for name in SCORES})
        return compiled(unit(dtype, source), tmp_path_factory.mktemp("unit"), "-O1")

    def call(name: str, program: Traced, s: Tensor, ds: Tensor) -> Result:
        return run(library(s.dtype), f"of_{name}", program, s, ds)

    return call


def arguments(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores of both signs, up to where activations are flat, and gradients ``[1, KEYS, ROWS]``."""
    s, ds = torch.randn(2, 1, KEYS, ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    s[..., :3] = torch.tensor([0.0, 12.0, -12.0], dtype=torch.float64)
    return s.to(dtype), ds.to(dtype)


@pytest.mark.parametrize("language", ["torch", "C++"])
@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_scores_and_derivatives_are_torchs_in_their_dtype(
    name: str, dtype: torch.dtype, language: str, in_cpp: Callable[..., Result]
) -> None:
    """In float64 no constant of a score or a derivative has been rounded to float32."""
    program, (s, ds) = traced(name, dtype), arguments(dtype)
    assert (program.scored.dtype, program.by_score.dtype) == (dtype, dtype)
    found = in_torch(program, s, ds) if language == "torch" else in_cpp(name, program, s, ds)
    leaf, at = s.clone().requires_grad_(), torch.arange(ROWS, dtype=torch.int32)
    wanted = SCORES[name](leaf, 0, 0, at, torch.arange(KEYS, dtype=torch.int32)[:, None]).to(dtype)
    by_score, *by_learned = torch.autograd.grad(wanted, [leaf, *(program.captures[i] for i in program.learned)], ds)
    limit = 16 * torch.finfo(torch.float32 if name == "in_float32" else dtype).eps
    for one, other in ((found.scored, wanted.detach()), (found.by_score, by_score)):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit * float(other.abs().max()))  # terms cancel
    assert len(found.totals) == len(by_learned) == (name == "learned")
    limit = 16 * torch.finfo(torch.float32).eps  # torch's sums are rounded to the dtype of what learns
    for total, grad in zip(found.totals, by_learned, strict=True):
        torch.testing.assert_close(total.float(), grad, rtol=limit, atol=limit * float(grad.abs().max()))


def sources(program: Traced, language: Language) -> dict[str, str]:
    writers: dict[str, Callable[..., str]] = {
        "mask": emit_mask, "score": emit_score, "dscore": emit_gradient, "slopes": emit_slopes,
    }  # fmt: skip
    return {name: write(program, language, name) for name, write in writers.items()}


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_an_activation_has_words_in_every_language(name: str) -> None:
    """What Triton's compute is compared by its interpreter, in the tests of the backend."""
    word = {"silu": "sigmoid(", "gelu": "erf(", "gelu_tanh": "tanh("}[name]
    for language in (Torch(), Triton(), Cpp()):
        for dtype in REALS:
            made = sources(traced(name, dtype), language)
            assert word in made["score"]
            assert word in made["dscore"]


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_cpp_names_the_dtype_of_every_number(dtype: torch.dtype) -> None:
    kind, other = ("float", "double") if dtype == torch.float32 else ("double", "float")
    for name in ("silu", "gelu", "gelu_tanh", "factor", "factors"):
        made = "\n".join(sources(traced(name, dtype), Cpp()).values())
        made = made.replace("double* const* totals", "")  # sums of slopes are doubles in every dtype
        assert f"{kind}(0." in made or name == "silu"
        assert re.search(rf"\b({other}|real)\b", made) is None, made


@pytest.mark.parametrize("language", [Torch(), Triton(), Cpp()], ids=lambda x: x.name)
def test_a_program_without_a_mask_is_printed(language: Language) -> None:
    program = trace(None, SCORES["silu"])
    assert program.allowed is True
    assert not program.is_heavy
    returned = "spread<bool>(true);\n}" if isinstance(language, Cpp) else "True"
    assert sources(program, language)["mask"].rstrip().endswith(f"return {returned}")


def test_without_a_mask_everything_is_allowed(in_cpp: Callable[..., Result]) -> None:
    for dtype in REALS:
        s, ds = arguments(dtype)
        program = traced("as_it_is", dtype)
        for found in (in_torch(program, s, ds), in_cpp("as_it_is", program, s, ds)):
            assert (found.allowed != 0).all()
            assert torch.equal(found.scored, s)
            assert torch.equal(found.by_score, ds)


def test_a_plan_without_functions_is_the_score_itself() -> None:
    program = trace(None, None, dtype=torch.float64)
    assert program.scored is program.s
    assert program.by_score is program.ds
    assert program.s.dtype == torch.float64
    assert not program.program.lines


def test_triton_needs_a_tensor() -> None:
    """Its kernels take the tensors as a tuple, which is not empty. C++ takes none as well."""
    program = trace(lambda b, h, q, kv: kv <= q, SCORES["silu"])
    assert not program.captures
    with pytest.raises(NotImplementedError, match="it reads no tensor of the plan"):
        emit(lambda b, h, q, kv: kv <= q, SCORES["silu"])
    assert emit(lambda b, h, q, kv: TABLE[kv] > 0, SCORES["silu"]).captures == [TABLE]
