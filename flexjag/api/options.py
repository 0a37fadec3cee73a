"""Options of attention that no backend knows of: what is done to its inputs before, and to its results after."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexjag.algebra.node import finite
from flexjag.algebra.normalizers import Normalizer, Softmax
from flexjag.errors import PlanError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.layout import Layout
from flexjag.upstream import number

AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


def in_one_dtype(q: Jagged, k: Jagged, v: Jagged) -> tuple[Jagged, Jagged, Jagged]:
    """Inputs whose dtypes differ in autocast's dtype where it is enabled, as a norm or rotation in float32 leaves them.

    As PyTorch's ``scaled_dot_product_attention`` casts them, float64 is not.
    """
    given = (q, k, v)
    if not all(isinstance(x, Jagged) for x in given):
        return given
    tensors = [x.values for x in given]
    device = tensors[0].device.type
    alike = all(x.dtype == tensors[0].dtype for x in tensors)
    if alike or device == "meta" or not torch.is_autocast_enabled(device):
        return given
    if not all(x.dtype in AUTOCAST and x.device.type == device for x in tensors):
        return given
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.with_values(t.to(dtype)) for x, t in zip(given, tensors, strict=True))
    return q, k, v


def checked_scale(scale: float | None, dim: int) -> float:
    """The factor on ``q·k``, ``1 / sqrt(D)`` by default.

    Raises:
        ShapeError: If it is no finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(max(1, dim))
    if isinstance(scale, Tensor):
        rule = "must be a number; multiply q by a learned one"
        raise ShapeError(explain_values("scale", rule, shape=tuple(scale.shape)))
    return finite(ShapeError, "scale", scale)


def checked_sinks(sinks: Tensor | float | None, normalizer: Normalizer, q: Tensor) -> Tensor | None:
    """Sinks as a tensor ``[H]`` or 0-d on q's device.

    Raises:
        PlanError: If the normalizer is no softmax.
        ShapeError: If they are neither a finite number nor a floating-point tensor ``[H]`` on q's device.
    """
    if sinks is None:
        return None
    if not isinstance(normalizer, Softmax):
        raise PlanError(explain_values("sinks", "only a softmax has them", normalizer=normalizer))
    if not isinstance(sinks, Tensor):
        return number(finite(ShapeError, "sinks", sinks), torch.float32, q.device)
    if sinks.shape != (q.shape[1],) or not sinks.is_floating_point() or sinks.device != q.device:
        seen = {"shape": tuple(sinks.shape), "dtype": sinks.dtype, "device": sinks.device, "heads": q.shape[1]}
        raise ShapeError(explain_values("sinks", "must be a floating-point tensor [H] on q's device", **seen))
    return sinks


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with one more key of value 0 in each row: its share of the weights is taken off."""
    sinks = sinks.to(lse.dtype)
    kept = torch.sigmoid(lse - sinks)[:, :, None]
    total = torch.logaddexp(lse, sinks)
    if layout.has_spare:
        total = total.masked_fill((layout.q_segment >= layout.num_segments)[:, None], -torch.inf)
    return (out * kept).to(out.dtype), total
