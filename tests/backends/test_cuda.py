"""The CUDA path by the same calls: run these wherever a CUDA GPU is at hand.

Errors are bounded by what rounding explains: see `flexjag.testing.assert_matches_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CUDA_ONLY, check_error, double, make_qkv, needing_gradients, on_gpu

import flexjag as fj
import flexjag.testing
from flexjag import (
    Alibi,
    Causal,
    Chunked,
    Dense,
    Full,
    GlobalTokens,
    MaskMod,
    PerHead,
    Prefix,
    RelativeBias,
    Rows,
    SameGroup,
    ScoreMod,
    SoftCap,
    Window,
)
from flexjag.backends.varlen import has_gqa

pytestmark = CUDA_ONLY

LENGTHS = [300, 7, 0, 129, 1, 64]
TOTAL = sum(LENGTHS)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """No TF32: float32 is compared with float64."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def qkv(dtype: torch.dtype, lengths: list[int] | None = None, **shape: Any) -> tuple[fj.Jagged, ...]:
    shape = {"heads": 4, "dim": 64, **shape}
    return on_gpu(*make_qkv(LENGTHS if lengths is None else lengths, dtype=dtype, **shape))


Score = Callable[[list[torch.Tensor]], fj.Score | None]


def check(
    batches: tuple[fj.Jagged, ...],
    mask: fj.Mask,
    *,
    backend: str = "flex",
    score: Score = lambda _: None,
    learned: tuple[torch.Tensor, ...] = (),
    lse: bool = True,
) -> None:
    """A backend against the float64 reference, forward and backward, entry by entry and in norm."""
    leaves = [x.detach().clone().requires_grad_() for x in learned]
    plan = fj.plan(batches[0], batches[1], mask=mask, score=score(leaves))
    fj.testing.assert_matches_reference(*batches, plan=plan, backend=backend, learned=leaves, lse=lse, norms=True)


def tables() -> dict[str, fj.Mask]:
    """One mask of every family; made on the GPU, so only when a test runs."""
    generator = torch.Generator().manual_seed(0)
    lows = torch.randint(0, 60, (2, TOTAL), generator=generator).cuda()
    ids = torch.randint(0, 3, (TOTAL,), generator=generator).cuda()
    matrix = (torch.rand(300, 300, generator=generator) < 0.3).cuda()
    bounds = torch.tensor([100, 2, 0, 9, 1, 64]).cuda()
    return {
        "full": Full(),
        "causal": Causal(),
        "window": Window(50, 3),
        "window_per_segment": Window(bounds, None),
        "prefix": Prefix(4),
        "chunked": Chunked(48),
        "globals": GlobalTokens(5) | Window(10, 10),
        "rows": Rows(lows, lows + 30),
        "same_group": SameGroup(ids) & Causal(),
        "dense": Dense(matrix),
        "mask_mod": MaskMod(lambda b, h, q, kv: (q + kv + b) % 3 != 0),
        "mask_mod_by_head": MaskMod(lambda b, h, q, kv: (q + kv + h) % 3 != 0),
        "per_head": PerHead([Causal(), ~Causal(), Window(9, 0), Causal()]),
        "sinks": Causal() & (Window(50, 0) | Prefix(4)),
        "not": ~(Window(20, 20) | Prefix(1)),
        "nothing": ~Full(),
    }


FAMILIES = [
    "full", "causal", "window", "window_per_segment", "prefix", "chunked", "globals", "rows", "same_group", "dense",
    "mask_mod", "mask_mod_by_head", "per_head", "sinks", "not", "nothing",
]  # fmt: skip


def test_families_are_all_listed() -> None:
    assert sorted(FAMILIES) == sorted(tables())


@EACH_DTYPE
@pytest.mark.parametrize("family", FAMILIES)
def test_flex_masks(family: str, dtype: torch.dtype) -> None:
    check(qkv(dtype), tables()[family])


@EACH_DTYPE
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 1)])
def test_flex_grouped_heads(heads: int, groups: int, dtype: torch.dtype) -> None:
    check(qkv(dtype, heads=heads, groups=groups), Causal())


@EACH_DTYPE
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 32), (32, 128), (16, 16)])
def test_flex_value_dim(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(qkv(dtype, dim=dim, value_dim=value_dim), Causal())


@EACH_DTYPE
@pytest.mark.parametrize("mask", [Full(), Causal("end"), Window(9, 4, "end"), Prefix(3)], ids=repr)
def test_flex_cross_attention(mask: fj.Mask, dtype: torch.dtype) -> None:
    """Some segments have more keys than queries, some fewer, some none; T_q and T_kv are no tile multiples."""
    check(qkv(dtype, kv_lengths=[200, 70, 3, 0, 400, 64]), mask)


@EACH_DTYPE
@pytest.mark.parametrize("lengths", [[1], [127], [128], [129], [0, 5, 0], [1] * 40, [257, 255]], ids=str)
def test_flex_odd_sizes(lengths: list[int], dtype: torch.dtype) -> None:
    check(qkv(dtype, lengths), Causal())


SCORES: dict[str, tuple[Score, tuple[tuple[int, ...], ...]]] = {
    "alibi": (lambda p: Alibi(p[0]), ((4,),)),
    "relative_bias": (lambda p: RelativeBias(p[0]), ((4, 33),)),
    "alibi >> cap": (lambda p: Alibi(p[0]) >> SoftCap(5.0), ((4,),)),
    "cap": (lambda p: SoftCap(5.0), ()),
    "closure": (lambda p: ScoreMod(lambda s, b, h, q, kv: s + p[0][h] * (q - kv)), ((4,),)),
}


@EACH_DTYPE
@pytest.mark.parametrize("name", SCORES)
def test_flex_scores_and_their_gradients(name: str, dtype: torch.dtype) -> None:
    """Learned tables are float32 whatever the inputs are, as parameters of mixed-precision models are."""
    score, shapes = SCORES[name]
    learned = tuple(torch.linspace(-0.1, 0.1, torch.Size(s).numel(), device="cuda").view(s) for s in shapes)
    check(qkv(dtype), Causal() & Window(40, 0), score=score, learned=learned)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(50, 0), Causal() & Window(50, None), Window(9, 9)], ids=repr)
