"""collate: aligned fields, fixed capacity, plans, and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import flexjag as fj
from flexjag.data import Batch, PackedDataset, collate, lengths_of
from flexjag.errors import DataError


def sample(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 99, n).tolist(),
        "weights": rng.normal(size=(n, 2)).astype(np.float32),
        "labels": torch.arange(n, dtype=torch.int32),
        "user": seed,
        "name": f"user {seed}",
    }


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3), st.none() | st.just(4))
def test_fields_are_aligned(lengths: list[int], spare: int, empty: int, longest: int | None) -> None:
    samples = [sample(n, seed=s) for s, n in enumerate(lengths)]
    cut = [n if longest is None else min(n, longest) for n in lengths]
    rows, segments = sum(cut) + spare, len(lengths) + empty
    fixed = {"max_tokens": rows, "max_samples": segments} if spare or empty else {}
    batch = collate(samples, max_length=longest, fill={"labels": -100}, **fixed)
    assert list(batch) == list(samples[0])
    tokens, weights, labels = (batch[x] for x in ("tokens", "weights", "labels"))
    assert tokens.offsets is weights.offsets is labels.offsets
    assert tokens.lengths.tolist() == cut + [0] * (empty if fixed else 0)
    assert (tokens.dtype, weights.dtype, labels.dtype) == (torch.int64, torch.float32, torch.int32)
    assert weights.values.shape == (rows if fixed else sum(cut), 2)
    for s, n in enumerate(cut):
        assert tokens[s].tolist() == samples[s]["tokens"][:n]
        assert np.array_equal(weights[s].numpy(), samples[s]["weights"][:n])
        assert torch.equal(labels[s], samples[s]["labels"][:n])
    assert (labels.values[sum(cut) :] == -100).all()
    assert (tokens.values[sum(cut) :] == 0).all()
    assert batch["user"].tolist() == [*range(len(lengths))] + [0] * (empty if fixed else 0)
    assert batch["name"] == [f"user {s}" for s in range(len(lengths))]


def test_fixed_capacity_makes_one_graph() -> None:
    plan = functools.partial(fj.plan, mask=fj.Causal(), max_tokens=64, max_length=40)
    graphs = CompileCounter()
    embed = torch.randn(99, 2, 16)

    @torch.compile(fullgraph=True, backend=graphs, dynamic=False)
    def step(tokens: fj.Jagged, plan: fj.Plan) -> torch.Tensor:
        x = tokens.with_values(embed[tokens.values])
        return fj.attention(x, x, x, plan=plan, backend="tiled").values

    for lengths in ([3, 40], [7], [20, 20, 24], [0, 1, 5]):
        samples = [{"tokens": list(range(n))} for n in lengths]
        batch = collate(samples, max_tokens=64, max_samples=4, plan=plan)
        found = step(batch["tokens"], batch["plan"])
        assert found.shape == (64, 2, 16)
        alone = collate(samples)["tokens"]
        x = alone.with_values(embed[alone.values])
        wanted = fj.attention(x, x, x, mask=fj.Causal(), backend="reference").values
        torch.testing.assert_close(found[: sum(lengths)], wanted, rtol=1e-5, atol=1e-5)  # float32, at most 40 keys
        assert (found[sum(lengths) :] == 0).all()
    assert graphs.frame_count == 1


def test_a_batch_is_a_dict_and_a_pytree() -> None:
    batch = collate([sample(3), sample(2)])
    assert isinstance(batch, dict)
    leaves, spec = pytree.tree_flatten(batch)
    assert sum(isinstance(x, torch.Tensor) for x in leaves) == 7
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, Batch)
    assert again.keys() == batch.keys()
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    assert keys[:2] == ["['tokens'].values", "['tokens'].offsets"]


def test_moving_a_batch_keeps_what_is_shared() -> None:
    batch = collate([sample(3), sample(2)], plan=functools.partial(fj.plan, mask=fj.Causal()))
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, Batch)
    assert moved["tokens"].offsets is moved["labels"].offsets
    assert moved["user"].device.type == moved["plan"].layout.device.type == "meta"
    assert moved["name"] == batch["name"]


def test_pinning_a_batch_pins_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())  # needs a GPU
    batch = collate([sample(3), sample(2)], plan=functools.partial(fj.plan, mask=fj.Causal()))
    got = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(got, Batch)
    assert got["tokens"].offsets is got["labels"].offsets
    assert got["tokens"].values.data_ptr() != batch["tokens"].values.data_ptr()
    assert len({id(x) for x in pinned}) == len(pinned)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ([], {}, "samples: must hold at least one sample"),
    "a list": ([[1, 2]], {}, r"samples\[0\]: must be a mapping of field names.*type='list'"),
    "a missing field": (
        [{"a": [1]}, {"b": [1]}],
        {},
        r"samples\[1\]: must have the fields of the others; got fields=\['b'\], wanted=\['a'\]",
    ),
    "one more": ([{"a": [1]}, {"a": [1], "b": [1]}], {}, r"samples\[1\]: must have the fields of the others"),
    "unaligned": (
        [{"a": [1], "b": [1]}, {"a": [1, 2], "b": [1]}],
        {},
        r"samples\[1\]: must have the same length in all fields per token.*a=2, b=1",
    ),
    "nothing per token": ([{"a": 1}], {}, r"samples: must have a field per token; got fields=\['a'\]"),
    "not always per token": ([{"a": [1]}, {"a": 1}], {}, r"samples\[1\]\['a'\]: must be per token; got type='int'"),
    "too many tokens": ([{"a": [1, 2, 3]}], {"max_tokens": 2}, "samples: must fit max_tokens; got tokens=3, max_tok"),
    "too many samples": ([{"a": [1]}] * 3, {"max_samples": 2}, "samples: must fit max_samples; got samples=3"),
    "text per token": ([{"a": ["x"]}], {}, "a: must have one kind of entries in all samples; got error='no numbers"),
    "two widths": ([{"a": torch.ones(1, 2)}, {"a": torch.ones(1, 3)}], {}, "a: must have one kind of entries"),
    "no number": ([{"a": [1], "b": object()}], {}, "b: must be numbers, arrays or tensors; got type='object'"),
    "a plan's function that is none": (
        [{"a": [1]}],
        {"plan": fj.Causal()},
        r"plan: must be a function.*plan=Causal\(\)",
    ),
    "a misspelt fill": (
        [{"labels": [1]}],
        {"max_tokens": 2, "fill": {"label": -100}},
        r"fill: must name fields of the batch; got unknown=\['label'\], fields=\['labels'\]",
    ),
    "a fill that wraps": (
        [{"a": torch.ones(1, dtype=torch.uint8)}],
        {"max_tokens": 2, "fill": {"a": -100}},
        r"fill\['a'\]: must be a number that the field's dtype can hold; got fill=-100, dtype=torch.uint8",
    ),
    "a fill that is rounded": (
        [{"a": [1]}],
        {"max_tokens": 2, "fill": {"a": 0.5}},
        r"fill\['a'\]: must .*=torch.int64",
    ),
    "no number to fill": ([{"a": [1.0]}], {"max_tokens": 2, "fill": {"a": "x"}}, r"fill\['a'\]: must be .*fill='x'"),
    "NaN for integers": (
        [{"a": [1]}],
        {"max_tokens": 2, "fill": {"a": float("nan")}},
        r"fill\['a'\]: must be .*fill=nan",
    ),
    "a negative length": (
        [{"a": [1, 2]}],
        {"max_length": -1},
        "max_length: must be an int of at least 0; got max_length=-1",
    ),
    "half a token": (
        [{"a": [1, 2]}],
        {"max_tokens": 4.5},
        "max_tokens: must be an int of at least 0; got max_tokens=4.5",
    ),
    "a number to fill": (
        [{"a": [1]}],
        {"max_tokens": 2, "fill": -100},
        r"fill: must be a mapping of field names, as .*-100",
    ),
    "a name for names": (
        [{"tokens": [1]}],
        {"fields": "tokens"},
        "fields: must be a list of names; got fields='tokens'",
    ),
    "a plan": ([{"plan": [1]}], {"plan": fj.plan}, "fields: must have no 'plan' beside plan="),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    samples, options, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        collate(samples, **options)


def test_kinds_of_entries() -> None:
    batch = collate([{"a": [], "b": True, "c": 0.5}, {"a": [1.5, 2], "b": False, "c": 1.0}])
    assert batch["a"].values.tolist() == [1.5, 2]
    assert batch["a"].dtype == batch["c"].dtype == torch.get_default_dtype()
    assert batch["b"].dtype == torch.bool
    assert collate([{"a": range(3)}, {"a": (4,)}], fields=["a"])["a"].values.tolist() == [0, 1, 2, 4]
    assert collate([{"a": np.zeros(3)}])["a"].dtype == torch.float64
    assert collate([{"a": [1], "b": np.int16(3)}, {"a": [2], "b": np.int16(4)}])["b"].tolist() == [3, 4]


SAMPLES = [sample(n, seed=n) for n in (3, 9, 1, 0, 7, 4, 4, 2)]


def test_packs_hold_every_sample_once() -> None:
    packed = PackedDataset(SAMPLES, 10, fields=["tokens", "user"])
    batches = [packed[b] for b in range(len(packed))]
    assert sorted(u for x in batches for u in x["user"].tolist()) == sorted(x["user"] for x in SAMPLES)
    by_user = {x["user"]: x["tokens"] for x in SAMPLES}
    for x in batches:
        assert [t.tolist() for t in x["tokens"]] == [by_user[u] for u in x["user"].tolist()]
        assert x["tokens"].values.shape[0] <= 10
    assert packed.statistics().tokens == 30
    assert torch.equal(packed[-1]["tokens"].values, batches[-1]["tokens"].values)
    with pytest.raises(IndexError, match=r"index: must be that of a pack; got index=99, packs="):
        packed[99]


def test_packs_of_fixed_capacity_and_cut_samples() -> None:
    plan = functools.partial(fj.plan, mask=fj.Causal(), max_tokens=8)
    options = {"fields": ["tokens", "labels"], "fill": {"labels": -100}, "plan": plan}
    packed = PackedDataset(SAMPLES, 8, max_samples=4, truncate=True, fixed=True, **options)
    for b in range(len(packed)):
        x = packed[b]
        assert x["tokens"].values.shape == (8,)
        assert x["tokens"].num_segments == 4
        assert x["plan"].layout.num_segments == 4
        used = int(x["tokens"].offsets[-1])
        assert (x["labels"].values[used:] == -100).all()
    assert packed.statistics().tokens == 29


def test_packs_that_are_refused() -> None:
    with pytest.raises(DataError, match=r"truncate=True cuts those that do not; got lengths\[1\]=9, longest=8"):
        PackedDataset(SAMPLES, 8)
    with pytest.raises(DataError, match="lengths: must have one entry per sample; got lengths=1, samples=8"):
        PackedDataset(SAMPLES, 10, lengths=[3])
    with pytest.raises(DataError, match="max_tokens: must be given for packs of fixed capacity"):
        PackedDataset(SAMPLES, max_squares=100, fixed=True)


def test_lengths_of_datasets() -> None:
    assert lengths_of(SAMPLES).tolist() == lengths_of(SAMPLES, "labels").tolist() == [3, 9, 1, 0, 7, 4, 4, 2]
    assert lengths_of([]).tolist() == []
    with pytest.raises(DataError, match=r"field: must be one with entries per token; got field='name'"):
        lengths_of(SAMPLES, "name")
    with pytest.raises(DataError, match=r"dataset\[0\]: must be a mapping of field names; got type='list'"):
        lengths_of([[1, 2]])


def test_the_default_device_is_not_asked() -> None:
    samples = [sample(3), sample(2)]
    wanted = collate(samples, max_tokens=7, max_samples=3)
    with torch.device("meta"):
        found = collate(samples, max_tokens=7, max_samples=3)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    there = collate([{"tokens": torch.ones(3, device="meta")}])["tokens"]
    assert there.offsets.device.type == "meta"
