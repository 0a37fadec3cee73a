"""Scores as modules: registered, found by what replaces parameters, and the same scores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from cases import make_qkv
from torch import Tensor, nn

import flexjag as fj

LENGTHS = [5, 0, 18]
ENDS = torch.tensor([-4, 0, 4])
TIMES = torch.arange(23) * 3
MODULES = {
    "alibi": lambda **kw: fj.nn.Alibi(2, learned=True, **kw),
    "relative": lambda **kw: fj.nn.RelativeBias(2, 3, **kw),
    "bucketed": lambda **kw: fj.nn.BucketedBias(2, ENDS, **kw),
    "t5": lambda **kw: fj.nn.T5Bias(2, 8, max_distance=9, **kw),
    "time": lambda **kw: fj.nn.TimeBias(2, ENDS, **kw),
}
NODES = {
    "alibi": lambda x: fj.Alibi(x),
    "relative": lambda x: fj.RelativeBias(x),
    "bucketed": lambda x: fj.BucketedBias(x, ENDS),
    "t5": lambda x: fj.T5Bias(x, max_distance=9),
    "time": lambda x: fj.TimeBias(x, TIMES, ENDS),
}


def attend(score: fj.Score, dtype: torch.dtype = torch.float64) -> Tensor:
    q, k, v = make_qkv(LENGTHS, dtype=dtype)
    out = fj.attention(q, k, v, mask=fj.Causal(), score=score)
    assert isinstance(out, fj.Jagged)
    return out.values.square().sum()


def call(module: nn.Module) -> fj.Score:
    return module(TIMES) if isinstance(module, fj.nn.TimeBias) else module()


@pytest.mark.parametrize("kind", MODULES)
def test_modules_make_the_score_of_their_parameter(kind: str) -> None:
    module = MODULES[kind]()
    ((name, table),) = module.named_parameters()
    assert set(module.state_dict()) == {name} | ({"boundaries"} if kind in ("bucketed", "time") else set())
    with torch.no_grad():
        table.normal_()
    attend(call(module)).backward()
    leaf = table.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(attend(NODES[kind](leaf)), leaf)
    assert wanted.abs().max() > 1e-3
    assert torch.equal(table.grad, wanted)


@pytest.mark.parametrize("kind", MODULES)
def test_modules_are_made_on_meta_and_reset(kind: str) -> None:
    module = MODULES[kind](device="meta").to_empty(device="cpu")
    module.reset_parameters()
    for name, x in MODULES[kind]().state_dict().items():
        assert torch.equal(module.state_dict()[name], x)


def test_fixed_slopes_are_a_buffer() -> None:
    module = fj.nn.Alibi(4)
    assert not list(module.parameters())
    assert torch.equal(module.double().state_dict()["slopes"], fj.Alibi.from_heads(4).slopes.double())


class Layer(nn.Module):
    """A layer with one score of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = fj.nn.RelativeBias(2, 3, dtype=torch.float32)
        self.own = nn.Parameter(torch.zeros(2, 7))
        self.held = fj.RelativeBias(self.own)  # what the modules are there to avoid

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        batch = fj.Jagged(x, offsets)
        out = fj.attention(batch, batch, batch, mask=fj.Causal(), score=self.bias() >> self.held)
        assert isinstance(out, fj.Jagged)
        return x + out.values


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:  # type: ignore[no-untyped-def]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed and gloo")
def test_sharded_layers_train_their_scores(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layer, twin = Layer(), Layer()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    q = make_qkv(LENGTHS, dtype=torch.float32)[0]
    for one in (layer, twin):
        one(q.values, q.offsets).square().sum().backward()
    table = layer.bias.table
    assert isinstance(table, DTensor)
    assert isinstance(table.grad, DTensor)
    assert twin.bias.table.grad is not None
    torch.testing.assert_close(table.grad.full_tensor(), twin.bias.table.grad)
    assert layer.own.grad is None  # nothing tells: the node's tensor does not know of the module
