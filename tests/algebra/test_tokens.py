"""Keys and queries that are marked, one bool per token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CPP_SLOWLY, jagged
from torch import Tensor

import flexjag as fj
from flexjag.errors import MaskError
from flexjag.testing import assert_compiles, assert_matches_reference, assert_no_leak, assert_sandwich, assert_tiles

Q, K = [5, 0, 3, 20, 2], [6, 2, 0, 33, 1]


def marks(count: int, share: float = 0.4, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


MASKS: dict[str, Callable[[], fj.Mask]] = {
    "keys": lambda: fj.Keys(marks(sum(K))),
    "no key": lambda: fj.Keys(marks(sum(K), 0.0)),
    "all keys": lambda: fj.Keys(marks(sum(K), 1.1)),
    "queries": lambda: fj.Queries(marks(sum(Q))),
    "not keys": lambda: fj.Causal("end") & ~fj.Keys(marks(sum(K))),
    "global tokens": lambda: fj.Window(2, 2) | fj.Keys(marks(sum(K), 0.1)) | fj.Queries(marks(sum(Q), 0.1)),
    "by head": lambda: fj.PerHead([fj.Keys(marks(sum(K))), fj.Causal("end") | fj.Queries(marks(sum(Q)))]),
}


@pytest.mark.parametrize("backend", ["tiled", "segments", CPP_SLOWLY])
@pytest.mark.parametrize("kind", MASKS)
def test_backends_agree(kind: str, backend: str) -> None:
    q, k, v = jagged(Q, 2, 8), jagged(K, 1, 8, seed=1), jagged(K, 1, 4, seed=2)
    assert_matches_reference(q, k, v, mask=MASKS[kind](), backend=backend)


@pytest.mark.parametrize("kind", MASKS)
def test_spans_and_tiles(kind: str) -> None:
    q, k = jagged(Q, 2, 8), jagged(K, 1, 8)
    assert_sandwich(MASKS[kind](), q, k, heads=2)
    assert_tiles(MASKS[kind](), q, k, heads=2)
    assert_no_leak("tiled", q, k, k, mask=MASKS[kind]())


def test_dense_by_loops() -> None:
    q, k, keys, queries = jagged(Q, 1, 4), jagged(K, 1, 4), marks(sum(K)), marks(sum(Q), seed=1)
    same = q.segment_ids[:, None] == k.segment_ids
    assert torch.equal(fj.plan(q, k, mask=fj.Keys(keys)).to_dense(), same & keys)
    plan = fj.plan(q, k, mask=fj.Queries(queries))
    assert plan.exact
    assert torch.equal(plan.to_dense(), same & queries[:, None])


def test_marks_without_a_gap_leave_full_tiles() -> None:
    """A segment's valid keys first, then padding that was packed: tiles of valid keys need no test."""
    x = jagged([96, 96], 1, 4)
    valid = torch.cat([torch.arange(96) < 64, torch.arange(96) < 96])
    plan = assert_tiles(fj.Keys(valid), x)
    assert plan.num_full > plan.num_tiles // 3


def test_one_graph_for_all_batches() -> None:
    def run(x: fj.Jagged, keys: Tensor, queries: Tensor) -> Tensor:
        mask = fj.Causal() & (fj.Keys(keys) | fj.Queries(queries))
        out = fj.attention(x, x, x, mask=mask, backend="tiled")
        assert isinstance(out, fj.Jagged)
        return out.values

    batches = []
    for lengths in ([5, 9], [3, 0, 30], [2, 2, 2, 40]):
        both = [marks(sum(lengths), seed=seed) for seed in (0, 1)]
        for x in both:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        batches.append((jagged(lengths, 2, 8, dtype=torch.float32).requires_grad_(), *both))
    assert_compiles(run, batches, backend="aot_eager")


def test_spare_rows() -> None:
    values, offsets = jagged([40], 2, 8).values, torch.tensor([0, 10, 30])
    x = fj.Jagged(values, offsets)
    x.values[30:] = torch.nan
    mask = fj.Keys(marks(40)) & fj.Causal()
    plan = fj.plan(x, mask=mask, max_tokens=40, max_length=40)
    out = fj.attention(x, x, x, plan=plan, backend="tiled")
    clean = fj.Jagged(values[:30], offsets)
    wanted = fj.attention(clean, clean, clean, mask=fj.Keys(marks(40)[:30]) & fj.Causal(), backend="reference")
    torch.testing.assert_close(out.values[:30], wanted.values, rtol=1e-12, atol=1e-12)
    assert not out.values[30:].any()


@pytest.mark.parametrize("node", [fj.Keys, fj.Queries])
def test_bad_marks(node: type) -> None:
    for given in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.bool)):
        with pytest.raises(MaskError, match="marked: must be a 1-D bool tensor"):
            node(given)
    with pytest.raises(MaskError, match="marked: must be a tensor"):
        node([True])
    with pytest.raises(MaskError, match="marked: must have one entry per"):
        fj.plan(jagged([3], 1, 4), mask=node(marks(2)))
