"""Score nodes: functions applied to ``scale * q·k`` before the normalizer, composed left to right by ``>>``.

Positions are segment-local. A score may hold tensors that need gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flexjag.algebra.node import Align, Node, along, check_align, check_tensor, node
from flexjag.algebra.tree import head_counts, held_tensors, walk
from flexjag.errors import ScoreError, explain_values
from flexjag.offsets import as_int, can_look

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Score(Node):
    """Base class of every score node.

    Attributes:
        additive: The node adds a term that does not depend on the score: it is a bias.
    """

    additive: ClassVar[bool] = False

    def __rshift__(self, other: object) -> Score:
        if not isinstance(other, Score):
            raise ScoreError(explain_values("score", "both sides of >> must be scores", other=type(other).__name__))
        return Then(self, other)


@node
class ScoreMod(Score):
    """A function in FlexAttention's own signature, ``fn(score, b, h, q_pos, kv_pos) -> score``.

    Positions are segment-local and `b` is the segment. Tensors that `fn` closes over get gradients.
    Positions are clamped into the segment, so a lookup by position never reads out of bounds.
    """

    fn: ScoreFunction

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ScoreError(explain_values("fn", "must be callable as fn(score, b, h, q_pos, kv_pos)", fn=self.fn))


@node
class Alibi(Score):
    """Attention with linear biases: ``s + slopes[h] * (j - i)`` (arXiv 2108.12409).

    Args:
        slopes: ``[H]`` floating point, may need gradients.
        symmetric: ``s - slopes[h] * |j - i|`` instead, for models that also attend later keys.
        align: ``"end"`` counts i so that the last query is on the last key, ``j - (i + m - n)``: a decoding step then
            equals the last rows of the whole.

    >>> Alibi.from_heads(4).slopes.tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    additive = by_position = printable = True
    reads_pairs = False

    slopes: Tensor = along("query head")
    symmetric: bool = False
    align: Align = "start"

    def __post_init__(self) -> None:
        check_align(ScoreError, self.align)
        super().__post_init__()
        check_tensor(ScoreError, "slopes", self.slopes, "; for the paper's slopes call Alibi.from_heads(H)")
        if self.slopes.ndim != 1 or not self.slopes.dtype.is_floating_point:
            raise ScoreError(
                explain_values(
                    "slopes", "must be a 1-D float tensor [H]", shape=tuple(self.slopes.shape), dtype=self.slopes.dtype
                )
            )

    @staticmethod
    def from_heads(num_heads: int, device: torch.device | str | None = None) -> Alibi:
        """The paper's geometric slopes ``2**(-8 (h + 1) / H)``."""
        num_heads = as_int(num_heads)
        if not isinstance(num_heads, int) or num_heads < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScoreError(explain_values("num_heads", "must be an int of at least 1", num_heads=num_heads))
        exponent = torch.arange(1, num_heads + 1, dtype=torch.float32, device=device) * (-8.0 / num_heads)
        return Alibi(torch.exp2(exponent))


@node
class SoftCap(Score):
    """Keep scores in ``(-cap, cap)``: ``cap * tanh(s / cap)`` (Gemma 2, arXiv 2408.00118).

    Args:
        cap: A positive float.
    """

    printable = True
    reads_pairs = False

    cap: float

    def __post_init__(self) -> None:
        number = isinstance(self.cap, int | float)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not number or not 0 < self.cap < float("inf"):
            raise ScoreError(explain_values("cap", "must be a positive number", cap=self.cap))


