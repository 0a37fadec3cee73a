"""attention() and merge(): every backend against the reference, and the ways of calling them."""

from __future__ import annotations

import pytest
import torch
from cases import check_error, double, jagged, make_qkv, mostly_slow, needing_gradients

import flexjag as fj
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
from flexjag.errors import LayoutError, PlanError, ShapeError

LENGTHS = [40, 7, 0, 33]
TOTAL = sum(LENGTHS)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: a few hundred roundings of numbers of about 1
BACKENDS = pytest.mark.parametrize("backend", ["tiled", "segments", "cpp"])

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 3, (TOTAL,), generator=GENERATOR)
LOWS = torch.randint(0, 20, (2, TOTAL), generator=GENERATOR)
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(5, 3),
    "window_per_segment": Window(torch.tensor([2, 0, 5, 9]), None),
    "prefix": Prefix(4),
    "chunked": Chunked(6),
    "globals": GlobalTokens(2) | Window(1, 1),
    "rows": Rows(LOWS, LOWS + 3),
    "same_group": SameGroup(IDS) & Causal(),
    "dense": Dense(torch.rand(40, 40, generator=GENERATOR) < 0.3),
    "mask_mod": MaskMod(lambda b, h, q, kv: (q + kv + b + h) % 3 != 0),
    "per_head": PerHead([Causal(), ~Causal()]),
    "sinks": Causal() & (Window(5, 0) | Prefix(2)),
    "not": ~(Window(5, 5) | Prefix(1)),
}
SCORES = {
    "none": None,
    "alibi": Alibi(torch.tensor([0.5, 0.1], dtype=torch.float64)),
    "table": RelativeBias(torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7)),
    "cap": SoftCap(1.5),
    "fn": ScoreMod(lambda s, b, h, q, kv: s * 0.5 + 0.1 * (q - kv) + h),
    "chain": Alibi(torch.tensor([0.5, 0.1], dtype=torch.float64)) >> SoftCap(1.5),
}
ADDITIVE = {"none", "alibi", "table"}


def run_with_gradients(q, k, v, **arguments):  # type: ignore[no-untyped-def]
    """Output, lse and the gradients of a loss that uses both."""
    q, k, v = needing_gradients(q, k, v)
    out, lse = fj.attention(q, k, v, return_lse=True, **arguments)
    weights = torch.linspace(-1, 1, out.values.numel(), dtype=out.values.dtype).view(out.values.shape)
    finite = lse.values.masked_fill(lse.values == -torch.inf, 0.0)
    ((out.values * weights).sum() + (finite**2).sum().to(out.values.dtype)).backward()
    return out.values, lse.values, q.values.grad, k.values.grad, v.values.grad


def check_backend(backend: str, q, k, v, **arguments) -> None:  # type: ignore[no-untyped-def]
    """Forward, lse and gradients in float64 against the reference."""
    got = run_with_gradients(q, k, v, backend=backend, **arguments)
    expected = run_with_gradients(q, k, v, backend="reference", **arguments)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@BACKENDS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(mask: fj.Mask, backend: str) -> None:
    check_backend(backend, *make_qkv(LENGTHS), mask=mask)


@pytest.mark.parametrize(
    ("name", "backend"), [(s, b) for s in SCORES for b in ("tiled", "segments") if b == "tiled" or s in ADDITIVE]
)
def test_scores(name: str, backend: str) -> None:
    check_backend(backend, *make_qkv(LENGTHS), mask=Causal(), score=SCORES[name])


@BACKENDS
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), PerHead([Causal(), Full()] * 2)], ids=["full", "causal", "per_head"]
)
@pytest.mark.parametrize(("groups", "dim", "value_dim"), [(1, 16, 16), (2, 16, 24), (4, 8, 3), (2, 5, 16), (4, 1, 1)])
def test_shapes(mask: fj.Mask, groups: int, dim: int, value_dim: int, backend: str) -> None:
    q, k, v = make_qkv(LENGTHS, heads=4, groups=groups, dim=dim, value_dim=value_dim)
    out = fj.attention(q, k, v, mask=mask, backend=backend)
    assert out.values.shape == (TOTAL, 4, value_dim)
    assert out.offsets is q.offsets
    check_backend(backend, q, k, v, mask=mask)


