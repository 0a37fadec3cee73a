"""KVCache: what it holds after any operations, in any mode of gradients, and copied."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import jagged
from hypothesis import given
from hypothesis import strategies as st

import flexjag as fj

H, G, D, E = 4, 2, 8, 5
NAN = float("nan")


# What it holds


def poison(cache: fj.KVCache) -> None:
    """Fill the pages that no segment holds with NaN, and so the rows that were never written."""
    free = torch.ones(cache._capacity, dtype=torch.bool)
    free[torch.from_numpy(cache._table.pages)] = False
    for storage in (*cache._keys, *cache._values):
        storage.unflatten(0, (cache._capacity, cache._table.page))[free] = NAN


def check_pages(cache: fj.KVCache) -> None:
    """Pages are those that exist, as many as the lengths need, and free ones are counted."""
    table = cache._table
    assert ((table.pages >= 0) & (table.pages < cache._capacity)).all()
    assert table.counts.sum() == len(table.pages)
    assert cache.free_pages == cache._capacity - len(set(table.pages.tolist()))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "select", "evict", "add", "trim", "trim", "rewind"]),
        st.integers(0, 2**30),
    ),
    min_size=3,
    max_size=14,
)


@given(OPERATIONS, st.integers(1, 5), st.booleans())
def test_any_operations_hold_the_tokens_that_a_list_would(operations: list, page: int, fixed: bool) -> None:
    layers = 2
    cache = fj.KVCache(layers, G, D, E, segments=2, dtype=torch.float64, page=page, pages=2000 if fixed else None)
    held = [[(torch.zeros(0, G, D).double(), torch.zeros(0, G, E).double())] * layers for _ in range(2)]
    seen, first, count = [0, 0], [0, 0], 0
    keep_first = page // 2
    for name, seed in operations:
        g = torch.Generator().manual_seed(seed)

        def draw(high: int, size: int, g: torch.Generator = g) -> list[int]:
            return torch.randint(0, high, (size,), generator=g).tolist()

        sizes = [len(x[0][0]) for x in held]
        if name == "step":
            new = [
                n if flag else min(n, 1) for n, flag in zip(draw(3 * page, len(held)), draw(2, len(held)), strict=True)
            ]
            tokens = jagged(new)
            layout = cache.extend(tokens)
            assert cache.starts.tolist() == seen
            for layer in range(layers):
                count += 1
                k, v = jagged(new, G, D, seed=count), jagged(new, G, E, seed=-count)
                k, v = tokens.with_values(k.values), tokens.with_values(v.values)
                parts = list(zip(k.to_list(), v.to_list(), strict=True))
                for s, part in enumerate(parts):
                    held[s] = list(held[s])
                    held[s][layer] = tuple(torch.cat(x) for x in zip(held[s][layer], part, strict=True))
                for found, which in zip(cache.append(layer, k, v), (0, 1), strict=True):
                    assert found.offsets is layout.offsets
                    assert torch.equal(found.values, torch.cat([x[layer][which] for x in held] or [found.values]))
                    found.validate()
            seen = [a + n for a, n in zip(seen, new, strict=True)]
        elif name == "add":
            extra = draw(3, 1)[0]
            cache.add(extra)
            held += [[(torch.zeros(0, G, D).double(), torch.zeros(0, G, E).double())] * layers for _ in range(extra)]
            seen, first = seen + [0] * extra, first + [0] * extra
        elif name in ("select", "evict") and held:
            index = draw(len(held), draw(6, 1)[0])
            if name == "select":
                cache.select(torch.tensor(index, dtype=torch.int64))
            else:
                gone = [s in index for s in range(len(held))]
                cache.evict(gone)
                index = [s for s, x in enumerate(gone) if not x]
            held, seen, first = [held[i] for i in index], [seen[i] for i in index], [first[i] for i in index]
        elif name == "rewind":
            back = [min(n, m - f) for n, m, f in zip(draw(page + 2, len(held)), sizes, first, strict=True)]
            cache.rewind(back)
            held = [[tuple(x[: len(x) - n] for x in layer) for layer in s] for s, n in zip(held, back, strict=True)]
            seen = [a - n for a, n in zip(seen, back, strict=True)]
        elif name == "trim":
            last = draw(2 * page, len(held))
            cache.trim(torch.tensor(last, dtype=torch.int64), keep_first)
            for s, (n, m) in enumerate(zip(last, sizes, strict=True)):
                if m > n + keep_first:
                    held[s] = [tuple(torch.cat([x[:keep_first], x[m - n :]]) for x in layer) for layer in held[s]]
                    first[s] = keep_first
        check_pages(cache)
        poison(cache)
        assert cache.lengths.tolist() == [len(x[0][0]) for x in held]
        if name != "step":
            assert cache.starts.tolist() == seen
    assert not fixed or cache._capacity == 2000


def test_a_step_moves_nothing_that_is_there() -> None:
    cache = fj.KVCache(1, G, D, segments=2, page=4, pages=50)
    tokens = jagged([9, 6], G, D, dtype=torch.float32)
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    rows = cache._step.held.values  # type: ignore[union-attr]
    before, at = cache._keys[0][rows].clone(), cache._keys[0].data_ptr()
    poison(cache)
    tokens = jagged([1, 3], G, D, dtype=torch.float32)
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    assert cache._keys[0].data_ptr() == at
    assert torch.equal(cache._keys[0][rows], before)


def test_forks_share_all_pages_but_the_last_one_that_is_written_to() -> None:
    cache = fj.KVCache(1, G, D, segments=1, page=4)
    tokens = jagged([10], G, D, dtype=torch.float32)
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    cache.select([0] * 5)
    assert len(set(cache._table.pages.tolist())) == 3
    step = jagged([1, 1, 0, 0, 1], G, D, dtype=torch.float32)
    cache.extend(step)
    k, _ = cache.append(0, step, step)
    assert len(set(cache._table.pages.tolist())) == 3 + 3
    for s, x in enumerate(step.to_list()):
        assert torch.equal(k[s], torch.cat([tokens.values, x]))


def test_a_full_page_is_shared_and_not_copied() -> None:
    cache = fj.KVCache(1, G, D, segments=1, page=4)
    tokens = jagged([8], G, D, dtype=torch.float32)
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    cache.select([0, 0])
    step = jagged([1, 1], G, D, dtype=torch.float32)
    cache.extend(step)
    assert len(set(cache._table.pages.tolist())) == 2 + 2


def test_pages_that_double_keep_what_they_hold_and_freed_ones_are_used_again() -> None:
    cache = fj.KVCache(1, G, D, segments=1, page=4)
    sizes = []
    for _ in range(40):
        tokens = jagged([3], G, D, dtype=torch.float32)
        cache.extend(tokens)
        k, _ = cache.append(0, tokens, tokens)
        assert torch.equal(k.values, tokens.values.repeat(len(k.values) // 3, 1, 1))
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 6  # 1, 2, 4, ..., 32 pages
    for _ in range(100):
        cache.evict(0)
        cache.add()
        tokens = jagged([120], G, D, dtype=torch.float32)
        cache.extend(tokens)
        cache.append(0, tokens, tokens)
    assert cache.nbytes == sizes[-1]


def test_keys_of_one_segment_are_a_view_and_of_several_a_copy() -> None:
    cache = fj.KVCache(1, G, D, segments=2, page=4)
    for lengths, is_view in (([9, 0], True), ([1, 0], True), ([1, 1], False)):
        tokens = jagged(lengths, G, D, dtype=torch.float32)
        cache.extend(tokens)
        k, v = cache.append(0, tokens, tokens)
        assert (k.values.untyped_storage().data_ptr() == cache._keys[0].untyped_storage().data_ptr()) == is_view
        assert (v.values.untyped_storage().data_ptr() == cache._values[0].untyped_storage().data_ptr()) == is_view


def test_beams_equal_caches_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    prompt = torch.randn(7, G, D, generator=g)
    cache, beams = fj.KVCache(1, G, D, segments=1, page=4), [prompt]
    tokens = fj.Jagged.from_list([prompt])
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    for _ in range(12):
        parents = torch.randint(0, len(beams), (3,), generator=g)
        cache.select(parents)
        step = fj.Jagged.from_lengths(torch.randn(3, G, D, generator=g), [1, 1, 1])
        beams = [torch.cat([beams[p], x]) for p, x in zip(parents.tolist(), step.to_list(), strict=True)]
        cache.extend(step)
        k, v = cache.append(0, step, step)
        assert torch.equal(k.values, torch.cat(beams))
        assert torch.equal(v.values, torch.cat(beams))
        poison(cache)


# Modes, copies, edges


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_as_it_is(dtype: torch.dtype) -> None:
    cache = fj.KVCache(2, G, D, segments=2, dtype=dtype)
    tokens = jagged([3, 5], G, D, dtype=dtype)
    cache.extend(tokens)
    k, _ = cache.append(1, tokens, tokens)
    assert torch.equal(k.values, tokens.values)
    assert k.dtype == cache.dtype == dtype


def test_it_goes_from_inference_mode_to_no_grad_and_back() -> None:
    cache, pieces = fj.KVCache(1, G, D, segments=2, page=2), []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            tokens = jagged([3, 4], G, D, dtype=torch.float32, seed=len(pieces))
            pieces.append(tokens)
            cache.select([1, 0])
            cache.select([1, 0])
            cache.extend(tokens)
            k, _ = cache.append(0, tokens, tokens)
    for s in range(2):
        assert torch.equal(k[s], torch.cat([x[s] for x in pieces]))


def test_offsets_of_int32_and_copies() -> None:
    tokens = jagged([3, 4], G, D, dtype=torch.float32)
    tokens = fj.Jagged(tokens.values, tokens.offsets.int())
    cache = fj.KVCache(1, G, D, segments=2)
    cache.extend(tokens)
    k, _ = cache.append(0, tokens, tokens)
    assert k.offsets.dtype == torch.int32
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        step = jagged([1, 1], G, D, dtype=torch.float32)
        one.extend(step)
        k, _ = one.append(0, step, step)
        assert torch.equal(k[0], torch.cat([tokens[0], step[0]]))
    assert repr(cache) == (
        "KVCache(layers=1, heads=2, dim=8, value_dim=8, segments=2, tokens=9, pages=2 of 16, float32, device=cpu)"
    )


def test_no_segments_and_no_tokens() -> None:
    cache = fj.KVCache(1, G, D)
    for lengths in ([], [0, 0]):
        tokens = jagged(lengths, G, D, dtype=torch.float32)
        cache.add(len(lengths))
        keys = cache.extend(tokens)
        k, v = cache.append(0, tokens, tokens)
        q = tokens.with_values(tokens.values.repeat(1, 2, 1))
        assert fj.attention(q, k, v, plan=fj.plan(q, keys, mask=fj.Causal("end"))).values.shape == (0, H, D)
    cache.extend(tokens)
    cache.evict([0, 1])
    assert cache.num_segments == 0
