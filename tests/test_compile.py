"""One graph for all batches: planning, attention and its backward under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flexjag as fj
from flexjag.testing import Graphs, assert_compiles, assert_no_leak

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM
MASK = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(2))
NUM_BATCHES = 50
AT_MOST = 2  # one for all sizes but 0 and 1, one for those


def batches() -> list[list[int]]:
    """Fifty lists of lengths, S from 1 to 8, with empty segments, S = 1, T = 1 and T a multiple of the tile among them."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(NUM_BATCHES):
        size = int(torch.randint(2, 9, (), generator=g))
        found.append(torch.randint(0, 90, (size,), generator=g).tolist())
    # Totals stay under 4096: Inductor's C++ adds up a Linear's bias gradient in another way from there on.
    assert max(map(sum, found)) < 4096
    found[10], found[20], found[30], found[40] = [57], [1], [0, 1, 0], [32, 32]
    return found


class Layer(nn.Module):
    """Attention with a residual; plans for itself if it is given no plan."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.backend = backend

    def forward(self, x: fj.Jagged, plan: fj.Plan | None) -> fj.Jagged:
        parts = self.project(x.values).unflatten(1, (3, HEADS, DIM)).unbind(1)
        q, k, v = (x.with_values(t) for t in parts)
        if plan is None:
            out = fj.attention(q, k, v, mask=MASK, score=fj.Alibi(self.slopes), backend=self.backend)
        else:
            out = fj.attention(q, k, v, plan=plan, backend=self.backend)
        return x + out.with_values(out.values.flatten(1))


class Model(nn.Module):
    """Two layers."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(backend) for _ in range(2)])
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, x: fj.Jagged, plan: fj.Plan | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, plan)
        return x.values

    def gradients(self) -> dict[str, Tensor]:
        """The gradients, which are then cleared."""
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}
        self.zero_grad()
        return found


def arguments(model: Model, with_plan: bool, learned: bool = True) -> list[tuple]:
    found = []
    for lengths in batches():
        x = fj.Jagged.from_lengths(torch.randn(sum(lengths), WIDTH), lengths)
        score = fj.Alibi(model.slopes if learned else model.slopes.detach())
        found.append((x, fj.plan(x, mask=MASK, score=score, block_size=32)) if with_plan else (x,))
    return found


def assert_same_as_eager(model: Model, args: tuple, out: Tensor, backward: bool = True) -> None:
    """Up to float32's rounding: sums over at most 720 tokens and 20 keys, through two layers."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, float(out.detach().abs().sum()) / WIDTH ** 2)}
    if backward:
        found = model.gradients()
        wanted_out = model(*args)
        wanted_out.sum().backward()
        for name, wanted in model.gradients().items():
            torch.testing.assert_close(found[name], wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    else:
        wanted_out = model(*args)
    torch.testing.assert_close(out, wanted_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_plan", [True, False], ids=["plan outside", "plan inside"])
def test_fifty_batches_share_a_graph_forward_and_backward(with_plan: bool) -> None:
    model = Model()
    given = arguments(model, with_plan)
    graphs = assert_compiles(
        model, given, max_graphs=AT_MOST, after_each=lambda i, out: assert_same_as_eager(model, given[i], out)
    )
    assert graphs.forward[0] == 0
    assert not graphs.inference
