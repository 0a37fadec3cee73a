"""The same batches through DataLoader's workers, torchdata's StatefulDataLoader, and Hugging Face's datasets."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flexjag as fj
from flexjag.data import Batch, PackedDataset, TokenBudgetSampler, collate, lengths_of
from flexjag.errors import DataError

LENGTHS = np.clip(np.random.default_rng(0).lognormal(2.5, 0.8, 60).astype(np.int64), 1, 64)
SAMPLES = [{"tokens": torch.arange(n) + s, "user": s} for s, n in enumerate(LENGTHS.tolist())]


def even(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """A mask's function that processes find by its name."""
    return (i + j) % 2 == 0


def planned(x: fj.Jagged) -> fj.Plan:
    return fj.plan(x, mask=fj.Causal() & (fj.Window(8, 0) | fj.MaskMod(even)), block_size=16)


def same(found: Batch, wanted: Batch) -> bool:
    return all(
        torch.equal(a.values, b.values) and torch.equal(a.offsets, b.offsets)
        if isinstance(a, fj.Jagged)
        else not isinstance(a, torch.Tensor) or torch.equal(a, b)
        for a, b in ((found[name], wanted[name]) for name in wanted)
    )


def attend(batch: Batch) -> torch.Tensor:
    tokens = batch["tokens"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        tokens.with_values(torch.randn(tokens.values.shape[0], 2, 16, generator=generator, dtype=torch.float64))
        for _ in range(3)
    )
    return fj.attention(q, k, v, plan=batch["plan"], backend="tiled").values


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tensors of workers through files: without descriptors that would be left open where loaders are not exhausted."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield {"num_workers": 2, "multiprocessing_context": "fork"}  # type: ignore[misc]
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_plan_what_the_process_would(two_workers: dict[str, Any]) -> None:
    make = functools.partial(collate, plan=planned)
    sampler = TokenBudgetSampler(LENGTHS, 128)
    loader = DataLoader(SAMPLES, batch_sampler=sampler, collate_fn=make, **two_workers)  # type: ignore[arg-type]
    found = list(loader)
    sampler.set_epoch(0)
    wanted = [make([SAMPLES[i] for i in batch]) for batch in sampler]
    assert len(loader) == len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert same(a, b)
        assert a["tokens"].offsets.dtype == torch.int64
        assert torch.equal(attend(a), attend(b))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_plan_that_cannot_leave_its_worker_is_an_error(two_workers: dict[str, Any]) -> None:
    make = functools.partial(collate, plan=lambda x: fj.plan(x, mask=fj.MaskMod(lambda b, h, i, j: i >= j)))
    assert isinstance(make(SAMPLES[:2])["plan"], fj.Plan)
    loader = DataLoader(SAMPLES, batch_size=8, collate_fn=make, **two_workers)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="plan: must be picklable to be made in a worker: functions of a module"):
        next(iter(loader))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_packs_through_loaders(two_workers: dict[str, Any]) -> None:
    packed = PackedDataset(SAMPLES, 128)  # type: ignore[arg-type]
    users = [u for x in DataLoader(packed, batch_size=None, shuffle=True, **two_workers) for u in x["user"].tolist()]
    assert sorted(users) == list(range(len(SAMPLES)))
    joined = next(iter(DataLoader(packed, batch_size=2)))
    assert torch.equal(joined["tokens"].offsets, fj.Jagged.concat([packed[0]["tokens"], packed[1]["tokens"]]).offsets)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # by torchdata itself
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stateful_loader_goes_on_exactly(workers: int, taken: int, two_workers: dict[str, Any]) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> Any:
        options = two_workers if workers else {}
        sampler = TokenBudgetSampler(LENGTHS, 128, seed=1)
        return loaders.StatefulDataLoader(SAMPLES, batch_sampler=sampler, collate_fn=collate, **options)

    def users(batches: Iterator[Batch]) -> list[list[int]]:
        return [batch["user"].tolist() for batch in batches]

    whole = make()
    wanted = users(whole)
    second = users(whole)
    running = make()
    batches = iter(running)
    for _ in range(taken):
        next(batches)
    state = running.state_dict()
    rest = users(batches)  # so that the workers end
    assert rest == wanted[taken:]
    resumed = make()
    resumed.load_state_dict(state)
    assert users(resumed) == wanted[taken:]
    assert users(resumed) == second


class Columns:
    """What is used of a Hugging Face dataset, without the library."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.read: list[Any] = []

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: Any) -> Any:
        self.read.append(key)
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        self.read.append(list(keys))
        return [{name: column[i] for name, column in self.columns.items()} for i in keys]


COLUMNS = {
    "text": [f"text {n}" for n in LENGTHS],
    "tokens": [list(range(n)) for n in LENGTHS.tolist()],
    "length": LENGTHS.tolist(),
}


def test_a_dataset_of_columns_is_read_by_column_and_by_pack() -> None:
    dataset = Columns(COLUMNS)
    packed = PackedDataset(dataset, 128, fields=["tokens"])
    assert packed.lengths.tolist() == LENGTHS.tolist()
    assert dataset.read == [0, "tokens"]
    first = packed[0]
    assert dataset.read[2:] == [packed.packs[0].tolist()]
    assert [x.tolist() for x in first["tokens"]] == [COLUMNS["tokens"][i] for i in packed.packs[0]]


def test_hugging_faces_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict(COLUMNS)
    for one in (dataset, dataset.shuffle(seed=0), dataset.with_format("torch"), dataset.select(range(5, 40))):
        lengths = lengths_of(one, "tokens")
        assert lengths.tolist() == [len(one[i]["tokens"]) for i in range(len(one))]
        packed = PackedDataset(one, 128, fields=["tokens", "length"])
        assert packed.lengths.tolist() == lengths.tolist()
        batches = [packed[b] for b in range(len(packed))]
        assert all(x["tokens"].lengths.tolist() == x["length"].tolist() for x in batches)
        assert sum(len(x["tokens"]) for x in batches) == len(one)
    loader = DataLoader(dataset, batch_sampler=TokenBudgetSampler(LENGTHS, 128), collate_fn=collate)
    assert sum(len(batch["tokens"]) for batch in loader) == len(LENGTHS)
