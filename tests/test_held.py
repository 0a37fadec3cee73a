"""What masks and scores hold, and what their functions read, when it changes: before a call, before the backward."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import CPP_SLOWLY, make_qkv
from torch import Tensor

import flexjag as fj
from flexjag.errors import DifferentiationError, PlanError

F64 = torch.float64
LENGTHS = [5, 0, 20, 1]


# What is held may change between the forward and the backward.


def _scores() -> list[tuple[str, Callable[[Tensor], fj.Score], tuple[int, ...]]]:
    boundaries = torch.tensor([-2, 2])
    return [
        ("ScoreMod", lambda c: fj.ScoreMod(lambda s, b, h, i, j: s * c[0]), (1,)),
        ("Alibi", fj.Alibi, (2,)),
        ("RelativeBias", fj.RelativeBias, (2, 5)),
        ("BucketedBias", lambda c: fj.BucketedBias(c, boundaries), (2, 3)),
        ("TimeBias", lambda c: fj.TimeBias(c, torch.arange(26), boundaries), (2, 3)),
    ]


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU()], ids=repr)
@pytest.mark.parametrize(("name", "make", "shape"), _scores(), ids=[name for name, _, _ in _scores()])
@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", CPP_SLOWLY])
def test_a_score_written_to_before_the_backward(
    backend: str, name: str, make: Callable[[Tensor], fj.Score], shape: tuple[int, ...], normalizer: fj.Normalizer
) -> None:
    """The right gradient, or autograd's own error."""
    if backend == "segments" and name == "ScoreMod" and isinstance(normalizer, fj.Softmax):
        pytest.skip("not additive")
    x, k, v = make_qkv(LENGTHS, dim=8)
    values, held = x.values.requires_grad_(), torch.full(shape, 0.3, dtype=F64)

    def loss() -> Tensor:
        score = make(held)
        # a window whose spans are not one bias for all
        mask = fj.Causal() & fj.Prefix(torch.tensor([9, 9, 9, 9]))
        y = x.with_values(values)
        return fj.attention(y, k, v, mask=mask, score=score, normalizer=normalizer, backend=backend).values.sum()

    (wanted,) = torch.autograd.grad(loss(), values)
    total = loss()
    held.fill_(3.0)
    got = _outcome(lambda: torch.autograd.grad(total, values)[0])
    _is_right_or_an_error(got, wanted)


def _is_right_or_an_error(got: Tensor | RuntimeError, wanted: Tensor) -> None:
    if isinstance(got, Tensor):
        torch.testing.assert_close(got, wanted)
    else:
        assert "modified by an inplace operation" in str(got) or "reads something else in the backward" in str(got)


def _outcome(run: Callable[[], Tensor]) -> Tensor | RuntimeError:
    try:
        return run()
    except RuntimeError as error:
        return error


GLOBAL = torch.tensor(1.0, dtype=F64)


