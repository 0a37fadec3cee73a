"""Functions that masks and scores printed for torch call, on tensors that broadcast and on Python numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Convert a tensor to a dtype; a number is returned unchanged."""
    return x.to(dtype) if isinstance(x, Tensor) else x


def minimum(a: Any, b: Any) -> Any:
    """Elementwise minimum of tensors or numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """Elementwise maximum of tensors or numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def look_up(tensor: Tensor, *index: Any) -> Tensor:
    """``tensor[index]`` without a gradient.

    >>> look_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, torch.tensor([[1], [0]]))
    tensor([[4.],
            [3.]])
    """
    at = flat_index(tensor, *index)
    return tensor.flatten().index_select(0, at.flatten()).view(at.shape)


def flat_index(tensor: Tensor, *index: Any) -> Tensor:
    """Flat index of ``tensor[index]`` in a contiguous tensor."""
    at = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, i in zip(tensor.shape, index, strict=True):
        at = at * size + i
    return at
