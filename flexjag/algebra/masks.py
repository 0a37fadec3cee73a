"""Mask nodes: which key positions a query position may attend, inside its own segment.

Positions are segment-local: i of n queries, j of m keys. Isolation between segments is not a node: it is
always on. Nodes are frozen, hold no lengths, and combine with ``&``, ``|`` and ``~``. A bound may be an int
or a per-segment integer tensor ``[S]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexjag.algebra.node import Align, Node, along, check_align, check_tensor, is_integer, node, saturated
from flexjag.algebra.tree import head_counts, rebuilt, walk
from flexjag.errors import AmbiguousMaskError, MaskError, explain_values
from flexjag.upstream import holds_no_numbers, mend_dynamo_invert

mend_dynamo_invert()  # for ``~mask`` in functions that are compiled

Bound = int | Tensor
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Mask(Node):
    """Base class of every mask node. Subclass it and register its cases to add a node of your own."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, _check_mask(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _check_mask(other, "|"))

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise AmbiguousMaskError(
            explain_values(
                "mask", "has no truth value; combine masks with &, | and ~ instead of and, or and not", mask=self
            )
        )


def _check_mask(other: object, operator: str) -> Mask:
    if not isinstance(other, Mask):
        raise MaskError(explain_values("mask", f"both sides of {operator} must be masks", other=type(other).__name__))
    return other


def _check_bound(name: str, value: object, minimum: int | None) -> None:
    if isinstance(value, Tensor):
        if value.ndim != 1 or not is_integer(value):
            seen = {"shape": tuple(value.shape), "dtype": value.dtype}
            raise MaskError(explain_values(name, "a per-segment bound must be a 1-D integer tensor [S]", **seen))
        if minimum is not None and value.shape[0] and value.device.type == "cpu" and not holds_no_numbers(value):
            least = int(saturated(value).min())
            if least < minimum:
                raise MaskError(explain_values(name, f"must be at least {minimum} everywhere", least=least))
    elif not isinstance(value, int) or isinstance(value, bool):
        raise MaskError(explain_values(name, "must be an int or a per-segment integer tensor", value=value))
    elif minimum is not None and value < minimum:
        raise MaskError(explain_values(name, f"must be at least {minimum}", value=value))


@node
class Full(Mask):
    """Every key of the own segment.

    >>> Full()
    Full()
    """

    by_position = printable = True
    reads_pairs = False


@node
class Causal(Mask):
    """Key j for query i when ``j <= i``; with ``align="end"`` when ``j <= i + m - n``.

    Args:
        align: ``"start"`` counts positions from the segment's start; ``"end"`` lines up the last query
            with the last key, which varlen kernels call bottom-right.

    >>> Causal() & (Window(256, 0) | Prefix(4))
    Causal() & (Window(256, 0) | Prefix(4))
    """

    by_position = printable = True
    reads_pairs = False

    align: Align = "start"

    def __post_init__(self) -> None:
        check_align(MaskError, self.align)


@node
class Window(Mask):
    """Key j for query i when ``i - left <= j <= i + right``.

    A negative bound shifts the window past the query itself: ``Window(8, -1)`` is the 8 keys before it. Where bounds
    per segment add up to less than 0, the queries of that segment have no key, and zeros as their result.

    Args:
        left: How far back, int or ``[S]``; None is unlimited.
        right: How far ahead, int or ``[S]``; None is unlimited. Default 0: a sliding window looks back.
        align: As in :class:`Causal`.

    Raises:
        MaskError: If two ints leave no key in any row (unlimited is None, not -1).
    """

    by_position = printable = True
    reads_pairs = False

    left: Bound | None = along("segment")
    right: Bound | None = along("segment", default=0)
    align: Align = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _check_bound(name, getattr(self, name), None)
        if isinstance(self.left, int) and isinstance(self.right, int) and self.left < -self.right:
            rule = "must leave a key: left + right is at least 0; unlimited is None, not -1"
            raise MaskError(explain_values("left, right", rule, left=self.left, right=self.right))
        check_align(MaskError, self.align)


@node
class Prefix(Mask):
    """The first n keys: ``j < n``.

    Prefix-LM is ``Causal() | Prefix(n)``; attention sinks are ``Causal() & (Window(w, 0) | Prefix(4))``.

    Args:
        n: int or ``[S]``.
    """

    by_position = printable = True
    reads_pairs = False

    n: Bound = along("segment")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bound("n", self.n, 0)


@node
class Chunked(Mask):
    """Keys of the same chunk: ``i // size == j // size``.

    Args:
        size: Chunk length, int or ``[S]``, at least 1.
        align: As in :class:`Causal`: ``"end"`` puts query i at ``i + m - n``, and chunks begin with the keys.
    """

    by_position = printable = True
    reads_pairs = False

    size: Bound = along("segment")
    align: Align = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bound("size", self.size, 1)
        check_align(MaskError, self.align)


@node
class GlobalTokens(Mask):
    """The first n tokens attend and are attended by everything: ``i < n or j < n`` (Longformer, arXiv 2004.05150).

    Args:
        n: int or ``[S]``.
    """

    by_position = printable = True
    reads_pairs = False

    n: Bound = along("segment")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bound("n", self.n, 0)