def scaled_by_a_global(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s * GLOBAL


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU()], ids=repr)
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_names_bound_anew_before_the_backward(
    backend: str, normalizer: fj.Normalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a loop that makes a function of its variable, or in a notebook."""
    x, k, v = make_qkv(LENGTHS, dim=8)
    leaf = x.values.requires_grad_()
    losses, wanted = [], []
    for c in (1.0, 2.0):
        score = fj.ScoreMod(lambda s, b, h, i, j: s * c) >> fj.ScoreMod(scaled_by_a_global)  # noqa: B023
        y = x.with_values(leaf)
        loss = fj.attention(y, k, v, score=score, normalizer=normalizer, backend=backend).values.sum()
        wanted += torch.autograd.grad(loss, leaf, retain_graph=True)
        losses.append(loss)
    monkeypatch.setitem(globals(), "GLOBAL", torch.tensor(5.0, dtype=F64))
    for loss, right in zip(losses, wanted, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], right)


# A plan holds what its mask was made from.

BACKENDS = [
    "auto",
    "reference",
    "tiled",
    "segments",
    CPP_SLOWLY,
    pytest.param("flex", marks=pytest.mark.slow),
]
IDS = torch.tensor([0, 1, 0, 1])
OTHER = torch.tensor([0, 0, 0, 1])


def _masks() -> list[tuple[str, Callable[[Tensor], fj.Mask]]]:
    return [
        ("SameGroup", fj.SameGroup),
        ("kv_ids", lambda t: fj.SameGroup(IDS, t)),
        ("Prefix", lambda t: fj.Prefix(t[2:3] + t[1:2])),
        ("Rows", lambda t: fj.Rows(t, t + 1)),
        ("Dense", lambda t: fj.Dense(t.expand(4, 4) == 0)),
        ("closure", lambda t: fj.MaskMod(lambda b, h, i, j: t[i] == t[j])),
        ("PerHead", lambda t: fj.PerHead([fj.SameGroup(t) & fj.Causal()])),
    ]


@pytest.mark.parametrize(("name", "make"), _masks(), ids=[name for name, _ in _masks()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_holds_its_mask(backend: str, name: str, make: Callable[[Tensor], fj.Mask]) -> None:
    if backend == "flex" and name not in ("SameGroup", "closure"):
        pytest.skip("two graphs are enough")
    x = fj.Jagged.from_lengths(torch.eye(4)[:, None], [4])
    given = IDS.clone()
    plan = fj.plan(x, mask=make(given))
    wanted = fj.plan(x, mask=make(IDS.clone())).to_dense()
    given.copy_(OTHER)
    got = fj.attention(x, x, x, plan=plan, scale=0.0, backend=backend).values[:, 0] > 0
    assert torch.equal(got, wanted.view(4, 4))


class Held:
    """A predicate that reads a tensor of its own."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.ids[i] == self.ids[j]


SOMEWHERE = torch.tensor([0, 1, 0, 1])


def of_a_global(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return SOMEWHERE[i] == SOMEWHERE[j]


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "segments", CPP_SLOWLY])
def test_a_mask_that_reads_what_cannot_be_held_is_an_error_when_it_changes(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = fj.Jagged.from_lengths(torch.eye(4)[:, None], [4])
    held = Held(IDS.clone())
    plan = fj.plan(x, mask=fj.MaskMod(held))
    fj.attention(x, x, x, plan=plan, backend=backend)
    held.ids.copy_(OTHER)
    with pytest.raises(PlanError, match=r"plan: a tensor \[4\] was written to that its mask's function reads"):
        fj.attention(x, x, x, plan=plan, backend=backend)
    plan = fj.plan(x, mask=fj.MaskMod(of_a_global))
    fj.attention(x, x, x, plan=plan, backend=backend)
    monkeypatch.setitem(globals(), "SOMEWHERE", OTHER)
    with pytest.raises(PlanError, match="plan: something was bound anew that its mask's function reads"):
        fj.attention(x, x, x, plan=plan, backend=backend)


def test_a_plan_whose_mask_reads_something_else_by_now_is_not_moved() -> None:
    """Its tiles are those of what was read before."""
    x = fj.Jagged.from_lengths(torch.eye(4)[:, None], [4])
    held = Held(IDS.clone())
    plan = fj.plan(x, mask=fj.MaskMod(held))
    held.ids.copy_(OTHER)
    with pytest.raises(PlanError, match=r"plan: a tensor \[4\] was written to that its mask's function reads"):
        plan.to("cpu")


def test_scores_of_a_plan_stay_live() -> None:
    x, k, v = make_qkv([4, 9], dim=8)
    table = torch.zeros(2, 5, dtype=F64)
    plan = fj.plan(x, mask=fj.Causal(), score=fj.RelativeBias(table))
    table.copy_(torch.randn(2, 5, dtype=F64))
    for backend in ("reference", "tiled", "segments"):
        got = fj.attention(x, k, v, plan=plan, backend=backend).values
        wanted = fj.attention(x, k, v, mask=fj.Causal(), score=fj.RelativeBias(table.clone()), backend=backend).values
        torch.testing.assert_close(got, wanted)


class Reads:
    """Functions that read a number and a tensor of an object, of a list, of a default, or of a module."""

    def __init__(self, half: bool) -> None:
        self.c, self.w = 1.0, torch.ones(2, dtype=torch.bfloat16 if half else F64)

    def score(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * self.c + self.w[h]

    def mask(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j) * self.w[0] <= 9 * self.c


def _write_number(x: Reads) -> None:
    x.c = 3.0


def _bind_tensor(x: Reads) -> None:
    x.w = torch.full_like(x.w, 5.0)


def _write_tensor(x: Reads) -> None:
    x.w.fill_(5.0)


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU()], ids=repr)
@pytest.mark.parametrize("half", [False, True], ids=["double", "half"])
@pytest.mark.parametrize("change", [_write_number, _bind_tensor, _write_tensor])
@pytest.mark.parametrize("kind", ["score", "mask"])
@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", CPP_SLOWLY])
def test_attributes_that_change_before_the_backward(
    backend: str, kind: str, change: Callable[[Reads], None], half: bool, normalizer: fj.Normalizer
) -> None:
    """The right gradient or an error, of scores and of masks. A mask's number need not be noticed."""
    if kind == "score" and backend == "segments" and isinstance(normalizer, fj.Softmax):
        pytest.skip("not additive")
    if kind == "mask" and change is _write_number:
        pytest.skip("promised of names only")
    x, k, v = make_qkv(LENGTHS, dim=8)
    values, reads = x.values.requires_grad_(), Reads(half)
    given = {kind: fj.MaskMod(reads.mask) if kind == "mask" else fj.ScoreMod(reads.score)}

    def loss() -> Tensor:
        y = x.with_values(values)
        return fj.attention(y, k, v, normalizer=normalizer, backend=backend, **given).values.sum()

    (wanted,) = torch.autograd.grad(loss(), values)
    total = loss()
    change(reads)
    _is_right_or_an_error(_outcome(lambda: torch.autograd.grad(total, values)[0]), wanted)


