"""FBGEMM's functions of lengths, offsets and indices alone; and the numbers that all functions take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGE_LENGTHS
from fbgemm_integers import INTEGER, indices_of
from fbgemm_loops import Arguments, Batch, offsets_of
from fbgemm_table import CASES, outcome
from torch import Tensor

from flexjag.errors import FlexjagError, LayoutError, ShapeError
from flexjag.interop import fbgemm
from flexjag.interop.fbgemm_lengths import positions
from flexjag.interop.fbgemm_select import true_at
from flexjag.interop.fbgemm_unique import sorted_unique
from flexjag.testing import assert_compiles

N, OFFSETS = torch.tensor([2, 0, 3]), torch.tensor([0, 2, 2, 5])


def call(f: Any, name: str, b: Arguments) -> list[Tensor]:
    found = INTEGER[name].run(f, b, indices_of(b))
    return [found] if isinstance(found, Tensor) else list(found)


DTYPES = (torch.int32, torch.int64)


@pytest.mark.parametrize("edge", EDGE_LENGTHS)
@pytest.mark.parametrize("name", INTEGER)
def test_edges(name: str, edge: str) -> None:
    for b in (Batch(tuple(EDGE_LENGTHS[edge]), 4, dtype) for dtype in DTYPES):
        assert [x.tolist() for x in call(fbgemm, name, b.arguments)] == list(INTEGER[name].loop(b))


@pytest.mark.parametrize("name", [name for name, case in INTEGER.items() if case.oracle])
def test_equals_fbgemm(name: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    for lengths, dtype in itertools.product(EDGE_LENGTHS.values(), DTYPES):
        if INTEGER[name].some and not lengths:
            continue  # FBGEMM raises
        b = Batch(tuple(lengths), 4, dtype).arguments
        for got, wanted in zip(call(fbgemm, name, b), call(torch.ops.fbgemm, name, b), strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


def test_one_graph() -> None:
    """All of them in a graph, of which the second batch's serves the third."""
    batches = [Batch(lengths, 4) for lengths in ((3, 0, 5), (2, 6, 0, 1, 4), (7, 3))]

    def every(b: Arguments, indices: Tensor) -> list[list[Tensor]]:
        found = [case.run(fbgemm, b, indices) for case in INTEGER.values()]
        return [[x] if isinstance(x, Tensor) else list(x) for x in found]

    def compare(index: int, found: list[list[Tensor]]) -> None:
        for case, got in zip(INTEGER.values(), found, strict=True):
            assert [x.tolist() for x in got] == list(case.loop(batches[index]))

    given = [(b.arguments, indices_of(b.arguments)) for b in batches]
    assert_compiles(every, given, max_graphs=2, backward=False, backend="aot_eager", after_each=compare)


@pytest.mark.parametrize(
    ("operator", "given"),
    [(positions, N), (true_at, torch.tensor([True, False, True])), (sorted_unique, torch.tensor([3, 1, 3]))],
)
def test_opcheck(operator: Any, given: Tensor) -> None:
    torch.library.opcheck(operator.overload, (given,))


def test_features_that_share_a_hash_space() -> None:
    """Features 0 and 1 share one, and 3 and 4, the last; 2 has no index."""
    lengths = torch.tensor([2, 1, 1, 2, 0, 0, 1, 0, 1, 1])
    spaces, groups = torch.tensor([0, 0, 9, 12, 12, 15]), torch.tensor([0, 0, 2, 3, 3, 5])
    indices = torch.tensor([8, 3, 8, 3, 5, 1, 2, 7, 2])
    counts, ends, found, places = fbgemm.jagged_unique_indices(spaces, groups, offsets_of(lengths.tolist()), indices)
    assert found.tolist() == [1, 3, 5, 8, 2, 7]
    assert torch.equal(found[places], indices)
    assert counts.tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 0, 0]
    assert ends.tolist() == offsets_of(counts.tolist()).tolist()


def test_what_comes_back_besides_values() -> None:
    x = torch.arange(5.0)
    assert fbgemm.jagged_slice(x, N, torch.tensor([1, 0, 1]), 1)[1].tolist() == [1, 0, 1]
    assert fbgemm.masked_select_jagged_1d(x, N.int(), x > 1)[1].equal(torch.tensor([0, 0, 3], dtype=torch.int32))
    assert fbgemm.pack_segments_v2(x, N, 2)[1] is None
    mask = fbgemm.pack_segments_v2(x, N, 2, return_presence_mask=True)[1]
    assert mask is not None
    assert mask.tolist() == [[True, True], [False, False], [True, True]]
    rows, lengths = fbgemm.keyed_jagged_index_select_dim1(x, N, OFFSETS, torch.tensor([2, 2]), 3, None, 6)
    assert rows.tolist() == [2.0, 3.0, 4.0] * 2
    assert lengths.tolist() == [3, 3]


