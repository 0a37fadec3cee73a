"""What is no :class:`flexjag.DenseBias`, or does not fit its batch, is an error that says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import make_qkv

import flexjag as fj
from flexjag.errors import ScoreError, ShapeError

BATCH = make_qkv([3, 4])[0]
WRONG: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fj.DenseBias(3), ScoreError, r"values: must be a tensor; got values=3"),
    (lambda: fj.DenseBias(torch.zeros(25)), ScoreError, r"values: must be float, packed \[H or 1, .*got shape=\(25,\)"),
    (lambda: fj.DenseBias(torch.zeros(1, 25).long()), ScoreError, r"values: must be float.*dtype=torch.int64"),
    (lambda: fj.DenseBias(torch.zeros(0, 25)), ScoreError, r"values: must be float.*shape=\(0, 25\)"),
    (lambda: fj.DenseBias.from_list([]), ScoreError, r"matrices: must be one per segment, and at least one"),
    (
        lambda: fj.DenseBias.from_list([torch.zeros(2, 3, 3), torch.zeros(1, 4, 4)]),
        ScoreError,
        r"matrices: must all be .* of the same first dimension; got shapes=\[\(2, 3, 3\), \(1, 4, 4\)\]",
    ),
    (
        lambda: fj.plan(BATCH, score=fj.DenseBias(torch.zeros(2, 24))),
        ScoreError,
        r"values: packed matrices must have sum\(n_s \* m_s\) entries; got entries=24, needed=25",
    ),
    (
        lambda: fj.plan(BATCH, score=fj.DenseBias(torch.zeros(2, 26))),
        ScoreError,
        r"values: packed matrices .*; got entries=26, needed=25",
    ),
    (
        lambda: fj.plan(BATCH, max_tokens=7, score=fj.DenseBias(torch.zeros(2, 24))),
        ScoreError,
        r"values: packed matrices .* entries, or more of fixed capacity; got entries=24, needed=25",
    ),
    (
        lambda: fj.plan(BATCH).with_score(fj.SoftCap(2.0) >> fj.DenseBias(torch.zeros(1, 3, 9))),
        ScoreError,
        r"values: must have a row for each query and a column for each key of the longest segment; "
        r"got shape=\(1, 3, 9\), queries=4, keys=4",
    ),
    (
        lambda: fj.plan(BATCH, score=fj.DenseBias(torch.zeros(2, 25, device="meta"))),
        ScoreError,
        r"values: must be on the batch's device; got device='meta', batch='cpu'",
    ),
    (
        lambda: fj.attention(BATCH, BATCH, BATCH, score=fj.DenseBias(torch.zeros(3, 25))),
        ShapeError,
        r"made for q's heads; got made_for=3, heads=2",
    ),
    (
        lambda: fj.plan(BATCH, score=fj.DenseBias(torch.zeros(3, 25)) >> fj.Alibi(torch.ones(2))),
        ScoreError,
        r"score: every table must have one row per query head; got heads=\[2, 3\]",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_bad_input(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
