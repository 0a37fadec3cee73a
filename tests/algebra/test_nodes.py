"""Declarations of nodes: what is declared wrongly is an error that says what to write."""

from __future__ import annotations

import pytest
import torch
from cases import jagged
from torch import Tensor

import flexjag as fj
from flexjag.algebra.tree import tensors_along
from flexjag.errors import NodeError
from flexjag.extend import Mask, Sandwich, Score, Spans, along, dense, node, sandwich


class Undecorated(Mask):
    """Keys before n, whose author forgot the decorator."""

    def __init__(self, n: int) -> None:
        self.n = n


@sandwich.register(Undecorated)
def _(mask, layout):  # type: ignore[no-untyped-def]
    spans = Spans(layout.kv_start[None], torch.minimum(layout.kv_start + mask.n, layout.kv_end)[None])
    return Sandwich(spans, spans)


@dense.register(Undecorated)
def _(mask, segment):  # type: ignore[no-untyped-def]
    return (segment.j < mask.n).expand(segment.n, segment.m)


def test_a_forgotten_decorator() -> None:
    """Two masks without fields were equal, so that one served both heads."""
    mask = fj.PerHead([Undecorated(3), Undecorated(7)])
    with pytest.raises(NodeError, match=r"Undecorated: must be decorated by flexjag.extend.node"):
        fj.plan(jagged([9]), mask=mask)
    assert "Undecorated" in repr(mask)  # messages still can show it


def test_a_subclass_has_the_fields_of_its_base() -> None:
    class Lookback(fj.Window):
        """A name of its own for a window."""

    plan = fj.plan(jagged([9]), mask=fj.PerHead([Lookback(1), Lookback(2)]))
    assert torch.equal(plan.to_dense(), fj.plan(jagged([9]), mask=fj.PerHead([fj.Window(1), fj.Window(2)])).to_dense())


def test_an_axis_that_there_is_not() -> None:
    with pytest.raises(NodeError, match=r"axis: must be None or one of query token, key token, .*; got axis='token'"):
        along("token")  # type: ignore[arg-type]


def test_a_field_that_there_is_not() -> None:
    with pytest.raises(NodeError, match="times: in_place_of_none must name a field; got in_place_of_none='time'"):

        @node
        class Late(Score):
            times: Tensor | None = along("key token", default=None, in_place_of_none="time")


def test_a_number_in_a_tensor_fits_any_number_of_heads() -> None:
    @node
    class Tempered(Score):
        factor: Tensor = along("query head")

    assert [x.axis for x in tensors_along(Tempered(torch.tensor(0.5)))] == ["query head"]
    assert fj.plan(jagged([9]), score=Tempered(torch.tensor(0.5))).heads is None
    assert fj.plan(jagged([9]), score=Tempered(torch.ones(3))).heads == 3