def test_query_heads_share_the_key_head_of_their_group() -> None:
    q, k, v = make_qkv(LENGTHS, heads=4, groups=2)
    shared = [x.with_values(x.values[:, [0, 0, 1, 1]]) for x in (k, v)]
    for backend in ("reference", "tiled", "segments"):
        got = fj.attention(q, k, v, mask=Causal(), backend=backend).values
        expected = fj.attention(q, *shared, mask=Causal(), backend="reference").values
        torch.testing.assert_close(got, expected, **CLOSE)


@BACKENDS
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Causal("end"), Window(3, 1, "end"), ~Causal("end"), Prefix(3)], ids=repr
)
@pytest.mark.parametrize("kv_lengths", [[50, 20, 3, 1], [3, 0, 5, 40], [40, 7, 0, 33]], ids=str)
def test_cross_attention(mask: fj.Mask, kv_lengths: list[int], backend: str) -> None:
    q, k, v = make_qkv(LENGTHS, kv_lengths, heads=4, groups=2, value_dim=8)
    check_backend(backend, q, k, v, mask=mask)


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
def test_scale(backend: str) -> None:
    q, k, v = make_qkv(LENGTHS, dim=16)
    default = fj.attention(q, k, v, backend=backend).values
    assert torch.equal(default, fj.attention(q, k, v, scale=0.25, backend=backend).values)
    doubled = fj.attention(q.with_values(q.values * 2), k, v, backend="reference").values
    torch.testing.assert_close(fj.attention(q, k, v, scale=0.5, backend=backend).values, doubled, **CLOSE)
    flat = fj.attention(q, k, v, scale=0.0, backend=backend).to_list()
    for out, values in zip(flat, v.to_list(), strict=True):
        if len(values):
            torch.testing.assert_close(out, values.mean(0).expand_as(out), **CLOSE)


@pytest.mark.parametrize("backend", ["tiled", "segments"])
def test_gradcheck(backend: str) -> None:
    """Numerical differentiation shares no code with any backend. Rows 0 and 1 of segment 1 have no key."""
    q, k, v = make_qkv([3, 4], [2, 2], heads=2, groups=1, dim=3, value_dim=2)
    slopes = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def run(x, y, z, slopes):  # type: ignore[no-untyped-def]
        score = Alibi(slopes) >> SoftCap(2.0) if backend == "tiled" else Alibi(slopes)
        out, lse = fj.attention(
            q.with_values(x),
            k.with_values(y),
            k.with_values(z),
            mask=Causal("end"),
            score=score,
            return_lse=True,
            backend=backend,
        )
        return out.values, lse.values.masked_fill(lse.values == -torch.inf, 0.0)

    leaves = [x.detach().clone().requires_grad_() for x in (q.values, k.values, v.values, slopes)]
    assert torch.autograd.gradcheck(run, leaves)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("mask", [Causal(), ~(Window(5, 5) | Prefix(1))], ids=["causal", "not"])
def test_lower_precision(mask: fj.Mask, dtype: torch.dtype, backend: str) -> None:
    q, k, v = make_qkv(LENGTHS, heads=4, groups=2, dtype=dtype)
    got = run_with_gradients(q, k, v, mask=mask, backend=backend)
    same = run_with_gradients(q, k, v, mask=mask, backend="reference")
    exact = run_with_gradients(*map(double, (q, k, v)), mask=mask, backend="reference")
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), got, same, exact, strict=True):
        if name == "lse":  # float32, but SDPA's half-precision kernel exponentiates only as well as its output can show
            assert a.dtype == torch.float32
            a, b = a.to(dtype), b.to(dtype)
        check_error(a, b, c, name)


def test_plan_is_reused_across_layers() -> None:
    """Two layers of other head counts and dims share one plan; the result is that of planning each time."""
    plan = fj.plan(jagged(LENGTHS), mask=MASKS["sinks"], block_size=16)
    for heads, groups, dim in ((2, 2, 16), (4, 1, 8)):
        q, k, v = make_qkv(LENGTHS, heads=heads, groups=groups, dim=dim)
        for backend in ("reference", "tiled", "segments", "auto"):
            got = fj.attention(q, k, v, plan=plan, backend=backend).values
            expected = fj.attention(q, k, v, mask=MASKS["sinks"], backend="reference").values
            torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("block", [16, 32, 256])
