"""Random nested masks and scores: their CUDA kernels, lowered and simulated, against the dense reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import flexjag as fj
from flexjag.codegen.worker import Worker
from flexjag.testing import assert_kernels_match, masks, scores

pytest.importorskip("triton")

# A plan takes seconds: 2 of them in `dev`, 21 in `ci`, 214 in `nightly`.
EXAMPLES = max(2, settings.default.max_examples // 7) if settings.default else 2


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(interpret=True) as running:
        yield running


@st.composite
def plans(draw: st.DrawFn) -> tuple[fj.Plan, tuple[fj.Jagged, fj.Jagged, fj.Jagged]]:
    def draw_lengths(count: int) -> list[int]:
        return draw(
            st.lists(st.integers(0, 90) | st.sampled_from([0, 1, 127, 128, 129]), min_size=count, max_size=count)
        )

    count = draw(st.integers(1, 4))
    q_lengths = draw_lengths(count)
    kv_lengths = draw_lengths(count) if draw(st.booleans()) else None
    q_lengths[draw(st.integers(0, count - 1))] += 1
    if kv_lengths is not None:
        kv_lengths[draw(st.integers(0, count - 1))] += 1
    groups = draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 2]))
    dim, value_dim = draw(st.sampled_from([(16, 16), (32, 16), (16, 64)]))
    qkv = make_qkv(q_lengths, kv_lengths, heads=heads, groups=groups, dim=dim, value_dim=value_dim, dtype=torch.float32)
    mask = draw(masks(q_lengths, kv_lengths, heads=heads, depth=3))
    score, _ = draw(scores(heads, dtype=torch.float32))
    return fj.plan(*qkv[:2], mask=mask, score=score), qkv


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(plans())
def test_random_plans_kernels_equal_the_reference(
    worker: Worker, problem: tuple[fj.Plan, tuple[fj.Jagged, fj.Jagged, fj.Jagged]]
) -> None:
    plan, qkv = problem
    assert_kernels_match(plan, *qkv, backward=False, worker=worker)
