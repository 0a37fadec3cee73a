"""Decoding by KVCache: steps of any size equal the full pass, for every mask and score that decodes, and in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import jagged
from torch import Tensor, nn

import flexjag as fj
from flexjag.testing import assert_compiles

H, G, D, E = 4, 2, 8, 5
NAN = float("nan")


def poison(cache: fj.KVCache) -> None:
    """Fill the pages that no segment holds with NaN, and so the rows that were never written."""
    free = torch.ones(cache._capacity, dtype=torch.bool)
    free[torch.from_numpy(cache._table.pages)] = False
    for storage in (*cache._keys, *cache._values):
        storage.unflatten(0, (cache._capacity, cache._table.page))[free] = NAN


TABLE = torch.randn(H, 2 * 6 + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
BUCKETS = torch.randn(H, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
T5 = torch.randn(H, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)

DECODING: dict[str, tuple[fj.Mask, fj.Score | None, Any]] = {
    "causal": (fj.Causal("end"), None, None),
    "window": (fj.Window(5, 0, "end"), None, None),
    "shifted window": (fj.Window(8, -1, "end"), None, 0.0),
    "window | prefix": (fj.Window(4, 0, "end") | fj.Prefix(3) & fj.Causal("end"), None, None),
    "chunked": (fj.Causal("end") & fj.Chunked(6, align="end"), None, None),
    "sinks": (fj.Causal("end"), None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
    "softmax plus one": (fj.Window(5, 0, "end"), None, 0.0),
    "alibi": (fj.Causal("end"), fj.Alibi(SLOPES, align="end"), None),
    "symmetric alibi": (fj.Causal("end"), fj.Alibi(SLOPES, align="end", symmetric=True), None),
    "relative bias": (fj.Causal("end"), fj.RelativeBias(TABLE, align="end"), None),
    "buckets": (fj.Causal("end"), fj.BucketedBias(BUCKETS, torch.tensor([-9, -4, -1, 0]), align="end"), None),
    "t5": (fj.Causal("end"), fj.T5Bias(T5, bidirectional=False, max_distance=12, align="end"), None),
    "soft cap": (fj.Causal("end"), fj.Alibi(SLOPES, align="end") >> fj.SoftCap(5.0), None),
}

Sequence = tuple[Tensor, Tensor, Tensor]


def sequences(count: int, longest: int = 30) -> list[Sequence]:
    """q, k and v of each of `count` sequences, ``[n, heads, dim]``."""
    g = torch.Generator().manual_seed(7)
    lengths = torch.randint(5, longest, (count,), generator=g).tolist()
    return [tuple(torch.randn(n, h, d, generator=g).double() for h, d in ((H, D), (G, D), (G, E))) for n in lengths]  # type: ignore[misc]


def batches(waiting: list[Sequence]) -> Iterator[tuple[list[int], list[int], list[int], int]]:
    """Continuous batching of three at a time: indices, positions and sizes of a step; segments that then leave.

    A prompt enters in chunks of at most 4 tokens; then one token a step, sometimes two, sometimes none.
    """
    running: list[int] = []
    done: dict[int, int] = {}
    upcoming = iter(range(len(waiting)))
    step = 0
    while True:
        for index in upcoming:
            running.append(index)
            done[index] = 0
            if len(running) == 3:
                break
        if not running:
            return
        left = [len(waiting[i][0]) - done[i] for i in running]
        sizes = [min(n, 4 if done[i] < 5 else (1, 1, 2, 0)[(step + i) % 4]) for i, n in zip(running, left, strict=True)]
        yield running, [done[i] for i in running], sizes, step
        for i, n in zip(running, sizes, strict=True):
            done[i] += n
        running = [i for i in running if done[i] < len(waiting[i][0])]
        step += 1


def decoded(
    all_of: list[Sequence],
    mask: fj.Mask,
    score: fj.Score | None = None,
    *,
    sinks: Any = None,
    rope: bool = False,
    backend: str = "auto",
    before_step: Callable[[fj.KVCache], None] | None = None,
) -> list[Tensor]:
    """The outputs of all sequences, decoded three at a time; those that end leave, and others enter."""
    cache = fj.KVCache(1, G, D, E, dtype=torch.float64, page=4)
    found: list[list[Tensor]] = [[] for _ in all_of]
    present: list[int] = []
    for running, at, sizes, _ in batches(all_of):
        cache.evict([i not in running for i in present])
        cache.add(len(running) - cache.num_segments)
        present = list(running)
        if before_step is not None:
            before_step(cache)
        rows = list(zip(running, at, sizes, strict=True))
        q, k, v = (fj.Jagged.from_list([all_of[i][x][a : a + n] for i, a, n in rows]) for x in range(3))
        k, v = q.with_values(k.values), q.with_values(v.values)
        keys = cache.extend(q)
        assert cache.starts.tolist() == at
        if rope:
            q, k = fj.rope(q, k, starts=cache.starts)
        plan = fj.plan(q, keys, mask=mask, score=score)
        out = fj.attention(q, *cache.append(0, k, v), plan=plan, sinks=sinks, backend=backend)
        poison(cache)
        for i, x in zip(running, out.to_list(), strict=True):
            found[i].append(x)
    assert cache.lengths.sum() == 0 or present
    return [torch.cat(x) for x in found]


def whole(
    all_of: list[Sequence], mask: fj.Mask, score: fj.Score | None = None, sinks: Any = None, rope: bool = False
) -> list[Tensor]:
    """The outputs of all sequences in one pass, by the reference."""
    q, k, v = (fj.Jagged.from_list([x[i] for x in all_of]) for i in range(3))
    k, v = q.with_values(k.values), q.with_values(v.values)
    if rope:
        q, k = fj.rope(q, k)
    return fj.attention(q, k, v, mask=mask, score=score, sinks=sinks, backend="reference").to_list()


@pytest.mark.parametrize("name", DECODING)
def test_steps_equal_the_full_pass(name: str) -> None:
    mask, score, sinks = DECODING[name]
    all_of = sequences(6)
    wanted = whole(all_of, mask, score, sinks)
    for found, right in zip(decoded(all_of, mask, score, sinks=sinks), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["segments", "tiled", "reference"])
def test_every_backend_takes_what_the_cache_gives(backend: str) -> None:
    all_of, (mask, score, _) = sequences(4), DECODING["relative bias"]
    wanted = whole(all_of, mask, score)
    for found, right in zip(decoded(all_of, mask, score, backend=backend), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_rotated_steps_equal_the_rotated_whole() -> None:
    all_of = sequences(6)
    wanted = whole(all_of, fj.Causal(), rope=True)
    for found, right in zip(decoded(all_of, fj.Causal("end"), rope=True), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_a_prompt_may_see_itself_as_a_whole() -> None:
    lengths, prompts = [9, 12], torch.tensor([4, 6])
    mask = fj.Causal("end") | fj.Prefix(prompts)
    q, k, v = jagged(lengths, H, D), jagged(lengths, G, D, seed=1), jagged(lengths, G, E, seed=2)
    wanted = fj.attention(q, k, v, mask=mask, backend="reference")
    cache = fj.KVCache(1, G, D, E, segments=2, dtype=torch.float64)
    rows = [[], []]  # type: list[list[Tensor]]
    for low, high in (([0, 0], [4, 6]), ([4, 6], [9, 12])):
        a, b, c = (fj.Jagged.from_list([x[s][low[s] : high[s]] for s in range(2)]) for x in (q, k, v))
        keys = cache.extend(a)
        step = fj.attention(a, *cache.append(0, b, c), plan=fj.plan(a, keys, mask=mask))
        for s in range(2):
            rows[s].append(step[s])
    torch.testing.assert_close(torch.cat([torch.cat(x) for x in rows]), wanted.values, rtol=0, atol=1e-12)


# Windows that roll


@pytest.mark.parametrize("name", ["window", "softmax plus one", "shifted window"])
@pytest.mark.parametrize("score", [None, fj.Alibi(SLOPES, align="end"), fj.RelativeBias(TABLE, align="end")])
def test_what_a_window_has_passed_may_be_dropped(name: str, score: fj.Score | None) -> None:
    mask, _, sinks = DECODING[name]
    all_of = sequences(5, longest=60)
    wanted = whole(all_of, mask, score, sinks, rope=True)
    held = []

    def trim(cache: fj.KVCache) -> None:
        cache.trim(8 if name == "shifted window" else 5)
        held.append(int(cache.lengths.max()))

    found = decoded(all_of, mask, score, sinks=sinks, rope=True, before_step=trim)
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-12)
    assert max(held) <= 8


def test_a_window_with_its_first_tokens_may_be_rolled() -> None:
    mask, score, sinks = DECODING["window | prefix"]
    all_of = sequences(5, longest=60)
    wanted = whole(all_of, mask, score, sinks, rope=True)
    found = decoded(all_of, mask, score, rope=True, before_step=lambda cache: cache.trim(4, keep_first=3))
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-12)


def test_chunks_that_are_over_may_be_dropped() -> None:
    mask, score, sinks = DECODING["chunked"]
    all_of = sequences(5, longest=60)
    wanted = whole(all_of, mask, score, sinks, rope=True)
    found = decoded(all_of, mask, score, rope=True, before_step=lambda cache: cache.trim(cache.starts % 6))
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-12)


def test_pages_behind_a_window_are_used_again() -> None:
    cache = fj.KVCache(1, G, D, segments=2, page=4, pages=2 * 4)
    tokens = jagged([1, 1], G, D, dtype=torch.float32)
    for step in range(100):
        cache.trim(9)
        cache.extend(tokens)
        k, _ = cache.append(0, tokens, tokens)
        assert k.lengths.tolist() == [min(step + 1, 10)] * 2
    assert cache.starts.tolist() == [99, 99]


# Speculation


def test_rejected_drafts_leave_no_trace() -> None:
    all_of = sequences(1, longest=40)
    wanted = whole(all_of, fj.Causal())[0]
    cache, found, at = fj.KVCache(1, G, D, E, segments=1, dtype=torch.float64, page=4), [], 0
    while at < len(wanted):
        q, k, v = (fj.Jagged.from_list([x[at : at + 3]]) for x in all_of[0])
        k, v = q.with_values(k.values), q.with_values(v.values)
        draft = torch.randn(2, 1, 1).double()
        right = k.values.shape[0] - at % 3 % k.values.shape[0]  # accepted; the rest is other than what comes
        k, v = (x.with_values(torch.cat([x.values[:right], x.values[right:] + draft[:1]])) for x in (k, v))
        keys = cache.extend(q)
        out = fj.attention(q, *cache.append(0, k, v), plan=fj.plan(q, keys, mask=fj.Causal("end")))
        found.append(out.values[:right])
        cache.rewind(len(q.values) - right)
        at += right
        assert cache.starts.tolist() == cache.lengths.tolist() == [at]
    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-12)


# Isolation


@pytest.mark.parametrize("backend", ["segments", "reference"])
def test_other_segments_change_no_bit(backend: str) -> None:
    all_of = sequences(6)
    other = [*all_of]
    other[2] = tuple(torch.full_like(x, NAN) for x in all_of[2])  # type: ignore[assignment]
    outs = [decoded(x, fj.Causal("end"), backend=backend) for x in (all_of, other)]
    for i, (a, b) in enumerate(zip(*outs, strict=True)):
        assert torch.equal(a, b) == (i != 2)


# Graphs


class Decoder(nn.Module):
    """Two layers of attention with RoPE and grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList([nn.Linear(H * D, (H + 2 * G) * D) for _ in range(2)])

    def forward(self, x: fj.Jagged, cache: fj.KVCache, plan: fj.Plan) -> Tensor:
        for i, project in enumerate(self.project):
            heads = project(x.values).unflatten(1, (-1, D)).split([H, G, G], 1)
            q, k, v = (x.with_values(t) for t in heads)
            q, k = fj.rope(q, k, starts=cache.starts)
            k, v = cache.append(i, k, v)
            x = x.with_values(x.values + fj.attention(q, k, v, plan=plan, backend="tiled").values.flatten(1))
        return x.values


