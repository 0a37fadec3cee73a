"""What the records of backends promise, against what the backends do: on a CPU, and by rule elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import make_qkv, needing_gradients
from test_choice import case

import flexjag as fj
from flexjag.backends import Backend
from flexjag.backends.base import Promises
from flexjag.backends.choose import BACKENDS, ELSEWHERE, ON_CUDA, refusal
from flexjag.backends.cpp.rule import CPP
from flexjag.kernels.cpp import build
from flexjag.lowering.outline import with_tiles
from flexjag.testing import assert_matches_reference

ALL = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
NORMALIZERS = [fj.Softmax(), fj.SiLU(0.5), fj.StickBreaking()]
MASKS = [fj.Causal(), fj.Causal() & (fj.Window(5, 0) | fj.Prefix(2))]
HERE = [x for x in BACKENDS.values() if refusal(x.name, case(grad=True, lse=True)) is None]
REPEATABLE = [x for x in BACKENDS.values() if x.promises.deterministic == "everywhere"]
LENGTHS = [3, 9, 0, 9, 30, 9, 1, 9, 150]  # four of one length, which may share a call


def promising(promised: Callable[[Promises], object]) -> pytest.MarkDecorator:
    """Backends of a CPU that promise something, with each of their normalizers."""
    found = [(x, n) for x in HERE if promised(x.promises) for n in NORMALIZERS if isinstance(n, x.promises.normalizers)]
    return pytest.mark.parametrize(("backend", "normalizer"), found, ids=[f"{x.name}-{n!r}" for x, n in found])


def run(backend: Backend, batches: tuple[fj.Jagged, ...], **asked: object) -> list[torch.Tensor]:
    """Output and gradients."""
    q, k, v = needing_gradients(*batches)
    out = fj.attention(q, k, v, backend=backend.name, **asked).values  # type: ignore[arg-type]
    out.pow(2).sum().backward()
    return [out.detach(), *(x.values.grad for x in (q, k, v))]


def test_backends_of_a_cpu() -> None:
    assert [x.name for x in HERE if x.name != "cpp"] == ["reference", "tiled", "segments"]
    assert (CPP in HERE) == (build.refusal() is None)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@promising(lambda p: p.unmixed)
def test_unmixed(backend: Backend, mask: fj.Mask, normalizer: fj.Normalizer) -> None:
    """Each segment alone gives the bits that it gives among others, gradients included."""
    batches = make_qkv(LENGTHS, dtype=torch.float32)
    together = run(backend, batches, mask=mask, normalizer=normalizer)
    for at, length in zip(batches[0].offsets.tolist(), LENGTHS, strict=False):
        one = tuple(fj.Jagged.from_lengths(x.values[at : at + length], [length]) for x in batches)
        for got, wanted in zip(run(backend, one, mask=mask, normalizer=normalizer), together, strict=True):
            assert torch.equal(got, wanted[at : at + length])


def repeat(backend: Backend, device: str, mask: fj.Mask, normalizer: fj.Normalizer) -> None:
    """Outputs and gradients of two calls, bit by bit; the score learns, and a table is read many times."""
    results = []
    for _ in range(2):
        batches = tuple(x.to(device) for x in make_qkv(LENGTHS, heads=2, dim=16, dtype=torch.float32))
        table = torch.linspace(-1, 1, 18, device=device).view(2, 9).requires_grad_()
        q, k, v = needing_gradients(*batches)
        score = fj.RelativeBias(table)
        out = fj.attention(q, q.with_values(k.values), q.with_values(v.values), mask=mask, score=score,
                           normalizer=normalizer, backend=backend.name).values  # fmt: skip
        grads = torch.autograd.grad(out.pow(2).sum(), [q.values, k.values, v.values, table])
        results.append([out.detach(), *grads])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@promising(lambda p: p.deterministic != "nowhere")
def test_deterministic(backend: Backend, mask: fj.Mask, normalizer: fj.Normalizer) -> None:
    repeat(backend, "cpu", mask, normalizer)


@pytest.mark.cuda
@pytest.mark.parametrize("normalizer", NORMALIZERS[1:], ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("backend", REPEATABLE, ids=lambda x: x.name)
def test_deterministic_on_a_gpu(backend: Backend, mask: fj.Mask, normalizer: fj.Normalizer) -> None:
    repeat(backend, "cuda", mask, normalizer)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@promising(lambda p: p.contains_nan)
def test_contains_nan(backend: Backend, mask: fj.Mask, value: float, normalizer: fj.Normalizer) -> None:
    q, k, v = make_qkv(LENGTHS, dtype=torch.float32)
    clean = fj.attention(q, k, v, mask=mask, normalizer=normalizer, backend=backend.name).values
    rows = slice(*q.offsets[4:6].tolist())
    for x in (k, v):
        x.values[rows] = value
    dirty = fj.attention(q, k, v, mask=mask, normalizer=normalizer, backend=backend.name).values
    dirty[rows] = clean[rows]
    assert torch.equal(dirty, clean)


@promising(lambda p: p.wide)
def test_wide(backend: Backend, normalizer: fj.Normalizer) -> None:
    """Half precision computed in float32 is as exact as the oracle then asks."""
    q, k, v = make_qkv(LENGTHS, dtype=torch.bfloat16)
    assert_matches_reference(q, k, v, plan=fj.plan(q, mask=fj.Causal(), normalizer=normalizer), backend=backend.name)


@ALL
def test_traced(backend: Backend) -> None:
    promises = backend.promises
    for device in ("cpu", "cuda"):
        kind = fj.Softmax() if fj.Softmax in promises.normalizers else fj.SiLU()
        traced = case(device=device, tracing=True, dtype=torch.bfloat16, normalizer=kind)
        if promises.untraceable is not None:
            assert refusal(backend.name, traced) == promises.untraceable
        else:
            assert refusal(backend.name, traced) == refusal(backend.name, replace(traced, tracing=False))


@ALL
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_and_the_log_sum_exp_by_rule(backend: Backend, device: str) -> None:
    """What is not promised somewhere is refused there, and what is promised is not refused for itself."""
    promises = backend.promises
    normalizer = fj.Softmax() if fj.Softmax in promises.normalizers else fj.SiLU()
    plain = case(device=device, dtype=torch.bfloat16, normalizer=normalizer)
    for asked, promised in (
        ({"grad": True}, plain.has(promises.gradients)),
        ({"lse": True}, plain.has(promises.lse)),
        ({"grad": True, "lse": True}, plain.has(promises.lse) and promises.lse_gradient),
    ):
        why = promises.refuse(replace(plain, **asked))
        if not promised:
            assert why is not None
        elif plain.has(promises.gradients) or "grad" not in asked:
            assert why is None


def test_auto_asks_backends_that_there_are_and_last_one_that_runs_everything() -> None:
    for order in (ON_CUDA, ELSEWHERE):
        assert set(order) <= set(BACKENDS)
        last = BACKENDS[order[-1]]
        for what in (case(), case(~fj.Causal(), fj.SoftCap(2.0), tracing=True, grad=True, lse=True, plain=True)):
            assert refusal(last.name, what) is None
        assert [x for x in order if BACKENDS[x].before is not None] == []


@pytest.mark.parametrize("backend", HERE, ids=lambda x: x.name)
def test_tiles_are_made_for_those_that_need_them(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    module = importlib.import_module("flexjag.api.attention")
    monkeypatch.setattr(module, "with_tiles", lambda recipe: made.append(recipe) or with_tiles(recipe))
    fj.attention(*make_qkv([5]), backend=backend.name)
    assert bool(made) == backend.needs_tiles
