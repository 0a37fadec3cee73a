"""Scores as modules, with their tables registered for optimizers, state dicts and sharding.

A score node keeps the tensor it is given. If a module's parameters are replaced later, as by FSDP2's ``fully_shard``,
``Module.to_empty`` or ``torch.func.functional_call``, an existing node still holds the old table, which is no longer
trained. The forward of these modules returns a new node with the current parameter.

Shard the layer that calls attention, not one of these modules alone: its table would be freed before it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexjag.algebra import scores as s
from flexjag.algebra.node import Align


class _Score(nn.Module):
    """Base class: tables of zeros, and optional `boundaries`, which ``reset_parameters`` restores."""

    boundaries: Tensor

    def __init__(self, boundaries: Tensor | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._ends = None if boundaries is None else (boundaries.tolist(), boundaries.dtype)
        if boundaries is not None:
            self.register_buffer("boundaries", boundaries.detach().to(device, copy=True))

    def reset_parameters(self) -> None:
        """Set the table to zeros, a score without effect, and the boundaries to those given."""
        for table in self.parameters():
            nn.init.zeros_(table)
        if self._ends is not None:
            ends, dtype = self._ends
            self.boundaries.copy_(torch.tensor(ends, dtype=dtype, device="cpu"))


class Alibi(_Score):
    """:class:`flexjag.Alibi` with the paper's slopes.

    Args:
        num_heads: H.
        learned: Whether the slopes are a parameter instead of a buffer.
        symmetric: As in the score.
        align: As in the score.
        device: Device of the slopes.

    >>> Alibi(4)()
    Alibi(<float32[4]>)
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        learned: bool = False,
        symmetric: bool = False,
        align: Align = "start",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.align: Align = align
        slopes = s.Alibi.from_heads(num_heads, device).slopes
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)

    def reset_parameters(self) -> None:
        """Set the slopes to those of the paper."""
        with torch.no_grad():
            self.slopes.copy_(s.Alibi.from_heads(self.slopes.shape[0], self.slopes.device).slopes)

    def forward(self) -> s.Alibi:
        """Return the score node."""
        return s.Alibi(self.slopes, self.symmetric, self.align)


class RelativeBias(_Score):
    """:class:`flexjag.RelativeBias` with a learned table, initialized with zeros.

    Args:
        num_heads: H.
        max_distance: R, the distance beyond which the bias is constant.
        align: As in the score.
        device: Device of the table.
        dtype: Dtype of the table. Default: torch's.

    >>> RelativeBias(2, 8)()
    RelativeBias(<float32[2, 17]>)
    """

    def __init__(
        self,
        num_heads: int,
        max_distance: int,
        *,
        align: Align = "start",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.align: Align = align
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1, device=device, dtype=dtype))

    def forward(self) -> s.RelativeBias:
        """Return the score node."""
        return s.RelativeBias(self.table, self.align)


class BucketedBias(_Score):
    """:class:`flexjag.BucketedBias` with a learned table, initialized with zeros.

    Args:
        num_heads: H.
        boundaries: ``[K]``, ascending.
        align: As in the score.
        device: Device of the table.
        dtype: Dtype of the table. Default: torch's.

    >>> BucketedBias(2, torch.tensor([-8, 0, 8]))()
    BucketedBias(<float32[2, 4]>, <int64[3]>)
    """

    def __init__(
        self,
        num_heads: int,
        boundaries: Tensor,
        *,
        align: Align = "start",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(boundaries, device)
        self.align: Align = align
        self.table = nn.Parameter(torch.zeros(num_heads, boundaries.shape[0] + 1, device=device, dtype=dtype))

    def forward(self) -> s.BucketedBias:
        """Return the score node."""
        return s.BucketedBias(self.table, self.boundaries, self.align)


class T5Bias(_Score):
    """:class:`flexjag.T5Bias` with a learned table, initialized with zeros.

    ``bias.table.data.copy_(block.relative_attention_bias.weight.T)`` takes the table of a model of ``transformers``.

    Args:
        num_heads: H.
        num_buckets: K.
        bidirectional: As in the score.
        max_distance: As in the score.
        align: As in the score.
        device: Device of the table.
        dtype: Dtype of the table. Default: torch's.

    >>> T5Bias(2)()
    T5Bias(<float32[2, 32]>, True, 128, <int32[257]>)
    """

    buckets: Tensor

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        *,
        bidirectional: bool = True,
        max_distance: int = 128,
        align: Align = "start",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_buckets, self.bidirectional, self.max_distance = num_buckets, bidirectional, max_distance
        self.align: Align = align
        self.table = nn.Parameter(torch.zeros(num_heads, num_buckets, device=device, dtype=dtype))
        self.register_buffer("buckets", self._made().to(device), persistent=False)

    def _made(self) -> Tensor:
        return s.t5_buckets(self.num_buckets, self.bidirectional, self.max_distance)

    def reset_parameters(self) -> None:
        """Set the table to zeros, and make the buckets anew."""
        super().reset_parameters()
        self.buckets.copy_(self._made())

    def forward(self) -> s.T5Bias:
        """Return the score node."""
        return s.T5Bias(self.table, self.bidirectional, self.max_distance, self.align, self.buckets)


class TimeBias(_Score):
    """:class:`flexjag.TimeBias` with a learned table, initialized with zeros.

    Args:
        num_heads: H.
        boundaries: ``[K]``, ascending, for instance ``flexjag.TimeBias.log_boundaries(64)``.
        device: Device of the table.
        dtype: Dtype of the table. Default: torch's.

    >>> TimeBias(2, s.TimeBias.log_boundaries(8))(torch.arange(6))
    TimeBias(<float32[2, 9]>, <int64[6]>, <int64[8]>, None)
    """

    def __init__(
        self,
        num_heads: int,
        boundaries: Tensor,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(boundaries, device)
        self.table = nn.Parameter(torch.zeros(num_heads, boundaries.shape[0] + 1, device=device, dtype=dtype))

    def forward(self, times: Tensor, kv_times: Tensor | None = None) -> s.TimeBias:
        """Return the score node for one batch.

        Args:
            times: Time of each packed query token, ``[T_q]``.
            kv_times: Time of each packed key token, ``[T_kv]``. Default: `times`.
        """
        return s.TimeBias(self.table, times, self.boundaries, kv_times)
