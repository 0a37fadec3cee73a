"""Who can run what, by table. A made-up CUDA layout stands in for one: the rules read metadata only."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag import Causal, Full, Prefix, SoftCap, Window
from flexjag.algebra.dropping import Dropped
from flexjag.algebra.node import node
from flexjag.backends.base import Case
from flexjag.backends.choose import BACKENDS, choose, pick, refusal
from flexjag.backends.varlen import has_gqa
from flexjag.errors import BackendError

ALIBI = fj.Alibi.from_heads(2)
DROPPED = Dropped(torch.tensor(1), torch.tensor(0, dtype=torch.int32), 2)


def case(
    mask: fj.Mask | None = None,
    score: fj.Score | None = None,
    *,
    device: str = "cpu",
    tokens: int = 1000,
    segments: int = 10,
    is_self: bool = True,
    has_spare: bool = False,
    normalizer: Any = None,
    **known: Any,
) -> Case:
    layout: Any = SimpleNamespace(
        device=torch.device(device),
        on_gpu=device != "cpu",
        num_q=tokens,
        num_kv=tokens,
        num_segments=segments,
        is_self=is_self,
        has_spare=has_spare,
    )
    return Case(layout, Causal() if mask is None else mask, score, normalizer or fj.Softmax(), **known)


BF16 = {"dtype": torch.bfloat16, "device": "cuda"}

REFUSALS = [
    ("reference", case(), None),
    ("reference", case(tracing=True), "cannot be traced"),
    ("tiled", case(~Causal() | Prefix(3), SoftCap(1.0), tracing=True, grad=True, dtype=torch.float64), None),
    ("segments", case(), None),
    ("segments", case(~Causal(), ALIBI), None),
    ("segments", case(tracing=True), "cannot be traced"),
    ("segments", case(score=ALIBI >> SoftCap(1.0)), "only adds a bias, and Alibi"),
    ("flex", case(), None),
    ("flex", case(tracing=True), None),
    ("flex", case(grad=True), "no backward on CPU"),
    ("flex", case(lse=True), "does not return the log-sum-exp"),
    ("flex", case(dtype=torch.float64), "no float64"),
    ("flex", case(device="mps"), "not tested on mps"),
    ("flex", case(device="cuda", grad=True, lse=True), None),
    ("flex", case(device="cuda", dtype=torch.float64), "no float64"),
    ("flex", case(device="cuda", dims=(2, 2, 8, 16)), "need D >= 16 and E >= 16; got D=8, E=16"),
    ("varlen", case(), "runs on CUDA only"),
    ("varlen", case(**BF16), None),
    ("varlen", case(Full(), **BF16, is_self=False), None),
    ("varlen", case(Causal() & Window(9, None), **BF16), None),
    ("varlen", case(Causal("end"), **BF16, is_self=False), None),
    ("varlen", case(Causal(), **BF16, is_self=False), "aligned to the segments' ends"),
    ("varlen", case(Prefix(4), **BF16), r"not Prefix\(4\)"),
    ("varlen", case(Window(torch.tensor([1]), 0), **BF16), "not Window"),
    ("varlen", case(score=ALIBI, **BF16), "takes no score"),
    ("varlen", case(score=ALIBI >> DROPPED, **BF16), "takes no score function, as which dropout is computed"),
    ("varlen", case(device="cuda", dtype=torch.float32), "float16 and bfloat16, not torch.float32"),
    ("varlen", case(**BF16, tracing=True), "longest length on the host"),
    ("varlen", case(**BF16, has_spare=True), "spare rows"),
    ("varlen", case(**BF16, lse=True, grad=False), None),
    ("varlen", case(**BF16, lse=True, grad=True), "drops the gradient"),
    ("varlen", case(**BF16, dims=(2, 2, 64, 64)), None),
    ("varlen", case(**BF16, dims=(2, 2, 64, 32)), "needs D == E.*got D=64, E=32"),
    ("varlen", case(**BF16, dims=(2, 2, 20, 20)), "a multiple of 8.*got D=20"),
    ("varlen", case(**BF16, dims=(2, 2, 512, 512)), "at most 256; got D=512"),
]


@pytest.mark.parametrize(("backend", "what", "why"), REFUSALS, ids=[f"{b}-{w or 'runs'}" for b, _, w in REFUSALS])
def test_refusal(backend: str, what: Case, why: str | None) -> None:
    got = refusal(backend, what)
    if why is None:
        assert got is None
    else:
        assert got is not None

        assert re.search(why, got), got


def test_varlen_gqa_depends_on_torch() -> None:
    got = refusal("varlen", case(**BF16, dims=(4, 2, 64, 64)))
    assert (got is None) == has_gqa()


@node
class Other(fj.Normalizer):
    """A user's normalizer."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_takes_an_unknown_normalizer(backend: str) -> None:

    what = case(normalizer=Other())
    why = refusal(backend, what)
    assert why is not None
    assert "no case for the normalizer" in why


