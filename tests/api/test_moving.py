"""Plans, masks and scores on another device, in page-locked memory, and in another process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from cases import CUDA_ONLY, EDGE_LENGTHS, make_qkv
from torch import Tensor

import flexjag as fj
from flexjag.errors import MaskError, PlanError, ShapeError
from flexjag.lowering.layout import cpu_stands_in_for_gpu
from flexjag.lowering.outline import with_tiles
from flexjag.moving import Movable, once

IDS = torch.tensor([1, 2, 1, 1, 2, 1, 2, 2, 2, 1])
LENGTHS = [3, 0, 7]
EVEN = torch.tensor([True, False])


def even(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i + j) % 2 == 0


def closes_over(table: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, i, j: table[(i + j) % 2]


MASKS: dict[str, fj.Mask] = {
    "causal": fj.Causal(),
    "per segment": fj.Causal() & fj.Window(torch.tensor([1, 2, 3]), None),
    "opaque": fj.Causal() & (fj.SameGroup(IDS) | fj.MaskMod(even)),
    "closure": fj.MaskMod(closes_over(EVEN)),
    "per head": fj.PerHead((fj.Causal(), fj.Window(2, 2))),
}
SCORES: dict[str, fj.Score | None] = {
    "none": None,
    "slopes": fj.Alibi.from_heads(2),
    "times": fj.TimeBias(torch.randn(2, 4, dtype=torch.float64), IDS, torch.arange(3)),
}


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a plan's fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [x for one in value for x in tensors(one)]
    return [x for f in fields(value) for x in tensors(getattr(value, f.name))] if is_dataclass(value) else []


def copied(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
def test_a_moved_plan_gives_the_same_bits(mask: fj.Mask, score: fj.Score | None, backend: str) -> None:
    q, k, v = make_qkv(LENGTHS)
    plan = fj.plan(q, mask=mask, score=score, block_size=16)
    other = plan.changed(once(copied))
    wanted = fj.attention(q, k, v, plan=plan, backend=backend).values
    assert torch.equal(fj.attention(q, k, v, plan=other, backend=backend).values, wanted)
    before, after = ({x.untyped_storage().data_ptr() for x in tensors(p)} for p in (plan, other))
    assert after
    assert not before & after
    assert repr(other) == repr(plan)
    sent = other if mask is not MASKS["closure"] else None
    if sent is not None:
        again = pickle.loads(pickle.dumps(sent))
        assert torch.equal(fj.attention(q, k, v, plan=again, backend=backend).values, wanted)


@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS)
def test_edges_move(lengths: list[int]) -> None:
    q, k, v = make_qkv(lengths)
    for mask in (fj.Causal(), fj.MaskMod(even)):
        plan = fj.plan(q, mask=mask, block_size=16)
        other = plan.changed(once(copied))
        found, wanted = (fj.attention(q, k, v, plan=p, backend="tiled").values for p in (other, plan))
        assert torch.equal(found, wanted)
        assert (other.layout.kv_offsets is other.layout.q_offsets) == (plan.layout.kv_offsets is plan.layout.q_offsets)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_plans_for_a_gpu_are_those_that_are_made_there(mask: fj.Mask) -> None:
    q, _, _ = make_qkv(LENGTHS)
    score = fj.TimeBias(torch.randn(2, 4, dtype=torch.float64), IDS, torch.arange(3))
    plan = fj.plan(q, mask=mask, score=score)
    with cpu_stands_in_for_gpu():
        wanted = fj.plan(q, mask=mask, score=score)
        found = plan.changed(once(copied))
    assert found.layout.on_gpu
    for name in ("layout", "tables", "kernel_masks", "kernel_score", "made_tiles", "sandwiches", "head_of"):
        pairs = list(zip(tensors(getattr(found, name)), tensors(getattr(wanted, name)), strict=True))
        for a, b in pairs:
            assert a.shape == b.shape
            assert torch.equal(a, b) or name == "made_tiles"  # entries of tables past a row's count mean nothing
    assert torch.equal(found.to_dense(2), wanted.to_dense(2))
    back = found.changed(once(copied))
    assert not back.layout.on_gpu
    assert torch.equal(back.to_dense(2), plan.to_dense(2))


def test_where_only_shapes_are_known() -> None:
    q, _, _ = make_qkv(LENGTHS)
    for mask in MASKS.values():
        moved = fj.plan(q, mask=mask).to("meta")
        assert {x.device.type for x in tensors(moved)} == {"meta"}


def test_shared_memory_stays_shared() -> None:
    q, _, _ = make_qkv([100_000], heads=1, dim=1, dtype=torch.float32)
    plan = with_tiles(fj.plan(q, mask=fj.Causal()))
    held = (tensors(p) for p in (plan, plan.changed(once(copied))))
    size = [sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in one}.values()) for one in held]
    assert size[1] <= 1.1 * size[0]
    wide = torch.arange(5).expand(1000, 5)
    moved = once(copied)(wide)
    assert torch.equal(moved, wide)
    assert moved.untyped_storage().nbytes() == 40
    rows = torch.arange(10).as_strided((4, 3), (2, 1), 1)
    assert torch.equal(once(copied)(rows), rows)


def test_what_the_mask_reads_is_watched_after_a_move() -> None:
    q, k, v = make_qkv(LENGTHS)
    table = torch.tensor([True, False])
    plan = fj.plan(q, mask=fj.MaskMod(closes_over(table))).changed(once(copied))
    wanted = fj.attention(q, k, v, plan=plan, backend="tiled").values
    table.logical_not_()  # the plan holds a copy
    assert torch.equal(fj.attention(q, k, v, plan=plan, backend="tiled").values, wanted)


def test_masks_and_scores_move_with_what_functions_close_over() -> None:
    mask = (fj.MaskMod(closes_over(EVEN)) | fj.SameGroup(IDS)).to("meta", non_blocking=True)
    assert isinstance(mask, fj.Mask)
    with pytest.raises((RuntimeError, NotImplementedError)):
        mask.left.fn(*(torch.zeros((), dtype=torch.int32) for _ in range(4))).item()  # type: ignore[attr-defined]
    table = torch.zeros(2, 5, requires_grad=True)
    score = fj.RelativeBias(table) >> fj.SoftCap(3.0)
    moved = score.changed(copied)
    moved.first.table.sum().backward()  # type: ignore[attr-defined]
    assert table.grad is not None
    assert (table.grad == 1).all()
    assert fj.Causal().to("meta") == fj.Causal()
    with pytest.raises(MaskError, match="ids: must be on the batch's device"):
        fj.plan(make_qkv(LENGTHS)[0], mask=fj.SameGroup(IDS).to("meta"))


def test_every_public_holder_moves() -> None:
    for kind in (fj.Jagged, fj.Plan, fj.Mask, fj.Score, fj.data.Batch):
        assert issubclass(kind, Movable)
        assert all(callable(getattr(kind, name)) for name in ("to", "cpu", "cuda", "pin_memory"))


def test_dtypes_are_no_devices() -> None:
    """Offsets and ids in half precision would be others."""
    x = make_qkv(LENGTHS)[0]
    held = (fj.plan(x, mask=fj.SameGroup(IDS)), fj.SameGroup(IDS), fj.data.Batch(x=x), fj.Alibi.from_heads(2))
    for one in held:
        with pytest.raises(ShapeError, match=r"device: must be a device; what is held keeps its dtypes; got .*float16"):
            one.to(torch.float16)
    assert x.to(torch.float16).offsets.dtype == torch.int64


def test_a_plan_moved_for_another_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)  # real pinning needs a GPU
    q, k, v = make_qkv(LENGTHS)
    plan = fj.plan(q, mask=fj.Causal()).pin_memory()
    other = make_qkv([4, 0, 6])
    with pytest.raises(PlanError):
        fj.attention(*other, plan=plan)
    assert fj.attention(q, k, v, plan=plan).values.shape == q.values.shape


class TestOnAGpu:
    pytestmark = CUDA_ONLY

    @pytest.mark.parametrize("score", [None, fj.Alibi.from_heads(2)], ids=["no score", "slopes"])
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_a_plan_from_the_host(self, mask: fj.Mask, score: fj.Score | None) -> None:
        q, k, v = make_qkv(LENGTHS, dim=32, dtype=torch.float32)
        pinned = fj.data.Batch(q=q, k=k, v=v, plan=fj.plan(q, mask=mask, score=score)).pin_memory()
        assert all(x.is_pinned() for x in tensors(pinned["plan"]) if x.numel())
        there = pinned.to("cuda", non_blocking=True)
        made = fj.plan(there["q"], mask=mask.to("cuda"), score=None if score is None else score.to("cuda"))
        for backend in ("tiled", "flex"):
            found, wanted = (
                fj.attention(there["q"], there["k"], there["v"], plan=p, backend=backend).values
                for p in (there["plan"], made)
            )
            assert torch.equal(found, wanted)
        host = fj.attention(q, k, v, mask=mask, score=score, backend="reference").values
        torch.testing.assert_close(found.cpu(), host, rtol=2e-3, atol=2e-3)  # TF32 on GPUs

    def test_the_host_does_not_wait(self) -> None:
        plan = fj.plan(make_qkv(LENGTHS)[0], mask=MASKS["per segment"]).pin_memory()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.to("cuda", non_blocking=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
