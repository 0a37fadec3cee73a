"""FBGEMM as an oracle that nobody here wrote: values and gradients on CPU, for the ops it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexjag import Jagged, ops
from flexjag.testing import lengths as lengths_strategy

pytest.importorskip("fbgemm_gpu", exc_type=(ImportError, OSError))  # built for one torch
fbgemm = torch.ops.fbgemm

D, E = 4, 3
EPS = torch.finfo(torch.float32).eps
LONG = 60
"""Over every length drawn here."""

Call = Callable[..., Tensor]


def values(x: Jagged | Tensor) -> Tensor:
    return x.values if isinstance(x, Jagged) else x


def _select(segment: Tensor) -> Tensor:
    return torch.cat([segment.flip(0), segment // 2])


SIZES: dict[str, tuple[str, ...]] = {
    "x": ("T", "D"),
    "y": ("T", "E"),
    "dense": ("S", "N", "D"),
    "weight": ("S", "D", "E"),
}

PAIRS: dict[str, tuple[tuple[str, ...], Call, Call]] = {
    "jagged_to_padded_dense": (
        ("x",),
        lambda o, n, x: ops.jagged_to_padded_dense(Jagged(x, o), n, -1.5),
        lambda o, n, x: fbgemm.jagged_to_padded_dense(x, [o], [n], -1.5),
    ),
    "dense_to_jagged": (
        ("dense",),
        lambda o, n, y: ops.dense_to_jagged(y, o, allow_longer=True).values,
        lambda o, n, y: fbgemm.dense_to_jagged(y, [o], int(o[-1]))[0],
    ),
    "jagged_softmax": (
        ("x",),
        lambda o, n, x: ops.jagged_softmax(Jagged(x, o)).values,
        lambda o, n, x: fbgemm.jagged_softmax(x, o, LONG)[0],
    ),
    "jagged_dense_bmm": (
        ("x", "weight"),
        lambda o, n, x, y: ops.jagged_dense_bmm(Jagged(x, o), y).values,
        lambda o, n, x, y: fbgemm.jagged_dense_bmm(x, o, y, LONG)[0],
    ),
    "jagged_jagged_bmm": (
        ("x", "y"),
        lambda o, n, x, y: ops.jagged_jagged_bmm(Jagged(x, o), Jagged(y, o)),
        lambda o, n, x, y: fbgemm.jagged_jagged_bmm(x, y, o, LONG),
    ),
    "jagged_dense_elementwise_add": (
        ("x", "dense"),
        lambda o, n, x, y: ops.jagged_dense_elementwise_add(Jagged(x, o), y, allow_longer=True).values,
        lambda o, n, x, y: fbgemm.jagged_dense_elementwise_add_jagged_output(x, [o], y)[0],
    ),
    "jagged_dense_elementwise_add, dense output": (
        ("x", "dense"),
        lambda o, n, x, y: ops.jagged_to_padded_dense(Jagged(x, o), n) + y,
        lambda o, n, x, y: fbgemm.jagged_dense_elementwise_add(x, [o], y),
    ),
    "jagged_dense_elementwise_mul": (
        ("x", "dense"),
        lambda o, n, x, y: ops.jagged_dense_elementwise_mul(Jagged(x, o), y, allow_longer=True).values,
        lambda o, n, x, y: fbgemm.jagged_dense_elementwise_mul(x, [o], y)[0],
    ),
    "jagged_index_select": (
        ("x",),
        lambda o, n, x: ops.jagged_index_select(Jagged(x, o), _select(torch.arange(len(o) - 1))).values,
        lambda o, n, x: fbgemm.jagged_index_select(x, o.diff(), _select(torch.arange(len(o) - 1)))[0],
    ),
}


WITHOUT_GRADIENT = {"jagged_dense_elementwise_add, dense output"}
"""FBGEMM registers none on CPU."""


def result_and_gradients(call: Call, offsets: Tensor, width: int, operands: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in operands]
    result = call(offsets, width, *leaves)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


@pytest.mark.parametrize("name", PAIRS)
@given(
    lengths=lengths_strategy(min_segments=1, max_total=120),
    width=st.integers(1, LONG),
    seed=st.integers(0, 99),
)
def test_equals_fbgemm(name: str, lengths: list[int], width: int, seed: int) -> None:
    kinds, ours, theirs = PAIRS[name]
    offsets = torch.tensor([0, *accumulate(lengths)])
    sizes = {"S": len(lengths), "T": sum(lengths), "N": width, "D": D, "E": E}
    generator = torch.Generator().manual_seed(seed)
    operands = [torch.randn([sizes[n] for n in SIZES[kind]], generator=generator) for kind in kinds]
    got = result_and_gradients(ours, offsets, width, operands)
    if name in WITHOUT_GRADIENT:
        got, want = got[:1], [theirs(offsets, width, *operands)]
    else:
        want = result_and_gradients(theirs, offsets, width, operands)
    for x, y in zip(got, want, strict=True):
        # Two float32 results of sums of at most T + D products of two numbers; products of up to `largest` squared.
        largest = max([1.0, *(float(t.abs().max()) for t in [*operands, y] if t.numel())])
        torch.testing.assert_close(x, y, rtol=0, atol=2 * (sum(lengths) + D) * EPS * largest**2)
