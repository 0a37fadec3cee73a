"""Tensors go where the inputs are, whatever the default device; where only shapes are known, shapes come out."""

from __future__ import annotations

import pytest
import torch
from cases import jagged, make_qkv, needing_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flexjag as fj
from flexjag import Causal, MaskMod, Prefix, SameGroup, ScoreMod, SiLU, Softmax, StickBreaking, Window, ops
from flexjag.errors import PlanError
from flexjag.kernels.cpp import build

LENGTHS = [3, 0, 7]
IDS = torch.arange(10) // 2
MASKS = {
    "causal": Causal(),
    "spans": Causal() & (Window(2, 0) | Prefix(1)),
    "opaque": Causal() & (SameGroup(IDS) | MaskMod(lambda b, h, i, j: (i + j) % 2 == 0)),
}
SCORES = {
    "no score": None,
    "biases": fj.Alibi.from_heads(2) >> fj.TimeBias(torch.ones(2, 4), IDS, torch.arange(3)),
    "function": ScoreMod(lambda s, b, h, i, j: s * 2 + i),
}
ON_CPU = [
    ("reference", Softmax()),
    ("reference", SiLU()),
    ("tiled", Softmax()),
    ("tiled", SiLU()),
    ("tiled", StickBreaking()),
    ("segments", Softmax()),
    ("segments", SiLU()),
    ("segments", StickBreaking()),
]


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("backend", "normalizer"), ON_CPU, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_attention_does_not_ask_for_the_default_device(
    backend: str, normalizer: fj.Normalizer, mask: fj.Mask, score: fj.Score | None
) -> None:
    if backend == "segments" and isinstance(normalizer, Softmax) and isinstance(score, ScoreMod):
        pytest.skip("SDPA only adds biases")

    def run() -> list[Tensor]:
        q, k, v = needing_gradients(*make_qkv(LENGTHS))
        out = fj.attention(q, k, v, mask=mask, score=score, normalizer=normalizer, backend=backend).values
        return [out, *torch.autograd.grad(out.square().sum(), (q.values, k.values, v.values))]

    inputs = make_qkv(LENGTHS)
    assert inputs[0].values.device.type == "cpu"
    wanted = run()

    def elsewhere() -> list[Tensor]:
        q, k, v = needing_gradients(*inputs)
        with torch.device("meta"):
            out = fj.attention(q, k, v, mask=mask, score=score, normalizer=normalizer, backend=backend).values
            loss = out.square().sum()
            return [out, *torch.autograd.grad(loss, (q.values, k.values, v.values))]

    for x, y in zip(elsewhere(), wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(build.refusal() is not None, reason=str(build.refusal()))
def test_kernels_on_a_cpu_do_not_ask_for_the_default_device() -> None:
    """Nor do the spans of a mask that reads the head, or the gradient of a table: the kernels write where they are."""
    q, k, v = make_qkv(LENGTHS)
    mask = Causal() & MaskMod(lambda b, h, i, j: (i + j + h) % 2 == 0)

    def run() -> list[Tensor]:
        plan = fj.plan(q, mask=mask, score=fj.RelativeBias(table))
        out = fj.attention(q, k, v, plan=plan, backend="cpp").values
        return [out, *torch.autograd.grad(out.square().sum(), table)]

    table = torch.ones(2, 9, requires_grad=True)
    wanted = run()
    with torch.device("meta"):
        found = run()
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


X, Y, GRID = jagged(LENGTHS, 4), jagged(LENGTHS, 4, seed=1), jagged([9, 0, 49])
DENSE, VECTOR = torch.ones(3, 4, 5).double(), torch.ones(4).double()
PADDED, TARGETS = torch.ones(3, 7, 4).double(), torch.ones(3, 2, 4).double()
OPS = {
    "array_jagged_bmm": lambda: ops.array_jagged_bmm(GRID, X),
    "dense_to_jagged": lambda: ops.dense_to_jagged(PADDED, X.offsets),
    "jagged2_softmax": lambda: ops.jagged2_softmax(GRID, X.offsets),
    "jagged_concat": lambda: ops.jagged_concat([X, Y]),
    "jagged_dense_attention": lambda: ops.jagged_dense_attention(TARGETS, X, Y),
    "jagged_dense_bmm": lambda: ops.jagged_dense_bmm(X, DENSE),
    "jagged_dense_elementwise_add": lambda: ops.jagged_dense_elementwise_add(X, PADDED),
    "jagged_dense_elementwise_mul": lambda: ops.jagged_dense_elementwise_mul(X, PADDED),
    "jagged_index_select": lambda: ops.jagged_index_select(X, torch.tensor([2, 0], device="cpu")),
    "jagged_jagged_bmm": lambda: ops.jagged_jagged_bmm(X, Y),
    "jagged_jagged_bmm_jagged_out": lambda: ops.jagged_jagged_bmm_jagged_out(X, Y),
    "jagged_layer_norm": lambda: ops.jagged_layer_norm(X, VECTOR, VECTOR),
    "jagged_rms_norm": lambda: ops.jagged_rms_norm(X, VECTOR),
    "jagged_softmax": lambda: ops.jagged_softmax(X),
    "jagged_split": lambda: ops.jagged_split(
        X, [torch.tensor([1, 0, 4], device="cpu"), torch.tensor([2, 0, 3], device="cpu")]
    ),
    "jagged_to_padded_dense": lambda: ops.jagged_to_padded_dense(X),
    "segment_broadcast": lambda: ops.segment_broadcast(DENSE, X),
    "segment_max": lambda: ops.segment_max(X),
    "segment_mean": lambda: ops.segment_mean(X),
    "segment_min": lambda: ops.segment_min(X),
    "segment_sum": lambda: ops.segment_sum(X),
    "segment_sum in float32": lambda: ops.segment_sum(X.to(torch.float32)),
    "to_padded": lambda: X.to_padded(),
    "from_padded": lambda: fj.Jagged.from_padded(PADDED, LENGTHS),
    "from_list": lambda: fj.Jagged.from_list(X.to_list()),
    "positions": lambda: X.with_values(X.positions),
    "segment_ids": lambda: X.with_values(X.segment_ids),
    "plan": lambda: fj.plan(X, mask=MASKS["opaque"], score=SCORES["biases"]).to_dense(),
}


def test_every_op_is_here() -> None:
    assert set(ops.__all__) <= set(OPS)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_ops_do_not_ask_for_the_default_device(op) -> None:  # type: ignore[no-untyped-def]
    wanted = op()
    with torch.device("meta"):
        found = op()
    flat = [
        [x.values if isinstance(x, fj.Jagged) else x for x in (y if isinstance(y, tuple) else (y,))]
        for y in (found, wanted)
    ]
    for x, y in zip(*flat, strict=True):
        assert torch.equal(x, y)


def attend(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, mask: fj.Mask, score: fj.Score | None, normalizer
) -> Tensor:  # type: ignore[no-untyped-def]
    """In a plan of fixed capacity, with fresh tensors in the mask and the score."""
    x, y, z = (fj.Jagged(t, offsets) for t in (q, k, v))
    plan = fj.plan(x, mask=mask, score=score, normalizer=normalizer, max_length=7)
    out = fj.attention(x, y, z, plan=plan)
    assert isinstance(out, fj.Jagged)
    return out.values


FREE = {name: mask for name, mask in MASKS.items() if name != "opaque"} | {
    "function": MaskMod(lambda b, h, i, j: (i + j) % 2 == 0) & Causal()
}


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("normalizer", [Softmax(), SiLU(), StickBreaking()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("mask", FREE.values(), ids=FREE)
def test_shapes_come_out_where_only_shapes_are_known(mask: fj.Mask, normalizer: fj.Normalizer, kind: str) -> None:
    def run(device: str) -> None:
        q, k = torch.ones(10, 4, 8, device=device, requires_grad=True), torch.ones(10, 2, 8, device=device)
        v, offsets = torch.ones(10, 2, 6, device=device), torch.zeros(4, dtype=torch.int32, device=device)
        out = attend(q, k, v, offsets, mask, ScoreMod(lambda s, b, h, i, j: s * 2 + i), normalizer)
        assert (out.shape, out.dtype, out.device.type) == ((10, 4, 6), torch.float32, device)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert grad.shape == q.shape

    if kind == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cpu")


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_number_of_tiles_that_nobody_knows_is_asked_for(kind: str) -> None:
    def run(device: str) -> None:
        x = fj.Jagged(torch.ones(10, 2, 8, device=device), torch.zeros(4, dtype=torch.int32, device=device))
        with pytest.raises(PlanError, match=f"max_length: is needed where only shapes are known: on {kind} tensors"):
            _ = fj.plan(x, mask=Causal()).tiles

    if kind == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cpu")


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_a_plan_of_fixed_capacity(mode: str) -> None:
    q, k, v = (x.values for x in make_qkv(LENGTHS))
    offsets, number = make_qkv(LENGTHS)[0].offsets, torch.tensor(1)

    def call(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, number: Tensor) -> Tensor:
        score = ScoreMod(lambda s, b, h, i, j: s / q.shape[0] + q[number, h, j] * q.shape[0])
        return attend(q, k, v, offsets, Causal(), score, Softmax())

    traced = make_fx(call, tracing_mode=mode)(q, k, v, offsets, number)
    expected = call(q, k, v, offsets, number)
    torch.testing.assert_close(traced(q, k, v, offsets, number), expected, rtol=1e-13, atol=1e-13)
