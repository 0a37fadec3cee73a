"""Stick-breaking attention: by definition, its remainder, its stability, and the masks that it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import EDGE_LENGTHS, make_qkv, needing_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra.masks import Align
from flexjag.algebra.normalizers import StickBreaking
from flexjag.backends.normalized.stick_breaking import carry_over
from flexjag.errors import MaskError, PlanError
from flexjag.testing import assert_compiles, assert_matches_reference, assert_no_leak, jagged_batches, masks, problems

CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: a few hundred roundings of numbers of about 1
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
FAST = pytest.mark.parametrize("backend", ["tiled", "segments"])
WITH_GRADIENTS = pytest.mark.parametrize("backend", ["tiled", "segments", "cpp"])
VARIANTS = pytest.mark.parametrize(
    "normalizer",
    [StickBreaking(), StickBreaking(True), StickBreaking(False, True), StickBreaking(True, True)],
    ids=repr,
)
LENGTHS = [40, 7, 0, 33]
ALLOWED: dict[str, tuple[fj.Mask, Callable[[int, int], bool]]] = {
    "causal": (fj.Causal(), lambda i, j: j <= i),
    "window": (fj.Window(5, 0), lambda i, j: i - 5 <= j <= i),
    "sinks": (fj.Causal() & (fj.Window(3, 0) | fj.Prefix(2)), lambda i, j: j <= i and (i - 3 <= j or j < 2)),
    "holes": (
        fj.MaskMod(lambda b, h, q, kv: (q + kv) % 3 != 0) & fj.Causal(),
        lambda i, j: j <= i and (i + j) % 3 != 0,
    ),
}


def by_hand(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, normalizer: StickBreaking, allowed) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The stick of one row of one head at a time, broken from the nearest key on. No code of flexjag but `to_list`."""
    outs = [q.values.new_zeros(0, q.values.shape[1], v.values.shape[2])]
    rests = [q.values.new_zeros(0, q.values.shape[1])]
    for x, y, z in zip(q.to_list(), k.to_list(), v.to_list(), strict=True):
        y, z = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (y, z))
        share = torch.sigmoid(torch.einsum("nhd,mhd->nmh", x, y) / x.shape[2] ** 0.5)
        for i in range(x.shape[0]):
            left, out = torch.ones_like(x[i, :, 0]), torch.zeros_like(z[i])
            for j in reversed(range(y.shape[0])):
                if allowed(i, j) and (j < i or normalizer.attend_current):
                    out = out + (share[i, j] * left)[:, None] * z[j]
                    left = left * (1 - share[i, j])
            outs.append((out + left[:, None] * z[i] if normalizer.remainder else out)[None])
            rests.append(left[None])
    return torch.cat(outs), torch.cat(rests)


def run(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, **keywords) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    out, rest = fj.attention(q, k, v, return_remainder=True, **keywords)
    return out.values, rest.values


