"""The Triton kernels for pointwise normalizers on a GPU, on cases like those of the interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import CUDA_ONLY, check_error, make_qkv, needing_gradients, on_gpu
from torch import Tensor

import flexjag as fj
from flexjag.algebra.node import Node
from flexjag.algebra.normalizers import GELU, Identity, Pointwise, Sigmoid, SiLU
from flexjag.testing import assert_compiles, assert_no_leak

pytestmark = CUDA_ONLY

LENGTHS = [300, 7, 0, 129, 1, 64]
TOTAL = sum(LENGTHS)
HEADS = 4
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def masks() -> dict[str, fj.Mask]:
    ids = torch.arange(TOTAL, device="cuda") // 50 % 3
    return {
        "full": fj.Full(),
        "causal": fj.Causal(),
        "sinks": fj.Causal() & (fj.Window(60, 0) | fj.Prefix(4)),
        "other groups": fj.Causal() & ~fj.SameGroup(ids),
        "heads": fj.PerHead([fj.Causal(), fj.Window(9, 9), fj.Full(), ~fj.Full()]),
        "function": fj.MaskMod(lambda b, h, q, kv: (q % 3 != 0) & (kv <= q)),
    }


def scores(leaves: list[Tensor]) -> fj.Score:
    times = torch.arange(TOTAL, device="cuda") ** 2 % 10_007
    far = fj.TimeBias(leaves[1], times, torch.tensor([1, 10, 100, 1000], device="cuda"))
    return fj.Alibi(leaves[0]) >> fj.SoftCap(5.0) >> far


NORMALIZERS: dict[str, Pointwise] = {
    "silu": SiLU(1 / 64),
    "gelu": GELU(1 / 64),
    "gelu, tanh": GELU(1 / 64, approximate="tanh"),
    "identity": Identity(1 / 64),
    "sigmoid": Sigmoid(),
}


def batches(dtype: torch.dtype, **shape: int) -> tuple[fj.Jagged, ...]:
    return on_gpu(*make_qkv(LENGTHS, **{"heads": HEADS, "dim": 64, "dtype": dtype, **shape}))  # type: ignore[arg-type]


def run(given: tuple[fj.Jagged, ...], backend: str, dtype: torch.dtype, **parts: Node) -> list[Tensor]:
    """The output and the gradients of q, k, v and two learned tables."""
    q, k, v = needing_gradients(*(x.with_values(x.values.to(dtype)) for x in given))
    k, v = q.with_values(k.values), q.with_values(v.values)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(n, device="cuda", dtype=wide, generator=generator) for n in ((HEADS,), (HEADS, 5))]
    leaves = [(x / 50 if x.ndim == 1 else x).requires_grad_() for x in leaves]
    out = fj.attention(q, k, v, score=scores(leaves), backend=backend, **parts).values  # type: ignore[arg-type]
    weights = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [q.values, k.values, v.values, *leaves])]


@DTYPES
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("mask", ["full", "causal", "sinks", "other groups", "heads", "function"])
def test_matches_the_reference(mask: str, normalizer: str, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    given, parts = batches(dtype), {"mask": masks()[mask], "normalizer": NORMALIZERS[normalizer]}
    got, same, exact = (
        run(given, backend, d, **parts)
        for backend, d in (("triton", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    for i, (x, y, z) in enumerate(zip(got, same, exact, strict=True)):
        check_error(x, y, z, f"tensor {i}", products=TOTAL)


@pytest.mark.parametrize("shape", [{"groups": 1}, {"groups": 2, "dim": 40, "value_dim": 24}, {"dim": 128}], ids=str)
def test_shapes(shape: dict[str, int]) -> None:
    given, parts = batches(torch.bfloat16, **shape), {"mask": fj.Causal(), "normalizer": SiLU(1 / 64)}
    got, same, exact = (
        run(given, backend, d, **parts)
        for backend, d in (("triton", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64))
    )
    for i, (x, y, z) in enumerate(zip(got, same, exact, strict=True)):
        check_error(x, y, z, f"tensor {i}", products=TOTAL)


def test_auto_takes_it_and_repeats_it() -> None:
    given = batches(torch.bfloat16)
    assert fj.plan(given[0], mask=fj.Causal(), normalizer=SiLU()).backend == "triton"
    parts = {"mask": fj.Causal(), "normalizer": SiLU(1 / 64)}
    first = run(given, "auto", torch.bfloat16, **parts)
    for _ in range(3):
        again = run(given, "auto", torch.bfloat16, **parts)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_no_leak_and_no_poison() -> None:
    q, k, v = batches(torch.float32)
    parts = {"mask": fj.Causal(), "normalizer": SiLU(1 / 64)}
    assert_no_leak("triton", q, k, v, return_lse=False, **parts)
    clean = fj.attention(q, k, v, **parts, backend="triton").values
    values = v.values.clone()
    values[300:307] = torch.nan
    dirty = fj.attention(q, k, v.with_values(values), **parts, backend="triton").values
    assert dirty[300:307].isnan().all()
    assert torch.equal(dirty[307:], clean[307:])
    assert torch.equal(dirty[:300], clean[:300])


def test_one_graph_for_all_batches() -> None:
    table = torch.randn(HEADS, 9, device="cuda", requires_grad=True)

    def attend(x: fj.Jagged) -> Tensor:
        return fj.attention(x, x, x, mask=fj.Causal(), score=fj.RelativeBias(table), normalizer=SiLU(1 / 64)).values

    given = []
    for lengths in ([40, 7, 0, 133], [220, 30], [70, 2, 5, 90, 1]):
        values = torch.randn(sum(lengths), HEADS, 32, device="cuda", requires_grad=True)
        given.append((fj.Jagged.from_lengths(values, lengths),))

    def same(index: int, out: Tensor) -> None:
        assert torch.equal(out, attend(*given[index]))

    graphs = assert_compiles(attend, given, after_each=same)
    assert graphs.forward == graphs.backward == [0]
