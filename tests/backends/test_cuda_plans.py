"""Plans on CUDA: fixed capacity, no host syncs, CUDA graphs, one compiled graph for every batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CUDA_ONLY, check_error, double, make_qkv, needing_gradients, on_gpu

import flexjag as fj
from flexjag import Alibi, Causal, Full, MaskMod, PerHead, Prefix, Window

pytestmark = CUDA_ONLY

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """No TF32: float32 is compared with float64."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def qkv(lengths: list[int], dtype: torch.dtype) -> tuple[fj.Jagged, ...]:
    return on_gpu(*make_qkv(lengths, heads=4, dim=64, dtype=dtype))


CAPACITY = 640
CAPACITY_LENGTHS = [[300, 7, 0, 129, 1, 64], [1, 1, 1, 1, 1, 1], [320, 320, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


def capacity_batch(lengths: list[int], dtype: torch.dtype, fill: float) -> tuple[fj.Jagged, ...]:
    """q, k and v in buffers of fixed size, `fill` behind the last offset."""
    exact = qkv(lengths, dtype)
    buffers = []
    for x in exact:
        values = torch.full((CAPACITY, *x.values.shape[1:]), fill, dtype=dtype, device="cuda")
        values[: sum(lengths)] = x.values
        buffers.append(fj.Jagged(values, exact[0].offsets))
    return (*exact, *buffers)


@pytest.mark.parametrize("lengths", CAPACITY_LENGTHS, ids=str)
@EACH_DTYPE
def test_fixed_capacity(lengths: list[int], dtype: torch.dtype) -> None:
    used = sum(lengths)
    q, k, v, bq, bk, bv = capacity_batch(lengths, dtype, fill=3.0)
    plan = fj.plan(bq, mask=Causal() & (Window(50, 0) | Prefix(4)), max_tokens=CAPACITY, max_length=320)
    x, y, z = needing_gradients(bq, bk, bv)
    out, lse = fj.attention(x, y, z, plan=plan, return_lse=True, backend="flex")
    out.values.float().pow(2).sum().backward()
    assert not out.values[used:].any()
    assert (lse.values[used:] == -torch.inf).all()
    for t in (x, y, z):
        assert t.values.grad is not None
        assert not t.values.grad[used:].any()
        assert t.values.grad.isfinite().all()
    with torch.no_grad():
        same = fj.attention(q, k, v, mask=plan.mask, backend="reference")
        exact = fj.attention(*map(double, (q, k, v)), mask=plan.mask, backend="reference")
    check_error(out.values[:used], same.values, exact.values)


NO_SYNC = {
    "full": Full(),
    "sinks": Causal() & (Window(50, 0) | Prefix(4)),
    "mask_mod": Causal() & MaskMod(lambda b, h, q, kv: (q - kv) % 2 == 0),
    "per_head": PerHead([Causal(), Full(), Causal(), Full()]),
}


@pytest.mark.parametrize("mask", NO_SYNC.values(), ids=NO_SYNC.keys())
def test_fixed_capacity_plans_without_a_sync(mask: fj.Mask) -> None:
    q = capacity_batch(CAPACITY_LENGTHS[0], torch.bfloat16, fill=0.0)[3]
    fj.plan(q, mask=mask, max_tokens=CAPACITY, max_length=320)  # lazy initialisation may wait once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = fj.plan(q, mask=mask, max_tokens=CAPACITY, max_length=320)
        plan.block_mask  # noqa: B018
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plan.num_tiles > 0


def test_the_sync_check_can_fail() -> None:
    q = qkv([300, 7, 0, 129], torch.bfloat16)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            fj.plan(q, mask=Causal())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_planning_fits_in_a_cuda_graph() -> None:
    """Captured once, replayed on other offsets: the tiles are those of planning anew."""
    q = capacity_batch(CAPACITY_LENGTHS[0], torch.bfloat16, fill=0.0)[3]
    offsets = q.offsets.clone()
    static = fj.Jagged(q.values, offsets)

    def make() -> fj.Plan:
        return fj.plan(static, mask=Causal(), max_tokens=CAPACITY, max_length=320)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        make()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = make().tiles
    for lengths in CAPACITY_LENGTHS:
        batch = capacity_batch(lengths, torch.bfloat16, fill=0.0)[3]
        offsets.copy_(batch.offsets)
        graph.replay()
        expected = fj.plan(batch, mask=Causal(), max_tokens=CAPACITY, max_length=320).tiles
        for got, want in (
            (captured.all_heads.row, expected.all_heads.row),
            (captured.all_heads.full, expected.all_heads.full),
            (captured.kv_partial.count, expected.kv_partial.count),
            (captured.q_full.count, expected.q_full.count),
        ):
            assert torch.equal(got, want)


class TwoLayers(torch.nn.Module):
    """Two attention layers that share a plan made inside the graph."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = torch.nn.ModuleList(torch.nn.Linear(heads * dim, 3 * heads * dim) for _ in range(2))
        self.slopes = torch.nn.Parameter(torch.full((heads,), 0.1))

    def forward(self, x: fj.Jagged) -> torch.Tensor:
        plan = fj.plan(x, mask=Causal() & (Window(50, 0) | Prefix(4)), score=Alibi(self.slopes))
        for layer in self.project:
            parts = layer(x.values).unflatten(1, (3, self.heads, -1)).unbind(1)
            out = fj.attention(*(x.with_values(p) for p in parts), plan=plan)
            assert isinstance(out, fj.Jagged)
            x = x + x.with_values(out.values.flatten(1))
        return x.values


@EACH_DTYPE
def test_one_graph_for_every_batch(dtype: torch.dtype) -> None:
    """Twenty batches of other totals, lengths and numbers of segments, forward and backward."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    module = TwoLayers(heads=2, dim=32).to(device="cuda", dtype=dtype)
    compiled = torch.compile(module, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        segments = int(torch.randint(2, 12, (1,), generator=generator))
        lengths = torch.randint(0, 400, (segments,), generator=generator).tolist()
        lengths[0] += 2
        values = torch.randn(sum(lengths), 64, generator=generator).to(device="cuda", dtype=dtype)
        x = fj.Jagged.from_lengths(values, torch.tensor(lengths, device="cuda"))
        out = compiled(x)
        out.float().pow(2).mean().backward()
        assert out.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1
    assert module.slopes.grad is not None
    assert module.slopes.grad.isfinite().all()


def test_eager_calls_share_one_kernel_per_structure() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    forget_kernels()
    counters.clear()
    for lengths in ([300, 7], [20, 30, 0, 500], [129], [1, 2, 3, 4, 5], [777, 3]):
        q, k, v = qkv(lengths, torch.bfloat16)
        fj.attention(q, k, v, mask=Causal() | Prefix(3), backend="flex")
    assert counters["stats"]["unique_graphs"] == 1


def forget_kernels() -> None:
    """Forget the kernels that earlier tests compiled."""
    from flexjag.backends.flex import run as flex

    flex._compiled.cache_clear()


def test_a_million_tokens_plan_in_bounded_memory() -> None:
    lengths = [512] * 2048
    x = fj.Jagged.from_lengths(torch.zeros(2**20, device="cuda"), lengths)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = fj.plan(x, mask=Causal())
    assert plan.num_tiles == 2048 * 10  # four tiles a side: 4 + 3 + 2 + 1
    assert torch.cuda.max_memory_allocated() - before < 600e6
