"""FlexAttention's own CUDA kernels, lowered from plans and run in Triton's interpreter, against the dense reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match

pytest.importorskip("triton")
LENGTHS = [100, 3, 0, 150, 47]
QKV = tuple[fj.Jagged, fj.Jagged, fj.Jagged]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


def learned(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul_(0.3).requires_grad_()


def small(**options: object) -> QKV:
    return make_qkv(LENGTHS, **{"dtype": torch.float32, "dim": 32} | options)  # type: ignore[arg-type]


def learned_score() -> fj.Score:
    bias = learned(5)
    return fj.ScoreMod(lambda x, b, h, q, kv: x + bias[(q - kv) % 5])


def few_rows(qkv: QKV) -> fj.Mask:
    """Every third row has no key, the others two spans."""
    pos = qkv[0].positions
    lo = torch.stack([pos - 20, pos + 2]).clamp(min=0).int()
    hi = torch.stack([pos - 3, torch.where(pos % 3 == 0, 0, pos + 30)]).clamp(min=0).int()
    hi = torch.where((pos % 3 == 0)[None], lo, hi)
    return fj.Rows(lo, hi)


def dense(qkv: QKV) -> fj.Mask:
    areas = sum(n * n for n in LENGTHS)
    return fj.Dense(torch.rand(areas) < 0.4)


PLANS: dict[str, tuple[Callable[[], QKV], Callable[[QKV], fj.Mask], Callable[[], fj.Score | None]]] = {
    "full+softcap": (small, lambda _: fj.Full(), lambda: fj.SoftCap(3.0)),
    "causal": (small, lambda _: fj.Causal(), lambda: None),
    "causal(end), other offsets": (
        lambda: make_qkv([30, 3, 5, 200], [100, 0, 5, 81], dtype=torch.float32, dim=32),
        lambda _: fj.Causal(align="end"),
        lambda: None,
    ),
    "window|prefix+alibi": (
        small,
        lambda _: fj.Causal() & (fj.Window(20, 0) | fj.Prefix(4)),
        lambda: fj.Alibi(learned(2)),
    ),
    "prefix-LM": (small, lambda _: fj.Causal() | fj.Prefix(torch.tensor([7, 1, 0, 99, 0])), lambda: None),
    "chunked+relative bias": (small, lambda _: fj.Chunked(32), lambda: fj.RelativeBias(learned(2, 33))),
    "global+window": (small, lambda _: fj.GlobalTokens(2) | fj.Window(9, 9), lambda: None),
    "rows, some without keys": (small, few_rows, lambda: fj.Alibi(learned(2))),
    "groups+GQA": (
        lambda: small(heads=4, groups=2),
        lambda _: fj.SameGroup(torch.arange(300) // 17 % 3) & fj.Causal(),
        lambda: None,
    ),
    "dense, E != D": (lambda: small(dim=32, value_dim=64), dense, lambda: None),
    "opaque+learned score": (
        small,
        lambda _: fj.Causal() & fj.MaskMod(lambda b, h, q, kv: (q - kv) % 3 < 2),
        learned_score,
    ),
    "per head": (
        small,
        lambda _: fj.PerHead([fj.Causal(), fj.Window(16, 16) & ~fj.Prefix(3)]),
        lambda: fj.Alibi(learned(2)) >> fj.SoftCap(2.0),
    ),
    "rows without keys": (small, lambda _: ~fj.Causal(), lambda: None),
    "one tile exactly": (
        lambda: make_qkv([60, 68], dtype=torch.float32, dim=32),
        lambda _: fj.Causal(),
        lambda: None,
    ),
    "bfloat16": (lambda: small(dtype=torch.bfloat16), lambda _: fj.Causal(), lambda: fj.Alibi(learned(2))),
}


@pytest.mark.parametrize("name", PLANS)
def test_kernels_equal_the_reference(name: str, worker: Worker) -> None:
    make, make_mask, make_score = PLANS[name]
    qkv = make()
    plan = fj.plan(*qkv[:2], mask=make_mask(qkv), score=make_score())
    assert_kernels_match(plan, *qkv, worker=worker)
