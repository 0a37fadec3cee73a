"""HSTU's learned bias by position and time (generative-recommenders), and the times of its queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexjag.algebra.scores import RelativeBias, Score, TimeBias
from flexjag.errors import LayoutError, ScoreError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import as_int, check_same_layout
from flexjag.ops.checks import check_jagged
from flexjag.ops.packed import wide


class HSTUBias(nn.Module):
    """HSTU's learned bias by relative position and time, as a score: ``position[j - i] + time[bucket(t_i - t_j)]``.

    Buckets as in the public code: ``floor(log(t) / width)``, from 0 to `time_buckets`. Differences below one unit of
    time, also negative ones, are in bucket 0.

    Args:
        heads: H.
        max_distance: R, the distance beyond which the bias by position is constant. Default: no bias by position.
            The public code has R = maximal length − 1.
        time_buckets: Index of the last time bucket. Default: no bias by time. The public code has 128.
        bucket_width: Width of a bucket in the natural logarithm of time.
        per_head: One table per head. In the public code all heads share one.
        device: Device of the tables.
        dtype: Dtype of the tables.

    Raises:
        ScoreError: If neither bias is chosen, or a size is out of range.

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
        heads, max_distance, time_buckets = as_int(heads), as_int(max_distance), as_int(time_buckets)
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
        """Draw the tables from a normal distribution of standard deviation 0.02, as in the public code."""
        for table in (self.position, self.time):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if self.time_buckets is not None and self.boundaries is not None:  # they have no data after to_empty
            self.boundaries.copy_(TimeBias.log_boundaries(self.time_buckets, self.bucket_width))

    def forward(
        self, q: Jagged, k: Jagged | None = None, *, times: Jagged | None = None, kv_times: Jagged | None = None
    ) -> Score:
        """Return the score for one batch.

        Args:
            q: The query batch; only its layout is used.
            k: The key batch, if the queries are its segments' last tokens, as in a decode step. Default: `q`.
            times: ``[T_q]`` on q's offsets, the time of each query; None without a bias by time.
            kv_times: ``[T_kv]`` on k's offsets, the time of each key. Default: `times`.

        Raises:
            ScoreError: If times are given without a bias by time, or missing with one.
            LayoutError: If times have other offsets than the tokens.
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
        """Table ``[H, ...]``. A shared one is expanded in float32, so that its gradient is rounded once."""
        return table if table.shape[0] == self.heads else wide(table).expand(self.heads, -1)

    def _by_place_from_end(self, table: Tensor, q: Jagged, k: Jagged) -> TimeBias:
        """Bias by position of queries aligned with the last keys, which :class:`RelativeBias` does not offer."""
        assert self.max_distance is not None
        steps = torch.arange(1 - self.max_distance, self.max_distance + 1, device=q.device)
        return TimeBias(table.flip(1), _from_end(q), steps, _from_end(k))

    def extra_repr(self) -> str:
        """The arguments, for the module's repr."""
        sizes = {"max_distance": self.max_distance, "time_buckets": self.time_buckets}
        return ", ".join([f"heads={self.heads}", *(f"{k}={v}" for k, v in sizes.items() if v is not None)])


def _from_end(x: Jagged) -> Tensor:
    """Position of each token relative to its segment's end ``[T]``: −n_s to −1."""
    return torch.arange(x.values.shape[0], device=x.device) - _ends(x)


def _ends(x: Jagged) -> Tensor:
    """End offset of each token's segment ``[T]``."""
    # Index all S+1 offsets: a slice of size S would specialize the graph on S = 1.
    return x.offsets[(x.segment_ids + 1).clamp(max=x.num_segments)]


def next_times(times: Jagged) -> Jagged:
    """Time of each token's successor, and of the token itself at a segment's end.

    HSTU evaluates each query at this time: pass the result as `times`, the tokens' own times as `kv_times`.

    >>> next_times(Jagged.from_lengths(torch.tensor([1, 4, 9, 2, 5]), [3, 2])).values.tolist()
    [4, 9, 9, 5, 5]
    """
    check_jagged(times, "times")
    after = torch.arange(1, times.values.shape[0] + 1, device=times.device)
    return times.with_values(times.values[torch.minimum(after, _ends(times) - 1)])
