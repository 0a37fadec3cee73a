"""Target attention: one call for all segments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from flexjag.ops.cpp.common import find, threads

PER_SEGMENT, PER_PRODUCT = 4e-5, 1e-10
"""Seconds of the loop over segments, forward."""


class _Table(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("step", ctypes.c_int64))


class _Target(ctypes.Structure):
    _fields_ = (
        *((x, _Table) for x in ("query", "key", "value", "bias", "out", "grad", "dq", "dk", "dv", "db")),
        *((x, ctypes.c_void_p) for x in ("lse", "offsets")),
        *((x, ctypes.c_int64) for x in ("segments", "rows", "queries", "longest", "dim", "value_dim", "threads")),
        ("scale", ctypes.c_double),
    )


def target(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """See :mod:`flexjag.ops.target`."""
    library = _find(query, key, value)
    if library is None:
        return NotImplemented
    acc = torch.float64 if query.dtype == torch.float64 else torch.float32
    out, lse = query.new_empty((*query.shape[:2], value.shape[1])), query.new_empty(query.shape[:2], dtype=acc)
    done = _call(library.target, [query, key, value, bias], [out], lse, offsets, scale)
    return (out, lse) if done else NotImplemented


def target_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`flexjag.ops.target`."""
    library = _find(query, key, value)
    if library is None or grad.dtype != query.dtype:
        return NotImplemented
    found = [x.new_empty(x.shape) for x in (query, key, value)]
    of_bias = query.new_empty((0,) if bias is None else bias.shape)
    more = [out, grad, *found, None if bias is None else of_bias]
    done = _call(library.target_backward, [query, key, value, bias], more, lse, offsets, scale)
    return (found[0], found[1], found[2], of_bias) if done else NotImplemented


def _find(query: Tensor, key: Tensor, value: Tensor) -> ctypes.CDLL | None:
    """The library, if it is worth a call of these sizes."""
    segments, queries, dim = query.shape
    products = key.shape[0] * queries * (dim + value.shape[1])
    few = segments < 2 * torch.get_num_threads() > 2  # a segment is not divided among threads
    if not products or not dim or not value.shape[1] or few:
        return None
    return find("target", query.dtype, segments * PER_SEGMENT + products * PER_PRODUCT)


def _call(
    function: ctypes._NamedFuncPointer,
    inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> bool:
    """Call a function of the unit; False if the offsets are none, or too long for the bias."""
    query, key, value, bias = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    kept = [None if x is None else _adjacent(x) for x in (*inputs, *others)]  # until the kernel returns
    tables = [_table(x) for x in kept] + [_Table()] * (10 - len(kept))
    lse, offsets = lse.contiguous(), offsets.long().contiguous()
    longest, threads_ = 0 if bias is None else bias.shape[1], threads(key.numel() + value.numel())
    sizes = (query.shape[0], key.shape[0], query.shape[1], longest, query.shape[2], value.shape[1], threads_)
    call = _Target(*tables, lse.data_ptr(), offsets.data_ptr(), *sizes, scale)
    return not function(ctypes.byref(call))


def _adjacent(x: Tensor) -> Tensor:
    """A tensor as rows of adjacent numbers: packed rows as they are if they have those, others one behind another."""
    return x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous()


def _table(x: Tensor | None) -> _Table:
    """Where rows begin. Strides of a dense tensor with M = 1 or N = 1 need not be those of its rows."""
    if x is None or not x.numel():
        return _Table()
    return _Table(x.data_ptr(), x.stride(0) if x.ndim == 2 else x.shape[-1])
