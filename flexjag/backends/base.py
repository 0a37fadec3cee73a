"""What a backend is: one record of its name, its rule, its cost, how it runs and what callers may count on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import normalizers
from flexjag.algebra import scores as s
from flexjag.algebra import user_functions as functions
from flexjag.algebra.normalizers import Normalizer, Pointwise, Softmax, StickBreaking
from flexjag.backends.costs import Work
from flexjag.lowering.layout import Layout

Pair = tuple[Tensor, Tensor | None]
"""The output ``[T_q, H, E]``, and the rest ``[T_q, H]``: a softmax's log-sum-exp, or stick-breaking's remainder."""

Where = Literal["everywhere", "on CUDA", "nowhere"]

ALL: tuple[type[Normalizer], ...] = (Softmax, Pointwise, StickBreaking)
FIRST_ORDER = "backend 'segments' has no second-order gradients; use backend='tiled' or 'reference'"
HALF = (torch.float16, torch.bfloat16)
ASSUMED_DIMS = (1, 1, 64, 64)  # H, G, D and E where nothing says them


class Asked(Protocol):
    """What rules and the reference see of a recipe: what was asked for, and nothing that lowering made of it."""

    @property
    def layout(self) -> Layout:
        """Where the tokens sit."""
        ...

    @property
    def mask(self) -> m.Mask:
        """The mask."""
        ...

    @property
    def score(self) -> s.Score | None:
        """The score, or None."""
        ...

    @property
    def normalizer(self) -> Normalizer:
        """The normalizer."""
        ...

    @property
    def block_size(self) -> int:
        """Tile size."""
        ...

    @property
    def sample(self) -> tuple[int, int, torch.dtype, bool] | None:
        """``(H, D, dtype, grad)`` of the q that was planned for, if it had heads."""
        ...

    def learning_in(self, dtype: torch.dtype) -> Self:
        """With what score and normalizer learn read in at least `dtype`."""
        ...

    def place(self) -> functions.Place | None:
        """Where users' functions may be tried; None if nowhere."""
        ...


@dataclass(frozen=True)
class Case:
    """What a backend must cope with. None means not known yet.

    Attributes:
        layout: Where the tokens sit.
        mask: The mask.
        score: The score, or None.
        normalizer: The normalizer.
        tracing: A graph is being traced.
        dtype: Of q, k and v.
        grad: Some input needs a gradient.
        lse: The log-sum-exp is wanted.
        dims: ``(H, G, D, E)``.
        scale: Factor on ``q·k``.
        block_size: Tile size.
        plain: A ``torch.func`` transform or forward-mode AD is at work, which know plain torch operations only.
    """

    layout: Layout
    mask: m.Mask
    score: s.Score | None
    normalizer: Normalizer
    tracing: bool = False
    dtype: torch.dtype | None = None
    grad: bool | None = None
    lse: bool = False
    dims: tuple[int, int, int, int] | None = None
    scale: float = 1.0
    block_size: int = 128
    plain: bool = False

    @classmethod
    def of(cls, asked: Asked, **known: Any) -> Self:
        """A recipe's case.

        Args:
            asked: The recipe.
            known: What the caller knows besides. Nothing: as for the q that was planned for.
        """
        if not known:
            learned = functions.learned_tensors(asked.score, torch.float32, asked.place)
            held = (*learned, *normalizers.tensors(asked.normalizer))
            trained = torch.is_grad_enabled() and any(x.requires_grad for x in held)
            heads, dim, dtype, grad = asked.sample or (*ASSUMED_DIMS[1:3], None, False)
            known = {"dtype": dtype, "grad": grad or trained, "dims": (heads, heads, dim, dim)}
        return cls(asked.layout, asked.mask, asked.score, asked.normalizer, block_size=asked.block_size, **known)

    @property
    def on_cuda(self) -> bool:
        """Whether a CUDA (or ROCm) device's kernels will run."""
        return self.layout.on_gpu and self.layout.device.type in ("cuda", "cpu")

    def has(self, where: Where) -> bool:
        """Whether something that is promised there is promised here."""
        return where == "everywhere" or (where == "on CUDA" and self.on_cuda)

    def unlike(self, where: Where) -> str:
        """Where this is, if what is not promised here is promised somewhere, for the end of a sentence."""
        device = self.layout.device.type
        return "" if where == "nowhere" else f" on {'CPU' if device == 'cpu' else device}"


