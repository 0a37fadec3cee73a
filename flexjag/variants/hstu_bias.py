"""HSTU's learned bias by position and time (generative-recommenders), and the times that it compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexjag.errors import LayoutError, ScoreError, explain_values
from flexjag.jagged import Jagged, check_same_layout
from flexjag.ops.checks import check_jagged
from flexjag.ops.packed import wide
from flexjag.scores import RelativeBias, Score, TimeBias


class HSTUBias(nn.Module):
    """HSTU's learned bias by relative position and time, as a score: ``position[j - i] + time[bucket(t_i - t_j)]``.

    The buckets of the public code: ``floor(log(t) / width)``, from 0 to `time_buckets`. What is under one unit of
    time, or negative, goes to bucket 0.

    Args:
        heads: H.
        max_distance: R, the distance from which on the position's bias is constant. Default: no bias by position.
            The public code has one less than its maximal length.
        time_buckets: The last bucket of time. Default: no bias by time. The public code has 128.
        bucket_width: In natural logarithms of the times' unit.
        per_head: A table for each head. The public code's heads share one.
        device: Of the tables.
        dtype: Of the tables.

    Raises:
        ScoreError: If there is nothing to look up, or a size is out of range.

    >>> HSTUBias(2, max_distance=255, time_buckets=64)
    HSTUBias(heads=2, max_distance=255, time_buckets=64)
    """

    position: nn.Parameter | None
    time: nn.Parameter | None
    boundaries: Tensor | None

    def __init__(
        self,
        heads: int,
        *,
        max_distance: int | None = None,
        time_buckets: int | None = None,
        bucket_width: float = 0.301,
        per_head: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_distance is None and time_buckets is None:
            raise ScoreError(explain_values("max_distance, time_buckets", "at least one must be given"))
        for name, size in (("heads", heads), ("max_distance", max_distance), ("time_buckets", time_buckets)):
            least = 1 if name == "heads" else 0
            if size is not None and (not isinstance(size, int) or size < least):
                raise ScoreError(explain_values(name, f"must be an int of at least {least}", **{name: size}))
        self.heads, self.max_distance, self.time_buckets = heads, max_distance, time_buckets
        self.bucket_width = bucket_width
        rows, factory = heads if per_head else 1, {"device": device, "dtype": dtype}
        widths = {
            "position": None if max_distance is None else 2 * max_distance + 1,
            "time": None if time_buckets is None else time_buckets + 1,
        }
        for name, width in widths.items():
            table = None if width is None else nn.Parameter(torch.empty(rows, width, **factory))
            self.register_parameter(name, table)
        boundaries = None if time_buckets is None else TimeBias.log_boundaries(time_buckets, bucket_width, device)
        self.register_buffer("boundaries", boundaries, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal tables of deviation 0.02, as in the public code."""
        for table in (self.position, self.time):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if self.time_buckets is not None and self.boundaries is not None:  # a module made on "meta" has lost them
            self.boundaries.copy_(TimeBias.log_boundaries(self.time_buckets, self.bucket_width))

    def forward(
        self, q: Jagged, k: Jagged | None = None, *, times: Jagged | None = None, kv_times: Jagged | None = None
    ) -> Score:
        """The score for one batch.

        Args:
            q: The query batch; only its layout matters.
            k: The key batch, if the queries are only the last tokens of each of its segments, as in a decode step.
            times: ``[T_q]`` on q's offsets, when each query is asked; None if there is no bias by time.
            kv_times: ``[T_kv]`` on k's offsets, when each key happened. Default: `times`.

        Raises:
            ScoreError: If there is a bias by time and no time, or the reverse.
            LayoutError: If times do not lie like tokens.
        """
        if (times is None) != (self.time is None) or (times is None and kv_times is not None):
            rule = "must be given for a bias by time" if times is None else "go with a bias by time, which is not here"
            raise ScoreError(explain_values("times", rule, time_buckets=self.time_buckets))
        found: list[Score] = []
        if self.position is not None:
            table = self._of_heads(self.position)
            found.append(RelativeBias(table) if k is None else self._by_place_from_end(table, q, k))
        if self.time is not None:
            assert times is not None
            assert self.boundaries is not None
            whole = q if k is None else k
            for name, given, like in (
                ("times", times, q),
                ("kv_times", times if kv_times is None else kv_times, whole),
            ):
                if not isinstance(given, Jagged):
                    raise LayoutError(explain_values(name, "must be a flexjag.Jagged", type=type(given).__name__))
                check_same_layout(like, given, name, "must have the offsets of the tokens")
            own = None if kv_times is None else kv_times.values
            found.append(TimeBias(self._of_heads(self.time), times.values, self.boundaries, own))
        return found[0] if len(found) == 1 else found[0] >> found[1]

    def _of_heads(self, table: Tensor) -> Tensor:
        """``[H, ...]``; a table that all heads share gets the sum of their gradients, kept wide and rounded once."""
        return table if table.shape[0] == self.heads else wide(table).expand(self.heads, -1)

    def _by_place_from_end(self, table: Tensor, q: Jagged, k: Jagged) -> TimeBias:
        """The bias by position of queries that line up with the last keys, which :class:`RelativeBias` has not."""
        assert self.max_distance is not None
        steps = torch.arange(1 - self.max_distance, self.max_distance + 1, device=q.device)
        return TimeBias(table.flip(1), _from_end(q), steps, _from_end(k))

    def extra_repr(self) -> str:
        """The arguments that were given."""
        sizes = {"max_distance": self.max_distance, "time_buckets": self.time_buckets}
        return ", ".join([f"heads={self.heads}", *(f"{k}={v}" for k, v in sizes.items() if v is not None)])


def _from_end(x: Jagged) -> Tensor:
    """``[T]``: minus how many tokens of its segment are left, from each token on."""
    return torch.arange(x.values.shape[0], device=x.device) - _ends(x)


def _ends(x: Jagged) -> Tensor:
    """``[T]``: where each token's segment ends."""
    # Of all S+1 offsets: a slice of S would make S = 1 a graph of its own.
    return x.offsets[(x.segment_ids + 1).clamp(max=x.num_segments)]


def next_times(times: Jagged) -> Jagged:
    """When the token after each one happened, and for a segment's last token when it did itself.

    HSTU's queries are asked at these times: pass them as `times`, and the tokens' own as `kv_times`.

    >>> next_times(Jagged.from_lengths(torch.tensor([1, 4, 9, 2, 5]), [3, 2])).values.tolist()
    [4, 9, 9, 5, 5]
    """
    check_jagged(times, "times")
    after = torch.arange(1, times.values.shape[0] + 1, device=times.device)
    return times.with_values(times.values[torch.minimum(after, _ends(times) - 1)])
