"""Target attention: a few dense queries per segment attend to its jagged keys, with a trainable bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import check_same_layout
from flexjag.ops.checks import check_jagged, check_like, check_rows
from flexjag.ops.matrices import matrix_softmax, outer, times_packed
from flexjag.ops.packed import cut, lengths_of
from flexjag.ops.padding import unpad
from flexjag.ops.register import define


def jagged_dense_attention(
    query: Tensor, key: Jagged, value: Jagged, bias: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Target attention: ``out[s, m] = Σ_i softmax_i(scale · query[s, m] · key[s, i] + bias[s, i, m]) value[s, i]``.

    As in Jagged Flash Attention (arXiv 2409.15373), whose ``K[B, D, T]`` is the transposed `query`
    here and whose Q is `key`. No T × M tensor is stored: the backward recomputes the weights segment by segment.

    Args:
        query: ``[S, M, D]``, M queries per segment. For a compiled function, mark S as dynamic by
            ``torch._dynamo.maybe_mark_dynamic(query, 0)``: otherwise a second S recompiles once.
        key: ``[T, D]`` of the same dtype.
        value: ``[T, E]`` with the offsets of `key`.
        bias: ``[S, N, M]`` with N at least the longest segment; positions behind a segment's end are not read and get
            gradient 0.
        scale: Factor on query · key. Default 1, as in the paper, not 1/√D.

    Returns:
        ``[S, M, E]``, 0 for an empty segment.

    Raises:
        LayoutError: If `key` or `value` is not a Jagged, their offsets differ, or a segment is longer than N
            (checked on a CPU).
        ShapeError: If ranks, sizes, dtypes or devices of the operands do not match.

    >>> key = Jagged.from_lengths(torch.zeros(3, 1), [1, 2])
    >>> value = key.with_values(torch.tensor([[1.0], [2.0], [4.0]]))
    >>> jagged_dense_attention(torch.ones(2, 1, 1), key, value).tolist()
    [[[1.0]], [[3.0]]]
    """
    check_jagged(key, "key", 2, floating=True)
    check_jagged(value, "value", 2, floating=True)
    check_like(value.values, "value", key, "key")
    check_same_layout(key, value, "value", "must have the offsets of key")
    check_rows(query, "query", key, 3, "key")
    if query.shape[2] != key.values.shape[1]:
        seen = {"query": tuple(query.shape), "key": tuple(key.values.shape)}
        raise ShapeError(explain_values("query", "must be [S, M, D] with the features D of key", **seen))
    if bias is not None:
        check_rows(bias, "bias", key, 3, "key")
        if bias.shape[2] != query.shape[1]:
            seen = {"bias": tuple(bias.shape), "query": tuple(query.shape)}
            raise ShapeError(explain_values("bias", "must be [S, N, M] with M queries", **seen))
    return target(query, key.values, value.values, bias, key.offsets, scale)[0]


def _check_bias(bias: Tensor | None, lengths: list[int]) -> None:
    longest = max(lengths, default=0)
    if bias is not None and longest > bias.shape[1]:
        seen = {"longest": longest, "bias": tuple(bias.shape)}
        raise LayoutError(explain_values("bias", "must have a row for every position of a segment", **seen))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scores ``[M, n]`` of one segment in `dtype`; `q` is already scaled."""
    scores = torch.mm(k, q.t()) if bias is None else torch.addmm(bias[: k.shape[0]], k, q.t())
    return scores.t().to(dtype, memory_format=torch.contiguous_format)


@define("target")
def target(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[S, M, E]`` and log-sum-exp of the scores ``[S, M]``, the latter in float32 for half precision."""
    lengths = lengths_of(offsets, key.shape[0], "key.offsets")
    _check_bias(bias, lengths)
    out = query.new_zeros((*query.shape[:2], value.shape[1]))
    top = query.new_full(query.shape[:2], -torch.inf, dtype=_wide(query.dtype))  # the largest score of each query
    share = torch.ones_like(top)  # its softmax weight, never 0: lse = top - log(share)
    biases = [None] * len(lengths) if bias is None else bias.unbind(0)
    dense = (t.unbind(0) for t in (query * scale, out, top, share))
    for q, o, t, w, k, v, b in zip(*dense, cut(key, lengths), cut(value, lengths), biases, strict=True):
        if k.shape[0]:
            scores = _scores(q, k, b, top.dtype)
            torch.amax(scores, 1, out=t)
            weights = torch.softmax(scores, 1)
            torch.amax(weights, 1, out=w)
            torch.mm(weights.to(v.dtype), v, out=o)
    return out, top.sub_(share.log_())