@dataclass(frozen=True)
class Promises:
    """What callers may count on wherever a backend's rule lets them through.

    Attributes:
        normalizers: The kinds of normalizers it has.
        gradients: Where it has a backward.
        second_order: Its gradients can be differentiated again, and ``torch.func`` transforms and forward-mode AD go
            through it.
        lse: Where it returns the log-sum-exp of a softmax.
        lse_gradient: That has a gradient.
        untraceable: Why it cannot be part of a graph; None if it can.
        contains_nan: NaN or inf in one segment reaches no other.
        unmixed: Which other segments are in the batch changes no bit of a segment's output.
        wide: The normalizers for which half precision is computed in float32.
    """

    normalizers: tuple[type[Normalizer], ...] = ALL
    gradients: Where = "everywhere"
    second_order: bool = False
    lse: Where = "everywhere"
    lse_gradient: bool = True
    untraceable: str | None = None
    contains_nan: bool = False
    unmixed: bool = False
    wide: tuple[type[Normalizer], ...] = ()

    def refuse(self, case: Case) -> str | None:
        """Why the promises do not cover a case, or None if they do."""
        if case.plain and not self.second_order:
            return "torch.func transforms and forward-mode AD know plain torch operations only"
        if not isinstance(case.normalizer, ALL):
            return f"it has no case for the normalizer {case.normalizer!r}"
        if not isinstance(case.normalizer, self.normalizers):
            if isinstance(case.normalizer, Softmax):
                return "its kernels are for normalizers other than a softmax"
            kinds = " or ".join("a softmax" if x is Softmax else x.__name__ for x in self.normalizers)
            return f"its kernels compute {kinds}, not {case.normalizer!r}"
        if case.tracing and self.untraceable is not None:
            return self.untraceable
        if case.grad and not case.has(self.gradients):
            return f"it has no backward{case.unlike(self.gradients)}"
        if case.lse and not case.has(self.lse):
            return f"it does not return the log-sum-exp{case.unlike(self.lse)}"
        if case.lse and case.grad and not self.lse_gradient:
            return "it drops the gradient of its log-sum-exp"
        return None


@dataclass(frozen=True)
class Backend:
    """One way to run a recipe.

    Attributes:
        name: What ``attention(backend=...)`` calls it.
        title: What it is, in a few words.
        takes: Which masks and scores it takes, in a few words.
        run: ``run(q, k, v, recipe, scale, need_rest)`` of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]`` and
            ``v [T_kv, G, E]`` to a :data:`Pair`, whose second may be None if the rest is not needed. It imports what
            is heavy when it is called.
        refuse: Why it cannot run a case that its promises cover, in one sentence, or None if it can. It reads
            structure and metadata only.
        promises: What callers may count on.
        needs_tiles: It reads the recipe's tiles.
        cost: What a case takes, to choose among those that can run it on a CPU; None if nobody has measured it.
        wasteful: Why ``auto`` should pass it over for a case that it can run, or None.
        before: The backend before which ``auto`` asks this one, for one that :func:`flexjag.backends.choose.register`
            adds; None if it has to be named.
    """

    name: str
    title: str
    takes: str
    run: Callable[..., Pair]
    refuse: Callable[[Case], str | None] = lambda case: None
    promises: Promises = Promises()
    needs_tiles: bool = False
    cost: Callable[[Case], Work] | None = None
    wasteful: Callable[[Case], str | None] = lambda case: None
    before: str | None = None
