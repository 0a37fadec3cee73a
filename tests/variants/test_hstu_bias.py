"""What HSTU needs besides SiLU: biases by bucketed position and time, and its mask."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EDGE_LENGTHS, make_qkv, needing_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flexjag as fj
from flexjag.algebra import scores as s
from flexjag.algebra.normalizers import SiLU
from flexjag.algebra.scores import BucketedBias, TimeBias
from flexjag.errors import MaskError, ScoreError
from flexjag.lowering import mods
from flexjag.testing import assert_compiles, assert_matches_reference, assert_tiles, lengths
from flexjag.variants.hstu.mask import hstu_mask

CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # float64: a few hundred roundings of numbers of about 1
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
BOUNDARIES = torch.tensor([-5, -1, 0, 1, 1, 7])
TIME_BOUNDARIES = TimeBias.log_boundaries(8)


def table(width: int, heads: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(heads, width, generator=g, dtype=torch.float64)


def times(total: int) -> Tensor:
    g = torch.Generator().manual_seed(6)
    return torch.randint(0, 900, (total,), generator=g).cumsum(0)


def bucket(x: int, boundaries: Tensor) -> int:
    return sum(int(b) <= x for b in boundaries)


@BACKENDS
@pytest.mark.parametrize("normalizer", [fj.Softmax(), SiLU()], ids=repr)
def test_biases_by_hand(normalizer: fj.Normalizer, backend: str) -> None:
    """Every pair of tokens, looked up one by one."""
    sizes = [9, 0, 4]
    q, k, v = make_qkv(sizes)
    by_place, by_time, when = table(7), table(9), times(13)
    score = BucketedBias(by_place, BOUNDARIES) >> TimeBias(by_time, when, TIME_BOUNDARIES)
    got = fj.attention(q, k, v, score=score, normalizer=normalizer, backend=backend).values
    for start, n in ((0, 9), (9, 4)):
        here = slice(start, start + n)
        raw = torch.einsum("ihd,jhd->hij", q.values[here], k.values[here]) / 4
        for i in range(n):
            for j in range(n):
                passed = int(when[start + i] - when[start + j])
                raw[:, i, j] += by_place[:, bucket(j - i, BOUNDARIES)] + by_time[:, bucket(passed, TIME_BOUNDARIES)]
        weights = raw.softmax(2) if normalizer == fj.Softmax() else raw * torch.sigmoid(raw)
        wanted = torch.einsum("hij,jhe->ihe", weights, v.values[here])
        torch.testing.assert_close(got[here], wanted, **CLOSE)


def test_log_boundaries_are_hstus_buckets() -> None:
    """floor(log(t) / 0.301) of every whole t up to 10^5, and of powers of two at a width of log 2."""
    for width, most in ((0.301, 38), (1.0, 11)):
        boundaries = TimeBias.log_boundaries(most, width)
        t = torch.arange(1, 100_000)
        wanted = (t.double().log() / width).floor().long().clamp(max=most)
        assert torch.equal(torch.bucketize(t, boundaries, right=True), wanted)
    assert TimeBias.log_boundaries(5, math.log(2)).tolist() == [2, 4, 8, 16, 32]
    assert TimeBias.log_boundaries(0).tolist() == []


@BACKENDS
def test_queries_may_have_times_of_their_own(backend: str) -> None:
    """HSTU asks at the next event's time."""
    q, k, v = make_qkv([5, 8])
    when = times(14)
    shifted = TimeBias(table(9), when[1:], TIME_BOUNDARIES, when[:-1])
    got = fj.attention(q, k, v, mask=fj.Causal(), score=shifted, normalizer=SiLU(), backend=backend).values
    own = TimeBias(table(9), when[:-1], TIME_BOUNDARIES)
    assert not torch.allclose(
        got, fj.attention(q, k, v, mask=fj.Causal(), score=own, normalizer=SiLU(), backend=backend).values
    )
    passed, biases = when[1:, None] - when[None, :-1], table(9)
    mod = fj.ScoreMod(lambda x, b, h, i, j: x + biases[h, _bucket_of(passed, b, i, j)])
    wanted = fj.attention(q, k, v, mask=fj.Causal(), score=mod, normalizer=SiLU(), backend="reference").values
    torch.testing.assert_close(got, wanted, **CLOSE)


