"""Users' functions of scalars, called once and watched: what they read, what they learn, what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flexjag import masks as m
from flexjag import scores as s
from flexjag.errors import FlexjagError, MaskError, ScoreError, explain_values


class _Watch(TorchFunctionMode):
    """Sees every tensor that torch functions are given, and tells apart those they made themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}  # the values keep the ids from being reused

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, Tensor) and id(x) not in self.made:
                self.given[id(x)] = x
        out = func(*args, **(kwargs or {}))
        self.made.update({id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)})
        return out


class Substitute(TorchFunctionMode):
    """Torch functions that are given one of `old` get its counterpart in `new` instead."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        super().__init__()
        self.new = {id(x): y for x, y in zip(old, new, strict=True)}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = tree_map(lambda x: self.new.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


def depends_on_head(mask: m.Mask, device: torch.device) -> bool:
    """Whether a user's predicate in the mask looks at its `h`, found by calling it once and watching."""
    match mask:
        case m.And() | m.Or():
            return depends_on_head(mask.left, device) or depends_on_head(mask.right, device)
        case m.Not():
            return depends_on_head(mask.mask, device)
        case m.MaskMod():
            zero = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
            with _Watch() as watch:
                mask.fn(*zero)
            return id(zero[1]) in watch.given
        case _:
            return not type(mask).__module__.startswith("flexjag.")  # a user's node may look at it


def check_functions(mask: m.Mask, score: s.Score | None, device: torch.device) -> None:
    """Call every user's function once, as a backend will, to tell mistakes in it by its name.

    Raises:
        MaskError: If a mask's function fails or does not return one bool.
        ScoreError: If a score's function fails or does not return one float.
    """
    zero, one = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, device=device)
    found: list[tuple[type[FlexjagError], Callable[..., Tensor], tuple[Tensor, ...], str]] = []
    found += [(MaskError, fn, (zero,) * 4, "(b, h, q_pos, kv_pos) -> bool") for fn in _functions(mask)]
    for part in s.parts(score):
        if isinstance(part, s.ScoreMod):
            found.append((ScoreError, part.fn, (one, *(zero,) * 4), "(score, b, h, q_pos, kv_pos) -> float"))
    for error, fn, args, signature in found:
        name = getattr(fn, "__name__", type(fn).__name__)
        rule = f"{name} must be {signature} in tensor operations: & | ~ and torch.where, not and, or, not, if"
        try:
            out = torch.vmap(fn)(*args)
        except (RuntimeError, ValueError, TypeError, IndexError) as reason:
            raise error(explain_values("fn", rule, error=str(reason).split("\n")[0])) from reason
        if (out.dtype == torch.bool) != (error is MaskError) or out.shape != (1,):
            raise error(explain_values("fn", rule, dtype=out.dtype, shape=tuple(out.shape[1:])))


def _functions(mask: m.Mask) -> list[Callable[..., Tensor]]:
    match mask:
        case m.MaskMod():
            return [mask.fn]
        case m.And() | m.Or():
            return _functions(mask.left) + _functions(mask.right)
        case m.Not():
            return _functions(mask.mask)
        case m.PerHead():
            return [fn for one in mask.masks for fn in _functions(one)]
        case _:
            return []


def learned_tensors(score: s.Score | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The tensors of a score that need gradients, including those a user's function closes over.

    Each function is called once, on one score, and watched. Empty when gradients are off.
    """
    found: dict[int, Tensor] = {}
    if score is None or not torch.is_grad_enabled():
        return []
    for node in s.parts(score):
        if isinstance(node, s.ScoreMod):
            zero = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
            with _Watch() as watch:
                node.fn(torch.zeros((), dtype=dtype, device=device), *zero)
            found.update(watch.given)
    found.update({id(x): x for x in s.tensors(score)})
    return [x for x in found.values() if x.requires_grad]
