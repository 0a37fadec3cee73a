"""Packed values and lengths from lists, position ids, padding masks and NestedTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, assert_on_device, explain_values
from flexjag.offsets import can_look, check_ends, check_tensor, index_tensor, listed, offsets_of
from flexjag.upstream import holds_no_numbers

Packed = tuple[Tensor, Tensor]
"""Values ``[T, ...]`` and offsets ``[S+1]``."""

COMPACT = "compact=True leaves them out and numbers the others anew"
TOGETHER = f"must have the tokens of a row together; {COMPACT}"


def join(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Concatenate tensors ``[n_s, ...]``; also return their lengths.

    Raises:
        ShapeError: If they differ in dtype or in anything but their first dimension.
    """
    tensors = listed("tensors", tensors)
    if not tensors:
        return torch.zeros(0), []
    first = tensors[0]
    for s, t in enumerate(tensors):
        check_tensor(ShapeError, f"tensors[{s}]", t)
        if t.ndim < 1:
            raise ShapeError(explain_values(f"tensors[{s}]", "must have a token dimension", shape=()))
        if t.shape[1:] != first.shape[1:] or t.dtype != first.dtype or t.device != first.device:
            rule = "must agree with tensors[0] in dtype, device and in all dimensions but the first"
            seen = {"first_shape": tuple(first.shape), "first_dtype": first.dtype}
            if t.device != first.device:
                seen = {"device": str(t.device), "first_device": str(first.device)}
            raise ShapeError(explain_values(f"tensors[{s}]", rule, shape=tuple(t.shape), dtype=t.dtype, **seen))
    return torch.cat(tensors), [t.shape[0] for t in tensors]


def join_batches(batches: Sequence[Any], kind: type) -> Packed:
    """Concatenate the segments of batches of a kind; see :meth:`flexjag.Jagged.concat`."""
    batches = listed("batches", batches)
    if not batches:
        raise LayoutError(explain_values("batches", "must hold at least one batch", batches=batches))
    first = batches[0]
    for i, x in enumerate(batches):
        if not isinstance(x, kind):
            raise ShapeError(explain_values(f"batches[{i}]", f"must be a {kind.__name__}", type=type(x).__name__))
        if x.values.shape[1:] != first.values.shape[1:] or x.dtype != first.dtype or x.device != first.device:
            rule = "must agree with batches[0] in dtype, device and all dimensions but the first"
            raise ShapeError(explain_values(f"batches[{i}]", rule, **{f"batches[{i}]": x, "batches[0]": first}))
        check_ends(x.offsets, x.values.shape[0], f"batches[{i}].offsets")
    return torch.cat([x.values for x in batches]), offsets_of(torch.cat([x.lengths for x in batches]))


def select(values: Tensor, offsets: Tensor, index: slice) -> Packed:
    """The segments of a slice, packed; a view of `values` if the slice has no step."""
    first, end, step = index.indices(offsets.shape[0] - 1)
    if step == 1:
        offsets = offsets[first : max(first, end) + 1]
        low, high = torch.stack((offsets[0], offsets[-1])).tolist()
        return values[low:high], offsets - low
    ends, lengths = offsets.tolist(), offsets.diff()
    chosen = range(offsets.shape[0] - 1)[index]
    parts = [values[:0], *(values[ends[s] : ends[s + 1]] for s in chosen)]
    return torch.cat(parts), offsets_of(lengths[list(chosen)])


def cut_by_positions(values: Tensor, position_ids: Tensor) -> Packed:
    """Cut packed values where position ids restart; see :meth:`flexjag.Jagged.from_position_ids`."""
    check_tensor(ShapeError, "values", values)
    position_ids = index_tensor(position_ids)
    check_tensor(LayoutError, "position_ids", position_ids)
    ids = position_ids
    if ids.ndim not in (1, 2) or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        seen = {"shape": tuple(ids.shape), "dtype": ids.dtype}
        raise LayoutError(explain_values("position_ids", "must be integers [T] or [B, N]", **seen))
    if ids.ndim == 2 and values.shape[: ids.ndim] == ids.shape:
        values = values.flatten(0, 1)
    ids = ids.flatten().long()
    if values.ndim < 1 or values.shape[0] != ids.shape[0] or ids.device != values.device:
        rule = "must have one entry per token and be on the device of values"
        seen = {"position_ids": tuple(position_ids.shape), "values": tuple(values.shape)}
        devices = {"position_ids_device": str(ids.device), "values_device": str(values.device)}
        raise LayoutError(explain_values("position_ids", rule, **seen, **devices))
    starts = ids == 0
    goes_on = torch.cat([starts[:1] & False, ids[1:] == ids[:-1] + 1])
    if position_ids.ndim == 2:
        goes_on = goes_on.view(position_ids.shape).clone()
        goes_on[:, :1] = False
    wrong = ~(starts | goes_on.flatten())
    if holds_no_numbers(ids):
        assert_on_device(~wrong.any(), "position_ids: must begin with 0, and count on by 1 or restart at 0")
    elif bool(wrong.any()):
        raise _misplaced(ids, int(wrong.int().argmax()), position_ids.shape[-1])
    end = ids.new_full((1,), ids.shape[0])
    return values, torch.cat([starts.nonzero().flatten(), end])