def _bucket_of(passed: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (passed[i + 5 * b, j + 5 * b] >= TIME_BOUNDARIES).sum()


@pytest.mark.parametrize("normalizer", [fj.Softmax(), SiLU(0.1)], ids=repr)
@pytest.mark.parametrize("backend", ["tiled", "segments"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(data=st.data())
def test_backends_are_the_reference(
    dtype: torch.dtype, backend: str, normalizer: fj.Normalizer, data: st.DataObject
) -> None:
    sizes = data.draw(lengths())
    kv_sizes = data.draw(lengths(min_segments=len(sizes), max_segments=len(sizes)))
    q, k, v = make_qkv(sizes, kv_sizes, heads=4, groups=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    learned = [t.to(wide).requires_grad_() for t in (table(7, 4), table(9, 4))]
    when = [t.double() if data.draw(st.booleans()) else t for t in (times(sum(sizes)), times(sum(kv_sizes)))]
    score = BucketedBias(learned[0], BOUNDARIES) >> TimeBias(learned[1], when[0], TIME_BOUNDARIES, when[1])
    plan = fj.plan(q, k, mask=fj.Window(20, 3), score=score, normalizer=normalizer, block_size=16)
    assert_matches_reference(q, k, v, plan=plan, backend=backend, learned=learned)


@pytest.mark.parametrize("normalizer", [fj.Softmax(), SiLU()], ids=repr)
@pytest.mark.parametrize("backend", ["tiled", "segments"])
def test_gradcheck(backend: str, normalizer: fj.Normalizer) -> None:
    q, k, v = make_qkv([3, 4], dim=3, value_dim=2)
    when = times(7)

    def run(x, places, moments):  # type: ignore[no-untyped-def]
        score = BucketedBias(places, BOUNDARIES) >> TimeBias(moments, when, TIME_BOUNDARIES)
        return fj.attention(
            q.with_values(x), k, v, mask=fj.Causal(), score=score, normalizer=normalizer, backend=backend
        ).values

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in (q.values, table(7), table(9))])


@pytest.mark.parametrize("backend", ["tiled", "segments"])
def test_gradients_of_biases_are_the_same_every_time(backend: str) -> None:
    """On two threads, where plain indexing adds with atomics."""
    q, k, v = make_qkv([300, 200, 7], dtype=torch.float32)
    learned = [t.float().requires_grad_() for t in (table(7), table(9))]
    score = BucketedBias(learned[0], BOUNDARIES) >> TimeBias(learned[1], times(507), TIME_BOUNDARIES)
    threads = torch.get_num_threads()

    def run() -> tuple[Tensor, ...]:
        out = fj.attention(q, k, v, mask=fj.Causal(), score=score, normalizer=SiLU(), backend=backend)
        return torch.autograd.grad((out.values**2).sum(), learned)

    torch.set_num_threads(2)
    try:
        first = run()
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_one_graph_for_all_batches() -> None:
    """Plan, mask, biases and backward, with other lengths, times and targets each time."""
    learned = [t.clone().requires_grad_() for t in (table(7), table(9))]
    g = torch.Generator().manual_seed(1)

    def attend(x: fj.Jagged, when: Tensor, targets: Tensor) -> Tensor:
        score = BucketedBias(learned[0], BOUNDARIES) >> TimeBias(learned[1], when, TIME_BOUNDARIES)
        mask = hstu_mask(x, contextual=3, targets=targets, max_attn_len=20, min_full=5)
        return fj.attention(x, x, x, mask=mask, score=score, normalizer=SiLU(0.1)).values

    given = []
    for index in range(8):
        sizes = torch.randint(3, 60, (2 + index % 5,), generator=g).tolist()
        values = torch.randn(sum(sizes), 2, 8, generator=g, dtype=torch.float64).requires_grad_()
        when, targets = times(sum(sizes)), torch.randint(0, 4, (len(sizes),), generator=g)
        for t in (when, targets):
            torch._dynamo.maybe_mark_dynamic(t, 0)
        given.append((fj.Jagged.from_lengths(values, sizes), when, targets))

    def same(index: int, out: Tensor) -> None:
        eager = attend(*given[index])
        torch.testing.assert_close(out, eager, **CLOSE)
        leaves = [given[index][0].values, *learned]
        found = [leaf.grad for leaf in leaves]
        for got, wanted in zip(found, torch.autograd.grad(eager.sum(), leaves), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)  # sums over up to 59 * 59 * 5 scores
        for leaf in leaves:
            leaf.grad = None

    graphs = assert_compiles(attend, given, after_each=same)
    assert graphs.forward == graphs.backward == [0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_flex_takes_the_biases() -> None:
    """FlexAttention's own kernel, in a graph, on the same score functions."""
    q, k, v = (fj.Jagged.from_lengths(torch.randn(61, 2, 16), [9, 0, 31, 1, 20]) for _ in range(3))
    score = BucketedBias(table(7).float(), BOUNDARIES) >> TimeBias(table(9).float(), times(61), TIME_BOUNDARIES)
    with torch.no_grad():
        plan = fj.plan(q, mask=fj.Causal(), score=score)
        got = fj.attention(q, q.with_values(k.values), q.with_values(v.values), plan=plan, backend="flex").values
        wanted = fj.attention(
            q, q.with_values(k.values), q.with_values(v.values), plan=plan, backend="reference"
        ).values
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # float32, rows of up to 31 keys


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 12])
def test_the_scalar_search_is_bucketize(count: int) -> None:
    """FlexAttention looks up one score at a time."""
    boundaries = torch.randint(-9, 9, (count,), generator=torch.Generator().manual_seed(count)).sort().values
    for x in torch.arange(-12, 12):
        assert int(mods._bucket(x, boundaries)) == bucket(int(x), boundaries)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BucketedBias(table(6), BOUNDARIES), r"table must be float \[H, K \+ 1\] for K.*table=\(2, 6\)"),
        (lambda: BucketedBias(table(7).long(), BOUNDARIES), "dtype=torch.int64"),
        (lambda: TimeBias(table(7), times(9)[None], BOUNDARIES), r"times: must be 1-D, one per packed.*\(1, 9\)"),
        (lambda: TimeBias(table(7), times(9), BOUNDARIES, table(3)), r"kv_times: must be 1-D"),
        (lambda: TimeBias.log_boundaries(3, 0.0), r"count: width must be positive; got count=3, width=0.0"),
        (lambda: TimeBias.log_boundaries(99, 1.0), r"count: must be 0 to 42 at this width"),
    ],
)
def test_malformed_biases_raise(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScoreError, match=message):
        make()


