"""Nodes from outside the package, one small file each: they run wherever flexjag's own do, and the guide shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import make_qkv, needing_gradients
from toys.periodic import Periodic
from toys.same_colour import NextColour
from toys.sunset import Sunset, sunset_by_formula

import flexjag as fj
from flexjag.algebra.tree import is_by_position
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match, assert_matches_reference, assert_no_leak, assert_sandwich

LENGTHS = [5, 0, 130, 1, 17]
TOTAL = sum(LENGTHS)
TOYS = Path(__file__).parent / "toys"


def problem(dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[fj.Mask, fj.Score, tuple[fj.Jagged, ...]]:
    c = torch.linspace(-0.5, 0.5, heads, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    colours = torch.arange(TOTAL, dtype=torch.int32) // 3 % 4
    return NextColour(colours), Periodic(c, 3), make_qkv(LENGTHS, heads=heads, dim=16, dtype=dtype)


@pytest.mark.parametrize("backend", ["tiled", "segments"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_on_cpu(backend: str, dtype: torch.dtype) -> None:
    mask, score, qkv = problem(dtype)
    assert_matches_reference(*qkv, mask=mask & fj.Causal(), score=score, backend=backend)
    assert_matches_reference(*qkv, mask=fj.Causal(), score=fj.Alibi.from_heads(2) >> score, backend=backend)
    assert_no_leak(backend, *qkv, mask=mask, score=score)


def test_spans_hold_the_mask() -> None:
    mask, _, (q, k, _) = problem()
    assert_sandwich(mask | fj.Prefix(1), q, k, heads=2)


def test_one_bias_serves_all_segments() -> None:
    """What the class declares reaches the rules: a bias by position is shared, one by token is not."""
    mask, score, _ = problem()
    assert is_by_position(fj.Causal(), score, is_self=True)
    assert not is_by_position(mask, score, is_self=True)


def on_triton() -> dict[str, float]:
    mask, score, qkv = problem()
    plan = fj.plan(qkv[0], mask=mask & fj.Causal(), score=score, normalizer=fj.SiLU(1 / 16))
    return assert_matches_reference(*qkv, plan=plan, backend="triton")


def test_on_triton() -> None:
    with Worker(interpret=True) as worker:
        ratios = worker.call("call_function", __name__, "on_triton")
    assert set(ratios) >= {"out", "grad_q", "grad_k", "grad_v", "grad_learned[0]"}


def test_on_a_gpu_that_is_not_there() -> None:
    mask, score, qkv = problem(torch.bfloat16)
    assert_kernels_match(fj.plan(qkv[0], mask=mask & fj.Causal(), score=score), *qkv)


def test_a_variant_equals_its_formula_and_compiles() -> None:
    layer = Sunset(2, window=5, kept=1).double()
    q, k, v = needing_gradients(*make_qkv(LENGTHS, heads=2, dim=16))
    out = layer(q, k, v).values
    pieces = zip(*(x.values.split(LENGTHS) for x in (q, k, v)), strict=True)
    wanted = torch.cat([sunset_by_formula(*piece, layer.rate, 5, 1) for piece in pieces])
    torch.testing.assert_close(out, wanted)
    leaves, weights = [q.values, k.values, v.values, layer.rate], torch.randn_like(out)
    grads = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, wanted))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v).values, wanted)
    half = make_qkv(LENGTHS, heads=2, dim=16, dtype=torch.bfloat16)
    assert_kernels_match(fj.plan(half[0], mask=layer.mask, score=fj.Alibi(layer.float().rate)), *half)


@pytest.mark.parametrize("toy", sorted(TOYS.glob("*.py")), ids=lambda path: path.stem)
def test_the_guide_shows_it(toy: Path) -> None:
    text = toy.read_text()
    assert len(text.splitlines()) <= 40
    guide = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    assert text.split('"""', 2)[2].strip() in guide