def with_gradients(attend, batches) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output, remainder, and the gradients of a loss that weighs both."""
    leaves = needing_gradients(*batches)
    q = leaves[0]
    out, rest = attend(q, *(q.with_values(x.values) for x in leaves[1:]))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    loss = (out * weights).sum() + (rest**2).sum()
    loss = loss + sum(0 * x.values.sum() for x in leaves)
    return [out, rest, *torch.autograd.grad(loss, [x.values for x in leaves])]


def check(normalizer: StickBreaking, name: str, batches, backend: str) -> None:  # type: ignore[no-untyped-def]
    mask, allowed = ALLOWED[name]
    plan = fj.plan(batches[0], mask=mask, normalizer=normalizer, block_size=16)
    got = with_gradients(lambda q, k, v: run(q, k, v, plan=plan, backend=backend), batches)
    wanted = with_gradients(lambda q, k, v: by_hand(q, k, v, normalizer, allowed), batches)
    for what, a, b in zip(("out", "rest", "dq", "dk", "dv"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, what=what: f"{what}: {text}")


@BACKENDS
@VARIANTS
@pytest.mark.parametrize("name", ALLOWED)
def test_definition(name: str, normalizer: StickBreaking, backend: str) -> None:
    check(normalizer, name, make_qkv([20, 3, 0, 33]), backend)


@BACKENDS
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
def test_every_edge_length(lengths: list[int], backend: str) -> None:
    check(StickBreaking(False, True), "causal", make_qkv(lengths), backend)


@BACKENDS
@pytest.mark.parametrize(("groups", "dim", "value_dim"), [(1, 16, 16), (2, 16, 24), (4, 1, 1)])
def test_shapes(groups: int, dim: int, value_dim: int, backend: str) -> None:
    batches = make_qkv([20, 0, 17], heads=4, groups=groups, dim=dim, value_dim=value_dim)
    check(StickBreaking(), "causal", batches, backend)
    check(StickBreaking(True, True), "sinks", batches, backend)


@FAST
def test_many_pieces(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as small as they get: 16 rows, or one row of tiles."""
    from flexjag.backends import blocks
    from flexjag.backends.normalized import pieces

    monkeypatch.setattr(blocks, "CHUNK_SCORES", 1)
    monkeypatch.setattr(pieces, "RUN_SCORES", 1)
    for name in ALLOWED:
        check(StickBreaking(), name, make_qkv([40, 0, 17]), backend)


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("kv_lengths", [[50, 20, 3, 1], [3, 0, 5, 40], [0, 0, 0, 0]], ids=str)
def test_cross_attention(kv_lengths: list[int], align: Align) -> None:
    """Queries that continue a longer history, say: row i lines up with key i, or i + m - n."""
    q, k, v = make_qkv(LENGTHS, kv_lengths, heads=4, groups=2)
    for normalizer in (StickBreaking(), StickBreaking(True)):
        plan = fj.plan(q, k, mask=fj.Causal(align), normalizer=normalizer, block_size=16)
        wanted, wanted_rest = run(q, k, v, plan=plan, backend="reference")
        for backend in ("tiled", "segments", "cpp"):
            out, rest = run(q, k, v, plan=plan, backend=backend)
            torch.testing.assert_close(out, wanted, **CLOSE)
            torch.testing.assert_close(rest, wanted_rest, **CLOSE)


@BACKENDS
def test_a_decode_step_is_the_last_row(backend: str) -> None:
    q, k, v = make_qkv([20, 1, 33])
    mask = fj.Causal("end")
    whole, rest = run(q, k, v, mask=mask, normalizer=StickBreaking(), backend=backend)
    last = torch.tensor([19, 20, 53])
    one = fj.Jagged.from_lengths(q.values[last], [1, 1, 1])
    out, left = run(one, k, v, mask=mask, normalizer=StickBreaking(), backend=backend)
    torch.testing.assert_close(out, whole[last], **CLOSE)
    torch.testing.assert_close(left, rest[last], **CLOSE)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 7.0, 30.0])
def test_rows_sum_to_one_with_the_remainder(size: float, dtype: torch.dtype, backend: str) -> None:
    q, k, _ = make_qkv([300, 1, 0, 17], dtype=dtype)
    ones = q.with_values(torch.ones(318, 2, 1, dtype=dtype))
    keywords = {"mask": fj.Causal(), "scale": size / 4, "backend": backend}
    out, rest = run(q, k, ones, normalizer=StickBreaking(), **keywords)
    assert (rest >= 0).all()
    assert (rest <= 1).all()
    # Every weight is exp of a sum of up to 300 softplus of at most `reach`, each sum rounded that often.
    reach = size * 16
    limit = 300 * torch.finfo(dtype).eps * (reach + 300)
    assert (out[..., 0] + rest - 1).abs().max() <= limit
    out, _ = run(q, k, ones, normalizer=StickBreaking(remainder=True), **keywords)
    assert (out - 1).abs().max() <= limit


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("z", [50.0, -50.0, 1000.0, -1000.0])
def test_extreme_scores(z: float, dtype: torch.dtype, backend: str) -> None:
    """At +z the nearest key takes everything, at -z nobody takes anything; nothing is NaN on the way."""
    x = torch.ones(40, 1, 1, dtype=dtype, requires_grad=True)
    v = torch.arange(40, dtype=dtype).view(40, 1, 1).clone().requires_grad_()
    q = fj.Jagged.from_lengths(x, [40])
    out, rest = run(q, q, q.with_values(v), mask=fj.Causal(), normalizer=StickBreaking(), scale=z, backend=backend)
    nearest = torch.arange(40, dtype=dtype).sub(1).clamp(min=0)
    # One rounding of z, in the exponent; a float32 50 leaves e**-50 of the stick.
    error = 4 * abs(z) * torch.finfo(dtype).eps * 39 + 40 * 39 * torch.exp(torch.tensor(-abs(z))).item()
    assert (out.flatten() - (nearest if z > 0 else 0)).abs().max() <= error
    assert (rest.flatten()[1:] - float(z < 0)).abs().max() <= error
    for grad in torch.autograd.grad(out.sum() + rest.sum(), [x, v]):
        assert grad.isfinite().all()


