"""HSTU's norms, with parameter gradients as accurate in half precision as in float32 (PyTorch's are not on a CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexjag.ops.norm import layer_norm
from flexjag.ops.packed import wide


class LayerNorm(nn.LayerNorm):
    """Layer norm of ``[T, features]``, as PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the features of each token, with gain and shift."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class HeadNorm(nn.GroupNorm):
    """Group norm of ``[T, H * E]``: over each head's features, with one gain and one shift per head.

    Args:
        heads: H.
        eps: Added to the variance.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(self, heads: int, eps: float, **factory: Any) -> None:
        super().__init__(heads, heads, eps, **factory)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the features of each head, with gain and shift."""
        by_head = wide(input).unflatten(1, (self.num_groups, -1))
        # Not functional.group_norm, which refuses one token of one feature.
        out = torch.group_norm(by_head, self.num_groups, wide(self.weight), wide(self.bias), self.eps)
        return out.flatten(1).to(input.dtype)
