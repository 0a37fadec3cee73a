"""Bad input: every error names the argument, the rule and the values seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import jagged, make_qkv

import flexjag as fj
from flexjag import Causal, Full, Jagged, PerHead
from flexjag.errors import FlexjagError, LayoutError, MaskError, PlanError, ScoreError, ShapeError
from flexjag.variants import hstu_mask, next_times

VALUES = torch.zeros(5, 2, 16)


def offsets(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


CONSTRUCTORS = [
    (
        lambda: Jagged(VALUES, torch.tensor([0.0, 5.0])),
        LayoutError,
        r"offsets: must be int32 or int64; got dtype=torch.float32",
    ),
    (
        lambda: Jagged(VALUES, torch.tensor([False, True])),
        LayoutError,
        r"offsets: must be int32 or int64; got dtype=torch.bool",
    ),
    (
        lambda: Jagged(VALUES, offsets(0, 5).to("meta")),
        LayoutError,
        r"offsets: must be on the device of values; got offsets='meta', values='cpu'",
    ),
    (
        lambda: Jagged(VALUES, offsets(0, 5)[None]),
        LayoutError,
        r"offsets: must be 1-D with S\+1 entries; got shape=\(1, 2\)",
    ),
    (lambda: Jagged(VALUES, offsets()), LayoutError, r"offsets: must be"),
    (
        lambda: Jagged(torch.tensor(3.0), offsets(0, 1)),
        ShapeError,
        r"values: must have a token dimension; got shape=\(\)",
    ),
    (lambda: Jagged(VALUES, offsets(1, 5)).validate(), LayoutError, r"offsets: must start at 0; got first=1"),
    (
        lambda: Jagged(VALUES, offsets(0, 4, 3, 5)).validate(),
        LayoutError,
        r"offsets: must not decrease; got offsets\[1\]=4, offsets\[2\]=3",
    ),
    (
        lambda: Jagged(VALUES, offsets(0, 4)).validate(),
        LayoutError,
        r"offsets: must end at the number of packed tokens; got last=4, tokens=5",
    ),
    (
        lambda: Jagged(VALUES, offsets(0, 6)).validate(),
        LayoutError,
        r"offsets: must end at the number of packed tokens; got last=6, tokens=5",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, [2, 2]),
        LayoutError,
        r"lengths: must sum to the number of packed tokens; got sum=4, tokens=5",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, [6, -1]),
        LayoutError,
        r"lengths: must not be negative; got lengths\[1\]=-1",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, [2.5, 2.5]),
        LayoutError,
        r"lengths: must be integers; got lengths=\[2.5, 2.5\]",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, torch.ones(5)),
        LayoutError,
        r"lengths: must be 1-D int32 or int64; got dtype=torch.float32, shape=\(5,\)",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, torch.tensor([[5]])),
        LayoutError,
        r"lengths: must be 1-D int32 or int64.*shape=\(1, 1\)",
    ),
    (
        lambda: Jagged.from_list([VALUES, VALUES[:, :1]]),
        ShapeError,
        r"tensors\[1\]: must agree with tensors\[0\].*shape=\(5, 1, 16\).*first_shape=\(5, 2, 16\)",
    ),
    (
        lambda: Jagged.from_list([VALUES, VALUES.double()]),
        ShapeError,
        r"tensors\[1\]: must agree.*dtype=torch.float64.*first_dtype=torch.float32",
    ),
    (
        lambda: Jagged.from_padded(VALUES, [1, 2]),
        LayoutError,
        r"lengths: must have one entry per row of dense; got lengths=\(2,\), dense=\(5, 2, 16\)",
    ),
    (
        lambda: Jagged.from_padded(VALUES, [1, 2, 3, 0, 0]),
        LayoutError,
        r"lengths: must not exceed the padded length; got longest=3, padded=2",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, [1] * 100000 + [-7]),
        LayoutError,
        r"lengths: must not be negative; got lengths\[100000\]=-7$",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, torch.tensor([3, -7, 4])),
        LayoutError,
        r"lengths: must not be negative; got lengths\[1\]=-7$",
    ),
    (
        lambda: Jagged.from_lengths(VALUES, [0.5] * 1000),
        LayoutError,
        r"lengths: must be integers; got .{,99}1000 entries",
    ),
    (
        lambda: Jagged.from_list([torch.tensor(1.0)]),
        ShapeError,
        r"tensors\[0\]: must have a token dimension; got shape=",
    ),
    (
        lambda: Jagged.from_list([VALUES, VALUES.to("meta")]),
        ShapeError,
        r"tensors\[1\]: must agree with tensors\[0\].*device='meta', first_device='cpu'",
    ),
    (lambda: jagged([5]) + np.ones(16), ShapeError, r"other: must be a Jagged or a number; .*got shape=\(16,\)"),
    (lambda: np.ones(16) * jagged([5]), ShapeError, r"other: must be a Jagged or a number; .*got shape=\(16,\)"),
    (
        lambda: Jagged.from_list([[1, 2]]),
        ShapeError,
        r"tensors\[0\]: must be a tensor; torch.tensor makes one of numbers",
    ),
    (lambda: fj.MaskMod([0] * 1000), MaskError, r"fn: must be callable .{,99}1000 entries"),
    (lambda: fj.RelativeBias("x" * 9), ScoreError, r"table: must be a tensor; got table='xxxxxxxxx'"),
    (lambda: jagged([5]).to_padded(max_length=-1), ShapeError, r"max_length: must not be negative; got max_length=-1"),
    (lambda: fj.Alibi(8), ScoreError, r"slopes: must be a tensor; for the paper's slopes call Alibi.from_.* slopes=8"),
    (lambda: fj.Alibi.from_heads("2"), ScoreError, r"num_heads: must be an int of at least 1; got num_heads='2'"),
    (lambda: fj.SoftCap("3"), ScoreError, r"cap: must be a positive number; got cap='3'"),
    (lambda: fj.RelativeBias(9), ScoreError, r"table: must be a tensor; got table=9"),
    (lambda: fj.BucketedBias(torch.zeros(1, 2), [3]), ScoreError, r"boundaries: must be a tensor; got .*=\[3\]"),
    (
        lambda: fj.TimeBias(torch.zeros(1, 2), [1], torch.zeros(1)),
        ScoreError,
        r"times: must be a tensor; got times=\[1\]",
    ),
    (lambda: fj.SameGroup([1, 2]), MaskError, r"ids: must be a tensor; got ids=\[1, 2\]"),
    (lambda: fj.Dense([1, 2]), MaskError, r"values: must be a tensor; got values=\[1, 2\]"),
    (lambda: fj.Rows(1, 2), MaskError, r"lo: must be a tensor; got lo=1"),
    (lambda: hstu_mask(jagged([5]), targets=2), MaskError, r"targets: must be a tensor; got targets=2"),
    (lambda: next_times(torch.arange(4)), LayoutError, r"times: must be a flexjag.Jagged; got type='Tensor'"),
    (lambda: fj.merge([jagged([5])]), ShapeError, r"parts: must be pairs \(out, lse\), which attention gives with ret"),
]


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTORS, ids=[x[2][:45] for x in CONSTRUCTORS])
def test_constructors(make, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message) as caught:
        make()
    assert isinstance(caught.value, FlexjagError)
    assert isinstance(caught.value, ValueError)


def batch(
    *shape: int, lengths: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Jagged:
    ends = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    return Jagged(torch.zeros(shape, dtype=dtype, device=device), torch.tensor(ends, device=device))


def good() -> Jagged:
    return batch(5, 4, 16)


CALLS = [
    ({"q": torch.zeros(5, 4, 16)}, ShapeError, r"q: must be a flexjag.Jagged; got type='Tensor'"),
    ({"v": None}, ShapeError, r"v: must be a flexjag.Jagged; got type='NoneType'"),
    ({"q": batch(5, 64)}, ShapeError, r"q: values must be \[T, heads, dim\]; got shape=\(5, 64\)"),
    ({"k": batch(1, 5, 4, 16)}, ShapeError, r"k: values must be \[T, heads, dim\]; got shape=\(1, 5, 4, 16\)"),
    ({"v": batch(5, 4, 16, dtype=torch.int64)}, ShapeError, r"v: values must be floating point; got dtype=torch.int64"),
    (
        {"q": batch(5, 4, 16, dtype=torch.float64)},
        ShapeError,
        r"q, k, v: must share a dtype; got q=torch.float64, k=torch.float32, v=torch.float32",
    ),
    ({"v": batch(5, 4, 16, dtype=torch.bfloat16)}, ShapeError, r"q, k, v: must share a dtype; got .*v=torch.bfloat16"),
    (
        {"q": batch(5, 4, 16, device="meta")},
        ShapeError,
        r"q, k, v: must share a device; got q='meta', k='cpu', v='cpu'",
    ),
    (
        {"v": batch(5, 4, 16, device="meta")},
        ShapeError,
        r"q, k, v: must share a device; got q='cpu', k='cpu', v='meta'",
    ),
    (
        {"k": batch(5, 3, 16), "v": batch(5, 3, 16)},
        ShapeError,
        r"k: q's heads H must be a multiple of k's heads G; got H=4, G=3",
    ),
    (
        {"k": batch(5, 8, 16), "v": batch(5, 8, 16)},
        ShapeError,
        r"k: q's heads H must be a multiple of k's heads G; got H=4, G=8",
    ),
    ({"k": batch(5, 0, 16), "v": batch(5, 0, 16)}, ShapeError, r"k: q's heads H must be a multiple.*got H=4, G=0"),
    ({"v": batch(5, 2, 16)}, ShapeError, r"v: must have as many heads as k; got v=2, k=4"),
    ({"k": batch(5, 4, 8)}, ShapeError, r"k: must have q's head dim D; got q=16, k=8"),
    ({"v": batch(6, 4, 16, lengths=(3, 3))}, ShapeError, r"v: must have as many tokens as k; got v=6, k=5"),
    (
        {"v": batch(5, 4, 16, lengths=(3, 2))},
        LayoutError,
        r"v: must have the offsets of k.*offsets\[1\]=2.*offsets\[1\]=3",
    ),
    (
        {"k": batch(5, 4, 16, lengths=(1, 1, 3)), "v": batch(5, 4, 16, lengths=(1, 1, 3))},
        LayoutError,
        r"k: must have as many segments as q; got q=2, k=3",
    ),
    (
        {"mask": PerHead([Causal(), Full()])},
        ShapeError,
        r"mask, score: must be made for q's heads; got made_for=2, heads=4",
    ),
    (
        {"score": fj.Alibi.from_heads(3)},
        ShapeError,
        r"mask, score: must be made for q's heads; got made_for=3, heads=4",
    ),
    (
        {"score": fj.Alibi(torch.ones(4, device="meta"))},
        ScoreError,
        r"slopes: must be on the batch's device; got device='meta', batch='cpu'",
    ),
    ({"score": fj.RelativeBias(torch.ones(4, 3, device="meta"))}, ScoreError, r"table: must be on the batch's device"),
    (
        {"score": fj.BucketedBias(torch.ones(4, 2), torch.ones(1, device="meta"))},
        ScoreError,
        r"boundaries: must be on the batch's device",
    ),
    (
        {"score": fj.SoftCap(1.0) >> fj.TimeBias(torch.ones(4, 2), torch.ones(5, device="meta"), torch.ones(1))},
        ScoreError,
        r"times: must be on the batch's device",
    ),
    (
        {"score": fj.TimeBias(torch.ones(4, 2), torch.ones(5), torch.ones(1), torch.ones(5, device="meta"))},
        ScoreError,
        r"kv_times: must be on the batch's device",
    ),
    ({"score": fj.RelativeBias(torch.ones(3, 3))}, ShapeError, r"made for q's heads; got made_for=3, heads=4"),
    ({"normalizer": fj.SiLU(torch.ones(5, device="meta"))}, PlanError, r"scale: must be on the batch's device"),
    ({"normalizer": fj.SiLU(torch.ones((), device="meta"))}, PlanError, r"scale: must be on the batch's device"),
    (
        {"normalizer": fj.SiLU(torch.ones(6))},
        PlanError,
        r"scale: must have one entry per query token; got entries=6, t",
    ),
    ({"normalizer": fj.Sigmoid(torch.ones(4, device="meta"))}, PlanError, r"bias: must be on the batch's device"),
    ({"mask": ~fj.SameGroup(torch.ones(5, device="meta").int())}, MaskError, r"ids: must be on the batch's device"),
    (
        {"mask": fj.PerHead([Causal() & fj.Prefix(torch.ones(2, device="meta").int())] * 4)},
        MaskError,
        r"n: must be on the batch's device",
    ),
    ({"score": fj.RelativeBias(torch.ones(3, 5))}, ShapeError, r"q's heads; got made_for=3, heads=4, table=\(3, 5\)"),
    ({"scale": "x"}, ShapeError, "scale: must be a finite number; got scale='x'"),
    ({"scale": float("nan")}, ShapeError, "scale: must be a finite number; got scale=nan"),
    ({"scale": True}, ShapeError, "scale: must be a finite number; got scale=True"),
    ({"plan": "plan"}, PlanError, r"plan: must come from flexjag.plan; got type='str'"),
]


@pytest.mark.parametrize(("changed", "error", "message"), CALLS, ids=[x[2][:45] for x in CALLS])
def test_attention(changed: dict, error: type[Exception], message: str) -> None:
    x = good()
    with pytest.raises(error, match=message) as caught:
        fj.attention(**{"q": x, "k": x, "v": x, **changed})
    assert isinstance(caught.value, FlexjagError)


BROKEN = [
    (offsets(1, 2, 5), r"q.offsets: must start at 0; got first=1"),
    (offsets(0, 4, 2, 5), r"q.offsets: must not decrease; got q.offsets\[1\]=4, q.offsets\[2\]=2"),
    (offsets(0, 2, 4), r"q.offsets: must end at the number of packed tokens; got last=4, tokens=5"),
]


@pytest.mark.parametrize(("ends", "message"), BROKEN, ids=[x[1][:30] for x in BROKEN])
def test_contents_of_offsets_are_checked_when_asked(ends: torch.Tensor, message: str) -> None:
    x = Jagged(torch.zeros(5, 4, 16), ends)
    with pytest.raises(LayoutError, match=message):
        fj.attention(x, x, x, validate=True)
    with pytest.raises(LayoutError, match=message):
        fj.plan(x, validate=True)


def test_contents_of_the_keys_offsets_are_checked_too() -> None:
    bad = Jagged(torch.zeros(5, 4, 16), offsets(0, 2, 4))
    with pytest.raises(LayoutError, match=r"k.offsets: must end at the number of packed tokens; got last=4, tokens=5"):
        fj.attention(good(), bad, bad, validate=True)


OTHER_LAYOUTS = {
    "tokens": (7, 2),
    "segments": (2, 3, 0),
    "lengths": (3, 2),
}


@pytest.mark.parametrize("lengths", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS.keys())
def test_plan_for_another_layout(lengths: tuple[int, ...]) -> None:
    plan = fj.plan(batch(sum(lengths), 4, 16, lengths=lengths), mask=Causal())
    x = good()
    if lengths == (3, 2):
        seen = r"q.offsets\[1\]=2, plan's offsets\[1\]=3"
    else:
        total = rf"\({sum(lengths)}, {sum(lengths)}\)"
        seen = rf"plan_tokens={total}, plan_segments={len(lengths)}, tokens=\(5, 5\), segments=2"
    with pytest.raises(PlanError, match=rf"plan: was made for another layout; make one per batch.*{seen}"):
        fj.attention(x, x, x, plan=plan)


def test_plan_for_other_keys() -> None:
    q, k, v = make_qkv([2, 3], [4, 4])
    plan = fj.plan(q, k)
    _, k2, v2 = make_qkv([2, 3], [3, 5])
    with pytest.raises(PlanError, match=r"plan: was made for another layout.*k.offsets\[1\]=3, plan's offsets\[1\]=4"):
        fj.attention(q, k2, v2, plan=plan)
    with pytest.raises(PlanError, match=r"plan_tokens=\(5, 5\).*tokens=\(5, 8\)"):
        fj.attention(q, k, v, plan=fj.plan(q))


def test_plan_on_another_device() -> None:
    plan = fj.plan(good())
    x = batch(5, 4, 16, device="meta")
    with pytest.raises(PlanError, match="plan: was made for another layout"):
        fj.attention(x, x, x, plan=plan)


def test_every_error_is_a_flexjag_error_and_a_familiar_one() -> None:
    from flexjag import errors

    familiar = {
        errors.LayoutError: ValueError,
        errors.ShapeError: ValueError,
        errors.MaskError: ValueError,
        errors.ScoreError: ValueError,
        errors.AmbiguousMaskError: TypeError,
        errors.PlanError: ValueError,
        errors.BackendError: RuntimeError,
        errors.UnknownNodeError: NotImplementedError,
    }
    for error, base in familiar.items():
        assert issubclass(error, errors.FlexjagError)
        assert issubclass(error, base)


def test_wording() -> None:
    from flexjag.errors import explain_values

    assert explain_values("q", "must be flat") == "q: must be flat"
    assert explain_values("q", "must be flat", shape=(1, 2), name="x") == "q: must be flat; got shape=(1, 2), name='x'"


def in_graphs() -> dict[str, tuple[Callable[..., torch.Tensor], tuple[object, ...], str]]:
    """Calls that fail while they are traced, with sizes that vary, and what Dynamo must then report."""
    x, shorter, longer = (batch(sum(n), 4, 16, lengths=n) for n in ((2, 3), (2, 2), (2, 2, 1)))
    times = torch.ones(4)
    for t in (*(y for z in (x, shorter, longer) for y in (z.values, z.offsets)), times):
        torch._dynamo.maybe_mark_dynamic(t, 0)
    return {
        "plan of another S": (
            lambda x, plan: fj.attention(x, x, x, plan=plan).values,
            (longer, fj.plan(x)),
            r"PlanError\(.plan: was made for another layout.*plan_tokens=\(5, 5\), plan_segments=2, tokens=\(5, 5\)",
        ),
        "rows": (
            lambda x, y: fj.attention(x, x, y).values,
            (x, shorter),
            r"ShapeError\(.v: must have as many tokens as k; got v=4, k=5",
        ),
        "batches": (
            lambda x, y: (x + y).values,
            (x, longer),
            r"LayoutError\(.other: must have the same offsets.*wanted=Jagged\(segments=2, .*values=\[5, 4, 16\]",
        ),
        "times": (
            lambda x, t: fj.plan(x, score=fj.TimeBias(x.values[:4, 0, :2], t, t[:1])).layout.q_pos,
            (x, times),
            r"ScoreError\(.times: must have one entry per query token; got entries=4, tokens=5",
        ),
        "node": (
            lambda x, n: fj.attention(x, x, x, mask=fj.Prefix(n.int())).values,
            (x, times),
            r"MaskError\(.n: must have one entry per segment; got entries=4, segments=2",
        ),
    }


@pytest.mark.parametrize("name", ["plan of another S", "rows", "batches", "times", "node"])
def test_errors_inside_graphs_keep_their_words(name: str) -> None:
    call, args, message = in_graphs()[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(call, fullgraph=True, backend="eager")(*args)
