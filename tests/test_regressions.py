"""One test per bug that a review found; each failed before its mend."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flexjag as fj
from flexjag.errors import FlexjagError

BACKENDS = ["tiled", "segments"]
F64 = torch.float64


def batch(lengths: list[int], heads: int = 2, dim: int = 8, dtype: torch.dtype = F64, grad: bool = True) -> fj.Jagged:
    return fj.Jagged.from_lengths(torch.randn(sum(lengths), heads, dim, dtype=dtype, requires_grad=grad), lengths)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpp"])
def test_non_reentrant_checkpointing(backend: str) -> None:
    x = batch([5, 40])

    def attend(values: torch.Tensor) -> torch.Tensor:
        j = fj.Jagged(values, x.offsets)
        return fj.attention(j, j, j, mask=fj.Causal(), backend=backend).values.square()

    (wanted,) = torch.autograd.grad(attend(x.values).sum(), x.values)
    (got,) = torch.autograd.grad(checkpoint(attend, x.values, use_reentrant=False).sum(), x.values)
    assert torch.equal(got, wanted)


def save_products(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    saved = op == torch.ops.aten.bmm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU(), fj.StickBreaking()], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_of_products(backend: str, normalizer: fj.Normalizer) -> None:
    """What it saves is its own: nothing may write to it."""
    x = batch([5, 40])

    def attend(values: torch.Tensor) -> torch.Tensor:
        j = fj.Jagged(values, x.offsets)
        return fj.attention(j, j, j, mask=fj.Causal(), normalizer=normalizer, backend=backend).values.square()

    (wanted,) = torch.autograd.grad(attend(x.values).sum(), x.values)
    contexts = functools.partial(create_selective_checkpoint_contexts, save_products)
    out = checkpoint(attend, x.values, use_reentrant=False, context_fn=contexts)
    assert torch.equal(torch.autograd.grad(out.sum(), x.values)[0], wanted)


@pytest.mark.parametrize(("dim", "value_dim"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("normalizer", [fj.Softmax(), fj.SiLU(), fj.StickBreaking()], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_features(backend: str, normalizer: fj.Normalizer, dim: int, value_dim: int) -> None:
    q, v = batch([5, 0, 40], dim=dim), batch([5, 0, 40], dim=value_dim)
    results = []
    for name in (backend, "reference"):
        out = fj.attention(q, q, q.with_values(v.values), mask=fj.Causal(), normalizer=normalizer, backend=name).values
        results.append((out, *torch.autograd.grad(out.square().sum(), (q.values, v.values))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("backend", ["auto", "tiled", "segments"])
def test_scales_that_are_not_positive(backend: str, scale: float) -> None:
    x = batch([30, 10])
    got, want = (fj.attention(x, x, x, mask=fj.Causal(), scale=scale, backend=b).values for b in (backend, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpp"])
def test_spare_rows_hand_users_functions_nothing_out_of_range(backend: str) -> None:
    x = fj.Jagged(torch.randn(64, 2, 8, dtype=F64), torch.tensor([0, 10, 30]))
    per_segment, per_position = torch.tensor([3, 4]), torch.arange(20)
    mask = fj.MaskMod(lambda b, h, i, j: (j < per_segment[b]) & (per_position[i] >= 0))
    plan = fj.plan(x, mask=mask, max_tokens=64)
    got = fj.attention(x, x, x, plan=plan, backend=backend).values
    torch.testing.assert_close(
        got, fj.attention(x, x, x, plan=plan, backend="reference").values, rtol=1e-12, atol=1e-12
    )
    assert not got[30:].any()


WIDE = [2**31, 2**32, 2**40, torch.iinfo(torch.int64).max]


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("node", [lambda n: fj.Window(n, 0), fj.Prefix, fj.Chunked, fj.GlobalTokens])
def test_bounds_per_segment_beyond_int32_mean_everything(node, wide: int) -> None:
    x = batch([7, 4], grad=False)
    dense = fj.plan(x, mask=node(torch.tensor([wide, wide]))).to_dense()
    whole = fj.plan(x, mask=node(100)).to_dense()
    assert torch.equal(dense, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", [False, True])
def test_half_precision_keeps_a_large_bias(backend: str, learned: bool) -> None:
    x = batch([600], dtype=torch.bfloat16)
    score = fj.Alibi(torch.tensor([0.25, 0.06], requires_grad=learned))
    wide = x.to(F64)
    want = fj.attention(wide, wide, wide, score=score, backend="reference").values.detach()
    got = fj.attention(x, x, x, score=score, backend=backend).values.detach()
    # The inputs are exact in both; what is left is the output's own rounding and the weights' (bfloat16 in the kernel).
    assert float((got.double() - want).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * float(want.abs().max())


def test_a_score_may_use_a_tensor_and_one_computed_from_it() -> None:
    x, w = batch([6, 9]), torch.randn(2, dtype=F64, requires_grad=True)
    grads = []
    for backend in ("tiled", "reference"):
        e = w.exp()
        score = fj.Alibi(e) >> fj.ScoreMod(lambda s, b, h, i, j, e=e: s * w[h] + e[h] * (i - j))
        out = fj.attention(x, x, x, mask=fj.Causal(), score=score, backend=backend).values
        grads.append(torch.autograd.grad(out.square().sum(), w)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_z_loss_over_rows_without_keys_stays_finite(backend: str) -> None:
    x = batch([5, 9, 3])
    _, lse = fj.attention(x, x, x, mask=fj.Causal() & ~fj.Prefix(1), backend=backend, return_lse=True)
    loss = torch.where(lse.values.isfinite(), lse.values.square(), 0.0).sum()
    assert torch.autograd.grad(loss, x.values)[0].isfinite().all()


def test_kernels_are_shared_across_bounds_and_fresh_callables() -> None:
    assert fj.Window(3, 0).structure() == fj.Window(9, 0).structure()
    assert fj.Window(3, 0).structure() != fj.Window(None, 0).structure()

    def near(limit, b, h, i, j):
        return (i - j).abs() < limit

    parts = [fj.MaskMod(functools.partial(near, n)).structure() for n in (1, 2)]
    assert parts[0] == parts[1]
    assert hash(parts[0]) == hash(parts[1])


BAD = {
    "learned scale": lambda x: fj.attention(x, x, x, scale=torch.tensor(0.3, requires_grad=True)),
    "float hi": lambda x: fj.Rows(torch.zeros(9, dtype=torch.int64), torch.zeros(9)),
    "no spans": lambda x: fj.Rows(torch.zeros(0, 9, dtype=torch.int64), torch.zeros(0, 9, dtype=torch.int64)),
    "infinite cap": lambda x: fj.SoftCap(float("inf")),
    "float block size": lambda x: fj.plan(x, block_size=128.0),
    "float bound": lambda x: fj.plan(x, max_length=10.5),
    "other layout in merge": lambda x: fj.merge([(y, y.map(lambda v: v[..., 0])) for y in (x, batch([5, 4]))]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str) -> None:
    with pytest.raises(FlexjagError, match=r"^[\w, ]+: .*; got "):
        BAD[case](batch([4, 5]))


def test_a_stale_plan_is_found_inside_a_compiled_function() -> None:
    a, b = batch([4, 6], grad=False), batch([6, 4], grad=False)
    plan = fj.plan(a, mask=fj.Causal())
    attend = torch.compile(lambda x: fj.attention(x, x, x, plan=plan).values, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(attend(a), fj.attention(a, a, a, plan=plan).values, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="plan: was made for another layout"):
        attend(b)


@pytest.mark.parametrize("offsets", [[0, 4, 9], [1, 4, 10], [0, 6, 4, 10], [6, 4], [0, -2, 10]])
def test_offsets_are_checked_on_cpu(offsets: list[int]) -> None:
    x = fj.Jagged(torch.randn(10, 2, 16), torch.tensor(offsets))
    with pytest.raises(FlexjagError, match=r"q.offsets: must"):
        fj.attention(x, x, x, mask=fj.Causal())


@pytest.mark.parametrize(
    "fn",
    [lambda b, h, q, k: q >= k and q < 10, lambda b, h, q, k: True, lambda b, h, q, k: q - k, lambda q, k: q >= k],
    ids=["and", "python bool", "integer", "two arguments"],
)
def test_mistakes_in_a_users_mask_are_told(fn) -> None:
    with pytest.raises(FlexjagError, match=r"fn: <lambda> must be \(b, h, q_pos, kv_pos\) -> bool"):
        fj.plan(batch([5]), mask=fj.Causal() & fj.MaskMod(fn))
