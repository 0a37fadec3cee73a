"""Mask nodes: equality, text, operators and the questions asked of their structure."""

from __future__ import annotations

import pytest
import torch

import flexjag as fj
from flexjag import Causal, Chunked, Dense, Full, GlobalTokens, MaskMod, PerHead, Prefix, Rows, SameGroup, Window
from flexjag.algebra import masks as m
from flexjag.algebra.facts import as_window
from flexjag.errors import AmbiguousMaskError, MaskError

BOUND = torch.tensor([1, 2])
IDS = torch.tensor([0, 0, 1])


def even(b, h, q, kv):  # type: ignore[no-untyped-def]
    return (q + kv) % 2 == 0


MAKERS = {
    "full": Full,
    "causal": Causal,
    "causal_end": lambda: Causal(align="end"),
    "window": lambda: Window(2, None),
    "window_tensor": lambda: Window(BOUND, 0),
    "prefix": lambda: Prefix(3),
    "chunked": lambda: Chunked(4),
    "global": lambda: GlobalTokens(1),
    "rows": lambda: Rows(IDS, IDS),
    "same_group": lambda: SameGroup(IDS),
    "mask_mod": lambda: MaskMod(even),
    "per_head": lambda: PerHead([Causal(), Full()]),
    "and": lambda: Causal() & Prefix(1),
    "or": lambda: Causal() | Prefix(1),
    "not": lambda: ~Causal(),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_equal_when_built_alike(make) -> None:  # type: ignore[no-untyped-def]
    assert make() == make()
    assert hash(make()) == hash(make())


def test_all_different_otherwise() -> None:
    masks = [make() for make in MAKERS.values()]
    assert len(set(masks)) == len(masks)
    assert Window(2, 0) != Window(0, 2)
    assert (Causal() & Prefix(1)) != (Prefix(1) & Causal())
    assert Causal() != "Causal()"


def test_tensors_compare_by_identity() -> None:
    assert Window(BOUND, 0) != Window(BOUND.clone(), 0)
    assert Dense(torch.ones(2, 2, dtype=torch.bool)) != Dense(torch.ones(2, 2, dtype=torch.bool))


TEXTS = [
    (Full(), "Full()"),
    (Causal(), "Causal()"),
    (Causal(align="end"), "Causal(align='end')"),
    (Window(256, 0), "Window(256, 0)"),
    (Window(None, 3, align="end"), "Window(None, 3, align='end')"),
    (Window(BOUND, 0), "Window(<int64[2]>, 0)"),
    (SameGroup(IDS), "SameGroup(<int64[3]>, None)"),
    (MaskMod(even), "MaskMod(even)"),
    (PerHead([Causal(), Full()]), "PerHead((Causal(), Full()))"),
    (Causal() & (Window(256, 0) | Prefix(4)), "Causal() & (Window(256, 0) | Prefix(4))"),
    (Causal() & Window(256, 0) | Prefix(4), "(Causal() & Window(256, 0)) | Prefix(4)"),
    (Prefix(4) | Causal() & Full(), "Prefix(4) | (Causal() & Full())"),
    (Full() & Full() & Causal(), "Full() & Full() & Causal()"),
    (Full() | Full() | Causal(), "Full() | Full() | Causal()"),
    (~Causal(), "~Causal()"),
    (~~Causal(), "~~Causal()"),
    (~(Causal() | Full()), "~(Causal() | Full())"),
    (~(Causal() & Full()), "~(Causal() & Full())"),
    (~Causal() & ~Full(), "~Causal() & ~Full()"),
]


@pytest.mark.parametrize(("mask", "text"), TEXTS, ids=[text for _, text in TEXTS])
def test_repr(mask: fj.Mask, text: str) -> None:
    assert repr(mask) == text


@pytest.mark.parametrize(
    "mask", [x for x, text in TEXTS if "<" not in text and "even" not in text], ids=lambda x: repr(x)
)
def test_repr_is_code_for_an_equivalent_mask(mask: fj.Mask) -> None:
    again = eval(repr(mask), vars(fj))
    assert again == mask


def test_truth_value_raises() -> None:
    with pytest.raises(AmbiguousMaskError, match=r"mask: has no truth value; combine masks with &.*mask=Causal\(\)"):
        bool(Causal())
    with pytest.raises(TypeError):
        Causal() and Full()
    with pytest.raises(AmbiguousMaskError):
        not Causal()


@pytest.mark.parametrize("other", [None, 3, True, even, fj.Softmax()])
def test_operators_refuse_what_is_no_mask(other: object) -> None:
    kind = type(other).__name__
    with pytest.raises(MaskError, match=f"mask: both sides of & must be masks; got other='{kind}'"):
        Causal() & other  # type: ignore[operator]
    with pytest.raises(MaskError, match=rf"mask: both sides of \| must be masks; got other='{kind}'"):
        Causal() | other  # type: ignore[operator]


BAD = [
    (lambda: Window(-1, 0), r"left, right: must leave a key.*unlimited is None, not -1; got left=-1, right=0"),
    (lambda: Window(1, -2), r"left, right: must leave a key.*got left=1, right=-2"),
    (lambda: Chunked(2, "middle"), r"align: must be 'start' or 'end'; got align='middle'"),
    (lambda: Window(1.5, 0), r"left: must be an int or a per-segment integer tensor; got value=1.5"),
    (lambda: Window(True, 0), r"left: must be an int or a per-segment integer tensor; got value=True"),
    (lambda: Window(torch.ones(2), 0), r"left: a per-segment bound must be a 1-D integer tensor.*dtype=torch.float32"),
    (lambda: Window(2, 0, align="middle"), r"align: must be 'start' or 'end'; got align='middle'"),
    (lambda: Causal("middle"), r"align: must be 'start' or 'end'; got align='middle'"),
    (lambda: Prefix(-1), r"n: must be at least 0; got value=-1"),
    (lambda: GlobalTokens(-1), r"n: must be at least 0; got value=-1"),
    (lambda: Chunked(0), r"size: must be at least 1; got value=0"),
    (lambda: Prefix(torch.ones(2, 2, dtype=torch.int64)), r"n: a per-segment bound.*shape=\(2, 2\)"),
    (
        lambda: Rows(torch.zeros(3), torch.zeros(3)),
        r"lo, hi: must be integer tensors of one shape.*dtype=torch.float32",
    ),
    (lambda: Rows(IDS, IDS[:2]), r"lo, hi: must be integer tensors of one shape.*lo=\(3,\), hi=\(2,\)"),
    (
        lambda: SameGroup(torch.zeros(3)),
        r"ids: must be a 1-D integer or bool tensor; got shape=\(3,\), dtype=torch.float32",
    ),
    (lambda: SameGroup(IDS, IDS[None]), r"kv_ids: must be a 1-D integer or bool tensor; got shape=\(1, 3\)"),
    (lambda: Dense(torch.zeros(2, 2)), r"values: must be boolean.*dtype=torch.float32"),
    (lambda: Dense(torch.zeros(1, 2, 2, dtype=torch.bool)), r"values: must be boolean.*shape=\(1, 2, 2\)"),
    (lambda: MaskMod(3), r"fn: must be callable as fn\(b, h, q_pos, kv_pos\); got fn=3"),
    (lambda: PerHead([]), r"masks: must hold one mask per query head; got masks=\[\]"),
    (lambda: PerHead([Causal(), 3]), r"mask: both sides of PerHead must be masks; got other='int'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_malformed_nodes_raise(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MaskError, match=message):
        make()


HEADS = PerHead([Causal(), Full()])


def test_at_head() -> None:
    assert m.at_head(HEADS, 0) == Causal()
    assert m.at_head(HEADS, 1) == Full()
    nested = ~(Prefix(1) & HEADS) | HEADS
    assert m.at_head(nested, 1) == (~(Prefix(1) & Full()) | Full())
    assert m.at_head(PerHead([HEADS, ~HEADS]), 1) == ~Full()
    assert m.at_head(Causal(), 5) == Causal()


def test_num_mask_heads() -> None:
    assert m.num_mask_heads(Causal() & ~Prefix(1)) is None
    assert m.num_mask_heads(~(Prefix(1) | HEADS)) == 2
    assert m.num_mask_heads(PerHead([HEADS, Full()])) == 2
    with pytest.raises(MaskError, match=r"every PerHead must have one mask per head; got heads=\[2, 3\]"):
        m.num_mask_heads(HEADS & PerHead([Full()] * 3))


WINDOWS = [
    (Full(), (None, None, "start")),
    (Causal(), (None, 0, "start")),
    (Causal("end"), (None, 0, "end")),
    (Window(4, 2), (4, 2, "start")),
    (Window(BOUND, 2), None),
    (Causal() & Window(4, 2), (4, 0, "start")),
    (Window(8, None) & Window(4, 2) & Full(), (4, 2, "start")),
    (Full() & Causal("end"), (None, 0, "end")),
    (Causal("end") & Window(4, 2), None),
    (Causal() | Window(4, 2), None),
    (~Causal(), None),
    (Prefix(1), None),
    (Causal() & Prefix(1), None),
    (HEADS, None),
]


@pytest.mark.parametrize(("mask", "window"), WINDOWS, ids=[repr(x) for x, _ in WINDOWS])
def test_as_window(mask: fj.Mask, window: tuple[int | None, int | None, str] | None) -> None:
    assert as_window(mask) == window


def test_dense_from_list_packs_row_major() -> None:
    a, b = torch.tensor([[True, False], [False, False]]), torch.tensor([[False, True, True]])
    assert Dense.from_list([a, b]).values.tolist() == [True, False, False, False, False, True, True]
    assert Dense.from_list([]).values.shape == (0,)
