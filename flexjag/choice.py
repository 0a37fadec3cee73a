"""What follows from a mask and a score of the order and the positions of tokens, without looking at a batch."""

from __future__ import annotations

from torch import Tensor

from flexjag import masks as m
from flexjag import scores as s
from flexjag.errors import MaskError, explain_values


def _causal_aligns(mask: m.Mask) -> set[m.Align]:
    """How the parts of a mask that rule out all later keys are aligned; empty if later keys may be allowed."""
    match mask:
        case m.Causal():
            return {mask.align}
        case m.Window() if isinstance(mask.right, int) and mask.right == 0:
            return {mask.align}
        case m.And():
            return _causal_aligns(mask.left) | _causal_aligns(mask.right)
        case m.Or():
            parts = [_causal_aligns(mask.left), _causal_aligns(mask.right)]
        case m.PerHead():
            parts = [_causal_aligns(one) for one in mask.masks]
        case _:
            return set()
    united: set[m.Align] = set()
    for part in parts:
        united |= part
    return united if all(parts) else set()


def diagonal_align(mask: m.Mask, is_self: bool) -> m.Align:
    """Which key a query of a causal-type mask lines up with: counted from the segment's start, or from its end.

    Raises:
        MaskError: If the mask may allow later keys, or, in cross-attention, lines up both ways.
    """
    found = _causal_aligns(mask)
    if not found:
        rule = "stick-breaking needs a mask without later keys: Causal(), Window(w, 0) or one of them & any mask"
        raise MaskError(explain_values("mask", rule, mask=mask))
    if len(found) > 1 and not is_self:
        rule = "stick-breaking needs one alignment of queries and keys that differ in offsets"
        raise MaskError(explain_values("mask", rule, mask=mask))
    return "start" if is_self else found.pop()


def is_by_position(mask: m.Mask, score: s.Score | None, is_self: bool) -> bool:
    """Whether mask and score see nothing of a token but its position in its segment, so that one bias fits them all.

    >>> import torch
    >>> is_by_position(m.Causal() & m.Window(9, 0), None, True), is_by_position(m.Prefix(torch.tensor([2])), None, True)
    (True, False)
    """
    by_position = all(isinstance(part, (s.Alibi, s.RelativeBias, s.BucketedBias)) for part in s.parts(score))
    return by_position and _mask_is_by_position(mask, is_self)


def _mask_is_by_position(mask: m.Mask, is_self: bool) -> bool:
    match mask:
        case m.And() | m.Or():
            return _mask_is_by_position(mask.left, is_self) and _mask_is_by_position(mask.right, is_self)
        case m.Not():
            return _mask_is_by_position(mask.mask, is_self)
        case m.PerHead():
            return all(_mask_is_by_position(one, is_self) for one in mask.masks)
        case m.Full():
            return True
        case m.Causal():
            return is_self or mask.align == "start"
        case m.Window():
            fixed = not isinstance(mask.left, Tensor) and not isinstance(mask.right, Tensor)
            return fixed and (is_self or mask.align == "start")
        case m.Prefix() | m.GlobalTokens():
            return not isinstance(mask.n, Tensor)
        case m.Chunked():
            return not isinstance(mask.size, Tensor)
        case _:
            return False
