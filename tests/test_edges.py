"""The table of edge cases: empty segments, rows without keys, odd sizes, poisoned values, isolation."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from cases import EDGE_LENGTHS, make_qkv, needing_gradients

import flexjag as fj
from flexjag import Causal, Full, MaskMod, Prefix, Window
from flexjag.backends import Backend
from flexjag.errors import LayoutError
from flexjag.lowering.layout import build_layout

BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", "segments", "cpp"])
ALL_BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "tiled",
        "segments",
        "cpp",
        pytest.param(
            "flex", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]
        ),
    ],
)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: a few hundred roundings of numbers of about 1
ALLOWED: dict[str, tuple[fj.Mask, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "full": (Full(), lambda i, j: (i >= 0) & (j >= 0)),
    "causal": (Causal(), lambda i, j: j <= i),
    "sinks": (Causal() & (Window(3, 0) | Prefix(2)), lambda i, j: (j <= i) & ((i - 3 <= j) | (j < 2))),
    "some_rows": (MaskMod(lambda b, h, q, kv: (q % 3 != 0) & (kv <= q)), lambda i, j: (i % 3 != 0) & (j <= i)),
}


def by_hand(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged, allowed) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Softmax attention written out row by row of weights: no code of flexjag but `to_list`."""
    outs, lses = [], []
    for x, y, z in zip(q.to_list(), k.to_list(), v.to_list(), strict=True):
        scores = torch.einsum("nhd,mhd->nhm", x, y) / x.shape[2] ** 0.5
        ok = allowed(torch.arange(x.shape[0])[:, None], torch.arange(y.shape[0])[None])[:, None]
        e = torch.where(ok, scores.exp(), 0.0)
        total = e.sum(2)
        outs.append(torch.einsum("nhm,mhe->nhe", e / total.clamp(min=1e-300)[..., None], z))
        lses.append(torch.where(total > 0, total, 0.0).log())
    link = 0 * (q.values.sum() + k.values.sum() + v.values.sum())  # gradients exist even if there is no segment
    none = q.values.new_zeros(0, q.values.shape[1], v.values.shape[2])
    return torch.cat([none, *outs]) + link, torch.cat([none[..., 0], *lses]) + link


