"""Argument checks shared by the ragged ops."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import can_look as can_look
from flexjag.offsets import check_computable


def check_jagged(x: object, name: str, ndim: int | None = None, floating: bool = False) -> None:
    """Check that an argument is a Jagged, optionally of rank `ndim` and of floating point values.

    Raises:
        LayoutError: If it is not a Jagged.
        ShapeError: If its values have another rank, or are not floating point although `floating` is set.
    """
    if not isinstance(x, Jagged):
        raise LayoutError(explain_values(name, "must be a flexjag.Jagged", type=type(x).__name__))
    if ndim is not None and x.values.ndim != ndim:
        raise ShapeError(explain_values(name, f"its values must have {ndim} dimensions", shape=tuple(x.values.shape)))
    if floating and not x.values.is_floating_point():
        raise ShapeError(explain_values(name, "its values must be floating point", dtype=x.values.dtype))
    if floating:
        check_computable(name, x.values)


def check_like(tensor: object, name: str, x: Jagged, x_name: str = "x", or_float32: bool = False) -> None:
    """Check that a dense argument is a tensor with the dtype and device of a jagged one.

    With `or_float32`, meant for parameters, float32 is accepted beside half precision values.

    Raises:
        ShapeError: If it is not.
    """
    if not isinstance(tensor, Tensor):
        raise ShapeError(explain_values(name, "must be a tensor", type=type(tensor).__name__))
    seen: dict[str, object] = {name: tensor.dtype, x_name: x.values.dtype}
    is_wider = or_float32 and tensor.dtype == torch.float32 and x.values.dtype in (torch.bfloat16, torch.float16)
    if tensor.dtype != x.values.dtype and not is_wider:
        more = ", or be float32 beside half precision" if or_float32 else ""
        raise ShapeError(explain_values(name, f"must have the dtype of {x_name}{more}", **seen))
    if tensor.device != x.values.device:
        seen = {name: str(tensor.device), x_name: str(x.values.device)}
        raise ShapeError(explain_values(name, f"must be on the device of {x_name}", **seen))


def check_rows(dense: Tensor, name: str, x: Jagged, ndim: int, x_name: str = "x") -> None:
    """Check that a dense argument has `ndim` dimensions (at least) and one row per segment of `x`.

    Raises:
        ShapeError: If its rank is lower or its first size is not S.
    """
    check_like(dense, name, x, x_name)
    if dense.ndim != ndim or dense.shape[0] != x.num_segments:
        rule = f"must have {ndim} dimensions, the first one for the segments of {x_name}"
        raise ShapeError(explain_values(name, rule, shape=tuple(dense.shape), segments=x.num_segments))


def check_index(tensor: object, name: str, device: torch.device) -> None:
    """Check that offsets, lengths or indices are a 1-D integer tensor on `device`.

    Raises:
        LayoutError: If they are not.
    """
    if not isinstance(tensor, Tensor):
        raise LayoutError(explain_values(name, "must be a tensor", type=type(tensor).__name__))
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != 1:
        seen: dict[str, object] = {"dtype": tensor.dtype, "shape": tuple(tensor.shape)}
        raise LayoutError(explain_values(name, "must be 1-D int32 or int64", **seen))
    if tensor.device != device:
        seen = {name: str(tensor.device), "values": str(device)}
        raise LayoutError(explain_values(name, "must be on the device of the values", **seen))


def check_total(total: int | None, name: str = "total") -> None:
    """Check a number of packed tokens given by the caller.

    Raises:
        LayoutError: If it is negative.
    """
    if total is not None and total < 0:
        raise LayoutError(explain_values(name, "must not be negative", **{name: total}))
