"""The operators of the backend ``cpp``: one opaque node of a graph forward, and one backward."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor

from flexjag.backends.base import FIRST_ORDER
from flexjag.backends.cpp.library import Problem, run
from flexjag.errors import DifferentiationError


def problem_of(
    captures: list[Tensor],
    learned: list[int] | None,
    numbers: list[int],
    source: str,
    offsets: list[Tensor],
    spans: list[Tensor],
    window: list[int] | None,
    *rest: Any,
) -> Problem:
    """The problem of the operator's arguments, of which AOTInductor passes an empty list as None."""
    mask_of, scale, factor, unshared = rest
    spans = [] if window else spans
    held = (
        source,
        captures,
        learned or [],
        numbers,
        offsets,
        spans,
        window or [],
        mask_of,
        scale,
        factor,
        unshared or [],
    )
    return Problem(*held)


def compute(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The function of :func:`attend`."""
    q, k, v = (_packed(x) for x in (q, k, v))
    out, lse = _empty(q, v)
    run("attend", problem, (q.shape[1], k.shape[1]), {"q": q, "k": k, "v": v, "out": out, "lse": lse})
    return out, lse


@torch.library.custom_op("flexjag::cpp_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    learned: list[int] | None,
    numbers: list[int],
    source: str,
    offsets: list[Tensor],
    spans: list[Tensor],
    window: list[int] | None,
    mask_of: Tensor | None,
    scale: float,
    factor: float,
    unshared: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Attention by a plan's printed functions.

    Args:
        q: ``[T_q, H, D]``.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        captures: Tensors that the functions read, at least one; each of the `learned` ones is contiguous.
        learned: Indices of the captures that need gradients. AOTInductor passes None for an empty list.
        numbers: Integers that they read.
        source: The printed functions.
        offsets: ``[S+1]`` int32, of queries and of keys.
        spans: Per distinct mask: starts and ends of the outer spans, then of the inner ones, each ``[K, T_q]`` int32.
        window: In place of the spans, if it is not empty: see :class:`Problem`.
        mask_of: ``[H]`` int32, the mask of each head; None for the first.
        scale: Factor on ``q·k``.
        factor: Factor on the output, without a softmax.
        unshared: Those of the `learned` ones of which no two segments or heads read the same entry.

    Returns:
        ``[T_q, H, E]``, and ``[H, T_q]`` in at least float32: the log-sum-exp of a softmax, the remainder of
        stick-breaking, which is not in the output; unspecified values else.
    """
    rest = mask_of, scale, factor, unshared
    return compute(q, k, v, problem_of(captures, learned, numbers, source, offsets, spans, window, *rest))


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=acc)


def _packed(x: Tensor) -> Tensor:
    """The tensor with adjacent columns; itself if they are."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


@torch.library.custom_op("flexjag::cpp_attention_backward", mutates_args=())
def differentiate(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: list[Tensor],
    learned: list[int] | None,
    numbers: list[int],
    source: str,
    offsets: list[Tensor],
    spans: list[Tensor],
    window: list[int] | None,
    mask_of: Tensor | None,
    scale: float,
    factor: float,
    unshared: list[int] | None,
) -> list[Tensor]:
    """The gradients of q, k, v and the `learned` captures of :func:`attend`."""
    grad, q, k, v, out = (_packed(x) for x in (grad, q, k, v, out))
    dq, dk, dv = _like(q, k, v)
    rest = mask_of, scale, factor, unshared
    problem = problem_of(captures, learned, numbers, source, offsets, spans, window, *rest)
    tensors = {"q": q, "k": k, "v": v, "out": out, "grad": grad, "dq": dq, "dk": dk, "dv": dv, "lse": lse.contiguous()}
    given = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    found = run("differentiate", problem, (q.shape[1], k.shape[1]), {**tensors, "grad_lse": given})
    return [dq, dk, dv, *(x.to(captures[i].dtype) for x, i in zip(found, learned or [], strict=True))]


@differentiate.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    captures, learned = rest[2:4]
    return _like(q, k, v, *(captures[i] for i in learned or []))


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise DifferentiationError(FIRST_ORDER.format("cpp"))


differentiate.register_autograd(_refuse)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, learned, numbers, source, offsets, spans, window, mask_of, scale, factor, unshared = inputs
    ctx.save_for_backward(q, k, v, *output, *captures, *offsets, *spans, mask_of)
    ctx.sizes = [5, len(captures), len(offsets), len(spans)]
    ctx.learned, ctx.numbers, ctx.source, ctx.rest = learned, numbers, source, (window, scale, factor, unshared)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    ends = list(itertools.accumulate(ctx.sizes, initial=0))
    saved = ctx.saved_tensors  # once: checkpointing gives them away
    (q, k, v, out, lse), captures, offsets, spans = (list(saved[a:b]) for a, b in itertools.pairwise(ends))
    window, *factors = ctx.rest
    by_capture: list[Tensor | None] = [None] * len(captures)
    dq = dk = dv = None
    if grad is not None or grad_lse is not None:
        grad = torch.zeros_like(out) if grad is None else grad.to(q.dtype)
        dq, dk, dv, *found = differentiate(
            grad, grad_lse, q, k, v, out, lse, captures, ctx.learned, ctx.numbers, ctx.source, offsets, spans,
            window, saved[ends[-1]], *factors,
        )  # fmt: skip
        for i, x in zip(ctx.learned, found, strict=True):
            by_capture[i] = x
    none = [None if x else [] for x in (ctx.learned, ctx.numbers, window, factors[-1])]  # [] would be taken for tensors
    nothing = [None] * len(offsets), [None] * len(spans)
    return dq, dk, dv, by_capture or [], none[0], none[1], None, *nothing, none[2], None, None, None, none[3]


attend.register_autograd(_backward, setup_context=_remember)
