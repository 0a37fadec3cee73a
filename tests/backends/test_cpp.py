"""The backend ``cpp`` against the dense float64 reference: every edge of its blocks, few structures, many batches."""

from __future__ import annotations

import pytest
import torch
from cases import needing_gradients
from cpp_cases import F32, F64, INTERVALS, KEYS, QUERIES, SHAPES, STRUCTURES, Shape, batches, numbers
from hypothesis import given
from hypothesis import strategies as st

import flexjag as fj
from flexjag.kernels.cpp import build
from flexjag.testing import assert_matches_reference, problems

pytestmark = pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
QUICK = ("float32", "opaque", "scores")
PAIRS = [(name, mask) for name, x in STRUCTURES.items() for mask in x.masks]
MEMORY = ("contiguous", "heads first", "columns first", "expanded", "rows apart", "packed")


def mostly(names: tuple[str, ...]) -> list[object]:
    """Structures: the first mask of each, and all of the named ones; the others are slow."""
    found: list[object] = []
    for name, mask in PAIRS:
        is_quick = name in names or mask == STRUCTURES[name].masks[0]
        found.append(pytest.param(name, mask, marks=[] if is_quick else pytest.mark.slow, id=f"{name}-{mask}"))
    return found


@pytest.mark.parametrize(("name", "mask"), mostly(QUICK))
def test_every_edge(name: str, mask: str) -> None:
    """Forward, log-sum-exp and all gradients; empty segments, one token, and blocks of queries and keys ± 1."""
    for shape in SHAPES:
        STRUCTURES[name].check(shape, mask)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    count = draw(st.integers(0, 4))
    one = st.one_of(st.sampled_from(QUERIES), st.integers(0, 60))
    q_lengths = draw(st.lists(one, min_size=count, max_size=count).map(tuple))
    kv = st.one_of(st.sampled_from(KEYS), st.integers(0, 120))
    kv_lengths = draw(st.one_of(st.just(q_lengths), st.lists(kv, min_size=count, max_size=count).map(tuple)))
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (4, 1)]))
    return Shape(q_lengths, kv_lengths, heads, groups, draw(st.sampled_from(MEMORY)), draw(st.integers(0, 99)))


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@given(data=st.data())
def test_any_batch(data: st.DataObject, name: str) -> None:
    STRUCTURES[name].check(data.draw(shapes()), data.draw(st.sampled_from([*INTERVALS])))


@pytest.mark.parametrize("name", ["scores", "silu"])
@given(shape=shapes())
def test_any_batch_of_scores(shape: Shape, name: str) -> None:
    STRUCTURES[name].check(shape, "sinks")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
@given(data=st.data())
def test_any_problem(data: st.DataObject, dtype: torch.dtype) -> None:
    """Masks and scores of all kinds, each a kernel of its own."""
    p = data.draw(problems(dtype=dtype))
    assert_matches_reference(p.q, p.k, p.v, plan=p.plan(), backend="cpp", learned=p.learned)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(2, 257), (15, 17), (31, 32), (64, 63), (128, 127), (257, 2)])
def test_any_columns(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    q, k, v = batches(Shape((50, 0, 3), (97, 5, 0), 4, 2), dtype, dim, value_dim)
    assert_matches_reference(q, k, v, mask=fj.Causal("end"), backend="cpp")


def test_gradcheck() -> None:
    """Of q, k, v, the log-sum-exp and everything that is learned."""
    structure = STRUCTURES["float64"]
    q, k, v = batches(Shape((3, 0, 2), (2, 1, 4)), F64, structure.dim, structure.value_dim)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = (x.with_values(y) for x, y in zip((q, k, v), values, strict=True))
        out, lse = fj.attention(*batch, mask=fj.Window(2, 1), backend="cpp", return_lse=True)
        return out.values, torch.where(torch.isfinite(lse.values), lse.values, 0.0)

    assert torch.autograd.gradcheck(run, [x.values.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["float32", "scores", "silu", "opaque"])
def test_spare_rows_may_hold_anything(name: str, fill: float) -> None:
    """In q, k, v and what flows back: real rows are as without them to the bit, spare ones are zeros."""
    structure, shape = STRUCTURES[name], Shape((20, 0, 17), (20, 0, 17), 4, 2)
    exact = batches(shape, structure.dtype, structure.dim, structure.value_dim)
    found = []
    for value in (0.0, fill):
        leaves = [torch.cat([x.values, x.values.new_full((9, *x.values.shape[1:]), value)]) for x in exact]
        q, k, v = (fj.Jagged(x.requires_grad_(), exact[0].offsets) for x in leaves)
        wide = Shape((20, 0, 26), (20, 0, 26), 4, 2)  # data of spare tokens
        mask = fj.Causal() if name == "opaque" else structure.mask("causal", shape)
        plan = fj.plan(
            q, k, mask=mask, score=structure.score(wide), normalizer=structure.normalizer(wide), max_tokens=46
        )
        out = fj.attention(q, k, v, plan=plan, backend="cpp").values
        back = torch.cat([torch.ones_like(out[:37]), torch.full_like(out[37:], value)])
        grads = torch.autograd.grad(out, leaves, back)
        assert not any(x[37:].any() for x in (out, *grads))
        found.append((out, *grads))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_one_query_with_many_keys(dtype: torch.dtype) -> None:
    """A decode step."""
    structure = STRUCTURES["float32" if dtype == F32 else "bfloat16"]
    q, k, v = batches(Shape((1, 1, 1), (1000, 3, 500), 4, 1), dtype, structure.dim, structure.value_dim)
    assert_matches_reference(q, k, v, backend="cpp")


@pytest.mark.parametrize("bound", [2**31 - 1, 2**31, 2**63 - 1, 2**70])
def test_bounds_past_every_position_are_none(bound: int) -> None:
    q, k, v = needing_gradients(*batches(Shape((20, 5), (20, 5)), F32, 16, 16))
    wide = fj.attention(q, k, v, mask=fj.Window(bound, 0), backend="cpp").values
    assert torch.equal(wide, fj.attention(q, k, v, mask=fj.Window(None, 0), backend="cpp").values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tables_of_another_dtype(dtype: torch.dtype) -> None:
    q, k, v = batches(Shape((20, 5), (20, 5)), F32, 8, 8)
    table = numbers(2, 4, dtype=dtype)
    score = fj.ScoreMod(lambda s, b, h, i, j: s * table[h, j % 4] + table[h, i % 4])
    assert_matches_reference(q, k, v, mask=fj.Causal(), score=score, learned=[table], backend="cpp")