@WITH_GRADIENTS
@VARIANTS
def test_gradcheck(normalizer: StickBreaking, backend: str) -> None:
    """Numerical differentiation shares no code with any backend; row 0 of each segment has no key but its own."""
    q, k, v = make_qkv([3, 0, 4], heads=2, groups=1, dim=3, value_dim=2)
    slopes = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def attend(x, y, z, slopes):  # type: ignore[no-untyped-def]
        values = (q.with_values(t) for t in (x, y, z))
        score = fj.Alibi(slopes) >> fj.SoftCap(2.0)
        return run(*values, mask=fj.Causal() & fj.Window(2, 5), score=score, normalizer=normalizer, backend=backend)

    leaves = [x.detach().clone().requires_grad_() for x in (q.values, k.values, v.values, slopes)]
    assert torch.autograd.gradcheck(attend, leaves)


@st.composite
def causal_problems(draw: st.DrawFn, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """A problem of :func:`problems` with a mask that stick-breaking takes, and its plan."""
    p = draw(problems(dtype=dtype))
    align = draw(st.sampled_from(["start", "end"]))
    mask = draw(st.sampled_from([fj.Causal(align), fj.Window(20, 0, align)]))
    if draw(st.booleans()):
        mask = mask & fj.MaskMod(lambda b, h, q, kv: (q + kv + h) % 4 != 0)
    normalizer = StickBreaking(draw(st.booleans()), p.q.offsets is p.k.offsets and draw(st.booleans()))
    return p, fj.plan(p.q, p.k, mask=mask, score=p.score, normalizer=normalizer, block_size=p.block_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@FAST
@given(data=st.data())
def test_backends_are_the_reference(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    p, plan = data.draw(causal_problems(dtype))
    assert_matches_reference(p.q, p.k, p.v, plan=plan, backend=backend, learned=p.learned)


@FAST
@given(data=st.data())
def test_no_segment_leaks(backend: str, data: st.DataObject) -> None:
    p, plan = data.draw(causal_problems(torch.float32))
    assert_no_leak(backend, p.q, p.k, p.v, plan=plan, return_lse=False, return_remainder=True)


@given(data=st.data())
def test_any_mask_is_taken_behind_a_causal_one(data: st.DataObject) -> None:
    q, k, v = data.draw(jagged_batches())
    kv_lengths = None if q.offsets is k.offsets else k.lengths.tolist()
    mask = fj.Causal() & data.draw(masks(q.lengths.tolist(), kv_lengths, heads=q.values.shape[1], depth=2))
    try:
        plan = fj.plan(q, k, mask=mask, normalizer=StickBreaking(), block_size=16)
        got = fj.attention(q, k, v, plan=plan, backend="tiled").values
    except MaskError as error:
        assert "one alignment" in str(error)  # noqa: PT017 (not every mask lines up both ways)
        return
    wanted = fj.attention(q, k, v, plan=plan, backend="reference").values
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.slow
def test_one_graph_for_all_batches() -> None:
    slopes = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    g = torch.Generator().manual_seed(1)

    def attend(x: fj.Jagged) -> Tensor:
        out, rest = fj.attention(
            x, x, x, mask=fj.Causal(), score=fj.Alibi(slopes), normalizer=StickBreaking(), return_remainder=True
        )
        second = fj.attention(out, x, x, mask=fj.Window(20, 0), normalizer=StickBreaking(True, True))
        return second.values + rest.values[..., None]

    given = []
    for index in range(10):
        lengths = torch.randint(0, 200, (2 + index % 5,), generator=g).tolist() if index else [300, 133]
        values = torch.randn(sum(lengths), 2, 8, generator=g, dtype=torch.float64).requires_grad_()
        given.append((fj.Jagged.from_lengths(values, lengths),))

    def same(index: int, out: Tensor) -> None:
        x = given[index][0]
        eager = attend(x)
        torch.testing.assert_close(out, eager, **CLOSE)
        leaves = [x.values, slopes]
        found = [leaf.grad for leaf in leaves]
        for got, wanted in zip(found, torch.autograd.grad(eager.sum(), leaves), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)  # two layers, sums of hundreds of tokens
        for leaf in leaves:
            leaf.grad = None

    graphs = assert_compiles(attend, given, after_each=same)
    assert graphs.forward == graphs.backward == [0]


def test_carry_over() -> None:
    totals, row = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 0, 2, 2])
    assert carry_over(totals, row, True).tolist() == [6.0, 4.0, 0.0, 16.0, 0.0]
    assert carry_over(totals, row, False).tolist() == [0.0, 1.0, 3.0, 0.0, 8.0]
    assert carry_over(totals[:0], row[:0], True).shape == (0,)


def test_spare_rows_are_left_alone() -> None:
    q, k, v = (fj.Jagged(x.values[:40], torch.tensor([0, 9, 20])) for x in make_qkv([40]))
    q, k, v = needing_gradients(q, q.with_values(k.values), q.with_values(v.values))
    k, v = (q.with_values(x.values) for x in (k, v))
    normalizer = StickBreaking(remainder=True)
    plan = fj.plan(q, mask=fj.Causal(), normalizer=normalizer, max_tokens=40, max_length=16, block_size=16)
    for backend in ("reference", "tiled", "segments", "cpp"):
        out, rest = run(q, k, v, plan=plan, backend=backend)
        assert out[:20].any()
        assert not out[20:].any()
        assert (rest[20:] == 1).all()
        for grad in torch.autograd.grad((out**2).sum() + rest[:20].sum(), [q.values, k.values, v.values]):
            assert grad[:20].any()
            assert not grad[20:].any()


BAD_MASKS = [fj.Full(), ~fj.Causal(), fj.Window(3, 1), fj.Window(3, None), fj.Causal() | fj.Prefix(2), fj.Prefix(3)]
GOOD_MASKS = [
    fj.Causal(),
    fj.Window(None, 0),
    fj.Prefix(3) & fj.Causal(),
    (fj.Window(2, 0) | fj.Causal()) & ~fj.Window(0, 0),
    fj.PerHead([fj.Causal(), fj.Window(3, 0)]),
]


@pytest.mark.parametrize("mask", [*BAD_MASKS, fj.PerHead([fj.Causal(), fj.Full()])], ids=repr)
@BACKENDS
def test_masks_that_may_allow_later_keys_raise(mask: fj.Mask, backend: str) -> None:
    q, k, v = make_qkv([5])
    with pytest.raises(MaskError, match=r"mask: stick-breaking needs a mask without later keys: Causal\(\)"):
        fj.attention(q, k, v, mask=mask, normalizer=StickBreaking(), backend=backend)


@pytest.mark.parametrize("mask", GOOD_MASKS, ids=repr)
def test_masks_of_causal_type_run(mask: fj.Mask) -> None:
    q, k, v = make_qkv([25, 6])
    wanted = fj.attention(q, k, v, mask=mask, normalizer=StickBreaking(), backend="reference").values
    for backend in ("tiled", "segments", "cpp", "auto"):
        got = fj.attention(q, k, v, mask=mask, normalizer=StickBreaking(), backend=backend).values
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_what_cannot_be_raises() -> None:
    q, k, v = make_qkv([5], [7])
    mixed = fj.Causal("end") & fj.Window(3, 0)
    with pytest.raises(MaskError, match="one alignment of queries and keys"):
        fj.attention(q, k, v, mask=mixed, normalizer=StickBreaking())
    with pytest.raises(PlanError, match=r"normalizer: remainder=True adds each query's own value, .* q.with_values"):
        fj.attention(q, k, v, mask=fj.Causal(), normalizer=StickBreaking(remainder=True))
    with pytest.raises(PlanError, match=r"return_lse: only a softmax has a log-sum-exp; got normalizer=StickBreaking"):
        fj.attention(q, k, v, mask=fj.Causal(), normalizer=StickBreaking(), return_lse=True)
