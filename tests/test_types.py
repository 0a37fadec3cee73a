"""What type checkers are told; `.ci/run` gives this file to mypy and pyright, and here it is run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch

import flexjag as fj


def test_attention_returns_what_was_asked_for() -> None:
    x = fj.Jagged.from_lengths(torch.zeros(5, 1, 16), [2, 3])
    assert_type(fj.attention(x, x, x), fj.Jagged)
    assert_type(fj.attention(x, x, x, mask=fj.Causal(), return_lse=False), fj.Jagged)
    assert_type(fj.attention(x, x, x, return_lse=True), tuple[fj.Jagged, fj.Jagged])
    stick = fj.plan(x, mask=fj.Causal(), normalizer=fj.StickBreaking())
    assert_type(fj.attention(x, x, x, plan=stick, return_remainder=True), tuple[fj.Jagged, fj.Jagged])
    for wanted in (False, True):
        out = assert_type(fj.attention(x, x, x, return_lse=wanted), fj.Jagged | tuple[fj.Jagged, fj.Jagged])
        assert isinstance(out, tuple) is wanted
    assert_type(fj.merge([fj.attention(x, x, x, return_lse=True)]), tuple[fj.Jagged, fj.Jagged])
    assert_type(fj.attention(x, x, x).values, torch.Tensor)


def test_nodes_combine_into_masks_and_scores() -> None:
    assert_type(fj.Causal() & (fj.Window(4) | ~fj.Prefix(2)), fj.Mask)
    assert_type(fj.Alibi.from_heads(2) >> fj.SoftCap(3.0), fj.Score)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(fj.__file__).parent / "py.typed").is_file()