def test_block_size_changes_nothing(block: int) -> None:
    q, k, v = make_qkv(LENGTHS)
    plan = fj.plan(q, mask=MASKS["not"], score=SCORES["chain"], block_size=block)
    expected = fj.attention(q, k, v, mask=MASKS["not"], score=SCORES["chain"], backend="reference").values
    torch.testing.assert_close(fj.attention(q, k, v, plan=plan, backend="tiled").values, expected, **CLOSE)


def test_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager path of `tiled` goes in chunks of whole tile rows; make them as small as they get."""
    from flexjag.backends import blocks

    monkeypatch.setattr(blocks, "CHUNK_SCORES", 1)
    q, k, v = make_qkv(LENGTHS)
    plan = fj.plan(q, mask=MASKS["sinks"], score=SCORES["chain"], block_size=16)
    check_backend("tiled", q, k, v, plan=plan)


@pytest.mark.slow
def test_tiled_traced_equals_eager() -> None:
    q, k, v = make_qkv(LENGTHS, heads=4, groups=2, value_dim=8)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def traced(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> tuple[fj.Jagged, fj.Jagged]:
        mask = Causal() & (Window(5, 0) | Prefix(2))
        return fj.attention(q, k, v, mask=mask, score=SoftCap(1.5), return_lse=True)  # type: ignore[return-value]

    def gradients(fn):  # type: ignore[no-untyped-def]
        x, y, z = needing_gradients(q, k, v)
        out, lse = fn(x, y, z)
        ((out.values**2).sum() + (lse.values**2).sum()).backward()
        return out.values, lse.values, x.values.grad, y.values.grad, z.values.grad

    def reference(x, y, z):  # type: ignore[no-untyped-def]
        return fj.attention(x, y, z, mask=MASKS["sinks"], score=SoftCap(1.5), return_lse=True, backend="reference")

    for got, expected in zip(gradients(traced), gradients(reference), strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


FLEX = {
    "causal": (Causal(), None, 2, None),
    "sinks, alibi, gqa": (MASKS["sinks"], Alibi(torch.tensor([0.5, 0.1, 0.2, 0.3])), 1, None),
    "not, opaque, cap": (~MaskMod(lambda b, h, q, kv: (q + kv + h) % 3 == 0) & Window(9, 9), SoftCap(1.5), 4, None),
    "per head, cross": (PerHead([Causal("end"), Full()] * 2), None, 4, [50, 20, 3, 1]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised by Inductor's own imports
@pytest.mark.parametrize("name", mostly_slow(FLEX, "sinks, alibi, gqa"))
def test_flex_inference(name: str) -> None:
    """The compiled kernel on CPU; two batches, so that nothing of the first is baked in."""
    mask, score, groups, kv_lengths = FLEX[name]
    for lengths in (LENGTHS, [3, 140, 0, 9]):
        q, k, v = make_qkv(lengths, kv_lengths, heads=4, groups=groups, dtype=torch.float32)
        got = fj.attention(q, k, v, mask=mask, score=score, backend="flex")
        same = fj.attention(q, k, v, mask=mask, score=score, backend="reference")
        exact = fj.attention(*map(double, (q, k, v)), mask=mask, score=score, backend="reference")
        check_error(got.values, same.values, exact.values)


def test_plan_with_a_mask_besides_raises() -> None:
    q, k, v = make_qkv([3])
    for other in ({"mask": Full()}, {"score": SoftCap(1.0)}, {"normalizer": fj.Softmax()}):
        with pytest.raises(PlanError, match=r"plan: already holds a mask, score and normalizer.*plan=Plan\(Causal"):
            fj.attention(q, k, v, plan=fj.plan(q, mask=Causal()), **other)  # type: ignore[arg-type]


PARTS = [Causal() & Window(3, 0), Causal() & ~Window(3, 0) & Prefix(2), Causal() & ~Window(3, 0) & ~Prefix(2)]


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
def test_merge_of_disjoint_keys_is_attention_over_all(backend: str) -> None:
    """Most rows have no key in some part, and the gradient flows through both out and lse."""

    def merged(q, k, v):  # type: ignore[no-untyped-def]
        return fj.merge([fj.attention(q, k, v, mask=x, return_lse=True, backend=backend) for x in PARTS])

    def whole(q, k, v):  # type: ignore[no-untyped-def]
        return fj.attention(q, k, v, mask=Causal(), return_lse=True, backend="reference")

    results = []
    for fn in (merged, whole):
        q, k, v = needing_gradients(*make_qkv(LENGTHS))
        out, lse = fn(q, k, v)
        ((out.values**2).sum() + lse.values.sum()).backward()
        results.append((out.values, lse.values, q.values.grad, k.values.grad, v.values.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_merge_of_two_key_batches() -> None:
    """Keys in two places (a cache and new tokens): merging equals attending their concatenation."""
    q, k, v = make_qkv([3, 2], [4, 0])
    _, k2, v2 = make_qkv([3, 2], [1, 5])
    pieces = [[torch.cat(p) for p in zip(a.to_list(), b.to_list(), strict=True)] for a, b in ((k, k2), (v, v2))]
    both_k = fj.Jagged.from_list(pieces[0])
    both_v = both_k.with_values(fj.Jagged.from_list(pieces[1]).values)
    out, lse = fj.merge([fj.attention(q, k, v, return_lse=True), fj.attention(q, k2, v2, return_lse=True)])
    expected = fj.attention(q, both_k, both_v, return_lse=True, backend="reference")
    torch.testing.assert_close(out.values, expected[0].values, **CLOSE)
    torch.testing.assert_close(lse.values, expected[1].values, **CLOSE)


def test_merge_of_rows_without_any_key() -> None:
    q, k, v = needing_gradients(*make_qkv([4]))
    parts = [fj.attention(q, k, v, mask=~Full(), return_lse=True, backend="tiled") for _ in range(2)]
    out, lse = fj.merge(parts)
    assert not out.values.any()
    assert (lse.values == -torch.inf).all()
    out.values.sum().backward()
    for x in (q, k, v):
        assert x.values.grad is not None
        assert not x.values.grad.any()


def test_merge_of_one_part_is_that_part() -> None:
    q, k, v = make_qkv([4, 3])
    part = fj.attention(q, k, v, mask=Causal(), return_lse=True)
    out, lse = fj.merge([part])
    torch.testing.assert_close(out.values, part[0].values, rtol=0, atol=0)
    torch.testing.assert_close(lse.values, part[1].values, rtol=1e-15, atol=1e-15)


def test_merge_survives_large_scores() -> None:
    """exp(1e4) overflows; the merge works on differences."""
    q, k, v = make_qkv([6])
    a, b = (fj.attention(q, k, v, mask=x, scale=1e4, return_lse=True) for x in (Window(2, 2), ~Window(2, 2)))
    expected = fj.attention(q, k, v, scale=1e4, return_lse=True, backend="reference")
    out, lse = fj.merge([a, b])
    torch.testing.assert_close(out.values, expected[0].values, rtol=1e-9, atol=1e-9)  # scores of 1e4 lose four digits
    torch.testing.assert_close(lse.values, expected[1].values, rtol=1e-12, atol=0)


def test_merge_refuses_what_does_not_fit() -> None:
    q, k, v = make_qkv([4])
    part = fj.attention(q, k, v, return_lse=True)
    other = fj.attention(*make_qkv([5]), return_lse=True)
    with pytest.raises(ShapeError, match=r"parts: must hold at least one \(out, lse\); got parts=\[\]"):
        fj.merge([])
    with pytest.raises(ShapeError, match=r"parts: every out must be \[T, H, E\].*lse=\(4, 1\).*first_out=\(4, 2, 16\)"):
        fj.merge([part, (part[0], part[1].map(lambda v: v[:, :1]))])
    with pytest.raises(LayoutError, match=r"parts: must all have the same offsets.*tokens=4.*tokens=5"):
        fj.merge([part, other])