@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", CPP_SLOWLY])
def test_names_in_masks_bound_anew_before_the_backward(backend: str) -> None:
    x, k, v = make_qkv(LENGTHS, dim=8)
    values, wanted, losses = x.values.requires_grad_(), [], []
    for width in (2, 9):
        held = [torch.tensor(width)]
        mask = fj.MaskMod(lambda b, h, i, j: (i - j).abs() <= width)  # noqa: B023
        mask &= fj.MaskMod(lambda b, h, i, j, most=held[0]: i - j <= most) | fj.MaskMod(
            lambda b, h, i, j: i - j <= held[0]  # noqa: B023
        )
        loss = fj.attention(x.with_values(values), k, v, mask=mask, backend=backend).values.sum()
        wanted += torch.autograd.grad(loss, values, retain_graph=True)
        held[0].fill_(100)
        held[0] = torch.tensor(0)
        losses.append(loss)
    for loss, right in zip(losses, wanted, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, values)[0], right)


def test_a_module_whose_parameter_is_replaced_is_an_error() -> None:
    """As under torch.func.functional_call, when the backward calls the function again."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2, dtype=F64))

        def forward(self, x: fj.Jagged) -> Tensor:
            score = fj.ScoreMod(lambda s, b, h, i, j: s * self.w[h])
            return fj.attention(x, x, x, score=score, backend="tiled").values.pow(2).sum()

    x, _, _ = make_qkv(LENGTHS, dim=8)
    w = torch.ones(2, dtype=F64, requires_grad=True)
    total = torch.func.functional_call(Layer(), {"w": w}, (x,))
    with pytest.raises(DifferentiationError, match="fn: <lambda> reads something else in the backward"):
        torch.autograd.grad(total, w)


def half_table(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + HALF[h] * j


HALF = torch.tensor([0.3, -0.2], dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_training_and_evaluation_agree(backend: str) -> None:
    x, k, v = make_qkv([300], dim=8, dtype=torch.float32)
    score = fj.ScoreMod(half_table)
    trained = fj.attention(x, k, v, score=score, backend=backend).values.detach()
    with torch.no_grad():
        assert torch.equal(fj.attention(x, k, v, score=score, backend=backend).values, trained)


def test_nothing_waits_for_the_garbage_collector() -> None:
    x, k, v = make_qkv(LENGTHS, dim=8)
    table = torch.ones(2, dtype=F64, requires_grad=True) * 2
    alive = weakref.ref(table)
    gc.disable()
    try:
        fj.attention(x, k, v, score=fj.ScoreMod(lambda s, b, h, i, j, t=table: s + t[h]), backend="tiled")
        del table
        assert alive() is None
    finally:
        gc.enable()


def test_plans_with_functions_are_pickled_and_copied() -> None:
    x, k, v = make_qkv(LENGTHS, dim=8)
    plan = fj.plan(x, mask=fj.MaskMod(of_a_global_number), score=fj.ScoreMod(with_attributes))
    wanted = fj.attention(x, k, v, plan=plan, backend="tiled").values
    for twin in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert torch.equal(fj.attention(x, k, v, plan=twin, backend="tiled").values, wanted)


NUMBER = 3


def of_a_global_number(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.abs(i - j) < NUMBER


def with_attributes(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + with_attributes.shift + globals()["NUMBER"]  # type: ignore[attr-defined]


with_attributes.shift = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["tiled", "segments", CPP_SLOWLY])
def test_scores_made_in_inference_mode_train(backend: str) -> None:
    x, k, v = make_qkv([7, 3], dim=8)
    with torch.inference_mode():
        slopes, times = torch.ones(2, dtype=F64), torch.arange(10)
    score = fj.Alibi(slopes) >> fj.TimeBias(torch.zeros(2, 2, dtype=F64), times, torch.tensor([1]))
    values = x.values.requires_grad_()
    out = fj.attention(x.with_values(values), k, v, mask=fj.Causal(), score=score, backend=backend)
    assert bool(torch.autograd.grad(out.values.sum(), values)[0].any())


@pytest.mark.parametrize("backend", ["tiled", "segments", "reference", CPP_SLOWLY])
def test_tensors_that_a_function_makes_at_each_call_are_no_change(backend: str) -> None:
    x, k, v = make_qkv([7, 3], dim=8)
    table = np.array([True, False] * 4)
    mask = fj.MaskMod(lambda b, h, i, j: torch.as_tensor(table)[i] | torch.from_numpy(table)[j])
    plan = fj.plan(x, mask=mask)
    values = x.values.requires_grad_()
    wanted = fj.attention(x, k, v, mask=fj.MaskMod(lambda b, h, i, j: (i % 2 == 0) | (j % 2 == 0)), backend=backend)
    for _ in range(2):
        out = fj.attention(x.with_values(values), k, v, plan=plan, backend=backend).values
        torch.testing.assert_close(out, wanted.values)
        assert bool(torch.autograd.grad(out.sin().sum(), values)[0].any())
