"""A plan made once per step, passed to all layers of a compiled model that is trained as models are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPP_SLOWLY, mostly_slow
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flexjag as fj
from flexjag.upstream import dynamo_differentiates_varying_sizes

HEADS, DIM = 2, 8
MASK = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(2))
STEPS = ([5, 0, 40], [60, 3], [1, 20, 7, 0, 2])


def save_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_products),
    },
}


class Layer(nn.Module):
    """Attention with a residual and a learned score, by a plan for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, values: Tensor, offsets: Tensor, plan: fj.Plan) -> Tensor:
        x = fj.Jagged(values, offsets)
        q, k, v = (x.with_values(t) for t in self.project(values).unflatten(1, (3, HEADS, DIM)).unbind(1))
        out = fj.attention(q, k, v, plan=plan.with_score(fj.Alibi(self.slopes)))
        return values + out.values.flatten(1)


class Model(nn.Module):
    """Two layers, each checkpointed if so asked."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.options = options

    def forward(self, x: fj.Jagged, plan: fj.Plan) -> Tensor:
        values = x.values
        for layer in self.layers:
            if self.options is None:
                values = layer(values, x.offsets, plan)
            else:
                values = checkpoint(layer, values, x.offsets, plan, **self.options)
        return values


def batch(lengths: list[int], seed: int = 0) -> fj.Jagged:
    g = torch.Generator().manual_seed(seed)
    return fj.Jagged.from_lengths(torch.randn(sum(lengths), HEADS * DIM, generator=g, requires_grad=True), lengths)


def trained(call: Callable[..., Tensor], model: Model, autocast: bool) -> list[Tensor]:
    """Gradients summed up over steps, of the parameters and of each batch."""
    found = []
    for step, lengths in enumerate(STEPS):
        x = batch(lengths, step)
        plan = fj.plan(x, mask=MASK)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(x, plan)
        out.float().square().mean().backward()
        found.append(x.values.grad)
    found += [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    model.zero_grad()
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", mostly_slow(CHECKPOINTS, "non-reentrant", "selective"))
def test_a_plan_per_step_under_checkpointing_accumulation_and_autocast(kind: str, autocast: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graphs = Model(CHECKPOINTS[kind]), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    got = trained(compiled, model, autocast)
    assert graphs.frame_count == 1
    model.options = None
    wanted = trained(model, model, autocast)
    # In graphs another backend may run; under autocast q, k and v are rounded to bfloat16.
    close = {"rtol": 2**-5, "atol": 2**-7} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for found, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(found, want, **close)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_eager_checkpointing_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = Model(CHECKPOINTS[kind])
    got = trained(model, model, False)
    model.options = None
    for found, want in zip(got, trained(model, model, False), strict=True):
        if kind == "reentrant":  # adds up gradients in another order
            torch.testing.assert_close(found, want)
        else:
            assert torch.equal(found, want)


OFFSETS = torch.tensor([0, 3, 3, 8])
VALUES = torch.randn(8, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss(values: Tensor, backend: str, plan: fj.Plan | None = None) -> Tensor:
    x = fj.Jagged(values, OFFSETS)
    mask = fj.Causal() if plan is None else None
    return fj.attention(x, x, x, mask=mask, plan=plan, backend=backend).values.square().sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(VALUES),
    "jvp": lambda f: torch.func.jvp(f, (VALUES,), (VALUES.cos(),))[1],
    "vmap": lambda f: torch.vmap(f)(torch.stack([VALUES, 2 * VALUES])),
    "second order": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(VALUES),
}


NEEDS_GRAD = pytest.mark.skipif(not dynamo_differentiates_varying_sizes(), reason="an assertion of PyTorch fails")
IN_GRAPHS = [pytest.param(x, marks=NEEDS_GRAD) if x in ("grad", "second order") else x for x in TRANSFORMS]


@pytest.mark.parametrize("transform", IN_GRAPHS)
@pytest.mark.parametrize("backend", mostly_slow(["tiled", "auto"], "auto"))
def test_transforms_in_a_graph(backend: str, transform: str) -> None:
    """``auto`` takes a backend that they go through."""
    apply = TRANSFORMS[transform]
    plan = fj.plan(fj.Jagged(VALUES, OFFSETS), mask=fj.Causal(), refine_tiles=True)
    torch._dynamo.reset()
    got = torch.compile(lambda: apply(lambda x: loss(x, backend, plan)), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(got, apply(lambda x: loss(x, "reference")), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", [x for x in IN_GRAPHS if x != "jvp"])
def test_transforms_in_a_graph_that_plans(transform: str) -> None:
    apply = TRANSFORMS[transform]
    torch._dynamo.reset()
    got = torch.compile(lambda: apply(lambda x: loss(x, "auto")), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(got, apply(lambda x: loss(x, "reference")), rtol=1e-9, atol=1e-9)


def test_forward_mode_in_a_graph_that_plans_is_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda: TRANSFORMS["jvp"](lambda x: loss(x, "auto")), backend="aot_eager", fullgraph=True)
    with pytest.raises(
        RuntimeError, match="max_length: forward-mode AD inside a graph needs it, or a plan made outside"
    ):
        compiled()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", [CPP_SLOWLY])
def test_transforms_in_a_graph_of_other_backends_are_refused(backend: str, transform: str) -> None:
    """PyTorch would take its derivative in forward mode for 0."""
    apply = TRANSFORMS[transform]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: apply(lambda x: loss(x, backend)), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"torch.func transforms and forward-mode AD know plain torch operations"):
        compiled()