CHOICES = [
    (case(**BF16), "varlen"),
    (case(score=ALIBI, tokens=10 * 200, **BF16), "flex"),
    (case(tokens=10 * 200, **BF16, tracing=True), "flex"),
    (case(device="cuda", tokens=10 * 200, dtype=torch.float32), "flex"),
    (case(device="cuda", tokens=10 * 200, dtype=torch.float32, block_size=64), "triton"),  # not FlexAttention's tiles
    (case(score=ALIBI, **BF16), "triton"),  # of whose tiles little would be needed
    (case(Causal() & Prefix(3), tokens=10 * 5000, **BF16), "triton"),
    (case(**BF16, tracing=True), "triton"),
    (case(fj.MaskMod(lambda b, h, q, kv: q >= kv), **BF16, tracing=True), "flex"),
    (case(device="cuda", dtype=torch.float64), "tiled"),
    (case(device="cuda", dtype=torch.float32, dims=(2, 2, 8, 8)), "triton"),
    (case(), "segments"),
    (case(Full()), "segments"),
    (case(tokens=20), "segments"),  # two tokens per segment, which share a call
    (case(fj.Window(torch.full((10,), 9), 0), tokens=20), "tiled"),  # and do not
    (case(tracing=True), "tiled"),
    (case(Causal() & Prefix(3)), "segments"),
    (case(Causal() & Prefix(3), score=ALIBI), "segments"),
    (case(Causal() & Prefix(3), tokens=10 * 5000), "segments"),
    (case(Causal() & (fj.Window(9, 0) | Prefix(3)), tokens=10 * 5000), "tiled"),  # a gap over long segments
    (case(Causal() & fj.Window(9, 0), tokens=10 * 5000), "segments"),
    (case(score=fj.Alibi(torch.ones(2, requires_grad=True))), "segments"),
    (case(score=fj.Alibi(torch.ones(2, requires_grad=True)), tokens=20_000), "segments"),  # which share a bias
    (case(score=fj.Alibi(torch.ones(2, requires_grad=True)), tokens=200_000), "tiled"),
    (case(score=ALIBI >> SoftCap(1.0)), "tiled"),
]


WITH_CPP = [
    (case(), "segments"),  # a compilation would not pay
    (case(tokens=10 * 5000), "cpp"),
    (case(tokens=10 * 5000, normalizer=fj.SiLU()), "cpp"),
    (case(tokens=10 * 5000, dtype=torch.bfloat16), "cpp"),
    (case(score=ALIBI >> SoftCap(1.0), tokens=20_000), "cpp"),
    (case(score=fj.Alibi(torch.ones(2, requires_grad=True)), tokens=200_000), "cpp"),
    (case(tracing=True), "cpp"),
    (case(fj.MaskMod(lambda b, h, q, kv: q >= kv), tracing=True), "tiled"),
    (case(tokens=10 * 5000, plain=True), "tiled"),
]
"""What auto takes with a C++ compiler; above, without one."""


@pytest.mark.parametrize(("what", "expected"), CHOICES, ids=[str(i) + "-" + e for i, (_, e) in enumerate(CHOICES)])
def test_choose_without_cpp(what: Case, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJAG_CPP", "0")
    check_choice(what, expected)


@pytest.mark.parametrize(("what", "expected"), WITH_CPP, ids=[f"{i}-{e}" for i, (_, e) in enumerate(WITH_CPP)])
def test_choose_with_cpp(what: Case, expected: str) -> None:
    check_choice(what, expected)


def check_choice(what: Case, expected: str) -> None:
    name, why = choose(what)
    assert name == expected
    assert len(why) > 20
    assert refusal(name, what) is None
    assert pick("auto", what) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_is_taken_or_raises(backend: str) -> None:
    """It never falls back, and the error names a backend that can."""
    for what in (*(w for _, w, _ in REFUSALS), *(w for w, _ in CHOICES)):
        why = refusal(backend, what)
        if why is None:
            assert pick(backend, what) == backend
            continue
        with pytest.raises(BackendError) as caught:
            pick(backend, what)
        message = str(caught.value)
        assert message.startswith(f"backend: {backend!r} cannot run this plan: {why}")
        able = message.split("use backend='")[1].split("'")[0]
        assert refusal(able, what) is None


def test_nothing_can() -> None:

    with pytest.raises(BackendError, match="no backend here can"):
        pick("tiled", case(normalizer=Other()))


def test_unknown_name() -> None:
    with pytest.raises(BackendError, match=r"backend: must be 'auto' or one of reference, tiled.*got backend='fast'"):
        pick("fast", case())
    q, k, v = make_qkv([3])
    with pytest.raises(BackendError, match="got backend='fast'"):
        fj.attention(q, k, v, backend="fast")


def test_attention_raises_and_names_one_that_can() -> None:
    q, k, v = make_qkv([30], dtype=torch.float32)
    with pytest.raises(BackendError, match=r"'varlen' cannot run this plan: .* CUDA only; use backend='segments'"):
        fj.attention(q, k, v, mask=Causal(), backend="varlen")
    with pytest.raises(BackendError, match=r"'segments' cannot run this plan: .*SoftCap.*; use backend='tiled'"):
        fj.attention(q, k, v, score=SoftCap(2.0), backend="segments")
    with pytest.raises(BackendError, match=r"'flex' cannot run this plan: .*log-sum-exp on CPU; use backend="):
        fj.attention(q, k, v, return_lse=True, backend="flex")
    grad = q.with_values(q.values.clone().requires_grad_())
    with pytest.raises(BackendError, match=r"'flex' cannot run this plan: .*no backward on CPU"):
        fj.attention(grad, k, v, backend="flex")