@BACKENDS
@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("lengths", EDGE_LENGTHS.values(), ids=EDGE_LENGTHS.keys())
def test_every_edge_length(lengths: list[int], name: str, backend: str) -> None:
    """Empty segments first, middle, last and all; no segments; T under, at and over a tile."""
    mask, allowed = ALLOWED[name]
    batches = make_qkv(lengths)
    plan = fj.plan(batches[0], mask=mask, block_size=16)
    results = []
    for run in (
        lambda q, k, v: [x.values for x in fj.attention(q, k, v, plan=plan, return_lse=True, backend=backend)],
        lambda q, k, v: by_hand(q, k, v, allowed),
    ):
        q, k, v = needing_gradients(*batches)
        out, lse = run(q, k, v)
        ((out**2).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()).backward()
        results.append((out, lse, q.values.grad, k.values.grad, v.values.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@BACKENDS
@pytest.mark.parametrize("kv_lengths", [[0, 5, 3], [4, 0, 0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("lengths", [[2, 3, 1], [0, 2, 0], [0, 0, 0]], ids=str)
def test_segments_empty_on_one_side(lengths: list[int], kv_lengths: list[int], backend: str) -> None:
    q, k, v = needing_gradients(*make_qkv(lengths, kv_lengths))
    out, lse = fj.attention(q, k, v, return_lse=True, backend=backend)
    expected, expected_lse = by_hand(q, k, v, ALLOWED["full"][1])
    torch.testing.assert_close(out.values, expected, **CLOSE)
    torch.testing.assert_close(lse.values, expected_lse, **CLOSE)
    out.values.sum().backward()
    for x in (q, k, v):
        assert x.values.grad is not None
        assert x.values.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "segments", "cpp", "flex"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_tokens_launches_nothing(lengths: list[int], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flexjag.api.attention")

    def fail(record: Backend, *_: object) -> None:
        raise AssertionError(f"{record.name} was asked to run nothing")

    monkeypatch.setattr(module, "_execute", fail)
    q, k, v = make_qkv(lengths, value_dim=8, dtype=torch.float32)
    if backend != "flex":
        q, k, v = needing_gradients(q, k, v)
    out = fj.attention(q, k, v, mask=Causal(), backend=backend)
    assert out.values.shape == (0, 2, 8)
    assert out.offsets is q.offsets
    if backend != "flex":
        out.values.sum().backward()
        assert [x.values.grad.shape for x in (q, k, v)] == [x.values.shape for x in (q, k, v)]


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled", "segments", "cpp", "flex"])
def test_queries_without_any_key_in_the_batch(backend: str) -> None:
    q, k, v = make_qkv([2, 3], [0, 0], dtype=torch.float32)
    out = fj.attention(q, k, v, backend=backend)
    assert out.values.shape == (5, 2, 16)
    assert not out.values.any()


EMPTY_ROWS = {
    "not_full": (~Full(), [3, 20], [3, 20], slice(0, 23)),
    "prefix_0": (Prefix(0), [3, 20], [3, 20], slice(0, 23)),
    "predicate": (MaskMod(lambda b, h, q, kv: (b == 1) & (kv <= q)), [3, 20], [3, 20], slice(0, 3)),
    "strictly_before": (~(Causal() & ~Causal()) & ~Window(None, 0), [3, 20], [3, 20], slice(2, 3)),
    "causal_end": (Causal("end"), [5, 20], [2, 20], slice(0, 3)),
}


@BACKENDS
@pytest.mark.parametrize(("mask", "lengths", "kv_lengths", "rows"), EMPTY_ROWS.values(), ids=EMPTY_ROWS.keys())
def test_rows_without_keys(mask: fj.Mask, lengths: list[int], kv_lengths: list[int], rows: slice, backend: str) -> None:
    q, k, v = needing_gradients(*make_qkv(lengths, kv_lengths))
    out, lse = fj.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert not out.values[rows].any()
    assert (lse.values[rows] == -torch.inf).all()
    assert not out.values.isnan().any()
    # An infinite gradient for what is not there must not become NaN.
    (out.values.sum() + lse.values.masked_fill(lse.values == -torch.inf, 0.0).sum()).backward()
    grads = [x.values.grad for x in (q, k, v)]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert not grads[0][rows].any()  # type: ignore[index]
    if rows == slice(0, 23):
        assert not any(g.any() for g in grads)  # type: ignore[union-attr]


@BACKENDS
def test_gradient_through_the_lse_of_rows_without_keys(backend: str) -> None:
    q, k, v = needing_gradients(*make_qkv([4]))
    _, lse = fj.attention(q, k, v, mask=~Full(), return_lse=True, backend=backend)
    lse.values.backward(torch.ones_like(lse.values))
    for x in (q, k, v):
        assert x.values.grad is None or not x.values.grad.any()


@ALL_BACKENDS
def test_fixed_capacity_zeroes_the_spare_rows(backend: str) -> None:
    """Rows behind the last offset may hold anything: they give 0 and -inf, and change nothing else."""
    lengths, tokens = [30, 0, 17, 1], 64
    exact = make_qkv(lengths, dtype=torch.float32)
    used = sum(lengths)
    buffers = []
    for x in exact:
        values = torch.full((tokens, *x.values.shape[1:]), 1e4)
        values[:used] = x.values
        buffers.append(fj.Jagged(values, exact[0].offsets))
    q, k, v = buffers
    plan = fj.plan(q, mask=Causal(), max_tokens=tokens, max_length=30)
    want_lse = backend != "flex"  # its CPU kernel has none
    got = fj.attention(q, k, v, plan=plan, return_lse=want_lse, backend=backend)
    out, lse = got if isinstance(got, tuple) else (got, None)
    expected = fj.attention(*exact, mask=Causal(), backend="reference").values
    assert not out.values[used:].any()
    torch.testing.assert_close(out.values[:used], expected, rtol=1e-5, atol=1e-6)  # float32, 30 terms
    if lse is not None:
        assert (lse.values[used:] == -torch.inf).all()
        assert lse.values[:used].isfinite().all()


@BACKENDS
def test_spare_rows_get_no_gradient(backend: str) -> None:
    x = torch.randn(32, 2, 16, dtype=torch.float64, requires_grad=True)
    batch = fj.Jagged(x, torch.tensor([0, 9, 20]))
    plan = fj.plan(batch, mask=Causal(), max_tokens=32, max_length=16, block_size=16)
    (fj.attention(batch, batch, batch, plan=plan, backend=backend).values ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad[:20].any()
    assert not x.grad[20:].any()


SHARED_TILE = [3, 5, 8, 0, 11]  # all in the first two tiles of 16
OWN_TILES = [16, 32, 16, 0, 16]  # segments begin and end with tiles


def rows_of(lengths: list[int], segment: int) -> slice:
    start = sum(lengths[:segment])
    return slice(start, start + lengths[segment])


def poisoned(x: fj.Jagged, rows: slice, value: float) -> fj.Jagged:
    values = x.values.clone()
    values[rows] = value
    return x.with_values(values)


@ALL_BACKENDS
@pytest.mark.parametrize("lengths", [SHARED_TILE, OWN_TILES], ids=["shared tile", "own tiles"])
def test_other_segments_do_not_change_by_a_bit(lengths: list[int], backend: str) -> None:
    q, k, v = make_qkv(lengths, dtype=torch.float32)
    plan = fj.plan(q, mask=Causal())
    before = fj.attention(q, k, v, plan=plan, backend=backend).values
    rows = rows_of(lengths, 1)
    after = fj.attention(*(poisoned(x, rows, 7.5) for x in (q, k, v)), plan=plan, backend=backend).values
    assert not torch.equal(after[rows], before[rows])
    after[rows] = before[rows]
    assert torch.equal(after, before)


@BACKENDS
def test_gradients_of_other_segments_do_not_change_by_a_bit(backend: str) -> None:
    grads = []
    rows = rows_of(SHARED_TILE, 1)
    for value in (None, 7.5):
        batches = make_qkv(SHARED_TILE, dtype=torch.float32)
        if value is not None:
            batches = tuple(poisoned(x, rows, value) for x in batches)
        q, k, v = needing_gradients(*batches)
        plan = fj.plan(q, mask=Causal(), block_size=16)
        (fj.attention(q, k, v, plan=plan, backend=backend).values ** 2).sum().backward()
        grads.append([x.values.grad for x in (q, k, v)])
    for before, after in zip(*grads, strict=True):
        assert not torch.equal(after[rows], before[rows])
        after[rows] = before[rows]
        assert torch.equal(after, before)


def run_poisoned(lengths: list[int], which: str, value: float, backend: str):  # type: ignore[no-untyped-def]
    """Output and gradients with segment 1 of k, v or both poisoned, and the rows of the others."""
    q, k, v = make_qkv(lengths, dtype=torch.float32)
    rows = rows_of(lengths, 1)
    k = poisoned(k, rows, value) if "k" in which else k
    v = poisoned(v, rows, value) if "v" in which else v
    q, k, v = needing_gradients(q, k, v)
    plan = fj.plan(q, mask=Causal(), block_size=16)
    out = fj.attention(q, k, v, plan=plan, backend=backend).values
    others = torch.ones(len(out), dtype=torch.bool)
    others[rows] = False
    out[others].sum().backward()
    return out.detach(), [x.values.grad for x in (q, k, v)], others


POISON = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])


@POISON
@pytest.mark.parametrize("backend", ["reference", "segments", "cpp"])
@pytest.mark.parametrize("which", ["k", "v", "kv"])
def test_poison_stays_in_its_segment(which: str, backend: str, value: float) -> None:
    out, grads, others = run_poisoned(SHARED_TILE, which, value, backend)
    clean, clean_grads, _ = run_poisoned(SHARED_TILE, "", value, backend)
    if "v" in which or backend == "reference":  # SDPA's CPU kernel answers 0 where every score is NaN
        assert not out[~others].isfinite().any()
    assert torch.equal(out[others], clean[others])
    for got, expected in zip(grads, clean_grads, strict=True):
        assert torch.equal(got[others], expected[others])


@POISON
def test_tiled_keeps_poison_out_of_other_tiles(value: float) -> None:
    """Where segments do not share a tile, 0 x NaN is never computed."""
    out, grads, others = run_poisoned(OWN_TILES, "kv", value, "tiled")
    clean, clean_grads, _ = run_poisoned(OWN_TILES, "", value, "tiled")
    assert torch.equal(out[others], clean[others])
    for got, expected in zip(grads, clean_grads, strict=True):
        assert torch.equal(got[others], expected[others])


@POISON
def test_tiled_spreads_poisoned_values_within_a_tile(value: float) -> None:
    """A known limit, documented by this test: a masked weight is 0, and 0 x NaN is NaN.

    Segments 0, 1 and 2 share the first tile with the poison; segment 4 has the second tile for itself.
    """
    out, _, _ = run_poisoned([*SHARED_TILE[:4], 16], "v", value, "tiled")
    clean, _, _ = run_poisoned([*SHARED_TILE[:4], 16], "", value, "tiled")
    assert not out[:16].isfinite().any()
    assert torch.equal(out[16:], clean[16:])


@POISON
def test_tiled_masks_poisoned_keys_in_the_forward(value: float) -> None:
    """Scores are masked before they are used, so bad keys alone reach nobody else's output."""
    out, _, others = run_poisoned(SHARED_TILE, "k", value, "tiled")
    clean, _, _ = run_poisoned(SHARED_TILE, "", value, "tiled")
    assert torch.equal(out[others], clean[others])


def test_packed_indices_over_int32_raise() -> None:
    values = torch.zeros(1).expand(2**31)  # one element in memory
    x = fj.Jagged(values, torch.tensor([0, 2**31]))
    with pytest.raises(LayoutError, match=r"q: packed indices must fit in int32; got tokens_q=2147483648"):
        build_layout(x, x)


def test_more_elements_than_int32_in_q() -> None:
    """T·H·D over 2^31 while T fits: only indices of tokens are int32."""
    x = fj.Jagged(torch.empty(2**20, 64, 64, device="meta"), torch.empty(3, dtype=torch.int64, device="meta"))
    assert x.values.numel() > 2**31
    assert build_layout(x, x).q_pos.shape == (2**20,)


STRIDED = {
    "every other feature": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "features first": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "expanded features": lambda x: x[..., :1].expand(-1, -1, x.shape[2]),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("how", list(STRIDED))
@pytest.mark.parametrize("mask", [Causal(), Window(5, 0)], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "tiled", "segments", "cpp"])
def test_strides_do_not_matter(backend: str, mask: fj.Mask, how: str) -> None:
    """A kernel that reads only some strides is given only those."""
    results = []
    for change in (STRIDED[how], lambda x: STRIDED[how](x).contiguous()):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(50, 2, 16, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
        q, k, v = (fj.Jagged.from_lengths(change(x), [20, 0, 30]) for x in leaves)
        out = fj.attention(q, q.with_values(k.values), q.with_values(v.values), mask=mask, backend=backend)
        assert isinstance(out, fj.Jagged)
        results.append((out.values, *torch.autograd.grad(out.values.square().sum(), leaves)))
    for strided, plain in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)  # products in another order


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("normalizer", [None, fj.SiLU()], ids=repr)
def test_without_tokens_every_parameter_gets_a_zero_gradient(lengths: list[int], normalizer: object) -> None:
    """As torch's own layers do: an optimizer or DDP must not find a None."""
    table = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(0, 2, 16, requires_grad=True)
    x = fj.Jagged.from_lengths(values, lengths)
    out = fj.attention(x, x, x, score=fj.RelativeBias(table), normalizer=normalizer)
    out.values.sum().backward()
    for leaf in (table, values):
        assert leaf.grad is not None
        assert not leaf.grad.any()
