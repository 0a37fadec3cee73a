"""Samples to a batch: a dict of Jagged fields on one layout."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import get_worker_info

from flexjag.errors import DataError, explain_values
from flexjag.jagged import Jagged
from flexjag.moving import Change, Movable, changed_value
from flexjag.offsets import as_int

HOST = torch.device("cpu")  # whatever the default device is: batches are made in workers

PLAN = "plan"
"""Key of the plan in a batch."""


class Batch(dict[str, Any], Movable):
    """The fields of a batch by name, with ``to(device, non_blocking=True)`` and ``pin_memory()`` for all of them.

    Fields that share their offsets still do on the other device, so that a plan for one is a plan for all.

    >>> batch = collate([{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}])
    >>> batch.to("meta")["tokens"]
    Jagged(segments=2, tokens=5, values=[5] int64, device=meta)
    """

    def changed(self, change: Change) -> Batch:
        """The batch with `change` of every tensor in its fields."""
        return Batch({name: changed_value(value, change) for name, value in self.items()})


def _unflatten(values: Any, names: Any) -> Batch:
    return Batch(zip(names, values, strict=True))


pytree.register_pytree_node(
    Batch,
    lambda batch: (list(batch.values()), list(batch)),
    _unflatten,
    serialized_type_name="flexjag.data.Batch",
    flatten_with_keys_fn=lambda batch: ([(pytree.MappingKey(k), v) for k, v in batch.items()], list(batch)),  # pyright: ignore[reportArgumentType]
)


def collate(
    samples: Sequence[Mapping[str, Any]],
    *,
    fields: Collection[str] | None = None,
    max_tokens: int | None = None,
    max_samples: int | None = None,
    max_length: int | None = None,
    fill: Mapping[str, float] | None = None,
    plan: Callable[[Jagged], Any] | None = None,
) -> Batch:
    """Pack samples into a batch: what they have per token becomes Jagged, all of it with the same offsets.

    A sample is a mapping of names to lists, arrays or tensors ``[n, ...]``, of the same n in all fields of the sample.
    What is no sequence (a number, a 0-d tensor) is stacked to ``[S]``; text becomes a list.
    As a DataLoader's `collate_fn`, with keywords: ``functools.partial(collate, max_tokens=32768)``.

    Args:
        samples: S samples of the same fields.
        fields: Names of the fields to take. Default: those of the first sample.
        max_tokens: Fixed capacity: values have this many rows ``[max_tokens, ...]``; those behind the last offset are
            spare. ``plan(max_tokens=...)`` gives them zeros.
        max_samples: Fixed number of segments: empty ones follow the samples'. What is stacked is padded, too.
        max_length: Cut samples to this many tokens.
        fill: What spare rows hold, by field; 0 where nothing is said. Labels want their ignored index here, and what is
            stacked wants what no sample has: ``{"labels": -100, "user": -1}``.
        plan: Plans a batch, from its first Jagged field: ``functools.partial(flexjag.plan, mask=...)``. The result is
            the field ``"plan"``. In a DataLoader's worker it is made beside training; its mask's functions must then be
            importable by name.

    Raises:
        DataError: If samples lack a field, fields of a sample differ in length, the batch exceeds its capacity, or
            `fill` names a field that there is not.

    >>> batch = collate([{"tokens": [1, 2], "user": 7}, {"tokens": [3], "user": 8}], max_tokens=4)
    >>> batch["tokens"].values.tolist(), batch["tokens"].offsets.tolist(), batch["user"].tolist()
    ([1, 2, 3, 0], [0, 2, 3], [7, 8])
    """
    max_tokens = _checked_size("max_tokens", max_tokens)
    max_samples = _checked_size("max_samples", max_samples)
    max_length = _checked_size("max_length", max_length)
    if plan is not None and not callable(plan):
        rule = "must be a function of the batch's first Jagged, as functools.partial(flexjag.plan, mask=...)"
        raise DataError(explain_values("plan", rule, plan=plan))
    columns = _columns(samples, fields)
    _check_fill(fill, columns)
    packed = {name: values for name, values in columns.items() if is_per_token(values[0])}
    if not packed:
        raise DataError(explain_values("samples", "must have a field per token", fields=list(columns)))
    lengths = _lengths(packed, max_length)
    total = sum(lengths)
    if max_tokens is not None and total > max_tokens:
        raise DataError(explain_values("samples", "must fit max_tokens", tokens=total, max_tokens=max_tokens))
    if max_samples is not None and len(lengths) > max_samples:
        seen = {"samples": len(lengths), "max_samples": max_samples}
        raise DataError(explain_values("samples", "must fit max_samples", **seen))
    first = next(iter(packed.values()))[0]
    offsets = _offsets(lengths, max_samples, first.device if isinstance(first, Tensor) else HOST)
    batch, filled = Batch(), {} if fill is None else fill
    for name, values in columns.items():
        spare = filled.get(name, 0)
        if name in packed:
            rows = _joined(name, [x[:n] for x, n in zip(values, lengths, strict=True)])
            batch[name] = Jagged(_extended(name, rows, max_tokens, spare), offsets)
        elif isinstance(values[0], str | bytes):
            batch[name] = values
        else:
            rows = _joined(name, [_tensor(name, x)[None] for x in values])
            batch[name] = _extended(name, rows, max_samples, spare)
    if plan is not None:
        if PLAN in batch:
            raise DataError(explain_values("fields", f"must have no {PLAN!r} beside plan=", fields=list(columns)))
        batch[PLAN] = plan(next(x for x in batch.values() if isinstance(x, Jagged)))
        if get_worker_info() is not None:
            _check_sendable(batch[PLAN])
    return batch


def _offsets(lengths: list[int], segments: int | None, device: torch.device) -> Tensor:
    """Offsets ``[S+1]``, with empty segments at the end up to a fixed number of them."""
    ends = [0, *itertools.accumulate(lengths)]
    ends += ends[-1:] * (0 if segments is None else segments + 1 - len(ends))
    return torch.tensor(ends, dtype=torch.int64, device=device)


def _columns(samples: Sequence[Mapping[str, Any]], fields: Collection[str] | None) -> dict[str, list[Any]]:
    samples = list(samples)
    if not samples:
        raise DataError(explain_values("samples", "must hold at least one sample"))
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            rule = "must be a mapping of field names, as {'tokens': [...]}"
            raise DataError(explain_values(f"samples[{i}]", rule, type=type(sample).__name__))
    if isinstance(fields, str):
        raise DataError(explain_values("fields", "must be a list of names", fields=fields))
    names = list(samples[0]) if fields is None else list(fields)
    for i, sample in enumerate(samples):
        missing = [name for name in names if name not in sample]
        if missing or (fields is None and len(sample) != len(names)):
            seen = {"fields": list(sample), "wanted": names}
            raise DataError(explain_values(f"samples[{i}]", "must have the fields of the others", **seen))
    return {name: [sample[name] for sample in samples] for name in names}


def _checked_size(name: str, given: object) -> int | None:
    """A size of at least 0 as an int, or None."""
    found = as_int(given)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
        raise DataError(explain_values(name, "must be an int of at least 0", **{name: given}))
    return found


def _check_fill(fill: object, columns: Mapping[str, list[Any]]) -> None:
    """Check that what spare rows hold is said for fields that there are: a misspelt name would say nothing."""
    if fill is None:
        return
    if not isinstance(fill, Mapping):
        raise DataError(explain_values("fill", "must be a mapping of field names, as {'labels': -100}", fill=fill))
    unknown = [name for name in fill if name not in columns]
    if unknown:
        raise DataError(explain_values("fill", "must name fields of the batch", unknown=unknown, fields=list(columns)))


def is_per_token(value: Any) -> bool:
    """True for lists, and arrays and tensors of at least one dimension: a field's entries per token."""
    return value.ndim > 0 if isinstance(value, Tensor | np.ndarray) else isinstance(value, list | tuple | range)


