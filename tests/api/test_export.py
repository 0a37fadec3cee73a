"""Batches through torch.export, and sizes that a graph reads from data."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from cases import jagged
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

import flexjag as fj
from flexjag import Jagged, ops
from flexjag.variants import hstu_mask

T, U, S = Dim("T", max=4096), Dim("U", max=4096), Dim("S", max=100)


def batch(lengths: list[int], seed: int = 0) -> Jagged:
    return jagged(lengths, 2, 16, dtype=torch.float32, seed=seed)


class Cross(nn.Module):
    """A plan made in the graph, and a Jagged in and out."""

    def forward(self, x: Jagged, y: Jagged) -> Jagged:
        plan = fj.plan(x, y, mask=fj.Window(20, 0) | fj.Prefix(2), score=fj.Alibi.from_heads(2))
        return fj.attention(x, y, y, plan=plan)


def test_export_with_named_sizes() -> None:
    example = batch([100, 150, 50]), batch([100, 250, 60], 1)
    sizes = [{0: T}, {0: S}], [{0: U}, {0: S}]
    file = io.BytesIO()
    torch.export.save(torch.export.export(Cross(), example, dynamic_shapes=sizes), file)
    file.seek(0)
    module = torch.export.load(file).module()
    for q_lengths, kv_lengths in (
        ([100, 150, 50], [100, 250, 60]),
        ([3, 2], [5, 900]),
        ([500, 1, 0, 7], [1, 0, 3, 120]),
    ):
        given = batch(q_lengths, 2), batch(kv_lengths, 3)
        out = module(*given)
        assert isinstance(out, Jagged)
        torch.testing.assert_close(out.values, Cross()(*given).values)


def test_export_of_another_normalizer() -> None:
    class Attend(nn.Module):
        def forward(self, x: Jagged) -> Tensor:
            return fj.attention(x, x, x, mask=fj.Causal(), normalizer=fj.SiLU(0.1)).values

    program = torch.export.export(Attend(), (batch([300, 20]),), dynamic_shapes=([{0: T}, {0: S}],))
    for lengths in ([300, 20], [5, 0, 3]):
        torch.testing.assert_close(program.module()(batch(lengths)), Attend()(batch(lengths)))


def packed(n: Tensor) -> Jagged:
    """A batch whose number of tokens is read from the lengths in the graph."""
    a, b = n.tolist()
    torch._check(a >= 0)
    torch._check(b >= 0)
    token = torch.arange(a + b, dtype=torch.float32)
    values = torch.stack([(token * (h + 1)).sin() for h in range(32)], 1).view(a + b, 2, 16)
    return Jagged(values, torch.cat([n.new_zeros(1), n.cumsum(0)]))


def planned(n: Tensor) -> Tensor:
    x = packed(n)
    plan = fj.plan(x, mask=fj.Causal() & (fj.Window(3, 0) | fj.Prefix(1)))
    return fj.attention(x, x.with_values(x.values * 2), x, plan=plan, backend="tiled").values


def crossed(n: Tensor) -> Tensor:
    x, y = packed(n), packed(n.flip(0))
    return fj.attention(x, y, y, backend="tiled").values


def recommended(n: Tensor) -> Tensor:
    x = packed(n)
    mask = hstu_mask(x, contextual=2, max_attn_len=3, targets=(n > 1).long())
    return fj.attention(x, x, x, mask=mask, normalizer=fj.SiLU(0.1), backend="tiled").values


def operated(n: Tensor) -> Tensor:
    x, y = packed(n), packed(n)
    flat = ops.jagged_softmax(x + y).map(lambda v: v.flatten(1))
    again = ops.jagged_index_select(flat, torch.tensor([1, 0]))
    return ops.jagged_dense_attention(ops.segment_mean(flat)[:, None], again, again)


@pytest.mark.parametrize("fn", [planned, crossed, recommended, operated])
def test_sizes_read_from_data_need_no_guard(fn: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(fn, fullgraph=True, backend=graphs)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for lengths in ([3, 5], [2, 2], [200, 20], [1, 0], [3, 2]):
            n = torch.tensor(lengths)
            torch.testing.assert_close(compiled(n), fn(n))
        assert graphs.frame_count == 1
        if fn is not operated:
            with pytest.raises(RuntimeError, match="Runtime assertion failed"):  # what may be empty cannot be read
                compiled(torch.tensor([0, 0]))