@target.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:2], value.shape[1]))
    return out, query.new_empty(query.shape[:2], dtype=_wide(query.dtype))


@define("target_backward")
def target_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; that of the bias is empty if there is none."""
    lengths = lengths_of(offsets, key.shape[0])
    results = [t.new_empty(t.shape) for t in (query, key, value)]
    of_bias = query.new_empty((0,) if bias is None else bias.shape)
    none = [None] * len(lengths)
    pairs = (none, none) if bias is None else (bias.unbind(0), of_bias.unbind(0))
    query = query * scale
    dense = (t.unbind(0) for t in (grad, query, out, lse, results[0]))
    packed = (cut(t, lengths) for t in (key, value, *results[1:]))
    for g, q, o, log, dq, k, v, dk, dv, b, db in zip(*dense, *packed, *pairs, strict=True):
        if db is not None:
            db[k.shape[0] :].zero_()
        if not k.shape[0]:
            dq.zero_()
            continue
        weights = _scores(q, k, b, lse.dtype).sub_(log[:, None]).exp_()
        torch.mm(weights.to(g.dtype).t(), g, out=dv)
        inner = (g * o).sum(1, keepdim=True, dtype=lse.dtype)
        scores = torch.mm(g, v.t()).to(lse.dtype).sub_(inner).mul_(weights).to(g.dtype)
        if db is not None:
            db[: k.shape[0]].copy_(scores.t())
        torch.mm(scores, k, out=dq)
        torch.mm(scores.t(), q, out=dk)
    return results[0].mul_(scale), results[1], results[2], of_bias


@target_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (t.new_empty(t.shape) for t in (query, key, value))
    return of_query, of_key, of_value, query.new_empty((0,) if bias is None else bias.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, offsets, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, bias, offsets, *output)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, bias, offsets, out, lse = ctx.saved_tensors
    *found, of_bias = target_backward(grad, query, key, value, bias, out, lse, offsets, ctx.scale)
    return *found, None if bias is None else of_bias, None, None


def _composed(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, offsets: Tensor, scale: float) -> Tensor:
    """Output of :func:`target` by operators differentiable to any order; holds all T × M scores at once."""
    segments, queries, _ = query.shape
    columns = torch.arange(segments + 1, device=offsets.device, dtype=offsets.dtype) * queries
    scores = outer(key, (query * scale).flatten(0, 1), offsets, columns, key.shape[0] * queries)
    if bias is not None:
        scores = scores + unpad(bias, offsets, key.shape[0], True).flatten()
    weights = matrix_softmax(scores, offsets, columns, 0)
    return times_packed(weights, value, offsets, columns, True, segments * queries).unflatten(0, (segments, queries))


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, query, key, value, bias, _, _, offsets, scale = inputs
    ctx.save_for_backward(grad, query, key, value, bias, offsets)
    ctx.scale = scale


def _backward_twice(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
    grad, query, key, value, bias, offsets = ctx.saved_tensors
    operands = (query, key, value) if bias is None else (query, key, value, bias)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return _composed(query, key, value, bias, offsets, ctx.scale)

    def gradients(grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(run, *operands)[1](grad)

    found = torch.func.vjp(gradients, grad, *operands)[1](above[: len(operands)])
    return *found, *[None] * (9 - len(found))


target.register_autograd(_backward, setup_context=_setup)
target_backward.register_autograd(_backward_twice, setup_context=_setup_twice)
target.register_kernel("flexjag.ops.triton.target")
target_backward.register_kernel("flexjag.ops.triton.target")
target.register_kernel("flexjag.ops.cpp.target", "CPU")
target_backward.register_kernel("flexjag.ops.cpp.target", "CPU")
