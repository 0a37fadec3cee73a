"""Rotary positions of jagged batches (RoPE, arXiv 2104.09864), counted from each segment's first token."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from flexjag.errors import LayoutError, PositionError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import as_int, can_look, index_tensor, mark_varying, same_size
from flexjag.upstream import fence

EXACT = 2**24  # float32 holds whole numbers up to here


@dataclass(frozen=True)
class Scaling(ABC):
    """Base class of the ways in which a model trained on short segments reads long ones.

    Args:
        factor: By how much longer, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _check(_is_number(self.factor) and self.factor >= 1, "factor", "must be at least 1", self.factor)

    @abstractmethod
    def frequencies(self, theta: float, dim: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """Angle in radians per position of each pair of dimensions, ``[dim / 2]``, or ``[T, dim / 2]`` per token.

        Args:
            theta: The base.
            dim: Number of dimensions that are rotated.
            lengths: ``[T]``, each token's number of positions: the length of its segment, plus where it starts.
            dtype: Dtype of the frequencies.
        """

    @property
    def magnitude(self) -> float:
        """What q and k are multiplied by as well."""
        return 1.0


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (arXiv 2306.15595): all angles are divided by `factor`.

    >>> Linear(4.0)
    Linear(factor=4.0)
    """

    def frequencies(self, theta: float, dim: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """As in :class:`Scaling`."""
        return _frequencies(theta, dim, lengths.device, dtype) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling: `theta` grows, so that the slowest pair turns `factor` times more slowly, the fastest as ever.

    Args:
        factor: As in :class:`Scaling`.
        original_length: If given, the scaling is dynamic: segments of up to so many tokens are read as they are,
            longer ones of n tokens with ``factor * n / original_length - (factor - 1)`` in place of `factor`. Each by
            its own length, whatever else is in the batch.

    >>> NTK(8.0)
    NTK(factor=8.0, original_length=None)
    """

    original_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_length is not None:
            _check_length(self.original_length)

    def frequencies(self, theta: float, dim: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """As in :class:`Scaling`."""
        if dim < 4:
            raise PositionError(explain_values("rotary_dim", "must be at least 4 per axis for NTK", rotary_dim=dim))
        power = dim / (dim - 2)
        if self.original_length is None:
            return _frequencies(theta * self.factor**power, dim, lengths.device, dtype)
        longer = (lengths.to(dtype) / self.original_length).clamp(min=1.0)
        grown = theta * (self.factor * longer - (self.factor - 1.0)) ** power
        return _frequencies(grown[:, None], dim, lengths.device, dtype)


@dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN (arXiv 2309.00071): fast pairs stay, slow ones are interpolated, those between in part.

    Args:
        factor: As in :class:`Scaling`.
        original_length: Positions that the model was trained on.
        fast: Pairs that turn more often than this over `original_length` stay as they are.
        slow: Pairs that turn less often are interpolated.
        attention_factor: What q and k are multiplied by. Default: ``0.1 * log(factor) + 1``, the paper's, or as
            `magnitudes` say.
        magnitudes: ``(mscale, mscale_all_dim)`` as DeepSeek's configurations have them: the multiplier is
            ``(0.1 * mscale * log(factor) + 1) / (0.1 * mscale_all_dim * log(factor) + 1)``.
        truncate: Whether the range of pairs that are interpolated in part is rounded outwards to whole pairs.

    >>> round(YaRN(4.0, 4096).magnitude, 4)
    1.1386
    """

    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    magnitudes: tuple[float, float] | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self.original_length)
        _check(self.fast > self.slow > 0, "fast, slow", "must be positive, fast the larger", (self.fast, self.slow))
        given = self.attention_factor
        _check(given is None or given > 0, "attention_factor", "must be positive", given)

    @property
    def magnitude(self) -> float:
        """As in :class:`Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        above, below = (1.0, 0.0) if self.magnitudes is None else self.magnitudes
        return (0.1 * above * math.log(self.factor) + 1.0) / (0.1 * below * math.log(self.factor) + 1.0)

    def frequencies(self, theta: float, dim: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """As in :class:`Scaling`."""
        # The pair, as a real number, that turns so many times over the original length.
        first, last = (
            dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first if last != first else 0.001  # a step, where both are one pair
        pair = torch.arange(dim // 2, device=lengths.device, dtype=dtype)
        kept = 1 - ((pair - first) / width).clamp(0, 1)
        return _blend(_frequencies(theta, dim, lengths.device, dtype), kept, self.factor)


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's scaling: by wavelength against the original length, with a smooth passage.

    Args:
        factor: As in :class:`Scaling`.
        original_length: Positions that the model was trained on.
        slow: Pairs that turn less often than this over `original_length` are interpolated (``low_freq_factor``).
        fast: Pairs that turn more often stay as they are (``high_freq_factor``).

    >>> Llama3(8.0, 8192)
    Llama3(factor=8.0, original_length=8192, slow=1.0, fast=4.0)
    """

    original_length: int
    slow: float = 1.0
    fast: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_length(self.original_length)
        _check(self.fast > self.slow > 0, "slow, fast", "must be positive, fast the larger", (self.slow, self.fast))

    def frequencies(self, theta: float, dim: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """As in :class:`Scaling`."""
        plain = _frequencies(theta, dim, lengths.device, dtype)
        turns = self.original_length / (2 * math.pi / plain)
        return _blend(plain, ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1), self.factor)


def _frequencies(theta: float | Tensor, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``theta ** (-2 i / dim)`` of the pairs i, rounded as the libraries do that models were trained with."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def _blend(plain: Tensor, kept: Tensor, factor: float) -> Tensor:
    """The part `kept` of the frequencies as they are, the rest of them divided by `factor`."""
    return plain / factor * (1 - kept) + plain * kept


@overload
def rope(
    q: Jagged,
    k: None = None,
    theta: float = ...,
    scaling: Scaling | None = ...,
    positions: Tensor | None = ...,
    interleaved: bool = ...,
    *,
    rotary_dim: int | None = ...,
    starts: int | Tensor = ...,
) -> Jagged: ...


@overload
def rope(
    q: Jagged,
    k: Jagged,
    theta: float = ...,
    scaling: Scaling | None = ...,
    positions: Tensor | None = ...,
    interleaved: bool = ...,
    *,
    rotary_dim: int | None = ...,
    starts: int | Tensor = ...,
) -> tuple[Jagged, Jagged]: ...


def rope(
    q: Jagged,
    k: Jagged | None = None,
    theta: float = 10000.0,
    scaling: Scaling | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    *,
    rotary_dim: int | None = None,
    starts: int | Tensor = 0,
) -> Jagged | tuple[Jagged, Jagged]:
    """Rotate pairs of dimensions by the token's position in its segment (RoPE, arXiv 2104.09864).

    Angles are computed in float32 (float64 for float64 inputs), the rotation too, and the result is rounded once.

    Args:
        q: ``[T, H, D]`` floating point, or any ``[T, ..., D]``.
        k: ``[T, G, D]`` on the same tokens. Keys of other offsets take a call of their own.
        theta: The base: pair i turns by ``theta ** (-2 i / rotary_dim)`` radians per position.
        scaling: For longer segments than the model was trained on: :class:`Linear`, :class:`NTK`, :class:`YaRN` or
            :class:`Llama3` of ``flexjag.positions``.
        positions: ``[T]`` numbers (also NumPy's), in place of the positions in the segment; or ``[T, A]``, one for each
            of A axes (rows and columns of an image): the rotated dimensions are cut into A equal parts, and each is
            rotated by its own axis, as a whole of ``rotary_dim / A`` dimensions would be.
        interleaved: Pairs are neighbours, ``(0, 1), (2, 3), ...`` (GPT-J), instead of halves, ``(i, i + R / 2)``
            (NeoX, Llama and transformers).
        rotary_dim: R, the number of leading dimensions that are rotated, even per axis. Default: all D.
        starts: Position of each segment's first token, int or ``[S]``: how many tokens a decoding step has behind it.

    Returns:
        q, or q and k if k is given, rotated, in their dtypes.

    Raises:
        ShapeError: If dimensions, dtypes or numbers of entries do not match.
        LayoutError: If q and k have different numbers of tokens or segments.
        PositionError: If a parameter is out of its range; on a CPU outside of graphs also if a position is negative or
            above 2**24, up to where float32 holds them exactly.

    >>> x = Jagged.from_lengths(torch.ones(5, 1, 2), [2, 3])
    >>> rope(x).values[:, 0, 0]  # the cosine minus the sine of the position
    tensor([ 1.0000, -0.3012,  1.0000, -0.3012, -1.3254])
    """
    both = (q,) if k is None else (q, k)
    dim = _check_inputs(both, rotary_dim)
    if not (scaling is None or isinstance(scaling, Scaling)):
        rule = "must be None or one of flexjag.positions, such as flexjag.positions.Linear(factor)"
        raise PositionError(explain_values("scaling", rule, scaling=scaling))
    positions, starts = index_tensor(positions), index_tensor(as_int(starts))
    dtype = torch.promote_types(q.dtype if k is None else torch.promote_types(q.dtype, k.dtype), torch.float32)
    _check(_is_number(theta) and theta > 0, "theta", "must be a positive number", theta)
    at, lengths = _positions(q, positions, starts, scaling, dtype)
    axes = at.shape[1]
    if dim % (2 * axes):
        rule = f"must be a multiple of {2 * axes}: of 2 for each of the {axes} axes of positions"
        raise ShapeError(explain_values("rotary_dim", rule, rotary_dim=dim))
    per_axis = dim // axes
    if scaling is None:
        frequencies = _frequencies(theta, per_axis, at.device, dtype)
    else:
        frequencies = scaling.frequencies(float(theta), per_axis, lengths, dtype)
    angles = at[:, :, None] * frequencies.reshape(-1, 1, per_axis // 2)  # [T, A, R / 2A]
    magnitude = 1.0 if scaling is None else scaling.magnitude
    table = torch.stack((angles.cos(), angles.sin())) * magnitude
    # Inductor would otherwise fuse them into the rotation, and compute them anew for each head.
    cos, sin = (table if table.requires_grad else fence(table)).unbind(0)
    turned = [x.with_values(_rotated(x.values, cos, sin, dim, interleaved)) for x in both]
    return turned[0] if k is None else (turned[0], turned[1])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, dim: int, interleaved: bool) -> Tensor:
    """Rotate the first `dim` dimensions of ``x [T, ..., D]`` by angles whose cosines are ``cos [T, A, R / 2A]``."""
    axes, pairs = cos.shape[1:]
    ones = [1] * (x.ndim - 2)
    cos, sin = (t.reshape(-1, *ones, axes, pairs) for t in (cos, sin))
    shape = (axes, pairs, 2) if interleaved else (axes, 2, pairs)
    where = -1 if interleaved else -2
    a, b = x[..., :dim].to(cos.dtype).unflatten(-1, shape).unbind(where)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), where).flatten(-3).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), -1)


def _positions(
    x: Jagged, positions: Tensor | None, starts: int | Tensor, scaling: Scaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Positions ``[T, A]`` in `dtype`, and for each token the number of positions in its segment ``[T]``."""
    tokens, by_length = x.values.shape[0], isinstance(scaling, NTK) and scaling.original_length is not None
    if positions is not None:
        _check_positions(positions, x)
        if by_length:
            rule = "dynamic NTK goes by the lengths of segments, not by given positions"
            raise PositionError(explain_values("positions", rule, scaling=scaling))
        if isinstance(starts, Tensor) or starts != 0:
            raise PositionError(explain_values("starts", "must not be given beside positions", starts=starts))
        mark_varying(positions, 0)
        return positions.to(dtype).reshape(tokens, -1), x.offsets
    segment, offsets = x.segment_ids, x.offsets.long()
    at = torch.arange(tokens, device=x.device) - offsets[segment]
    first: int | Tensor = starts
    if isinstance(starts, Tensor):
        _check_starts(starts, x)
        mark_varying(starts, 0)
        first = torch.cat([starts.long(), starts.new_zeros(1, dtype=torch.int64)])[segment]
    else:
        rule = f"must be an int of 0 to {EXACT}, or an integer tensor or array [S] of such"
        _check(isinstance(starts, int) and 0 <= starts <= EXACT, "starts", rule, starts)
    lengths = at
    if by_length:
        lengths = offsets[(segment + 1).clamp(max=x.num_segments)] - offsets[segment] + first  # spare rows: 0
    return (at + first).to(dtype)[:, None], lengths


def _check_inputs(both: tuple[Jagged, ...], rotary_dim: int | None) -> int:
    for name, x in zip("qk", both, strict=False):
        if not isinstance(x, Jagged):
            raise ShapeError(explain_values(name, "must be a flexjag.Jagged", type=type(x).__name__))
        if x.values.ndim < 2 or not x.dtype.is_floating_point:
            seen = {"shape": tuple(x.values.shape), "dtype": x.dtype}
            raise ShapeError(explain_values(name, "must be floating point [T, ..., D]", **seen))
        if not same_size(x.values.shape[0], both[0].values.shape[0]) or x.num_segments != both[0].num_segments:
            rule = "must be on the tokens of q; rotate keys of other offsets by a call of their own"
            raise LayoutError(explain_values(name, rule, q=both[0], k=x))
    q, k = both[0], both[-1]
    if k.offsets is not q.offsets and can_look(q.offsets, k.offsets) and not torch.equal(q.offsets, k.offsets):
        rule = "must have the offsets of q; rotate keys of other offsets by a call of their own"
        raise LayoutError(explain_values("k", rule, q=q.offsets, k=k.offsets))
    least = min(x.values.shape[-1] for x in both)
    dim = least if rotary_dim is None else rotary_dim
    differ = rotary_dim is None and q.values.shape[-1] != k.values.shape[-1]
    if not isinstance(dim, int) or differ or dim < 2 or dim % 2 or dim > least:
        seen = {"rotary_dim": rotary_dim, **{name: tuple(x.values.shape) for name, x in zip("qk", both, strict=False)}}
        raise ShapeError(
            explain_values("rotary_dim", "must be even, at least 2 and at most D, all D by default", **seen)
        )
    return dim


def _check_positions(positions: Tensor, x: Jagged) -> None:
    fits = isinstance(positions, Tensor) and positions.ndim in (1, 2) and positions.dtype != torch.bool
    if not fits or positions.dtype.is_complex or not same_size(positions.shape[0], x.values.shape[0]):
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else positions
        seen = {"positions": shape, "tokens": x.values.shape[0]}
        rule = "must be a tensor or array of numbers [T], or [T, A] for A axes"
        raise ShapeError(explain_values("positions", rule, **seen))
    if positions.device != x.device:
        seen = {"positions": str(positions.device), "q": str(x.device)}
        raise ShapeError(explain_values("positions", "must be on the batch's device", **seen))
    if positions.ndim == 2 and positions.shape[1] == 0:
        raise ShapeError(explain_values("positions", "must have an axis", positions=tuple(positions.shape)))
    _check_range("positions", positions)


def _check_starts(starts: Tensor, x: Jagged) -> None:
    whole = not (starts.dtype.is_floating_point or starts.dtype.is_complex or starts.dtype == torch.bool)
    if starts.ndim != 1 or not whole or not same_size(starts.shape[0], x.num_segments) or starts.device != x.device:
        seen = {"shape": tuple(starts.shape), "segments": x.num_segments, "dtype": starts.dtype}
        rule = "must be an int, or integers [S] on the batch's device"
        raise ShapeError(explain_values("starts", rule, **seen, device=str(starts.device)))
    _check_range("starts", starts)


def _check_range(name: str, given: Tensor) -> None:
    if can_look(given) and given.numel():
        wide = given.detach().to(torch.float64)  # also unsigned types, which have no minimum of their own
        least, most = float(wide.min()), float(wide.max())
        if not (least >= 0 and most <= EXACT):  # NaN is neither
            raise PositionError(explain_values(name, f"must be 0 to {EXACT}", least=least, most=most))


def _check_length(length: int) -> None:
    _check(isinstance(length, int) and length >= 1, "original_length", "must be an int of at least 1", length)


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _check(holds: bool, name: str, rule: str, given: object) -> None:
    if not holds:
        raise PositionError(explain_values(name, rule, **{name.split(",")[0]: given}))