@node
class RelativeBias(Score):
    """A bias looked up by clipped distance: ``s + table[h, clip(j - i, -R, R) + R]``.

    Args:
        table: ``[H, 2R + 1]`` floating point, may need gradients.
        align: As in :class:`Alibi`.
    """

    additive = by_position = printable = True

    table: Tensor = along("query head")
    align: Align = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_align(ScoreError, self.align)
        check_tensor(ScoreError, "table", self.table)
        if self.table.ndim != 2 or self.table.shape[1] % 2 != 1 or not self.table.dtype.is_floating_point:
            raise ScoreError(
                explain_values(
                    "table",
                    "must be float [H, 2R + 1], an odd width",
                    shape=tuple(self.table.shape),
                    dtype=self.table.dtype,
                )
            )

    @property
    def max_distance(self) -> int:
        """R, the distance from which on the bias is constant."""
        return self.table.shape[1] // 2


@node
class BucketedBias(Score):
    """A bias looked up by bucketed distance: ``s + table[h, number of boundaries <= j - i]``.

    Args:
        table: ``[H, K + 1]`` floating point, may need gradients.
        boundaries: ``[K]``, ascending, of any dtype; distances are compared in it. Repeated ones skip a bucket.
        align: As in :class:`Alibi`.

    >>> BucketedBias(torch.zeros(2, 4), torch.tensor([-8, 0, 8]))
    BucketedBias(<float32[2, 4]>, <int64[3]>)
    """

    additive = by_position = printable = True

    table: Tensor = along("query head")
    boundaries: Tensor = along(None)
    align: Align = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_align(ScoreError, self.align)
        _check_buckets(self.table, self.boundaries)


