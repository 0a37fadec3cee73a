"""The tables and small helpers that the unit tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
import torch

import flexjag as fj

T = TypeVar("T")
TILE = 16
CPP_SLOWLY = pytest.param("cpp", marks=pytest.mark.slow)
"""The backend ``cpp`` in tests that compile a kernel for each case."""

CUDA_ONLY = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor and Triton warn about themselves (deprecated imports, TF32 advice); errors here are ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def mostly_slow(values: Iterable[T], *quick: T) -> list[Any]:
    """Parameters of a test that takes seconds for each: all are marked slow but `quick`."""
    found = list(values)
    assert set(map(str, quick)) <= set(map(str, found)), quick
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in found]


EDGE_LENGTHS: dict[str, list[int]] = {
    "no_segments": [],
    "one_empty": [0],
    "all_empty": [0, 0, 0],
    "empty_first": [0, 5, 9],
    "empty_last": [7, 12, 0],
    "empty_middle": [6, 0, 0, 11],
    "one_token": [1],
    "one_token_each": [1, 1, 1],
    "under_a_tile": [3],
    "tile_minus_1": [TILE - 1],
    "tile": [TILE],
    "tile_plus_1": [TILE + 1],
    "several_in_a_tile": [3, 1, 4, 5],
    "many_tiles": [40, 7, 33, 16],
}
"""Lengths at which packing, tiling and isolation go wrong first."""


def jagged(lengths: list[int], *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> fj.Jagged:
    """Random normal values ``[sum(lengths), *shape]``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), *shape, dtype=torch.float64, generator=generator)
    return fj.Jagged.from_lengths(values.to(dtype), lengths)


def make_qkv(
    lengths: list[int],
    kv_lengths: list[int] | None = None,
    *,
    heads: int = 2,
    groups: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[fj.Jagged, fj.Jagged, fj.Jagged]:
    """Random q, k and v; q and k share their offsets tensor unless `kv_lengths` is given."""
    groups = heads if groups is None else groups
    q = jagged(lengths, heads, dim, dtype=dtype, seed=1)
    k = jagged(lengths if kv_lengths is None else kv_lengths, groups, dim, dtype=dtype, seed=2)
    v = jagged(lengths if kv_lengths is None else kv_lengths, groups, value_dim or dim, dtype=dtype, seed=3)
    if kv_lengths is None:
        k = q.with_values(k.values)
    return q, k, k.with_values(v.values)


def needing_gradients(*batches: fj.Jagged) -> tuple[fj.Jagged, ...]:
    """The same batches around fresh leaves that need gradients."""
    return tuple(x.with_values(x.values.detach().clone().requires_grad_()) for x in batches)


def double(x: fj.Jagged) -> fj.Jagged:
    """The batch in float64, detached."""
    return x.with_values(x.values.detach().double())


def check_error(
    got: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, name: str = "result", products: int = 0
) -> None:
    """Assert that `got` is about as close to `exact` as the reference in the same precision is.

    The bound is twice the reference's error plus one rounding of the largest value: both algorithms make the same
    number of roundings, in another order. Rows without a key (-inf) must be the same rows.

    `products` is for gradients that are differences of sums of that many products of numbers of about 1, which the
    reference may get exactly right by never forming them: such sums are kept in float32 and lose its rounding per term.
    """
    assert got.dtype == same.dtype, (name, got.dtype, same.dtype)
    eps = torch.finfo(got.dtype).eps
    assert torch.equal(got == -torch.inf, exact == -torch.inf), name
    got, same, exact = (x.detach().double().masked_fill(exact == -torch.inf, 0.0) for x in (got, same, exact))
    if not exact.numel():
        return
    error, own = (got - exact).abs().max(), (same - exact).abs().max()
    limit = 2 * (own + eps * exact.abs().max().clamp(min=1.0) + products * torch.finfo(torch.float32).eps)
    assert error <= limit, f"{name}: error {error:.3g} over {limit:.3g}, the reference's own is {own:.3g}"


def on_gpu(*batches: fj.Jagged) -> tuple[fj.Jagged, ...]:
    """The batches on the GPU; those that share an offsets tensor go on sharing it."""
    offsets = {id(x.offsets): x.offsets.cuda() for x in batches}
    return tuple(fj.Jagged(x.values.cuda(), offsets[id(x.offsets)]) for x in batches)
