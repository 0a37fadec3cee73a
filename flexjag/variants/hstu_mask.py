"""HSTU's attention mask (generative-recommenders), as spans per token."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag.errors import MaskError, explain_values
from flexjag.jagged import Jagged
from flexjag.masks import Rows
from flexjag.nodes import check_tensor
from flexjag.offsets import segment_ids, surely
from flexjag.upstream import holds_no_numbers


def hstu_mask(
    q: Jagged,
    k: Jagged | None = None,
    *,
    contextual: int = 0,
    targets: Tensor | None = None,
    max_attn_len: int | None = None,
    min_full: int = 0,
) -> Rows:
    """The mask of HSTU: causal, with a contextual prefix, targets at the end, and a window over the history.

    A segment is ``contextual`` tokens, then the history, then ``targets`` candidates. Contextual tokens count as one
    position. Each sees the contextual tokens and the whole history; a history token sees what is before it and itself;
    a target sees contextual tokens, history and itself, never another target, as if it came right after the history.

    Args:
        q: The query batch; only its offsets and number of tokens matter.
        k: The key batch, if the queries are only the last tokens of each of its segments, as in a decode step.
        contextual: How many tokens of each segment are its contextual prefix.
        targets: ``[S]`` integers, how many tokens at the end are targets. Default: none.
        max_attn_len: How many positions back a token sees. Default: all.
        min_full: The targets and the last this many positions of the history see all the same.

    Returns:
        Exact spans, one per token, or with targets two. Works inside ``torch.compile``.

    Raises:
        MaskError: If a number is out of range (those of `targets` are looked at on CPU only), `targets` is not
            ``[S]``, or k has other segments than q.

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
    _check(q, k, contextual, targets, max_attn_len, min_full)
    tokens = q.values.shape[0]
    token = torch.arange(tokens, device=q.offsets.device)
    if surely(tokens == 0):  # no segment to read from
        return Rows(token, token)
    segment = segment_ids(q.offsets, tokens)
    # Read per token, of all S+1 offsets: a slice of S would make S = 1 a graph of its own.
    last = (segment + 1).clamp(max=q.num_segments)
    length = k.offsets[last] - k.offsets[segment]
    at = token - q.offsets[last] + length
    skip = max(contextual - 1, 0)
    position = (at - skip).clamp(min=0)
    end = length - skip
    if targets is not None:
        end = end - targets[segment.clamp(max=max(0, q.num_segments - 1))]  # spare rows: anything
        position = torch.minimum(position, end)
    hi = torch.where(position > 0, position + skip, 0)
    lo = torch.zeros_like(hi)
    if max_attn_len is not None:
        near = torch.where(position > max_attn_len, position - max_attn_len + skip, 0)
        lo = torch.where(position >= end - min_full, 0, near) if min_full else near
    if contextual:
        prefix = position == 0
        lo, hi = torch.where(prefix, 0, lo), torch.where(prefix & (end > 0), end + skip, hi)
    if targets is None:  # a token comes right after what it sees
        return Rows(torch.where(hi > 0, lo, at), torch.maximum(hi, at + 1))
    return Rows(torch.stack([lo, at]), torch.stack([hi, at + 1]))


def _check(
    q: Jagged, k: Jagged, contextual: int, targets: Tensor | None, max_attn_len: int | None, min_full: int
) -> None:
    if k.num_segments != q.num_segments:
        raise MaskError(explain_values("k", "must have as many segments as q", q=q.num_segments, k=k.num_segments))
    for name, value, least in (
        ("contextual", contextual, 0),
        ("max_attn_len", 1 if max_attn_len is None else max_attn_len, 1),
        ("min_full", min_full, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise MaskError(explain_values(name, f"must be an int of at least {least}", value=value))
    if targets is None:
        return
    check_tensor(MaskError, "targets", targets)
    if targets.shape != (q.num_segments,) or targets.dtype.is_floating_point:
        rule = "must be integers, one per segment"
        shape = tuple(targets.shape)
        raise MaskError(explain_values("targets", rule, shape=shape, dtype=targets.dtype, segments=q.num_segments))
    # On a GPU, and in a traced graph, looking at the numbers would wait for them.
    if targets.device.type == "cpu" and not holds_no_numbers(targets):
        wrong = ((targets < 0) | (targets > k.lengths)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            rule = "must be from 0 to the segment's length"
            values = {f"targets[{at}]": int(targets[at]), "length": int(k.lengths[at])}
            raise MaskError(explain_values("targets", rule, **values))