def _misplaced(ids: Tensor, at: int, row: int) -> LayoutError:
    """The error of the first position that neither begins nor continues a segment."""
    seen = {f"position_ids[{i}]": int(ids[i]) for i in ((at - 1, at) if at % row else (at,))}
    rule = "must count on by 1 or restart at 0" if at % row else "must begin with 0"
    text = explain_values("position_ids", rule, **seen)
    return LayoutError(f"{text}; Jagged.from_lengths takes segments whose positions are others")


def remove_padding(dense: Tensor, mask: Tensor, compact: bool) -> Packed:
    """Gather what a padding mask keeps; see :meth:`flexjag.Jagged.from_padding_mask`."""
    check_tensor(ShapeError, "dense", dense)
    mask = index_tensor(mask)
    check_tensor(LayoutError, "mask", mask)
    if mask.ndim != 2 or mask.shape != dense.shape[:2] or mask.device != dense.device:
        seen = {"mask": tuple(mask.shape), "dense": tuple(dense.shape)}
        devices = {"mask_device": str(mask.device), "dense_device": str(dense.device)}
        raise LayoutError(explain_values("mask", "must be [S, N], as dense [S, N, ...] begins", **seen, **devices))
    kept = mask.bool()
    if mask.dtype != torch.bool and can_look(mask) and not torch.equal(kept.to(mask.dtype), mask):
        at = tuple(((mask != 0) & (mask != 1)).nonzero()[0].tolist())
        rule = "must be bool, or hold 0 for padding and 1 for tokens"
        raise LayoutError(explain_values("mask", rule, **{f"mask{list(at)}": mask[at].item()}))
    if not compact:
        ended = (kept[:, :-1] & ~kept[:, 1:]).cumsum(1) > 0
        again = ended & kept[:, 1:]
        if holds_no_numbers(mask):
            assert_on_device(~again.any(), f"mask: {TOGETHER}")
        elif bool(again.any()):
            rows = again.any(1).nonzero().flatten()
            s = int(rows[0])
            seen = {"row": s, "hole_before": int(again[s].int().argmax()) + 1, "rows_with_holes": rows.shape[0]}
            raise LayoutError(explain_values("mask", TOGETHER, **seen))
    index = kept.flatten().nonzero().flatten()
    return dense.flatten(0, 1).index_select(0, index), offsets_of(kept.sum(1))


def unnest(nested: Any, compact: bool) -> Packed:
    """Values and offsets of a NestedTensor; see :meth:`flexjag.Jagged.from_nested`."""
    if not isinstance(nested, Tensor) or not nested.is_nested:
        raise ShapeError(explain_values("nested", "must be a NestedTensor", type=type(nested).__name__))
    if nested.layout != torch.jagged:
        values, lengths = join(nested.unbind())
        return values, offsets_of(torch.tensor(lengths, dtype=torch.int64, device=values.device))
    made: Any = nested
    if made._ragged_idx != 1:
        rule = "must be ragged in dimension 1, that is [S, jagged, ...]; transpose it back"
        raise ShapeError(explain_values("nested", rule, ragged_dimension=made._ragged_idx, shape=tuple(made.shape)))
    values, offsets, lengths = made.values(), made.offsets(), made.lengths()
    if lengths is None and can_look(offsets):
        first, last = (int(offsets[i]) for i in (0, -1))
        if first == 0 and last == values.shape[0]:
            return values, offsets
        lengths = offsets.diff()
    elif lengths is None:
        check_ends(offsets, values.shape[0], "nested.offsets()")
        return values, offsets
    if not compact:
        rule = f"must have no rows between or behind its segments; {COMPACT}"
        raise LayoutError(explain_values("nested", rule, rows=values.shape[0], tokens=int(lengths.sum())))
    starts, packed = offsets[:-1], offsets_of(lengths)
    segment = torch.repeat_interleave(lengths)
    index = torch.arange(segment.shape[0], device=values.device) + (starts - packed[:-1])[segment]
    return values.index_select(0, index), packed


def nest(values: Tensor, offsets: Tensor) -> Tensor:
    """A NestedTensor of the jagged layout over packed values; rows behind the last offset are left out."""
    if holds_no_numbers(offsets):
        check_ends(offsets, values.shape[0])
    else:
        check_ends(offsets, values.shape[0], spare=True)
        values = values[: int(offsets[-1])]
    return torch.nested.nested_tensor_from_jagged(values, offsets.long())
