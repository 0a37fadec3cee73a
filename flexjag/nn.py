"""Scores as modules: their tables are registered, so that optimizers, state dicts and sharding find them.

A score node holds the tensor it was given. What replaces a module's parameters later, such as FSDP2's ``fully_shard``,
``Module.to_empty`` or ``torch.func.functional_call``, does not reach a node that was made before, and the table it
holds is trained by nobody. These modules make the node when they are called, around the parameter of that moment.

Shard the layer that calls attention, not one of these by itself: its table would be freed before it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexjag import scores as s


class _Score(nn.Module):
    """What the modules share: `boundaries`, if any, come back after ``to_empty``."""

    boundaries: Tensor

    def __init__(self, boundaries: Tensor | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._ends = None if boundaries is None else (boundaries.tolist(), boundaries.dtype)
        if boundaries is not None:
            self.register_buffer("boundaries", boundaries.detach().to(device, copy=True))

    def reset_parameters(self) -> None:
        """Set the table to zeros, so that the score starts out as no score, and the boundaries to those given."""
        for table in self.parameters():
            nn.init.zeros_(table)
        if self._ends is not None:
            ends, dtype = self._ends
            self.boundaries.copy_(torch.tensor(ends, dtype=dtype, device="cpu"))


class Alibi(_Score):
    """:class:`flexjag.Alibi` with the paper's slopes.

    Args:
        num_heads: H.
        learned: Whether the slopes are a parameter; else they are a buffer.
        device: Where the slopes are made.

    >>> Alibi(4)()
    Alibi(<float32[4]>)
    """

    slopes: Tensor

    def __init__(self, num_heads: int, *, learned: bool = False, device: torch.device | str | None = None) -> None:
        super().__init__()
        slopes = s.Alibi.from_heads(num_heads, device).slopes
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)

    def reset_parameters(self) -> None:
        """Set the slopes to the paper's."""
        with torch.no_grad():
            self.slopes.copy_(s.Alibi.from_heads(self.slopes.shape[0], self.slopes.device).slopes)

    def forward(self) -> s.Alibi:
        """The score node."""
        return s.Alibi(self.slopes)


class RelativeBias(_Score):
    """:class:`flexjag.RelativeBias` with a table that is learned from zeros.

    Args:
        num_heads: H.
        max_distance: R, the distance from which on the bias is constant.
        device: Where the table is made.
        dtype: Of the table. Default: torch's.

    >>> RelativeBias(2, 8)()
    RelativeBias(<float32[2, 17]>)
    """

    def __init__(
        self,
        num_heads: int,
        max_distance: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1, device=device, dtype=dtype))

    def forward(self) -> s.RelativeBias:
        """The score node."""
        return s.RelativeBias(self.table)


class BucketedBias(_Score):
    """:class:`flexjag.BucketedBias` with a table that is learned from zeros.

    Args:
        num_heads: H.
        boundaries: ``[K]``, ascending.
        device: Where the table is made.
        dtype: Of the table. Default: torch's.

    >>> BucketedBias(2, torch.tensor([-8, 0, 8]))()
    BucketedBias(<float32[2, 4]>, <int64[3]>)
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

    def forward(self) -> s.BucketedBias:
        """The score node."""
        return s.BucketedBias(self.table, self.boundaries)


class TimeBias(_Score):
    """:class:`flexjag.TimeBias` with a table that is learned from zeros.

    Args:
        num_heads: H.
        boundaries: ``[K]``, ascending, for instance ``flexjag.TimeBias.log_boundaries(64)``.
        device: Where the table is made.
        dtype: Of the table. Default: torch's.

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
        """The score node of one batch.

        Args:
            times: ``[T_q]``, the time of every packed query token.
            kv_times: ``[T_kv]``, of every packed key token. Default: `times`.
        """
        return s.TimeBias(self.table, times, self.boundaries, kv_times)