def steps(cache: fj.KVCache) -> Iterator[tuple[fj.Jagged, fj.KVCache, fj.Plan]]:
    """Prompts, single tokens, several tokens, other numbers of segments, storage that grows."""
    g = torch.Generator().manual_seed(1)
    for lengths in (
        [7, 0, 0],
        [5, 3, 9],
        [1, 1, 1],
        [1, 1, 1],
        [20, 1, 0],
        [1, 1, 1],
        None,
        [1, 1, 7, 0],
        [40, 1, 1, 3],
        [1] * 4,
    ):
        if lengths is None:
            cache.evict(1)
            cache.add(2)
            cache.trim(20)
            continue
        x = fj.Jagged.from_lengths(torch.randn(sum(lengths), H * D, generator=g), lengths)
        yield x, cache, fj.plan(x, cache.extend(x), mask=fj.Causal("end"), block_size=16)


def test_all_steps_are_one_graph() -> None:
    model = Decoder()
    with torch.no_grad():
        wanted = [model(*step) for step in steps(fj.KVCache(2, G, D, segments=3))]

    def check(index: int, out: Tensor) -> None:
        torch.testing.assert_close(out, wanted[index], rtol=0, atol=1e-5)

    graphs = assert_compiles(
        model, steps(fj.KVCache(2, G, D, segments=3)), backward=False, backend="aot_eager", after_each=check
    )
    assert graphs.inference == [0]


@pytest.mark.slow
def test_all_steps_are_one_graph_of_inductor() -> None:
    model = Decoder()
    with torch.no_grad():
        wanted = [model(*step) for step in steps(fj.KVCache(2, G, D, segments=3))]

    def check(index: int, out: Tensor) -> None:
        torch.testing.assert_close(out, wanted[index], rtol=0, atol=1e-5)

    graphs = assert_compiles(model, steps(fj.KVCache(2, G, D, segments=3)), backward=False, after_each=check)
    assert graphs.inference == [0]