def test_biases_that_do_not_fit_raise() -> None:
    q, k, v = make_qkv([5])
    with pytest.raises(ScoreError, match=r"times: must have one entry per query token; got entries=4, tokens=5"):
        fj.attention(q, k, v, score=TimeBias(table(7), times(4), BOUNDARIES))
    with pytest.raises(ScoreError, match=r"kv_times: must have one entry per key token; got entries=6, tokens=5"):
        fj.attention(q, k, v, score=TimeBias(table(7), times(5), BOUNDARIES, times(6)))
    both = BucketedBias(table(7), BOUNDARIES) >> TimeBias(table(7, 3), times(5), BOUNDARIES)
    with pytest.raises(ScoreError, match=r"one row per query head; got heads=\[2, 3\]"):
        fj.attention(q, k, v, score=both)
    assert s.is_additive(TimeBias(table(7), times(4), BOUNDARIES) >> BucketedBias(table(7), BOUNDARIES))


def defined(
    n: int, contextual: int, targets: int, max_attn_len: int, min_full: int, causal: bool = True, group: int = 1
) -> Tensor:
    """HSTU's mask of one segment of n tokens, pair by pair, 0 meaning none of a thing."""
    last = n - targets - (contextual - 1 if contextual else 0)

    def place(p: int) -> int:
        p = max(p - contextual + 1, 0) if contextual else p
        return min(p, last) if targets else p

    def sees(p: int, r: int) -> bool:
        i, j = place(p), place(r)
        distance = i - j if causal else abs(i - j)
        seen = p == r or distance > 0
        if max_attn_len:
            seen = seen and (distance <= max_attn_len or (min_full > 0 and i >= last - min_full))
        first = n - targets
        own = min(p, r) >= first and (p - first) // group == (r - first) // group and (p >= r or not causal)
        return seen or own or (contextual > 0 and i == 0 and j < last)

    return torch.tensor([[sees(p, r) for r in range(n)] for p in range(n)], dtype=torch.bool).view(n, n)