def _lengths(packed: Mapping[str, list[Any]], max_length: int | None) -> list[int]:
    found: list[int] | None = None
    first = next(iter(packed))
    for name, values in packed.items():
        odd = [i for i, x in enumerate(values) if not is_per_token(x)]
        if odd:
            kind = type(values[odd[0]]).__name__
            raise DataError(explain_values(f"samples[{odd[0]}][{name!r}]", "must be per token", type=kind))
        lengths = [len(x) for x in values]
        found = lengths if found is None else found
        if lengths != found:
            i = next(i for i, (a, b) in enumerate(zip(lengths, found, strict=True)) if a != b)
            rule = "must have the same length in all fields per token; collate fields of other lengths by another call"
            raise DataError(explain_values(f"samples[{i}]", rule, **{first: found[i], name: lengths[i]}))
    assert found is not None
    return found if max_length is None else [min(n, max_length) for n in found]


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(value, device=HOST)
    except (TypeError, ValueError, RuntimeError) as reason:
        rule, kind = "must be numbers, arrays or tensors", type(value).__name__
        raise DataError(explain_values(name, rule, type=kind, error=str(reason).split("\n")[0])) from None


def _joined(name: str, pieces: list[Any]) -> Tensor:
    """Concatenate along the first dimension; lists by NumPy, which is much faster than a tensor for each."""
    try:
        if isinstance(pieces[0], Tensor):
            return torch.cat(pieces)
        kept = [x for x in pieces if len(x)] or pieces[:1]  # an empty list has no dtype
        joined = np.concatenate([np.asarray(x) for x in kept])
        if not joined.size and not isinstance(pieces[0], np.ndarray):
            joined = joined.astype(np.int64)  # lists without entries: most likely of token ids
        if joined.dtype.kind not in "biufc":
            raise TypeError(f"no numbers but {joined.dtype}")
        made = torch.from_numpy(joined)
    except (TypeError, ValueError, RuntimeError) as reason:
        seen = {"error": str(reason).split("\n")[0]}
        raise DataError(explain_values(name, "must have one kind of entries in all samples", **seen)) from None
    of_lists = not isinstance(pieces[0], np.ndarray) and made.is_floating_point()
    return made.to(torch.get_default_dtype()) if of_lists else made


