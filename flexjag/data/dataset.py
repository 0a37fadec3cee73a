"""Packs of a map-style dataset as a map-style dataset, and the lengths of its samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from flexjag.data.collate import Batch, collate, is_per_token
from flexjag.data.packing import Budget, best_fit_decreasing, check_lengths, fit
from flexjag.data.sampler import squares
from flexjag.data.statistics import Statistics
from flexjag.errors import DataError, explain_values
from flexjag.jagged import Jagged


class MapStyle(Protocol):
    """What :class:`PackedDataset` asks of a dataset: a length, and samples by index."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The sample of an index."""
        ...


def lengths_of(dataset: MapStyle, field: str | None = None) -> np.ndarray:
    """Tokens of each sample of a dataset, ``[N]`` int64.

    Of Hugging Face's `datasets` only the column is read, without making Python lists of it; other datasets with
    `column_names` give their column by ``dataset[field]``. Of any other dataset every sample is read once.

    Args:
        dataset: A map-style dataset of mappings.
        field: The field whose entries are counted. Default: the first that is per token.

    Raises:
        DataError: If no field has entries to count.

    >>> lengths_of([{"tokens": [1, 2, 3]}, {"tokens": []}])
    array([3, 0])
    """
    count = len(dataset)
    if not count:
        return np.zeros(0, np.int64)
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise DataError(explain_values("dataset[0]", "must be a mapping of field names", type=type(first).__name__))
    if field is None:
        field = next((name for name, x in first.items() if is_per_token(x)), "")
    if field not in first or not is_per_token(first[field]):
        raise DataError(explain_values("field", "must be one with entries per token", field=field, fields=list(first)))
    if hasattr(dataset, "column_names"):
        return _column_lengths(dataset, field)
    return np.fromiter((len(dataset[i][field]) for i in range(count)), np.int64, count)


def _column_lengths(dataset: Any, field: str) -> np.ndarray:
    if hasattr(dataset, "with_format"):
        table = dataset.select_columns([field]).with_format("arrow")
        parts = [table[i : i + 65536][field] for i in range(0, len(dataset), 65536)]
        chunks = [chunk for part in parts for chunk in getattr(part, "chunks", [part])]
        if all(hasattr(chunk, "value_lengths") for chunk in chunks):
            counted = [chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for chunk in chunks]
            return np.concatenate([np.zeros(0, np.int64), *counted]).astype(np.int64)
    return np.fromiter((len(x) for x in dataset[field]), np.int64, len(dataset))


class PackedDataset(Dataset[Batch]):
    """A map-style dataset of packs: item b is the :class:`Batch` of the samples packed together.

    The packs are made once, best-fit-decreasing over all samples, and stay: any sampler, any trainer and
    ``DistributedSampler`` shuffle and share them. ``DataLoader(packed, batch_size=None, shuffle=True)`` gives one pack
    a step; with a `batch_size` the default collate joins the segments of several (without `plan` and fixed capacity).
    :class:`TokenBudgetSampler` packs anew for each epoch and balances ranks.

    Args:
        dataset: A map-style dataset of mappings, such as Hugging Face's `datasets`.
        max_tokens: The most tokens of a pack.
        lengths: Tokens of each sample. Default: :func:`lengths_of` the dataset.
        max_squares: The most squared lengths of a pack, summed.
        max_samples: The most samples of a pack.
        truncate: Cut samples that are longer than a pack. By default they are an error.
        fixed: Packs of fixed capacity: all have `max_tokens` rows, and `max_samples` segments if that is given.
        fields: Names of the fields to take, as in :func:`collate`.
        fill: What spare rows hold, by field.
        plan: Plans a pack, as in :func:`collate`.

    Raises:
        DataError: If lengths or budgets make no sense, or a sample is longer than a pack.

    >>> packed = PackedDataset([{"tokens": [1] * n} for n in (3, 6, 2, 5)], max_tokens=8)
    >>> [packed[b]["tokens"].lengths.tolist() for b in range(len(packed))]
    [[6, 2], [5, 3]]
    """

    def __init__(
        self,
        dataset: MapStyle,
        max_tokens: int | None = None,
        *,
        lengths: Sequence[int] | np.ndarray | Tensor | None = None,
        max_squares: int | None = None,
        max_samples: int | None = None,
        truncate: bool = False,
        fixed: bool = False,
        fields: Collection[str] | None = None,
        fill: Mapping[str, float] | None = None,
        plan: Callable[[Jagged], Any] | None = None,
    ) -> None:
        self.dataset, self.budget = dataset, Budget(max_tokens, max_squares, max_samples)
        known = check_lengths(lengths_of(dataset) if lengths is None else lengths)
        if len(known) != len(dataset):
            seen = {"lengths": len(known), "samples": len(dataset)}
            raise DataError(explain_values("lengths", "must have one entry per sample", **seen))
        if fixed and self.budget.max_tokens is None:
            raise DataError(explain_values("max_tokens", "must be given for packs of fixed capacity"))
        self.lengths = fit(known, self.budget, truncate)
        self.packs = best_fit_decreasing(self.lengths, self.budget)
        self.max_length = self.budget.longest if truncate else None
        self.fixed, self.fields, self.fill, self.plan = fixed, fields, fill, plan

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(explain_values("index", "must be that of a pack", index=index, packs=len(self)))
        chosen = self.packs[index % len(self)].tolist()
        fetch = getattr(self.dataset, "__getitems__", None)
        return collate(
            fetch(chosen) if fetch else [self.dataset[i] for i in chosen],
            fields=self.fields,
            max_tokens=self.budget.max_tokens if self.fixed else None,
            max_samples=self.budget.max_samples if self.fixed else None,
            max_length=self.max_length,
            fill=self.fill,
            plan=self.plan,
        )

    def statistics(self) -> Statistics:
        """Statistics of the packs, one a step."""
        tokens, work = (self.packs.sums(x)[:, None] for x in (self.lengths, squares(self.lengths)))
        return Statistics.of(np.diff(self.packs.bounds)[:, None], tokens, work, self.budget)
