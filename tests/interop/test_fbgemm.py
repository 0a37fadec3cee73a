"""FBGEMM's functions as flexjag has them, against plain loops over segments: no FBGEMM needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import EDGE_LENGTHS, mostly_slow
from fbgemm_integers import INTEGER
from fbgemm_loops import Arguments, Batch, D, E
from fbgemm_table import CASES, close, looped, outcome
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexjag.interop import fbgemm
from flexjag.testing import assert_compiles
from flexjag.testing import lengths as lengths_strategy

LONG, CUT = 40, 4
"""Padded lengths: of every segment of the edge table, and of few."""


def test_the_table_has_every_function() -> None:
    tested = {name.partition(",")[0] for name in CASES}
    assert tested | {name.partition(",")[0] for name in INTEGER} == set(fbgemm.__all__)
    assert sorted(fbgemm.__all__) == fbgemm.__all__


def check(name: str, b: Batch, seed: int = 0) -> None:
    case = CASES[name]
    operands = case.operands(b, seed=seed)
    got = outcome(lambda *x: case.run(fbgemm, b.arguments, *x), operands)
    close(got, looped(name, b, operands), b)


@pytest.mark.parametrize("size", [LONG, CUT])
@pytest.mark.parametrize("edge", EDGE_LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_edges(name: str, edge: str, size: int) -> None:
    check(name, Batch(tuple(EDGE_LENGTHS[edge]), size, torch.int32))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.positive])
def test_nothing_is_kept(name: str) -> None:
    check(name, Batch((3, 0, 2), 0))


@pytest.mark.parametrize("name", CASES)
@given(
    lengths=lengths_strategy(max_total=60),
    size=st.integers(1, 30),
    inner=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_equals_the_loop(
    name: str, lengths: list[int], size: int, inner: list[int], dtype: torch.dtype, seed: int
) -> None:
    check(name, Batch(tuple(lengths), size, dtype, tuple(inner)), seed)


BATCHES = [Batch((3, 0, 5), 4), Batch((2, 6, 0, 1, 4), 4), Batch((7, 3), 4)]


@pytest.mark.parametrize("name", mostly_slow(CASES, "jagged_softmax", "dense_to_jagged"))
def test_one_graph(name: str) -> None:
    case = CASES[name]
    operands = [case.operands(b) for b in BATCHES]
    calls = [(b.arguments, *x) for b, x in zip(BATCHES, operands, strict=True)]

    def compare(index: int, found: Tensor | list[Tensor]) -> None:
        results = [found] if isinstance(found, Tensor) else list(found)
        got = [*(x.detach() for x in results), *(x.grad for x in operands[index])]
        close(got, looped(name, BATCHES[index], operands[index], ones=True), BATCHES[index])

    def call(b: Arguments, *x: Tensor) -> Tensor | list[Tensor]:
        return case.run(fbgemm, b, *x)

    # The sizes of the first batch are constants of its graph, and those that differ are variables of the second.
    assert_compiles(call, calls, max_graphs=2, backend="aot_eager", after_each=compare)


def test_cumsum() -> None:
    assert fbgemm.asynchronous_complete_cumsum(torch.tensor([[1, 2], [3, 0]])).tolist() == [[0, 1, 3], [0, 3, 3]]
    assert fbgemm.asynchronous_complete_cumsum(torch.tensor([], dtype=torch.int32)).dtype == torch.int32


def test_offsets_come_back_as_they_were() -> None:
    x, offsets = torch.ones(3, 1), torch.tensor([0, 1, 3])
    assert fbgemm.dense_to_jagged(torch.ones(2, 2, 1), [offsets])[1][0] is offsets
    assert fbgemm.jagged_softmax(x, offsets, 2)[1] is offsets
    assert fbgemm.jagged_dense_bmm(x, offsets, torch.ones(2, 1, 1), 2)[1] is offsets
    assert fbgemm.jagged_dense_elementwise_mul(x, [offsets], torch.ones(2, 2, 1))[1][0] is offsets


ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jagged_to_padded_dense": lambda x, o: fbgemm.jagged_to_padded_dense(x, [o], [3]),
    "jagged_2d_to_dense": lambda x, o: fbgemm.jagged_2d_to_dense(x, o, 3),
    "jagged_dense_elementwise_add": lambda x, o: fbgemm.jagged_dense_elementwise_add(x, [o], torch.ones(2, 3, D)),
    "jagged_softmax": lambda x, o: fbgemm.jagged_softmax(x, o, 3)[0],
    "jagged_jagged_bmm": lambda x, o: fbgemm.jagged_jagged_bmm(x, x, o, 3),
    "jagged_dense_bmm": lambda x, o: fbgemm.jagged_dense_bmm(x, o, torch.ones(2, D, E), 3)[0],
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows_outside_the_offsets_do_not_count(name: str, graph: bool) -> None:
    """Two rows in front and three behind, with values that must not spread."""
    inside = torch.randn(5, D, requires_grad=True)
    around = torch.cat([torch.full((2, D), torch.nan), inside.detach(), torch.full((3, D), torch.inf)]).requires_grad_()
    offsets = torch.tensor([0, 1, 5])
    call = torch.compile(ROWS[name], fullgraph=True, backend="eager") if graph else ROWS[name]
    got, wanted = call(around, offsets + 2), ROWS[name](inside, offsets)
    if got.shape != wanted.shape:  # one row per token
        assert not got[:2].any()
        assert not got[7:].any()
        got = got[2:7]
    torch.testing.assert_close(got, wanted)
    direction = torch.randn(got.shape)
    of_around, of_inside = (torch.autograd.grad(y, x, direction)[0] for y, x in ((got, around), (wanted, inside)))
    torch.testing.assert_close(of_around, torch.nn.functional.pad(of_inside, (0, 0, 2, 3)))


@pytest.mark.parametrize("graph", [False, True])
def test_cut_tokens_do_not_spread(graph: bool) -> None:
    """What stands behind max_length may be anything."""
    clean = torch.randn(4, D)
    spoiled = clean.clone()
    spoiled[3] = torch.nan
    offsets, weight = torch.tensor([0, 1, 4]), torch.ones(2, D, E)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: fbgemm.jagged_softmax(x, offsets, 2)[0],
        lambda x: fbgemm.jagged_jagged_bmm(x, x, offsets, 2),
        lambda x: fbgemm.jagged_dense_bmm(x, offsets, weight, 2)[0],
        lambda x: fbgemm.batched_dense_vec_jagged_2d_mul(torch.ones(2, 2), x, offsets),
        lambda x: fbgemm.jagged_dense_elementwise_mul(x, [offsets], torch.ones(2, 2, D))[0],
    ]
    for call in calls:
        run = torch.compile(call, fullgraph=True, backend="eager") if graph else call
        torch.testing.assert_close(run(spoiled), call(clean))


@pytest.mark.parametrize("extra", [-2, 0, 4])
def test_total_rows_in_a_graph(extra: int) -> None:
    """The size is that of the call, whatever the offsets say; where they can be looked at, too small is an error."""
    dense, offsets = torch.randn(2, 3, D), torch.tensor([0, 1, 6])
    call = torch.compile(lambda y, o: fbgemm.dense_to_jagged(y, [o], 6 + extra)[0], fullgraph=True, backend="eager")
    rows = fbgemm.dense_to_jagged(dense, [offsets])[0]
    torch.testing.assert_close(call(dense, offsets), torch.nn.functional.pad(rows, (0, 0, 0, extra)))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_dtypes_of_what_only_moves(dtype: torch.dtype) -> None:
    x, offsets = torch.tensor([[1], [0], [1]]).to(dtype), torch.tensor([0, 1, 3])
    dense = fbgemm.jagged_to_padded_dense(x, [offsets], [2])
    assert dense.dtype == dtype
    assert torch.equal(fbgemm.dense_to_jagged(dense, [offsets])[0], x)
    assert torch.equal(fbgemm.jagged_index_select(x, offsets.diff(), torch.tensor([1, 0]))[0], x[[1, 2, 0]])
    assert torch.equal(fbgemm.sll_jagged2_to_padded_dense(x[:1, 0], offsets[:2], 1)[0], x[:1])


def test_empty_indices_select_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    rows, lengths = fbgemm.jagged_index_select(torch.ones(3, D), torch.tensor([1, 2]), none)
    assert rows.shape == (0, D)
    assert lengths.shape == (0,)


def test_promotion_and_one_feature() -> None:
    x, y, offsets = torch.ones(3, 2), torch.full((2, 1, 1), 2.0).half(), torch.tensor([0, 1, 3])
    added = fbgemm.jagged_dense_elementwise_add_jagged_output(x, [offsets], y)[0]
    assert added.dtype == torch.float32
    assert added.tolist() == [[3.0, 3.0], [3.0, 3.0], [1.0, 1.0]]
    assert fbgemm.jagged_dense_elementwise_mul(x.long(), [offsets], y.long())[0].tolist() == [[2, 2], [2, 2], [0, 0]]


def test_large_scores_of_masked_attention() -> None:
    """The share of a masked softmax is an exponential of a difference: no overflow, and 0 where all is masked."""
    q = torch.tensor([[60.0], [60.0]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[60.0], [-60.0]], dtype=torch.float64)
    v = torch.ones(2, 1, dtype=torch.float64)
    out = fbgemm.sll_jagged_flash_attention_basic(q, k, v, torch.tensor([0, 2]), 2, True)
    assert out.tolist() == [[0.5], [0.0]]
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