@node
class Rows(Mask):
    """Explicit spans: j for packed query row i when ``lo[k, i] <= j < hi[k, i]`` for some k.

    Args:
        lo: ``[K, T_q]`` or ``[T_q]`` integers, segment-local, inclusive. Out of range is clipped.
        hi: The same shape, exclusive.
    """

    printable = True
    reads_pairs = False

    lo: Tensor = along("query token")
    hi: Tensor = along("query token")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(MaskError, "lo", self.lo)
        check_tensor(MaskError, "hi", self.hi)
        floating = not all(is_integer(x) for x in (self.lo, self.hi))
        if (
            self.lo.shape != self.hi.shape
            or self.lo.ndim not in (1, 2)
            or floating
            or self.lo.shape[0] == 0 < self.lo.ndim - 1
        ):
            raise MaskError(
                explain_values(
                    "lo, hi",
                    "must be integer tensors of one shape, [T_q] or [K, T_q]",
                    lo=tuple(self.lo.shape),
                    hi=tuple(self.hi.shape),
                    dtype=self.lo.dtype,
                )
            )


@node
class SameGroup(Mask):
    """Keys whose id equals the query's: a document inside a segment, a round, a window, a bucket.

    Args:
        ids: ``[T_q]`` integers (or bools) per packed query token.
        kv_ids: ``[T_kv]`` per packed key token, when keys are not the queries' tokens.
    """

    printable = True
    reads_pairs = False

    ids: Tensor = along("query token")
    kv_ids: Tensor | None = along("key token", default=None, in_place_of_none="ids")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ids in (("ids", self.ids), ("kv_ids", self.kv_ids)):
            if ids is None:
                continue
            check_tensor(MaskError, name, ids)
            if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex:
                raise MaskError(
                    explain_values(
                        name, "must be a 1-D integer or bool tensor", shape=tuple(ids.shape), dtype=ids.dtype
                    )
                )
        if self.kv_ids is not None and (self.ids.dtype == torch.uint64) != (self.kv_ids.dtype == torch.uint64):
            rule = "must both be uint64 or neither, as no integer type holds the values of both"
            raise MaskError(explain_values("ids, kv_ids", rule, ids=self.ids.dtype, kv_ids=self.kv_ids.dtype))


@node
class Dense(Mask):
    """The given boolean matrix says so.

    Args:
        values: ``[N, M]`` bool, shared by every segment and indexed by local positions (positions
            outside the matrix are not allowed); or ``[sum n_s * m_s]`` bool, every segment's own
            row-major matrix back to back. :meth:`from_list` makes the second.
    """

    printable = True

    values: Tensor = along("pair")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor(MaskError, "values", self.values)
        if self.values.dtype != torch.bool or self.values.ndim not in (1, 2):
            raise MaskError(
                explain_values(
                    "values",
                    "must be boolean, [N, M] or packed 1-D",
                    shape=tuple(self.values.shape),
                    dtype=self.values.dtype,
                )
            )

    @staticmethod
    def from_list(matrices: Sequence[Tensor]) -> Dense:
        """One boolean ``[n_s, m_s]`` matrix per segment.

        >>> Dense.from_list([torch.ones(2, 2, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)])
        Dense(<bool[7]>)
        """
        flat = [m.flatten() for m in matrices]
        return Dense(torch.cat(flat) if flat else torch.zeros(0, dtype=torch.bool))


@node
class MaskMod(Mask):
    """A predicate in FlexAttention's own signature, ``fn(b, h, q_pos, kv_pos) -> bool``.

    Positions are segment-local and `b` is the segment, so a mask written for one sequence (any of
    attention-gym's) works per segment unchanged. Positions outside the segment never reach `fn`.
    """

    fn: MaskFunction

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise MaskError(explain_values("fn", "must be callable as fn(b, h, q_pos, kv_pos)", fn=self.fn))


@node
class PerHead(Mask):
    """Another mask for each query head: head h uses ``masks[h]``.

    Args:
        masks: As many masks as there are query heads.
    """

    by_position = printable = True
    reads_pairs = False

    masks: Sequence[Mask]

    def __post_init__(self) -> None:
        if not self.masks:
            raise MaskError(explain_values("masks", "must hold one mask per query head", masks=self.masks))
        object.__setattr__(self, "masks", tuple(_check_mask(m, "PerHead") for m in self.masks))


@node
class And(Mask):
    """Both masks allow the key: ``left & right``."""

    by_position = printable = True
    reads_pairs = False

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{_group(self.left, Or)} & {_group(self.right, Or)}"


@node
class Or(Mask):
    """One of the masks allows the key: ``left | right``."""

    by_position = printable = True
    reads_pairs = False

    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{_group(self.left, And)} | {_group(self.right, And)}"


@node
class Not(Mask):
    """The mask does not allow the key, within the own segment: ``~mask``."""

    by_position = printable = True
    reads_pairs = False

    mask: Mask

    def __repr__(self) -> str:
        return f"~{_group(self.mask, And, Or)}"


def _group(mask: Mask, *types: type) -> str:
    return f"({mask!r})" if isinstance(mask, types) else repr(mask)


def at_head(mask: Mask, head: int) -> Mask:
    """The mask of one query head: every :class:`PerHead` inside replaced by its choice."""
    if isinstance(mask, PerHead):
        return at_head(mask.masks[head], head)
    return rebuilt(mask, lambda one: at_head(one, head))


def num_mask_heads(mask: Mask) -> int | None:
    """Number of query heads that :class:`PerHead` nodes and tensors per head are for; None without any.

    Raises:
        MaskError: If two of them disagree.
    """
    found = {len(one.masks) for one in walk(mask) if isinstance(one, PerHead)} | head_counts(mask)
    if len(found) > 1:
        raise MaskError(explain_values("masks", "every PerHead must have one mask per head", heads=sorted(found)))
    return found.pop() if found else None