@given(
    sizes=lengths(max_total=90),
    contextual=st.none() | st.integers(0, 5),
    with_targets=st.booleans(),
    max_attn_len=st.integers(0, 12),
    min_full=st.integers(0, 5),
    causal=st.booleans(),
    group=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_mask_is_hstus(
    sizes: list[int],
    contextual: int | None,
    with_targets: bool,
    max_attn_len: int,
    min_full: int,
    causal: bool,
    group: int,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    targets = [int(torch.randint(0, n + 1, (), generator=g)) if with_targets else 0 for n in sizes]
    per_segment = torch.randint(0, 5, (len(sizes),), generator=g, dtype=torch.int32)
    prefixes = per_segment.tolist() if contextual is None else [contextual] * len(sizes)
    x = fj.Jagged.from_lengths(torch.zeros(sum(sizes)), sizes)
    mask = hstu_mask(
        x,
        causal=causal,
        contextual=per_segment if contextual is None else contextual,
        targets=torch.tensor(targets, dtype=torch.int64) if with_targets else None,
        target_group_size=group,
        max_attn_len=max_attn_len,
        min_full=min_full,
    )
    blocks = [
        defined(n, c, t, max_attn_len, min_full, causal, group)
        for n, c, t in zip(sizes, prefixes, targets, strict=True)
    ]
    assert torch.equal(
        fj.plan(x, mask=mask).to_dense(),
        torch.block_diag(*blocks).bool().view(sum(sizes), -1) if sum(sizes) else torch.zeros(0, 0).bool(),
    )
    assert_tiles(mask, x, block_size=16)


@BACKENDS
@pytest.mark.parametrize("sizes", [[40, 7, 0, 33], *EDGE_LENGTHS.values()], ids=str)
def test_hstu_attention_with_targets_and_contextual_tokens(sizes: list[int], backend: str) -> None:
    """``(SiLU(q·k / D + bias) / N ⊙ mask) V``, padded, written out; forward and all gradients."""
    batches = make_qkv(sizes)
    targets = torch.tensor([min(2, n // 3) for n in sizes], dtype=torch.int64)
    q, k, v = needing_gradients(*batches)
    by_place, by_time = (t.requires_grad_() for t in (table(7), table(9)))
    when = times(sum(sizes))
    score = BucketedBias(by_place, BOUNDARIES) >> TimeBias(by_time, when, TIME_BOUNDARIES)
    mask = hstu_mask(q, contextual=3, targets=targets, max_attn_len=9, min_full=4)
    k, v = (q.with_values(x.values) for x in (k, v))
    out = fj.attention(q, k, v, mask=mask, score=score, normalizer=SiLU(1 / 40), scale=1 / 16, backend=backend).values

    most = max([1, *sizes])
    x, y, z = (t.to_padded(max_length=most).transpose(1, 2) for t in (q, k, v))
    raw = torch.einsum("bhid,bhjd->bhij", x, y) / 16
    place = torch.arange(most)
    raw = raw + by_place[:, torch.bucketize(place[None] - place[:, None], BOUNDARIES, right=True)]
    clock = q.with_values(when).to_padded(max_length=most)
    passed = torch.bucketize(clock[:, :, None] - clock[:, None], TIME_BOUNDARIES, right=True)
    raw = raw + by_time[:, passed].transpose(0, 1)
    allowed = torch.zeros(len(sizes), 1, most, most, dtype=torch.bool)
    for b, n in enumerate(sizes):
        allowed[b, 0, :n, :n] = defined(n, 3, int(targets[b]), 9, 4)
    padded = torch.einsum("bhij,bhje->bhie", raw * torch.sigmoid(raw) / 40 * allowed, z).transpose(1, 2)
    wanted = padded[place[None] < q.lengths[:, None]]

    torch.testing.assert_close(out, wanted, **CLOSE)
    leaves = [q.values, k.values, v.values, by_place, by_time]
    found = [
        torch.autograd.grad((o**2).sum(), leaves, materialize_grads=True, allow_unused=True) for o in (out, wanted)
    ]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


@BACKENDS
def test_a_decode_step_is_the_last_rows(backend: str) -> None:
    """Two new tokens per segment against all keys: the last two rows of the whole."""
    q, k, v = make_qkv([20, 2, 33])
    targets = torch.tensor([1, 0, 2])
    options = {"contextual": 2, "targets": targets, "max_attn_len": 7, "min_full": 1, "target_group_size": 2}
    whole = fj.attention(q, k, v, mask=hstu_mask(q, **options), normalizer=SiLU(), backend=backend).values
    last = torch.tensor([18, 19, 20, 21, 53, 54])
    new = fj.Jagged.from_lengths(q.values[last], [2, 2, 2])
    got = fj.attention(new, k, v, mask=hstu_mask(new, k, **options), normalizer=SiLU(), backend=backend).values
    torch.testing.assert_close(got, whole[last], **CLOSE)


def test_none_and_nothing_are_unlimited() -> None:
    """As in the public code, 0 positions back means all."""
    x = fj.Jagged.from_lengths(torch.zeros(9), [9])
    whole = fj.plan(x, mask=hstu_mask(x, contextual=3)).to_dense()
    assert torch.equal(fj.plan(x, mask=hstu_mask(x, contextual=3, max_attn_len=0)).to_dense(), whole)
    assert torch.equal(fj.plan(x, mask=hstu_mask(x, causal=False)).to_dense(), torch.ones(9, 9).bool())


def test_a_fixed_capacity_without_segments() -> None:
    """Spare rows belong to no segment: they look up nothing."""
    none = torch.zeros(0, dtype=torch.int64)
    x = fj.Jagged(torch.zeros(4), torch.tensor([0]))
    mask = hstu_mask(x, contextual=none, targets=none, target_group_size=2)
    assert not fj.plan(x, mask=mask, max_tokens=4, max_length=4).to_dense().any()


def test_malformed_masks_raise() -> None:
    x = fj.Jagged.from_lengths(torch.zeros(5), [5])
    with pytest.raises(MaskError, match=r"contextual: must be an int of at least 0; got value=-1"):
        hstu_mask(x, contextual=-1)
    with pytest.raises(MaskError, match=r"max_attn_len: must be an int of at least 0; got value=-1"):
        hstu_mask(x, max_attn_len=-1)
    with pytest.raises(MaskError, match=r"target_group_size: must be an int of at least 1; got value=0"):
        hstu_mask(x, target_group_size=0)
    with pytest.raises(MaskError, match=r"contextual: must be integers, one per segment; got shape=\(\)"):
        hstu_mask(x, contextual=torch.tensor(1))
    with pytest.raises(MaskError, match=r"contextual: must not be negative; got contextual\[0\]=-1"):
        hstu_mask(x, contextual=torch.tensor([-1]))
    with pytest.raises(MaskError, match=r"targets: must be integers, one per segment; got shape=\(2,\)"):
        hstu_mask(x, targets=torch.tensor([1, 2]))
    for wrong in (6, -1):
        with pytest.raises(MaskError, match=rf"targets: must be from 0 to .*; got targets\[0\]={wrong}, length=5"):
            hstu_mask(x, targets=torch.tensor([wrong]))