@node
class T5Bias(Score):
    """T5's relative bias: ``s + table[h, bucket(j - i)]`` (arXiv 1910.10683).

    Half of the buckets hold a distance each, the others more and more of them, up to `max_distance`; farther keys share
    the last one. The buckets are those of ``transformers``.

    Args:
        table: ``[H, K]`` floating point, may need gradients: the transpose of ``relative_attention_bias.weight``.
        bidirectional: Later keys have buckets of their own, the second half, as in encoders; else they share bucket 0
            with the query's own position, as in decoders.
        max_distance: The distance from which on the bias is constant.
        align: As in :class:`Alibi`.
        buckets: ``[2 * max_distance + 1]`` int32, the bucket of each distance from ``-max_distance`` on. Made from the
            other arguments if None.

    >>> T5Bias(torch.zeros(2, 8), max_distance=9).buckets.tolist()
    [3, 3, 3, 3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7, 7, 7, 7]
    """

    additive = by_position = printable = True

    table: Tensor = along("query head")
    bidirectional: bool = True
    max_distance: int = 128
    align: Align = "start"
    buckets: Tensor = along(None, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(ScoreError, "table", self.table)
        check_align(ScoreError, self.align)
        if self.table.ndim != 2 or not self.table.dtype.is_floating_point:
            seen = {"shape": tuple(self.table.shape), "dtype": self.table.dtype}
            raise ScoreError(explain_values("table", "must be float [H, K]", **seen))
        if self.buckets is None:  # pyright: ignore[reportUnnecessaryComparison]
            buckets = t5_buckets(self.table.shape[1], self.bidirectional, self.max_distance, self.table.device)
            object.__setattr__(self, "buckets", buckets)
        elif self.buckets.shape != (2 * self.max_distance + 1,) or self.buckets.dtype != torch.int32:
            seen = {"shape": tuple(self.buckets.shape), "dtype": self.buckets.dtype, "max_distance": self.max_distance}
            raise ScoreError(explain_values("buckets", "must be int32 [2 * max_distance + 1]", **seen))


def t5_buckets(count: int, bidirectional: bool, max_distance: int, device: torch.device | str | None = None) -> Tensor:
    """The bucket of each distance ``j - i`` from ``-max_distance`` to ``max_distance``, int32, of `count` in all.

    Raises:
        ScoreError: If there are too few buckets, or `max_distance` is not beyond those of a single distance.
    """
    sides = 2 if bidirectional else 1
    each = count // sides
    exact = each // 2
    if count % sides or exact < 1 or not isinstance(max_distance, int) or max_distance <= exact:  # pyright: ignore[reportUnnecessaryIsInstance]
        rule = (
            "needs 2 buckets at least, an even number of 4 if bidirectional, and a max_distance beyond half of a side"
        )
        seen = {"buckets": count, "bidirectional": bidirectional, "max_distance": max_distance}
        raise ScoreError(explain_values("table", rule, **seen))
    distance = torch.arange(-max_distance, max_distance + 1)
    back = distance.abs() if bidirectional else distance.clamp(max=0).neg()
    # In float32, operation by operation as the models are trained: a boundary may hang on the rounding.
    steps = torch.log(back.float() / exact) / math.log(max_distance / exact) * (each - exact)
    far = (exact + steps.clamp(min=0).long()).clamp(max=each - 1)
    bucket = torch.where(back < exact, back, far)
    if bidirectional:
        bucket = bucket + (distance > 0) * each
    return bucket.to(device=device, dtype=torch.int32)


@node
class TimeBias(Score):
    """A bias looked up by bucketed time between tokens: ``s + table[h, number of boundaries <= t_i - t_j]``.

    HSTU (generative-recommenders) measures from the *next* event's time, so that a prediction knows when it is asked
    for: give those as `times`, and the events' own as `kv_times`.

    Args:
        table: ``[H, K + 1]`` floating point, may need gradients. Expand a table that all heads share.
        times: ``[T_q]``, the time of every packed query token, in the unit of `boundaries`.
        boundaries: ``[K]``, ascending, for instance :meth:`log_boundaries`. Differences are compared in its dtype.
        kv_times: ``[T_kv]``, of every packed key token. Default: `times`.

    >>> TimeBias(torch.zeros(2, 9), torch.arange(6), TimeBias.log_boundaries(8))
    TimeBias(<float32[2, 9]>, <int64[6]>, <int64[8]>, None)
    """

    additive = printable = True

    table: Tensor = along("query head")
    times: Tensor = along("query token")
    boundaries: Tensor = along(None)
    kv_times: Tensor | None = along("key token", default=None, in_place_of_none="times")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_buckets(self.table, self.boundaries)
        for name, times in (("times", self.times), ("kv_times", self.kv_times)):
            if times is None:
                continue
            check_tensor(ScoreError, name, times)
            if times.ndim != 1 or times.requires_grad:
                rule = "must be 1-D, one per packed token, without a gradient"
                raise ScoreError(explain_values(name, rule, shape=tuple(times.shape), dtype=times.dtype))

    @staticmethod
    def log_boundaries(count: int, width: float = 0.301, device: torch.device | str | None = None) -> Tensor:
        """``[count]`` int64: the whole numbers from which on ``floor(log(t) / width)`` is at least 1, 2, ...

        >>> TimeBias.log_boundaries(6).tolist()
        [2, 2, 3, 4, 5, 7]
        """
        most = math.floor(62 * math.log(2) / width) if width > 0 else -1
        if not 0 <= count <= most:
            rule = f"must be 0 to {most} at this width, for int64" if width > 0 else "width must be positive"
            raise ScoreError(explain_values("count", rule, count=count, width=width))
        # Rounded down by a hair: exp(k log 2) must not pass 2**k by a rounding error.
        ends = [math.ceil(math.exp(k * width) * (1 - 2**-40)) for k in range(1, count + 1)]
        return torch.tensor(ends, dtype=torch.int64, device="cpu" if device is None else device)


@node
class DenseBias(Score):
    """A bias given for each (query, key) pair: ``s + values[h, pair]``.

    Args:
        values: Floating point, may need gradients: ``[H or 1, sum n_s * m_s]``, every segment's own row-major matrix
            back to back, which :meth:`from_list` makes; or ``[H or 1, N, M]``, shared by every segment and indexed by
            local positions, with N and M at least the longest segment's. A first dimension of 1 serves all heads.

    >>> DenseBias(torch.zeros(8, 1, 512).expand(8, 512, 512))
    DenseBias(<float32[8, 512, 512]>)
    """

    additive = by_position = printable = True

    values: Tensor = along("pair", per_head=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(ScoreError, "values", self.values)
        if self.values.ndim not in (2, 3) or self.values.shape[0] == 0 or not self.values.dtype.is_floating_point:
            rule = "must be float, packed [H or 1, sum n_s * m_s], or [H or 1, N, M] for all segments"
            seen = {"shape": tuple(self.values.shape), "dtype": self.values.dtype}
            raise ScoreError(explain_values("values", rule, **seen))

    @property
    def is_packed(self) -> bool:
        """True if every segment has a matrix of its own."""
        return self.values.ndim == 2

    @staticmethod
    def from_list(matrices: Sequence[Tensor]) -> DenseBias:
        """One matrix ``[n_s, m_s]`` or ``[H or 1, n_s, m_s]`` per segment.

        Raises:
            ScoreError: If there is none, one is no such matrix, or they differ in heads.

        >>> DenseBias.from_list([torch.zeros(4, 2, 2), torch.zeros(4, 1, 3)])
        DenseBias(<float32[4, 7]>)
        """
        if not matrices:
            raise ScoreError(explain_values("matrices", "must be one per segment, and at least one", matrices=0))
        shapes = [tuple(x.shape) for x in matrices]
        if any(len(x) not in (2, 3) for x in shapes) or len({x[:-2] for x in shapes}) > 1:
            rule = "must all be [n_s, m_s], or all be [H or 1, n_s, m_s] of the same first dimension"
            raise ScoreError(explain_values("matrices", rule, shapes=shapes))
        return DenseBias(torch.cat([x.reshape(*(x.shape[:-2] or (1,)), -1) for x in matrices], 1))


def _check_buckets(table: Tensor, boundaries: Tensor) -> None:
    check_tensor(ScoreError, "table", table)
    check_tensor(ScoreError, "boundaries", boundaries)
    fits = table.ndim == 2 and boundaries.ndim == 1 and table.shape[1] == boundaries.shape[0] + 1
    if not fits or not table.dtype.is_floating_point or boundaries.requires_grad:
        rule = "table must be float [H, K + 1] for K boundaries [K]"
        shapes = {"table": tuple(table.shape), "boundaries": tuple(boundaries.shape), "dtype": table.dtype}
        raise ScoreError(explain_values("table, boundaries", rule, **shapes))
    if can_look(boundaries) and bool((boundaries[1:] < boundaries[:-1]).any()):
        raise ScoreError(explain_values("boundaries", "must be ascending", boundaries=boundaries))


@node
class Then(Score):
    """`first`, then `second`: ``first >> second``."""

    additive = by_position = printable = True
    reads_pairs = False

    first: Score
    second: Score

    def __repr__(self) -> str:
        return f"{self.first!r} >> {self.second!r}"


def parts(score: Score | None) -> list[Score]:
    """The chain of scores, in the order they are applied."""
    if score is None:
        return []
    if isinstance(score, Then):
        return parts(score.first) + parts(score.second)
    return [score]


def is_additive(score: Score | None) -> bool:
    """True if the score is a bias: a sum of ``s`` and terms that do not depend on ``s``."""
    return all(isinstance(one, Score) and one.additive for one in walk(score))


def num_score_heads(score: Score | None) -> int | None:
    """Number of query heads of the score's tables; None if no table is per head.

    Raises:
        ScoreError: If two of them disagree.
    """
    found = head_counts(score)
    if len(found) > 1:
        raise ScoreError(explain_values("score", "every table must have one row per query head", heads=sorted(found)))
    return found.pop() if found else None


def tensors(score: Score | None) -> list[Tensor]:
    """Tensors in the fields of the score's nodes; without those captured by a :class:`ScoreMod`."""
    return held_tensors(score)
