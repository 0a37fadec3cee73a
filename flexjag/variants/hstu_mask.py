"""HSTU's attention mask (generative-recommenders), as spans per token."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.errors import MaskError, explain_values
from flexjag.jagged import Jagged
from flexjag.masks import Rows
from flexjag.nodes import check_tensor
from flexjag.offsets import segment_ids
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
    """The mask of HSTU: causal, with a contextual prefix, targets at the end, and a window over the history.

    A segment is ``contextual`` tokens, then the history, then ``targets`` candidates. Contextual tokens count as one
    position. Each sees the contextual tokens and the whole history; a history token sees what is before it and itself;
    a target sees contextual tokens, history and itself, as if it came right after the history, and no other target
    but those before it in its group.

    Args:
        q: The query batch; only its offsets and number of tokens matter.
        k: The key batch, if the queries are only the last tokens of each of its segments, as in a decode step.
        causal: False lets tokens see as far ahead as back. That is symmetric, as the public definition is: the history
            then sees the targets, which see it. Targets of a group see each other.
        contextual: How many tokens of each segment are its contextual prefix: a number, or ``[S]`` integers.
        targets: ``[S]`` integers, how many tokens at the end are targets. Default: none.
        target_group_size: So many consecutive targets are a group; a segment's last group may be smaller.
        max_attn_len: How many positions back (and ahead, if not causal) a token sees; 0 or None for all.
        min_full: The targets and the last this many positions of the history see all the same.

    Returns:
        Exact spans, one per token, or with targets two. Works inside ``torch.compile``.

    Raises:
        MaskError: If a number is out of range (those of tensors are looked at on CPU only), `contextual` or `targets`
            is not ``[S]``, or k has other segments than q.

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
    _check(q, k, contextual, targets, target_group_size, max_attn_len, min_full)
    tokens = q.values.shape[0]
    segment = segment_ids(q.offsets, tokens)
    # Read per token, of all S+1 offsets: a slice of S would make S = 1 a graph of its own.
    last = (segment + 1).clamp(max=q.num_segments)
    length = k.offsets[last] - k.offsets[segment]
    at = torch.arange(tokens, device=q.offsets.device) - q.offsets[last] + length
    prefix = _per_token(contextual, segment) if isinstance(contextual, Tensor) else torch.full_like(at, contextual)
    skip = (prefix - 1).clamp(min=0)
    history_end = length if targets is None else length - _per_token(targets, segment)
    end = history_end - skip  # the position of all targets
    position = torch.minimum((at - skip).clamp(min=0), end)

    def start_of(position: Tensor) -> Tensor:
        """The first token of a position; position 0 has all of the contextual prefix."""
        return torch.where(position > 0, position + skip, 0)

    lo, hi = torch.zeros_like(at), start_of(position)
    if not causal:
        hi = torch.where(position < end, length, hi)
    if max_attn_len:
        near = position < end - min_full if min_full else True
        lo = torch.where(near & (position > max_attn_len), position - max_attn_len + skip, 0)
        if not causal:  # the position after the last one seen begins at the end of the window, if that is history
            ahead = position + max_attn_len + 1
            hi = torch.where(near & (ahead <= end) & (position < end), ahead + skip, hi)
    is_prefix = (position == 0) & (prefix > 0)
    lo = torch.where(is_prefix, 0, lo)
    hi = torch.where(is_prefix & (end > 0), torch.maximum(hi, end + skip), hi)
    if targets is None:  # what a token sees holds or touches it
        return Rows(torch.where(hi > 0, lo, at), torch.maximum(hi, at + 1))
    own, own_end = at, at + 1
    if target_group_size > 1:
        nth = at - history_end
        own = torch.where(nth >= 0, at - nth % target_group_size, at)
        if not causal:
            own_end = torch.where(nth >= 0, torch.minimum(own + target_group_size, length), own_end)
    return Rows(torch.stack([lo, own]), torch.stack([hi, own_end]))


def _per_token(counts: Tensor, segment: Tensor) -> Tensor:
    """``[T]`` of ``[S]`` int64, and 0 for spare rows."""
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
    """Check integers per segment, not negative, and if `bounded` at most the segment's length."""
    check_tensor(MaskError, name, counts)
    if counts.shape != (k.num_segments,) or counts.dtype.is_floating_point or counts.dtype == torch.bool:
        rule = "must be integers, one per segment"
        shape = tuple(counts.shape)
        raise MaskError(explain_values(name, rule, shape=shape, dtype=counts.dtype, segments=k.num_segments))
    # On a GPU, and in a traced graph, looking at the numbers would wait for them.
    if counts.device.type == "cpu" and not holds_no_numbers(counts):
        wrong = ((counts < 0) | (counts > k.lengths if bounded else False)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            rule = "must be from 0 to the segment's length" if bounded else "must not be negative"
            values = {f"{name}[{at}]": int(counts[at]), "length": int(k.lengths[at])}
            raise MaskError(explain_values(name, rule, **values))
