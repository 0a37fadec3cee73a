"""The record of a backend: its name, rule, cost, `run` function and promises to callers."""

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
"""The output ``[T_q, H, E]`` and the rest ``[T_q, H]``: a softmax's log-sum-exp, or stick-breaking's remainder."""

Where = Literal["everywhere", "on CUDA", "on CPU", "nowhere"]

ALL: tuple[type[Normalizer], ...] = (Softmax, Pointwise, StickBreaking)
FIRST_ORDER = "backend {!r} has no second-order gradients; use backend='tiled' or 'reference'"
HALF = (torch.float16, torch.bfloat16)
CALLS = 2500  # over which the seconds of a first call are spread
ASSUMED_DIMS = (1, 1, 64, 64)  # H, G, D and E where nothing says them


class Asked(Protocol):
    """The part of a recipe that rules and the reference may read: the plan's arguments, no result of lowering."""

    @property
    def layout(self) -> Layout:
        """Segment, local position and key range of each token."""
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
        """Tile size, in tokens."""
        ...

    @property
    def sample(self) -> tuple[int, int, torch.dtype, bool] | None:
        """``(H, D, dtype, requires_grad)`` of the q given to the plan, if it had heads; else None."""
        ...

    def learning_in(self, dtype: torch.dtype) -> Self:
        """Widen the learned tensors of score and normalizer to at least `dtype`."""
        ...

    def place(self) -> functions.Place | None:
        """Indices ``(b, h, q, kv)`` at which users' functions can be tried; None if there are none."""
        ...


@dataclass(frozen=True)
class Case:
    """The requirements of one attention call, which backends' rules check. None means not known yet.

    Attributes:
        layout: Segment, local position and key range of each token.
        mask: The mask.
        score: The score, or None.
        normalizer: The normalizer.
        tracing: True while a graph is traced.
        dtype: Dtype of q, k and v.
        grad: True if an input requires a gradient.
        lse: True if the log-sum-exp is requested.
        dims: ``(H, G, D, E)``.
        scale: Factor on ``q·k``.
        block_size: Tile size, in tokens.
        plain: True under a ``torch.func`` transform or forward-mode AD, which support plain torch operations only.
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
        """Build the case of a recipe.

        Args:
            asked: The recipe.
            known: Other attributes, from the call's inputs. Without any, they are taken from the recipe's `sample` and
                learned tensors.
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
        """True if kernels of a CUDA (or ROCm) device will run."""
        return self.layout.on_gpu and self.layout.device.type in ("cuda", "cpu")

    def has(self, where: Where) -> bool:
        """True if a promise for `where` covers this case's device."""
        here = "on CUDA" if self.on_cuda else "on CPU" if self.layout.device.type == "cpu" else None
        return where in ("everywhere", here)

    def unlike(self, where: Where) -> str:
        """The end of a refusal: " on" and this device if the promise holds on others, else empty."""
        device = self.layout.device.type
        return "" if where == "nowhere" else f" on {'CPU' if device == 'cpu' else device}"


@dataclass(frozen=True)
class Promises:
    """A backend's guarantees for every case that its rule accepts.

    Attributes:
        normalizers: The supported kinds of normalizers.
        gradients: Devices with a backward.
        second_order: Its gradients can be differentiated again, and ``torch.func`` transforms and forward-mode AD go
            through it.
        lse: Devices where it returns the log-sum-exp of a softmax.
        lse_gradient: The log-sum-exp is differentiable.
        untraceable: The reason why it cannot be part of a traced graph; None if it can.
        contains_nan: NaN or inf in one segment does not reach other segments.
        unmixed: A segment's output is bitwise independent of the other segments in the batch.
        deterministic: Devices where repeated calls give the same bits, gradients included. On CUDA most backends sum
            gradients by atomic operations, in an order that varies.
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
    deterministic: Where = "on CPU"
    wide: tuple[type[Normalizer], ...] = ()

    def refuse(self, case: Case) -> str | None:
        """The reason why the promises do not cover a case, as a sentence; None if they do."""
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
    """An implementation of attention that runs recipes.

    Attributes:
        name: Its name for ``attention(backend=...)``.
        title: A short description.
        takes: The supported masks and scores, in a few words.
        run: ``run(q, k, v, recipe, scale, need_rest)`` of packed ``q [T_q, H, D]``, ``k [T_kv, G, D]`` and
            ``v [T_kv, G, E]`` to a :data:`Pair`, whose second may be None if the rest is not needed. Heavy modules
            are imported when it is called.
        refuse: The rule: the reason why it cannot run a case that its promises cover, in one sentence, or None if it
            can. It reads structure and metadata only.
        promises: Its guarantees for the cases that it accepts.
        needs_tiles: True if it reads the recipe's tiles for every recipe.
        cost: Estimated work of a case, by which ``auto`` compares backends on a CPU; None if it was never measured.
        setup: Seconds that a first call takes once, for compilation; ``auto`` counts them as spread over
            :data:`CALLS` calls.
        wasteful: The reason why ``auto`` should skip it for a case that it can run, or None.
        scores: The number of scores of a head that it computes for a recipe and a case; None if it was never counted.
            It reads the device.
        source: The code that it prints for a recipe, for people to read; None if it prints none.
        before: The backend before which ``auto`` tries this one, if :func:`flexjag.backends.choose.register` adds it;
            None if only its name selects it.
    """

    name: str
    title: str
    takes: str
    run: Callable[..., Pair]
    refuse: Callable[[Case], str | None] = lambda case: None
    promises: Promises = Promises()
    needs_tiles: bool = False
    cost: Callable[[Case], Work] | None = None
    setup: float = 0.0
    wasteful: Callable[[Case], str | None] = lambda case: None
    scores: Callable[[Any, Case], float] | None = None
    source: Callable[[Any], str] | None = None
    before: str | None = None