def _extended(name: str, values: Tensor, rows: int | None, fill: float) -> Tensor:
    """Values with spare rows that hold `fill`, which an integer dtype must hold exactly: uint8 makes 156 of -100."""
    if rows is None:
        return values
    try:
        held = torch.full((), fill, dtype=values.dtype, device=HOST).item()
    except (TypeError, ValueError, RuntimeError):
        held = None
    if held is None or (held != fill and not values.dtype.is_floating_point and not values.dtype.is_complex):
        rule = "must be a number that the field's dtype can hold"
        raise DataError(explain_values(f"fill[{name!r}]", rule, fill=fill, dtype=values.dtype))
    out = values.new_full((rows, *values.shape[1:]), fill)
    out[: values.shape[0]] = values
    return out


class _Dry(pickle.Pickler):
    """Pickles without the tensors."""

    def persistent_id(self, obj: Any) -> int | None:
        return id(obj) if isinstance(obj, Tensor) else None


def _check_sendable(plan: Any) -> None:
    """Check that a plan can leave a worker: the queue's thread would only print the error, and training would wait."""
    try:
        _Dry(io.BytesIO()).dump(plan)
    except (pickle.PicklingError, TypeError, AttributeError) as reason:
        rule = "must be picklable to be made in a worker: functions of a module, without closure or defaults"
        raise DataError(explain_values("plan", rule, error=str(reason).split("\n")[0])) from reason
