"""Where FBGEMM reads or writes outside a tensor, crashes, or takes what cannot be meant: flexjag errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from fbgemm_loops import Arguments, Batch
from fbgemm_table import CASES
from torch import Tensor

from flexjag.errors import FlexjagError, LayoutError, ShapeError
from flexjag.interop import fbgemm

X, OFFSETS = torch.ones(5, 4), torch.tensor([0, 2, 2, 5])
DENSE, WEIGHT = torch.ones(3, 2, 4), torch.ones(3, 4, 2)
N = OFFSETS.diff()
SQUARES = torch.tensor([0, 4, 4, 13])
KEYS = torch.stack([N, N])

BAD: dict[str, tuple[Callable[[], object], type[FlexjagError], str]] = {
    "no list of offsets": (
        lambda: fbgemm.jagged_to_padded_dense(X, OFFSETS, [2]),  # type: ignore[arg-type]
        LayoutError,
        "offsets: must be a list",
    ),
    "no offsets": (lambda: fbgemm.jagged_to_padded_dense(X, [], []), LayoutError, "offsets: must not be empty"),
    "no list of lengths": (
        lambda: fbgemm.jagged_to_padded_dense(X, [OFFSETS], 2),  # type: ignore[arg-type]
        LayoutError,
        "max_lengths: must be a list",
    ),
    "lists of two sizes": (
        lambda: fbgemm.jagged_to_padded_dense(X, [OFFSETS], [2, 2]),
        LayoutError,
        "max_lengths: must have 1 entries",
    ),
    "no tensor": (
        lambda: fbgemm.jagged_softmax([1.0], OFFSETS, 2),  # type: ignore[arg-type]
        ShapeError,
        "values: must be a tensor",
    ),
    "three dimensions": (
        lambda: fbgemm.jagged_to_padded_dense(X[None], [OFFSETS], [2]),
        ShapeError,
        "values: must have 1 or 2 dimensions",
    ),
    "negative length": (
        lambda: fbgemm.jagged_to_padded_dense(X, [OFFSETS], [-1]),
        ShapeError,
        "max_length: must not be negative",
    ),
    "levels that do not fit": (
        lambda: fbgemm.jagged_to_padded_dense(X, [torch.tensor([0, 2]), OFFSETS], [2, 2]),
        LayoutError,
        "offsets: must end at the number of packed tokens",
    ),
    "float offsets": (lambda: fbgemm.jagged_softmax(X, OFFSETS.float(), 2), LayoutError, "must be int32 or int64"),
    "offsets behind the rows": (
        lambda: fbgemm.jagged_to_padded_dense(X, [OFFSETS + 4], [2]),
        LayoutError,
        "offsets: must be from 0 to the number of rows; got first=4, last=9, rows=5",
    ),
    "offsets before the rows": (lambda: fbgemm.jagged_jagged_bmm(X, X, OFFSETS - 1, 2), LayoutError, "must be from 0"),
    "decreasing offsets": (
        lambda: fbgemm.jagged_dense_bmm(X, torch.tensor([0, 4, 2, 5]), WEIGHT, 2),
        LayoutError,
        "offsets: must not decrease; got offsets[1]=4, offsets[2]=2",
    ),
    "decreasing in a packed result": (
        lambda: fbgemm.dense_to_jagged(DENSE, [torch.tensor([0, 4, 2, 5])]),
        LayoutError,
        "must not decrease",
    ),
    "padded with too few rows": (
        lambda: fbgemm.dense_to_jagged(DENSE[:2], [OFFSETS]),
        ShapeError,
        "offsets: must have one more entry",
    ),
    "padded with other dimensions": (
        lambda: fbgemm.dense_to_jagged(DENSE[0], [OFFSETS]),
        ShapeError,
        "dense: must have 3 dimensions",
    ),
    "too small a total": (
        lambda: fbgemm.dense_to_jagged(DENSE, [OFFSETS], 4),
        LayoutError,
        "total_L: must not be smaller than the last offset; got total_L=4, last=5",
    ),
    "negative total": (lambda: fbgemm.dense_to_jagged(DENSE, [OFFSETS], -1), ShapeError, "total_L: must not be neg"),
    "sum with too few rows": (
        lambda: fbgemm.jagged_dense_elementwise_add(X, [OFFSETS], DENSE[:2]),
        ShapeError,
        "y: must have one row per segment",
    ),
    "sum with one row for all": (
        lambda: fbgemm.jagged_dense_elementwise_add(X, [OFFSETS], DENSE[:1]),
        ShapeError,
        "y: must have one row per segment",
    ),
    "sum of short offsets": (
        lambda: fbgemm.jagged_dense_elementwise_add_jagged_output(X[:4], [OFFSETS], DENSE),
        LayoutError,
        "must end at the number of packed tokens",
    ),
    "sum of other features": (
        lambda: fbgemm.jagged_dense_elementwise_add_jagged_output(X, [OFFSETS], DENSE[:, :, :3]),
        ShapeError,
        "y: must have the features D of x_values",
    ),
    "product of other features": (
        lambda: fbgemm.jagged_dense_elementwise_mul(X, [OFFSETS], DENSE[:, :, :3]),
        ShapeError,
        "y: must have the features D of x_values",
    ),
    "fewer matrices than segments": (
        lambda: fbgemm.jagged_dense_bmm(X, OFFSETS, WEIGHT[:2], 3),
        ShapeError,
        "y: must have 3 dimensions, the first one for the segments",
    ),
    "matrices of more features": (
        lambda: fbgemm.jagged_dense_bmm(X, OFFSETS, torch.ones(3, 5, 2), 3),
        ShapeError,
        "y: must be [S, D, E]",
    ),
    "operands of two lengths": (
        lambda: fbgemm.jagged_jagged_bmm(X, X[:4], OFFSETS, 3),
        ShapeError,
        "y_values: must have the rows of x_values",
    ),
    "softmax of integers": (lambda: fbgemm.jagged_softmax(X.long(), OFFSETS, 3), ShapeError, "must be floating point"),
    "softmax of one dimension": (lambda: fbgemm.jagged_softmax(X[:, 0], OFFSETS, 3), ShapeError, "must have 2 dim"),
    "vectors that are not S·H": (
        lambda: fbgemm.batched_dense_vec_jagged_2d_mul(torch.ones(5, 2), X, OFFSETS),
        ShapeError,
        "v: must be [S·H, N]",
    ),
    "features that are not H·D": (
        lambda: fbgemm.batched_dense_vec_jagged_2d_mul(torch.ones(9, 2), X, OFFSETS),
        ShapeError,
        "v: must be [S·H, N]",
    ),
    "vectors of another dtype": (
        lambda: fbgemm.batched_dense_vec_jagged_2d_mul(torch.ones(6, 2).double(), X, OFFSETS),
        ShapeError,
        "v: must be floating point and have the dtype",
    ),
    "negative index": (
        lambda: fbgemm.jagged_index_select(X, N, torch.tensor([-1])),
        LayoutError,
        "indices: must be from 0 to S - 1",
    ),
    "index behind the segments": (
        lambda: fbgemm.jagged_index_select(X, N, torch.tensor([3])),
        LayoutError,
        "indices: must be from 0 to S - 1",
    ),
    "index behind the segments, and a number of rows": (
        lambda: fbgemm.jagged_index_select(X, N, torch.tensor([3]), 3),
        LayoutError,
        "indices: must be from 0 to S - 1",
    ),
    "too many output rows": (
        lambda: fbgemm.jagged_index_select(X, N, torch.tensor([0]), 3),
        LayoutError,
        "total: must be the number of tokens of the result",
    ),
    "negative output rows": (
        lambda: fbgemm.jagged_index_select(X, N, torch.tensor([0]), -1),
        LayoutError,
        "total: must not be negative",
    ),
    "lengths over the rows": (
        lambda: fbgemm.jagged_index_select(X, N + 1, torch.tensor([0])),
        LayoutError,
        "offsets: must be from 0 to the number of rows",
    ),
    "negative lengths": (
        lambda: fbgemm.jagged_index_select(X, torch.tensor([2, -1, 4]), torch.tensor([0])),
        LayoutError,
        "offsets: must not decrease",
    ),
    "lengths over a key's values": (
        lambda: fbgemm.stacked_jagged_2d_to_dense(torch.ones(10, 1), KEYS, [0, 6, 10], [2, 2]),
        LayoutError,
        "offsets: must be from 0 to the number of rows; got first=0, last=5, rows=4",
    ),
    "keys in another order": (
        lambda: fbgemm.stacked_jagged_1d_to_dense(torch.ones(10), KEYS, [5, 0, 5], [2, 2], 0),
        LayoutError,
        "offset_per_key: must not be negative or decrease",
    ),
    "keys without an end": (
        lambda: fbgemm.stacked_jagged_1d_to_dense(torch.ones(10), KEYS, [0, 5], [2, 2], 0),
        LayoutError,
        "offset_per_key: must have 3 entries",
    ),
    "too few sizes of keys": (
        lambda: fbgemm.stacked_jagged_1d_to_dense(torch.ones(10), KEYS, [0, 5, 10], [2], 0),
        LayoutError,
        "max_lengths_per_key: must have 2 entries",
    ),
    "lengths without keys": (
        lambda: fbgemm.stacked_jagged_1d_to_dense(torch.ones(10), N, [0, 5, 10], [2, 2], 0),
        ShapeError,
        "lengths: must have 2 dimensions",
    ),
    "front values of other segments": (
        lambda: fbgemm.sll_dense_jagged_cat_jagged_out(torch.ones(2), X[:, 0], OFFSETS, 2),
        LayoutError,
        "batches[1]: must have as many segments",
    ),
    "squares that are none": (
        lambda: fbgemm.sll_jagged2_to_padded_dense(torch.ones(5), torch.tensor([0, 5]), 2, 0),
        LayoutError,
        "lengths of offsets: must be squares",
    ),
    "negative size of squares": (
        lambda: fbgemm.sll_jagged2_to_padded_dense(torch.ones(13), SQUARES, -1, 0),
        ShapeError,
        "max_length: must not be negative",
    ),
    "squares of other lengths": (
        lambda: fbgemm.sll_jagged_dense_elementwise_mul_jagged_out(torch.ones(13), torch.ones(3, 3), N + 1, SQUARES, 3),
        LayoutError,
        "squares of x_seq_lengths: must be the lengths of x_offsets",
    ),
    "offsets of a softmax that do not fit": (
        lambda: fbgemm.sll_jagged2_softmax(torch.ones(13), OFFSETS, torch.tensor([0, 4, 5, 13]), 3, False),
        LayoutError,
        "matrices: must have as many entries as rows times columns",
    ),
    "lengths that are not those of the offsets": (
        lambda: fbgemm.sll_jagged_jagged_bmm_jagged_out(X, X, N + 1, OFFSETS, N, OFFSETS, N * N, SQUARES, 3),
        LayoutError,
        "x_lengths: must be the lengths of x_offsets; got x_lengths[0]=3, expected=2",
    ),
    "squares that are not those of the lengths": (
        lambda: fbgemm.sll_jagged_jagged_bmm_jagged_out(X, X, N, OFFSETS, N, OFFSETS, N, OFFSETS, 3),
        LayoutError,
        "z_offsets: must be the offsets of the products",
    ),
    "result of other lengths": (
        lambda: fbgemm.sll_array_jagged_bmm_jagged_out(
            torch.ones(13), X, N * N, SQUARES, N, OFFSETS, N.flip(0), torch.tensor([0, 3, 3, 5]), 3
        ),
        LayoutError,
        "z_offsets: must be y_offsets",
    ),
    "gaps in a result": (
        lambda: fbgemm.sll_jagged_self_substraction_jagged_out(X[:, 0], OFFSETS, torch.tensor([0, 1, 2, 6]), 3),
        LayoutError,
        "offsets_b: must be the offsets of (n - 1)²; got offsets_b[2]=2, expected=1",
    ),
    "divided by nothing": (
        lambda: fbgemm.sll_jagged_flash_attention_basic(X, X, X, OFFSETS, 0),
        ShapeError,
        "max_seq_len: must be positive",
    ),
    "attention with short offsets": (
        lambda: fbgemm.sll_multi_head_jagged_flash_attention(X[None], X[None], X[None], OFFSETS[:3], 3),
        LayoutError,
        "offsets: must end at the number of packed tokens",
    ),
    "attention with too few keys": (
        lambda: fbgemm.sll_jagged_flash_attention_basic(X, X[:4], X, OFFSETS, 3),
        ShapeError,
        "q_weights: must have the tokens of k_weights",
    ),
    "target attention with a bias of other segments": (
        lambda: fbgemm.sll_jagged_dense_flash_attention(X, WEIGHT, X, DENSE[:2, :, :2], OFFSETS, 3),
        ShapeError,
        "offsets: must have one more entry than dense has rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


LENGTHS_ONLY = (
    "jagged_index_select",
    "stacked_jagged",
    "keyed_jagged",
    "jagged_index_add",
    "jagged_slice",
    "jagged_1d_to_truncated",
    "masked_select",
    "jagged_acc",
    "pack_segments",
)
"""These take lengths."""


@pytest.mark.parametrize("wrong", ["decreasing", "behind"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(LENGTHS_ONLY) and "two" not in name])
def test_offsets_that_are_none(name: str, wrong: str) -> None:
    """Every function: FBGEMM reads other memory, or writes it."""
    case, b = CASES[name], Batch((2, 3, 4), 5)
    offsets = torch.tensor([0, 6, 5, 9] if wrong == "decreasing" else [0, 2, 5, 30])
    bad: Arguments = b.arguments._replace(offsets=offsets, squares=(b.arguments.squares[0], offsets * offsets))
    operands: list[Tensor] = case.operands(b)
    if name == "dense_to_jagged" and wrong == "behind":
        return  # these offsets are the result's own
    with pytest.raises((LayoutError, ShapeError)):
        case.run(fbgemm, bad, *operands)


def test_bad_offsets_are_found_inside_a_graph() -> None:
    compiled = torch.compile(fbgemm.jagged_softmax, fullgraph=True, backend="eager")
    for offsets in ([0, 4, 2, 5], [0, 2, 5, 7], [-1, 2, 4, 5]):
        with pytest.raises(LayoutError, match="must not decrease"):
            compiled(X, torch.tensor(offsets), 3)