def test_varlen(mask: fj.Mask, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    if heads[0] != heads[1] and not has_gqa():
        pytest.skip("this torch's varlen_attn has no grouped-query attention; its rule says so")
    check(qkv(dtype, heads=heads[0], groups=heads[1]), mask, backend="varlen", lse=False)


@pytest.mark.parametrize("mask", [Full(), Causal("end"), Window(9, 4, "end")], ids=repr)
def test_varlen_cross_attention(mask: fj.Mask) -> None:
    check(qkv(torch.bfloat16, kv_lengths=[310, 70, 3, 200, 1, 64]), mask, backend="varlen", lse=False)


def test_varlen_lse() -> None:
    """Without gradients it comes with the output, `[T, H]`, -inf for a row without keys."""
    batches = qkv(torch.bfloat16, kv_lengths=[300, 0, 3, 129, 1, 64])
    with torch.no_grad():
        got, same, exact = (
            fj.attention(*x, mask=Causal("end"), return_lse=True, backend=b)
            for x, b in (
                (batches, "varlen"),
                (batches, "reference"),
                (tuple(map(double, batches)), "reference"),
            )
        )
    assert got[1].values.shape == (TOTAL, 4)
    check_error(got[0].values, same[0].values, exact[0].values, "out")
    assert got[1].values.dtype == torch.float32
    check_error(got[1].values, same[1].values, exact[1].values, "lse")


def test_auto_takes_the_fused_kernels() -> None:
    q, k, v = qkv(torch.bfloat16)
    assert fj.plan(q, mask=Causal()).backend == "varlen"
    assert fj.plan(q, mask=Causal() | Prefix(3)).backend == "flex"
    out = fj.attention(q, k, v, mask=Causal())
    assert torch.equal(out.values, fj.attention(q, k, v, mask=Causal(), backend="varlen").values)


@EACH_DTYPE
def test_tiled_runs_on_cuda_too(dtype: torch.dtype) -> None:
    check(qkv(dtype), Causal() & (Window(50, 0) | Prefix(4)), backend="tiled")


@EACH_DTYPE
def test_segments_runs_on_cuda_too(dtype: torch.dtype) -> None:
    check(qkv(dtype), Causal() & (Window(50, 0) | Prefix(4)), backend="segments")


@EACH_DTYPE
def test_merge(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    with torch.no_grad():
        parts = [fj.attention(q, k, v, mask=m, return_lse=True, backend="flex") for m in (Causal(), ~Causal())]
        out, _ = fj.merge(parts)  # type: ignore[arg-type]
        same = fj.attention(q, k, v, backend="reference")
        exact = fj.attention(*map(double, (q, k, v)), backend="reference")
    assert out.values.dtype == dtype
    # Each part is rounded to dtype before they are merged: one rounding more than one call makes.
    rounding = torch.finfo(dtype).eps * exact.values.abs().max()
    error = (out.values.double() - exact.values).abs().max()
    assert error <= 2 * ((same.values.double() - exact.values).abs().max() + 2 * rounding)


@EACH_DTYPE
@pytest.mark.parametrize("backend", ["flex", "tiled", "segments", "varlen"])
def test_other_segments_do_not_change_by_a_bit(backend: str, dtype: torch.dtype) -> None:
    """Segment 1 shares tiles with its neighbours. Forward, and the gradients of the others."""
    if backend == "varlen" and dtype == torch.float32:
        pytest.skip("varlen_attn takes float16 and bfloat16")
    rows = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    results = []
    for value in (None, 7.5):
        batches = qkv(dtype)
        if value is not None:
            for x in batches:
                x.values[rows] = value
        q, k, v = needing_gradients(*batches)
        plan = fj.plan(q, mask=Causal())
        out = fj.attention(q, k, v, plan=plan, backend=backend)
        assert isinstance(out, fj.Jagged)
        out.values.float().pow(2).sum().backward()
        results.append([out.values.detach(), q.values.grad, k.values.grad, v.values.grad])
    for index, (before, after) in enumerate(zip(*results, strict=True)):
        assert before is not None
        assert after is not None
        if index and backend != "flex":
            continue  # index_add_ and the flash backward add atomically: their order is not fixed
        changed = after.clone()
        changed[rows] = before[rows]
        assert not torch.equal(after, before)
        assert torch.equal(changed, before)


def test_no_tokens() -> None:
    for lengths in ([], [0, 0]):
        q, k, v = needing_gradients(*qkv(torch.bfloat16, lengths))
        out = fj.attention(q, k, v, mask=Causal())
        assert isinstance(out, fj.Jagged)
        assert out.values.shape == (0, 4, 64)
        out.values.sum().backward()
