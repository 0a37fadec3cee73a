"""Bad input of KVCache: errors name the argument, the rule and the values, and the cache stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import jagged

import flexjag as fj
from flexjag.errors import DifferentiationError, KVCacheError, LayoutError, SegmentError, ShapeError

G, D = 2, 8


def begun(**sizes: Any) -> tuple[fj.KVCache, fj.Jagged]:
    """A cache of two segments in its first step, and the tokens of it."""
    cache, tokens = fj.KVCache(2, G, D, segments=2, **sizes), jagged([3, 4], G, D, dtype=torch.float32)
    cache.extend(tokens)
    return cache, tokens


@pytest.mark.parametrize("name", ["layers", "heads", "dim", "value_dim", "page", "pages"])
@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_sizes_are_positive_integers(name: str, size: Any) -> None:
    with pytest.raises(ShapeError, match=rf"{name}: must be an int of at least 1; got {name}={size!r}"):
        fj.KVCache(**({"layers": 1, "heads": G, "dim": D} | {name: size}))
    with pytest.raises(ShapeError, match="dtype: must be floating point"):
        fj.KVCache(1, G, D, dtype=torch.int64)
    with pytest.raises(ShapeError, match="segments: must be an int of at least 0; got segments=-1"):
        fj.KVCache(1, G, D, segments=-1)


def test_layers_that_are_not_there() -> None:
    cache, tokens = begun()
    for layer in (2, -1, 0.0, True, None):
        with pytest.raises(KVCacheError, match=rf"layer: must be that of a layer; got layer={layer}, layers=2"):
            cache.append(layer, tokens, tokens)  # type: ignore[arg-type]


def test_keys_and_values_that_do_not_fit() -> None:
    cache, tokens = begun()
    wrong = {
        "heads": tokens.with_values(torch.zeros(7, G + 1, D)),
        "dim": tokens.with_values(torch.zeros(7, G, D + 1)),
        "no heads": tokens.with_values(torch.zeros(7, G * D)),
        "dtype": tokens.to(torch.float64),
        "device": tokens.to("meta"),
    }
    for x in wrong.values():
        with pytest.raises(
            ShapeError, match=r"k: values must be \[T, G, D\] with the heads, dimension, dtype and device"
        ):
            cache.append(0, x, tokens)
        with pytest.raises(
            ShapeError, match=r"v: values must be \[T, G, E\] with the heads, dimension, dtype and device"
        ):
            cache.append(0, tokens, x)
    with pytest.raises(ShapeError, match=r"k: must be a flexjag.Jagged; got type='Tensor'"):
        cache.append(0, tokens.values, tokens)  # type: ignore[arg-type]
    for other in ([4, 3], [7], [3, 4, 0], [3, 3]):
        with pytest.raises(LayoutError, match="k: must have the offsets that the cache was extended by"):
            cache.append(0, jagged(other, G, D, dtype=torch.float32), tokens)


def test_gradients_are_refused_and_not_dropped() -> None:
    cache, tokens = begun()
    learned = tokens.with_values(tokens.values.clone().requires_grad_())
    with pytest.raises(DifferentiationError, match="v: needs a gradient, which a KVCache does not pass on"):
        cache.append(0, tokens, learned)
    with torch.no_grad():
        cache.append(0, learned, learned)
    k, _ = cache.append(1, learned.detach(), tokens)
    assert not k.values.requires_grad


def test_tokens_of_other_segments() -> None:
    cache = fj.KVCache(1, G, D, segments=2)
    for lengths in ([3], [1, 1, 1], []):
        with pytest.raises(
            LayoutError, match=rf"tokens: must have the segments of the cache.*segments={len(lengths)}, cache=2"
        ):
            cache.extend(jagged(lengths))
    with pytest.raises(LayoutError, match=r"tokens: must be a flexjag.Jagged"):
        cache.extend([1, 1])  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r"tokens: must have the segments of the cache.*device='meta'"):
        cache.extend(jagged([1, 1]).to("meta"))
    with pytest.raises(LayoutError, match=r"tokens.offsets: must start at 0 and end at the number of rows"):
        cache.extend(fj.Jagged(torch.zeros(9), torch.tensor([0, 3, 5])))
    with pytest.raises(LayoutError, match=r"tokens.offsets: must not decrease"):
        cache.extend(fj.Jagged(torch.zeros(5), torch.tensor([0, 7, 5])))
    assert cache.lengths.tolist() == [0, 0]


def test_a_step_begins_before_it_is_appended_and_ends_before_the_next() -> None:
    cache = fj.KVCache(2, G, D, segments=2)
    tokens = jagged([3, 4], G, D, dtype=torch.float32)
    with pytest.raises(KVCacheError, match=r"append: extend\(tokens\) begins a step"):
        cache.append(0, tokens, tokens)
    cache.extend(tokens)
    cache.append(0, tokens, tokens)
    calls: list[tuple[str, Any]] = [
        ("extend", tokens),
        ("select", [0]),
        ("evict", 0),
        ("add", 1),
        ("trim", 1),
        ("rewind", 1),
    ]
    for name, argument in calls:
        with pytest.raises(KVCacheError, match=rf"{name}: layers lack the tokens of the step.*lacking=\[1\], layers=2"):
            getattr(cache, name)(argument)
    cache.rewind([3, 4])  # all of it
    assert cache.lengths.tolist() == cache.starts.tolist() == [0, 0]
    cache.extend(tokens.with_values(tokens.values))
    for layer in range(2):
        cache.append(layer, tokens, tokens)
    cache.evict(1)
    with pytest.raises(KVCacheError, match=r"append: extend\(tokens\) begins a step"):
        cache.append(0, tokens, tokens)


def test_a_full_cache_says_so_and_stays_as_it_is() -> None:
    cache, tokens = begun(page=4, pages=3)
    for layer in range(2):
        cache.append(layer, tokens, tokens)
    more = jagged([2, 5], G, D, dtype=torch.float32)
    with pytest.raises(KVCacheError, match=r"pages: are all in use; .* got pages=3, page=4, lacking=2"):
        cache.extend(more)
    assert (cache.lengths.tolist(), cache.free_pages) == ([3, 4], 1)
    cache.evict(1)
    assert cache.free_pages == 2
    cache.extend(more[:1])
    k, _ = cache.append(0, more[:1], more[:1])
    assert torch.equal(k.values, torch.cat([tokens[0], more[0]]))


def test_segments_that_are_not_there() -> None:
    cache, tokens = begun()
    for layer in range(2):
        cache.append(layer, tokens, tokens)
    for call in (cache.select, cache.evict):
        for index in ([2], [-1], torch.tensor([0, 7])):
            with pytest.raises(SegmentError, match=r"segments: must be indices of segments; got index=.*, segments=2"):
                call(index)
        for index in ([0.5], [True], [True, False, True], torch.tensor([[0]]), ["a"]):
            with pytest.raises(SegmentError, match="segments: must be indices, or one bool for each segment"):
                call(index)  # type: ignore[arg-type]
    assert cache.num_segments == 2
    with pytest.raises(KVCacheError, match="count: must be an int of at least 0; got count=-1"):
        cache.add(-1)


def test_numbers_to_trim_and_to_rewind() -> None:
    cache, tokens = begun()
    for layer in range(2):
        cache.append(layer, tokens, tokens)
    for call, name in ((cache.trim, "keep_last"), (cache.rewind, "count")):
        for bad in (-1, [1], [1, -1], 1.0, [1, 1, 1], True, torch.ones(2)):
            with pytest.raises(ShapeError, match=rf"{name}: must be an int, or one for each segment, of at least 0"):
                call(bad)  # type: ignore[arg-type]
    with pytest.raises(
        KVCacheError, match=r"count: must be at most the tokens .* got lengths\[0\]=3, kept=0, count\[0\]=4"
    ):
        cache.rewind(4)
    with pytest.raises(ShapeError, match="keep_first: must be an int of at least 0; got keep_first=-1"):
        cache.trim(1, -1)
    cache.trim(1, keep_first=1)
    assert (cache.lengths.tolist(), cache.starts.tolist()) == ([2, 2], [3, 4])
    with pytest.raises(KVCacheError, match=r"count: must be at most the tokens .* behind those that trim"):
        cache.rewind(2)
    with pytest.raises(
        KVCacheError, match=r"keep_first: must be the same in all trims .* got keep_first=0, before=1, segment=0"
    ):
        cache.trim(1)


def test_only_append_is_for_graphs() -> None:
    cache, tokens = begun()
    for layer in range(2):
        cache.append(layer, tokens, tokens)
    with pytest.raises(Exception, match="extend: call it outside of compiled functions"):
        torch.compile(lambda x: cache.extend(x), fullgraph=True, backend="eager")(tokens)
