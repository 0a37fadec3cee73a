"""Segments of one or two queries, as in decoding: the C++ kernels sum their products over columns."""

from __future__ import annotations

import pytest
import torch
from cases import jagged, mostly_slow

import flexjag as fj
from flexjag.kernels.cpp import build

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
H, G = 4, 2
QUERIES, KEYS = [1, 2, 3, 0, 1, 2, 17, 50], [40, 3, 9, 5, 0, 201, 17, 98]
SLOPES = torch.rand(H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dim", mostly_slow([1, 7, 16, 24, 64], 7))
@pytest.mark.parametrize("dtype", mostly_slow([torch.float64, torch.float32, torch.bfloat16], torch.float32))
@pytest.mark.parametrize("window", [None, 6])
def test_they_equal_the_reference(dim: int, dtype: torch.dtype, window: int | None) -> None:
    q, k = jagged(QUERIES, H, dim, dtype=dtype), jagged(KEYS, G, dim, dtype=dtype, seed=1)
    v = k.with_values(jagged(KEYS, G, 5, dtype=dtype, seed=2).values)
    mask = fj.Causal("end") if window is None else fj.Window(window, 0, "end") | fj.Prefix(2)

    def attend(*qkv: fj.Jagged, backend: str = "reference") -> tuple[fj.Jagged, ...]:
        leaves = [x.detach().requires_grad_() for x in qkv]
        score = fj.Alibi(SLOPES.to(torch.promote_types(qkv[0].dtype, torch.float32)), align="end")
        out, lse = fj.attention(*leaves, mask=mask, score=score, return_lse=True, backend=backend)
        (out.values.sum() + lse.values.clamp(min=-1e3).sum()).backward()
        return out, lse, *(x.with_values(x.values.grad) for x in leaves)  # type: ignore[arg-type]

    found = attend(q, k, v, backend="cpp")
    exact, rounded = attend(*(x.to(torch.float64) for x in (q, k, v))), attend(q, k, v)
    for one, right, other in zip(found, exact, rounded, strict=True):
        finite = right.values.isfinite()
        assert torch.equal(one.values.isfinite(), finite)
        error, noise = ((x.values.double() - right.values)[finite].abs().max() for x in (one, other))
        largest = right.values[finite].abs().max()
        assert error <= 2 * (noise + 16 * torch.finfo(dtype).eps * largest), (float(error), float(noise))


def test_what_another_segment_holds_changes_no_bit() -> None:
    q, k = jagged(QUERIES, H, 16, dtype=torch.float32), jagged(KEYS, G, 16, dtype=torch.float32, seed=1)
    whole = fj.attention(q, k, k, mask=fj.Causal("end"), backend="cpp")
    for s in range(len(KEYS)):
        if KEYS[s] and QUERIES[s]:
            alone = fj.attention(q[s : s + 1], k[s : s + 1], k[s : s + 1], mask=fj.Causal("end"), backend="cpp")
            assert torch.equal(alone.values, whole[s])
