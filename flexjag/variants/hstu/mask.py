"""HSTU's attention mask (generative-recommenders), as spans per token."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.algebra.masks import Rows
from flexjag.algebra.node import check_tensor
from flexjag.errors import MaskError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import as_int, index_tensor, segment_ids
from flexjag.upstream import holds_no_numbers


def hstu_mask(
    q: Jagged,
    k: Jagged | None = None,
    *,
    causal: bool = True,
    contextual: int | Tensor = 0,
    targets: Tensor | None = None,
    target_group_size: int = 1,
    max_attn_len: int | None = None,
    min_full: int = 0,
) -> Rows:
    """HSTU's mask: causal, with a contextual prefix, targets at the end, and a window over the history.

    A segment consists of ``contextual`` tokens, the history, and ``targets`` candidates. Contextual tokens share one
    position and attend to all contextual tokens and the whole history. A history token attends to itself and the
    tokens before it. A target has the position after the history and attends to contextual tokens, history, itself,
    and the earlier targets of its group.

    Args:
        q: The query batch, of which only the offsets and the number of tokens are used.
        k: The key batch, if the queries are its segments' last tokens, as in a decode step. Default: `q`.
        causal: If False, the mask is symmetric, as in the public code: tokens attend as far ahead as back, the history
            attends to the targets, and targets of a group attend to each other.
        contextual: Number of contextual tokens of each segment: an int, or ``[S]`` integers.
        targets: Number of targets at the end of each segment, ``[S]`` integers. Default: none.
        target_group_size: Number of consecutive targets in a group; the last group may be smaller.
        max_attn_len: Window, in positions back (and ahead, if not causal); 0 or None for unlimited.
        min_full: If positive, the targets and the last `min_full` positions of the history are exempt from the window.

    Returns:
        A mask of exact spans, one per token, or two with targets. Works inside ``torch.compile``.

    Raises:
        MaskError: If a number is out of range (those in tensors are checked on a CPU only), `contextual` or `targets`
            is not ``[S]``, or the numbers of segments of `q` and `k` differ.

    >>> from flexjag import plan
    >>> x = Jagged.from_lengths(torch.zeros(5), [5])
    >>> plan(x, mask=hstu_mask(x, contextual=2, targets=torch.tensor([1]))).to_dense().int()
    tensor([[1, 1, 1, 1, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    k = q if k is None else k
    contextual, targets = index_tensor(as_int(contextual)), index_tensor(targets)
    target_group_size, max_attn_len, min_full = as_int(target_group_size), as_int(max_attn_len), as_int(min_full)
    _check(q, k, contextual, targets, target_group_size, max_attn_len, min_full)
    tokens = q.values.shape[0]
    segment = segment_ids(q.offsets, tokens)
    # Index all S+1 offsets per token: a slice of size S would specialize the graph on S = 1.
    last = (segment + 1).clamp(max=q.num_segments)
    length = k.offsets[last] - k.offsets[segment]
    at = torch.arange(tokens, device=q.offsets.device) - q.offsets[last] + length
    prefix = _per_token(contextual, segment) if isinstance(contextual, Tensor) else torch.full_like(at, contextual)
    skip = (prefix - 1).clamp(min=0)
    history_end = length if targets is None else length - _per_token(targets, segment)
    end = history_end - skip  # the position of all targets
    position = torch.minimum((at - skip).clamp(min=0), end)

    def start_of(position: Tensor) -> Tensor:
        """First token of a position; position 0 is the whole contextual prefix."""
        return torch.where(position > 0, position + skip, 0)

    lo, hi = torch.zeros_like(at), start_of(position)
    if not causal:
        hi = torch.where(position < end, length, hi)
    if max_attn_len:
        near = position < end - min_full if min_full else True
        lo = torch.where(near & (position > max_attn_len), position - max_attn_len + skip, 0)
        if not causal:  # the window ends where the position after its last one starts, if that is in the history
            ahead = position + max_attn_len + 1
            hi = torch.where(near & (ahead <= end) & (position < end), ahead + skip, hi)
    is_prefix = (position == 0) & (prefix > 0)
    lo = torch.where(is_prefix, 0, lo)
    hi = torch.where(is_prefix & (end > 0), torch.maximum(hi, end + skip), hi)
    if targets is None:  # the span contains the token or is adjacent to it
        return Rows(torch.where(hi > 0, lo, at), torch.maximum(hi, at + 1))
    own, own_end = at, at + 1
    if target_group_size > 1:
        nth = at - history_end
        own = torch.where(nth >= 0, at - nth % target_group_size, at)
        if not causal:
            own_end = torch.where(nth >= 0, torch.minimum(own + target_group_size, length), own_end)
    return Rows(torch.stack([lo, own]), torch.stack([hi, own_end]))


def _per_token(counts: Tensor, segment: Tensor) -> Tensor:
    """Per-segment counts ``[S]`` gathered per token: ``[T]`` int64, 0 for spare rows."""
    return torch.cat([counts.long(), counts.new_zeros(1, dtype=torch.int64)])[segment]


def _check(
    q: Jagged,
    k: Jagged,
    contextual: int | Tensor,
    targets: Tensor | None,
    target_group_size: int,
    max_attn_len: int | None,
    min_full: int,
) -> None:
    if k.num_segments != q.num_segments:
        raise MaskError(explain_values("k", "must have as many segments as q", q=q.num_segments, k=k.num_segments))
    for name, value, least in (
        ("contextual", contextual, 0),
        ("target_group_size", target_group_size, 1),
        ("max_attn_len", max_attn_len or 0, 0),
        ("min_full", min_full, 0),
    ):
        if isinstance(value, Tensor) and name == "contextual":
            _check_counts(name, value, k, bounded=False)
        elif not isinstance(value, int) or value < least:
            raise MaskError(explain_values(name, f"must be an int of at least {least}", value=value))
    if targets is not None:
        _check_counts("targets", targets, k, bounded=True)


def _check_counts(name: str, counts: Tensor, k: Jagged, bounded: bool) -> None:
    """Check that counts are ``[S]`` integers, not negative, and if `bounded` at most the segment's length."""
    check_tensor(MaskError, name, counts)
    if counts.shape != (k.num_segments,) or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        rule = "must be integers, one per segment"
        shape = tuple(counts.shape)
        raise MaskError(explain_values(name, rule, shape=shape, dtype=counts.dtype, segments=k.num_segments))
    # On a GPU reading the numbers would be a sync; in a traced graph there are none.
    if counts.device.type == "cpu" and not holds_no_numbers(counts):
        wrong = ((counts < 0) | (counts > k.lengths if bounded else False)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            rule = "must be from 0 to the segment's length" if bounded else "must not be negative"
            values = {f"{name}[{at}]": int(counts[at]), "length": int(k.lengths[at])}
            raise MaskError(explain_values(name, rule, **values))
