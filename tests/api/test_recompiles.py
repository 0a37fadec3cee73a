"""What a caller does that compiles a function again is said in one line: what changed, and what to do instead."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import mostly_slow
from torch import Tensor, nn

import flexjag as fj
from flexjag.api import recompiles


def batch(*lengths: int, heads: int = 2, **options: Any) -> fj.Jagged:
    lengths = lengths or (3, 4)
    return fj.Jagged.from_lengths(torch.randn(sum(lengths), heads, 8, **options), list(lengths))


def attend(
    q: fj.Jagged,
    *,
    mask: fj.Mask | None = None,
    score: fj.Score | None = None,
    plan: fj.Plan | None = None,
    scale: float | None = None,
    backend: str = "tiled",
) -> Tensor:
    return fj.attention(q, q, q, mask=mask, score=score, plan=plan, scale=scale, backend=backend).values


def summed(*tensors: Tensor, **options: Any) -> Tensor:
    return sum(x.sum() for x in (*tensors, *options.values()))


def from_tensors(values: Tensor, offsets: Tensor) -> Tensor:
    q = fj.Jagged(values, offsets)
    return q.positions + q.values[:, 0, 0]


def windowed(q: fj.Jagged, width: int) -> Tensor:
    return fj.attention(q, q, q, mask=fj.Window(width, 0), backend="tiled").values


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def of_all(calls: list[Callable[[Callable[..., Any]], Any]], fn: Callable[..., Any] = attend) -> recompiles.Recompiles:
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="eager", fullgraph=True)
    with fj.explain_recompiles() as seen:
        for call in calls:
            call(compiled)
    return seen


Call = tuple[tuple[Any, ...], dict[str, Any]]
CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Call]], str]] = {
    "number": (
        windowed,
        lambda: [((batch(), w), {}) for w in (3, 4, 5)],
        "width is 4, and the graph is for 3: PyTorch makes this number a symbol now, once; keep it the same, or pass it"
        " in a tensor",
    ),
    "bound of a mask": (
        attend,
        lambda: [((batch(),), {"mask": fj.Window(w, 0)}) for w in (3, 4)],
        "mask.left is 4, and the graph is for 3: the numbers of Window are part of a graph; give what varies as a"
        " tensor with one entry per segment",
    ),
    "number of a score": (
        attend,
        lambda: [((batch(),), {"score": fj.SoftCap(c)}) for c in (3.0, 4.0)],
        "score.cap is 4.0, and the graph is for 3.0: the numbers of SoftCap are part of a graph; keep it the same",
    ),
    "scale": (
        attend,
        lambda: [((batch(),), {"scale": s}) for s in (0.5, 0.6)],
        "scale is 0.6, and the graph is for 0.5: keep it the same, or multiply by a tensor instead",
    ),
    "structure": (
        attend,
        lambda: [((batch(),), {"mask": mask}) for mask in (fj.Causal(), fj.Causal() & fj.Window(2, 0))],
        "mask is Causal() & Window(2, 0), was Causal: each structure has a graph; what varies in one structure belongs"
        " in a tensor",
    ),
    "optional": (
        attend,
        lambda: [((batch(),), {}), ((batch(),), {"mask": fj.Causal()})],
        "mask is given, and was None before: each has a graph",
    ),
    "dtype": (
        attend,
        lambda: [((batch(),), {}), ((batch(dtype=torch.bfloat16),), {})],
        "q.values is bfloat16, and the graph is for float32; convert it before the call",
    ),
    "gradient": (
        attend,
        lambda: [((batch(),), {}), ((batch(requires_grad=True),), {})],
        "q.values needs a gradient, and did not before: each has a graph; keep it the same in every step",
    ),
    "heads": (
        attend,
        lambda: [((batch(),), {}), ((batch(heads=4),), {})],
        "q.values.shape[1] is 4, and the graph is for 2: numbers of heads and features are part of a graph",
    ),
    "backend": (
        attend,
        lambda: [((batch(),), {"backend": b}) for b in ("tiled", "auto")],
        "backend is 'auto', and the graph is for 'tiled': each has a graph",
    ),
    "strides": (
        attend,
        lambda: [((batch(),), {}), ((batch().map(lambda v: v.transpose(1, 2).contiguous().transpose(1, 2)),), {})],
        "q.values has other strides, [16, 1, 2]: each order in memory has a graph; call contiguous() before",
    ),
    "plan, mask": (
        attend,
        lambda: [((batch(),), {"plan": fj.plan(batch(), mask=mask)}) for mask in (fj.Causal(), fj.MaskMod(causal))],
        "plan differs in its mask (MaskMod, was Causal); make every plan by one call with arguments of one kind",
    ),
    "plan, number": (
        attend,
        lambda: [((batch(),), {"plan": fj.plan(batch(), score=fj.SoftCap(c))}) for c in (2.0, 3.0)],
        "plan differs in its score (plan.score.cap is 3.0, was 2.0); make every plan by one call with arguments of one"
        " kind",
    ),
    "plan, bound": (
        attend,
        lambda: [((batch(),), {"plan": fj.plan(batch(), max_length=n)}) for n in (None, 20)],
        "plan differs in its max_length; make every plan by one call with arguments of one kind",
    ),
    "one token": (
        attend,
        lambda: [((batch(),), {}), ((batch(1),), {})],
        "2 <= q.values.shape[0] does not hold: PyTorch makes one more graph for each of the sizes 0 and 1; nothing"
        " needs to be done",
    ),
    "entries": (
        summed,
        lambda: [((torch.ones(2),) * n, {}) for n in (2, 3)],
        "tensors has another number of entries: each has a graph",
    ),
    "options": (
        summed,
        lambda: [((torch.ones(2),), {}), ((torch.ones(2),), {"x": torch.ones(3)})],
        "options has another number of entries: each has a graph",
    ),
    "unmarked": (
        from_tensors,
        lambda: [((torch.randn(n, 2, 8), torch.tensor([0, n])), {}) for n in (7, 9, 11)],
        "values.shape[0] is 9, and the graph is for 7 only: PyTorch makes this size a symbol now; call "
        "torch._dynamo.maybe_mark_dynamic(values, 0) before, or pass a Jagged, which does",
    ),
}


QUICK = ("dtype", "bound of a mask", "plan, number", "entries", "options", "unmarked")


@pytest.mark.parametrize("case", mostly_slow(CASES, *QUICK))
def test_a_recompilation_is_explained(case: str) -> None:
    fn, calls, line = CASES[case]
    seen = of_all([lambda f, given=given: f(*given[0], **given[1]) for given in calls()], fn)
    place = f"{fn.__qualname__} (test_recompiles.py:{fn.__code__.co_firstlineno})"
    assert str(seen) == f"{place}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "line"),
    [
        (torch.no_grad, "whether gradients are recorded (torch.no_grad, torch.inference_mode) changed"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "whether autocast is on changed"),
    ],
    ids=["no_grad", "autocast"],
)
def test_modes_are_explained(mode: Callable[[], Any], line: str) -> None:
    def within(context: Any) -> Callable[[Callable[..., Any]], None]:
        def call(compiled: Callable[..., Any]) -> None:
            with context:
                compiled(batch())

        return call

    (one,) = of_all([within(nullcontext()), within(mode())])
    assert one.changes == (f"{line}: each has a graph",)


def test_modules_are_named_as_they_are_written() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 2

        def forward(self, values: Tensor) -> Tensor:
            return values * self.factor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Scale()])

        def forward(self, x: fj.Jagged) -> Tensor:
            return x.map(self.layers[0]).values

    model = Model()

    def changed(compiled: Callable[..., Any]) -> None:
        model.layers[0].factor = 3
        compiled(batch())

    (one,) = of_all([lambda f: f(batch()), changed], model)
    assert one.function.startswith("test_modules_are_named_as_they_are_written.<locals>.Model.forward (")
    assert one.changes[0].startswith("self.layers.0.factor is 3, and the graph is for 2: PyTorch makes this number")


def test_calls_of_one_kind_are_no_recompilation() -> None:
    seen = of_all([lambda f, n=n: f(batch(n, 2)) for n in (3, 5, 9)])
    assert seen == []
    assert str(seen) == ""


def test_the_graph_of_the_last_call_comes_first_and_the_list_ends_with_the_context() -> None:
    torch._dynamo.reset()
    compiled, said = torch.compile(from_tensors, backend="eager"), []
    given = [batch(), batch(dtype=torch.float64), batch(dtype=torch.bfloat16), batch(dtype=torch.float16)]
    given = [(x.values, x.offsets) for x in given]
    compiled(*given[0])
    with fj.explain_recompiles(said.append) as seen:
        compiled(*given[1])
        compiled(*given[2])
    compiled(*given[3])
    assert [len(x.changes) for x in seen] == [1, 2]
    assert [x.split("the graph is for ")[1].split(";")[0] for x in seen[1].changes] == ["float64", "float32"]
    assert said == [str(x) for x in seen] == str(seen).split("\n")


def test_guards_that_are_not_known_are_quoted() -> None:
    change = recompiles._change("0/0: x[0] % 3 == 1  # for y in x:  # a.py:3 in f\nUser stack trace:\n  here", {})
    assert change == "PyTorch's guard failed: x[0] % 3 == 1"


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("guard", ["x == 3", "y.z == 3", "f(x) is None", "x[ == 3", "___check_obj_id(q, 3)"])
def test_what_cannot_be_looked_up_or_printed_is_quoted(guard: str) -> None:
    assert recompiles._change(f"0/0: {guard}", {"x": Unprintable()}) == f"PyTorch's guard failed: {guard}"


@pytest.mark.slow  # a process
@pytest.mark.parametrize("value", ["1", "0"])
def test_the_environment_switches_it_on(value: str) -> None:
    code = """
        import flexjag as fj, torch
        fn = torch.compile(lambda x: x.values.sin(), backend="eager")
        x = fj.Jagged.from_lengths(torch.randn(3), [3])
        fn(x), fn(x.to(torch.float64))
    """
    environment = os.environ | {recompiles.SWITCH: value}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    line = "x.values is float64, and the graph is for float32; convert it before the call"
    assert (f"flexjag: <lambda> (<string>:3): {line}" in done.stderr.splitlines()) == (value == "1")