def as_other(b: Arguments, kind: Callable[[int], Any]) -> Arguments:
    return b._replace(size=kind(b.size), total=kind(b.total), chosen_total=kind(b.chosen_total))


KINDS: list[Callable[[int], Any]] = [np.int32, np.int64, torch.tensor, lambda n: torch.tensor([n])]


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_other_libraries(name: str) -> None:
    b = Batch((3, 0, 5), 4)
    case, operands = CASES[name], CASES[name].operands(b)
    wanted = outcome(lambda *x: case.run(fbgemm, b.arguments, *x), operands)
    for other in (as_other(b.arguments, kind) for kind in KINDS):
        for got, want in zip(outcome(lambda *x, b=other: case.run(fbgemm, b, *x), operands), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", INTEGER)
def test_numbers_of_other_libraries_for_integers(name: str) -> None:
    b = Batch((3, 0, 5), 4).arguments
    for kind in KINDS:
        found = INTEGER[name].run(fbgemm, as_other(b, kind), indices_of(b))
        got = [found] if isinstance(found, Tensor) else list(found)
        assert all(map(torch.equal, got, call(fbgemm, name, b)))


LISTS: list[Callable[[list[int]], Any]] = [
    tuple,
    np.array,
    lambda n: np.array(n, dtype=np.int32),
    torch.tensor,
    lambda n: [np.int64(k) for k in n],
    lambda n: [torch.tensor(k) for k in n],
]


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_libraries(kind: Callable[[list[int]], Any]) -> None:
    values, two = torch.arange(10.0), [OFFSETS[:3], torch.tensor([0, 2, 5])]
    got = fbgemm.jagged_to_padded_dense(values[:5], two, kind([2, 3]))
    assert torch.equal(got, fbgemm.jagged_to_padded_dense(values[:5], two, [2, 3]))
    keys = torch.stack([N, N])
    for stacked, x in (
        (fbgemm.stacked_jagged_1d_to_dense, values),
        (fbgemm.stacked_jagged_2d_to_dense, values[:, None]),
    ):
        wanted = stacked(x, keys, [0, 5, 10], [2, 3], 7)
        for a, b in zip(stacked(x, keys, kind([0, 5, 10]), kind([2, 3]), 7), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_lists_of_other_libraries_in_a_graph(kind: Callable[[list[int]], Any]) -> None:
    compiled = torch.compile(fbgemm.jagged_to_padded_dense, fullgraph=True, backend="aot_eager")
    values = torch.arange(5.0)
    for sizes in ([2], [4]):
        wanted = fbgemm.jagged_to_padded_dense(values, [OFFSETS], sizes)
        assert torch.equal(compiled(values, [OFFSETS], kind(sizes)), wanted)


X = torch.arange(5.0)
IDS = torch.tensor([4, 4, 1, 4, 0])
ROWS = X[:, None]

BAD: dict[str, tuple[Callable[[], object], type[FlexjagError], str]] = {
    "no integer": (lambda: fbgemm.jagged_softmax(ROWS, OFFSETS, 2.0), ShapeError, "max_length: must be an integer"),  # type: ignore[arg-type]
    "a truth value": (
        lambda: fbgemm.jagged_to_padded_dense(ROWS, [OFFSETS], [True]),
        ShapeError,
        "max_lengths[0]: must be an integer",
    ),
    "reals in an array": (
        lambda: fbgemm.jagged_to_padded_dense(ROWS, [OFFSETS], np.array([2.0])),
        ShapeError,
        "max_lengths[0]: must be an integer",
    ),
    "a matrix of sizes": (
        lambda: fbgemm.jagged_to_padded_dense(ROWS, [OFFSETS], torch.tensor([[2]])),
        ShapeError,
        "max_lengths[0]: must be an integer",
    ),
    "one number for a list": (
        lambda: fbgemm.jagged_to_padded_dense(ROWS, [OFFSETS], torch.tensor(2)),
        LayoutError,
        "max_lengths: must be a list",
    ),
    "an array of another size": (
        lambda: fbgemm.stacked_jagged_1d_to_dense(X, N[None], np.array([0, 5]), np.array([2, 2]), 0),
        LayoutError,
        "max_lengths_per_key: must have 1 entries",
    ),
    "negative lengths of a range": (
        lambda: fbgemm.repeat_arange(torch.tensor([2, -1])),
        LayoutError,
        "lengths: must not be negative; got lengths[1]=-1",
    ),
    "range behind its end": (lambda: fbgemm.offsets_range(OFFSETS, 4), LayoutError, "offsets: must not decrease"),
    "range of a later start": (lambda: fbgemm.offsets_range(OFFSETS + 1, 6), LayoutError, "offsets: must start at 0"),
    "mask of another size": (lambda: fbgemm.get_source_mask(N, N, 9), LayoutError, "output_size: must be the sum"),
    "mask of other segments": (
        lambda: fbgemm.get_source_mask(N, N[:2], 7),
        LayoutError,
        "num_sources: must have as many entries as num_targets",
    ),
    "permutation out of range": (
        lambda: fbgemm.expand_into_jagged_permute(N, OFFSETS, OFFSETS, 5),
        LayoutError,
        "permute: must be from 0 to S - 1; got smallest=0, largest=3, S=3",
    ),
    "permutation of another size": (
        lambda: fbgemm.expand_into_jagged_permute(N[:2], OFFSETS, OFFSETS, 5),
        LayoutError,
        "input_offset: must have one more entry",
    ),
    "permutation with another end": (
        lambda: fbgemm.expand_into_jagged_permute(torch.arange(3), OFFSETS, OFFSETS, 6),
        LayoutError,
        "output_offset: must end at",
    ),
    "start behind a segment": (
        lambda: fbgemm.jagged_slice(X, N, torch.tensor([0, 1, 0]), 1),
        LayoutError,
        "start: must not be larger than the length; got start[1]=1, x_lengths[1]=0",
    ),
    "negative start": (lambda: fbgemm.jagged_slice(X, N, -N, 1), LayoutError, "start: must not be negative"),
    "negative slice": (lambda: fbgemm.jagged_slice(X, N, N, -1), ShapeError, "slice_length: must not be negative"),
    "slice of longer segments": (lambda: fbgemm.jagged_slice(X, N + 1, N, 1), LayoutError, "must be from 0 to"),
    "negative truncation": (
        lambda: fbgemm.jagged_1d_to_truncated_values(X, N, -1),
        ShapeError,
        "max_truncated_length: must not be negative",
    ),
    "short mask": (
        lambda: fbgemm.masked_select_jagged_1d(X, N, X[:4] > 0),
        ShapeError,
        "mask: must be boolean with as many entries",
    ),
    "mask of numbers": (lambda: fbgemm.masked_select_jagged_1d(X, N, IDS), ShapeError, "mask: must be boolean"),
    "more is added than there is": (
        lambda: fbgemm.jagged_index_add_2d_forward(ROWS, torch.tensor([0]), torch.tensor([5]), N.cumsum(0), 5, 5),
        LayoutError,
        "input_offsets: must not be longer",
    ),
    "added behind the result": (
        lambda: fbgemm.jagged_index_add_2d_forward(ROWS, torch.arange(3), N.cumsum(0), N.cumsum(0), 5, 4),
        LayoutError,
        "offsets: must be from 0 to the number of rows",
    ),
    "another number of rows": (
        lambda: fbgemm.jagged_index_add_2d_forward(ROWS, torch.arange(3), N.cumsum(0), N.cumsum(0), 4, 5),
        ShapeError,
        "num_dense_input_rows: must be the number of rows",
    ),
    "keys of another batch size": (
        lambda: fbgemm.keyed_jagged_index_select_dim1(X, N, OFFSETS, N, 2),
        ShapeError,
        "lengths: must have batch_size entries per key",
    ),
    "keyed index of another key": (
        lambda: fbgemm.keyed_jagged_index_select_dim1(X, N, OFFSETS, torch.tensor([3]), 3),
        LayoutError,
        "indices: must be from 0 to S - 1",
    ),
    "keyed offsets of other lengths": (
        lambda: fbgemm.keyed_jagged_index_select_dim1(X, N, OFFSETS.flip(0), N[:1], 3),
        LayoutError,
        "offsets: must be the offsets of lengths",
    ),
    "infinity among integers": (
        lambda: fbgemm.pack_segments_v2(IDS, N, 2, pad_minf=True),
        ShapeError,
        "t_in: must have rows, of floating point",
    ),
    "more rows than are packed": (lambda: fbgemm.pack_segments(X, N + 1, 2), LayoutError, "must be from 0 to"),
    "index over its hash size": (
        lambda: fbgemm.jagged_unique_indices(torch.tensor([0, 4, 9]), torch.arange(3), torch.tensor([0, 2, 5]), IDS),
        LayoutError,
        "indices: must be smaller than the hash size of the feature; got indices[0]=4, hash_size=4",
    ),
    "segments that are not F·B": (
        lambda: fbgemm.jagged_unique_indices(torch.tensor([0, 4, 9]), torch.arange(3), OFFSETS, IDS),
        LayoutError,
        "offsets: must be those of as many segments per feature",
    ),
    "hash sizes of another batch size": (
        lambda: fbgemm.jagged_hash_size_cumsum(OFFSETS, IDS, 2),
        LayoutError,
        "offsets: must be those of batch_size segments",
    ),
    "weights of no unique index": (
        lambda: fbgemm.jagged_acc_weights_and_counts(X, IDS, 4),
        LayoutError,
        "reverse_indices: must be from 0 to U - 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name: str) -> None:
    run, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        run()
