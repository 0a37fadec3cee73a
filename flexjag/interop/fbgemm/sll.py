"""FBGEMM's ``sll_*`` functions on packed rows, attention among them (``fbgemm_gpu/sll``, Jagged Flash Attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag import ops
from flexjag.algebra.masks import Mask, Prefix, Window
from flexjag.api.attention import attention
from flexjag.errors import ShapeError, explain_values
from flexjag.interop.fbgemm.common import Integer, check_tensor, integer, kept, only, read
from flexjag.interop.fbgemm.products import (
    jagged_dense_bmm,
    jagged_dense_elementwise_add_jagged_output,
    jagged_jagged_bmm,
    jagged_softmax,
)
from flexjag.jagged import Jagged
from flexjag.ops.checks import can_look


def sll_jagged_dense_bmm(
    x: Tensor, y: Tensor, x_offsets: Tensor, N: Integer, allow_tf32: bool = True, use_fbgemm_kernel: bool = True
) -> Tensor:
    """The values of :func:`jagged_dense_bmm`.

    In all ``sll_*`` functions `allow_tf32` and `use_fbgemm_kernel` are ignored, as on FBGEMM's CPU;
    ``torch.backends.cuda.matmul`` sets TF32.

    Args:
        x: ``[T, D]`` floating point.
        y: ``[S, D, E]``.
        x_offsets: ``[S+1]``.
        N: Maximal length; later rows of the result are 0.
        allow_tf32: Ignored.
        use_fbgemm_kernel: Ignored.

    Returns:
        ``[T, E]``.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> sll_jagged_dense_bmm(torch.ones(2, 1), torch.full((1, 1, 1), 3.0), torch.tensor([0, 2]), 1).tolist()
    [[3.0], [0.0]]
    """
    return jagged_dense_bmm(x, x_offsets, y, N)[0]


def sll_jagged_jagged_bmm(
    x: Tensor, y: Tensor, x_offsets: Tensor, N: Integer, allow_tf32: bool = True, use_fbgemm_kernel: bool = True
) -> Tensor:
    """The same as :func:`jagged_jagged_bmm`: ``[T, D]`` and ``[T, E]`` to ``[S, D, E]``.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> sll_jagged_jagged_bmm(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([0, 2]), 5).tolist()
    [[[2.0]]]
    """
    return jagged_jagged_bmm(x, y, x_offsets, N)


def sll_jagged_softmax(x: Tensor, x_offsets: Tensor, max_seq_len: Integer, use_fbgemm_kernel: bool = True) -> Tensor:
    """The values of :func:`jagged_softmax`: ``[T, D]`` to ``[T, D]``.

    Raises:
        LayoutError: If the offsets are invalid.
        ShapeError: If shapes do not match.

    >>> sll_jagged_softmax(torch.ones(2, 1), torch.tensor([0, 2]), 2).tolist()
    [[0.5], [0.5]]
    """
    return jagged_softmax(x, x_offsets, max_seq_len)[0]


def sll_jagged_dense_elementwise_add(
    x: Tensor, x_offsets: Tensor, y: Tensor, max_seq_len: Integer, use_fbgemm_kernel: bool = True
) -> Tensor:
    """The values of :func:`jagged_dense_elementwise_add_jagged_output`: ``[T, D]`` and ``[S, N, D]`` to ``[T, D]``.

    `max_seq_len` is ignored: segments are bounded by the size of `y`, as in FBGEMM.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> sll_jagged_dense_elementwise_add(torch.ones(2, 1), torch.tensor([0, 2]), torch.ones(1, 1, 1), 5).tolist()
    [[2.0], [1.0]]
    """
    return jagged_dense_elementwise_add_jagged_output(x, [x_offsets], y)[0]


def sll_dense_jagged_cat_jagged_out(
    a: Tensor, b: Tensor, a_offsets: Tensor, max_seq_len: Integer
) -> tuple[Tensor, Tensor]:
    """Prepend one value to every segment.

    Differentiable without the warning that FBGEMM gives. `max_seq_len` is ignored, as on FBGEMM's CPU; its CUDA
    kernel writes zeros beyond it.

    Args:
        a: Values to prepend ``[S]``; other dtypes are promoted.
        b: ``[T]``.
        a_offsets: ``[S+1]`` of `b`, in spite of the name; they must cover all rows.
        max_seq_len: Ignored.

    Returns:
        ``[T + S]``, and its offsets in int64.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> sll_dense_jagged_cat_jagged_out(torch.tensor([8, 9]), torch.tensor([1, 2]), torch.tensor([0, 0, 2]), 2)
    (tensor([8, 9, 1, 2]), tensor([0, 1, 4]))
    """
    check_tensor(a, "a", 1)
    check_tensor(b, "b", 1)
    dtype = torch.promote_types(a.dtype, b.dtype)
    ones = torch.arange(a.shape[0] + 1, device=a.device)
    out = ops.jagged_concat([Jagged(a.to(dtype), ones), Jagged(b.to(dtype), a_offsets)])
    return out.values, a_offsets + ones


def sll_jagged_dense_flash_attention(
    q_weights: Tensor,
    k_weights: Tensor,
    v_weights: Tensor,
    attn_bias: Tensor,
    offsets: Tensor,
    max_seq_len: Integer,
    allow_tf32: bool = True,
) -> Tensor:
    """Target attention: ``out[s, m] = Σ_i softmax_i(q[s, i] · k[s, :, m] + bias[s, i, m]) v[s, i]``.

    The names are swapped: the dense k holds the queries, and the jagged q the keys. Scores are not scaled.

    Args:
        q_weights: ``[T, D]`` floating point.
        k_weights: ``[S, D, M]``, converted to the dtype of `q_weights`.
        v_weights: ``[T, E]``, converted to the dtype of the scores.
        attn_bias: ``[S, N, M]``, trainable; 0 at positions from N on. Its gradient at positions from
            `max_seq_len` on is 0; in FBGEMM it is uninitialized memory.
        offsets: ``[S+1]``; they must cover all rows.
        max_seq_len: Maximal length; later keys are ignored.
        allow_tf32: Ignored; see :func:`sll_jagged_dense_bmm`.

    Returns:
        ``[S, M, E]``, 0 for an empty segment.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match.

    >>> q, v, k = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [4.0]]), torch.ones(2, 1, 1)
    >>> sll_jagged_dense_flash_attention(q, k, v, torch.zeros(2, 2, 1), torch.tensor([0, 1, 3]), 2).tolist()
    [[[1.0]], [[3.0]]]
    """
    for tensor, name, ndim in (
        (q_weights, "q_weights", 2),
        (k_weights, "k_weights", 3),
        (v_weights, "v_weights", 2),
        (attn_bias, "attn_bias", 3),
    ):
        check_tensor(tensor, name, ndim)
    k_weights = k_weights.to(q_weights.dtype)
    size = integer(max_seq_len, "max_seq_len")
    if can_look(offsets) and attn_bias.dtype == q_weights.dtype:
        rows = read(q_weights, offsets, min(size, attn_bias.shape[1]))
        if rows.keep is None:  # no segment is truncated: one pass, and no weights are stored
            value = rows.x.with_values(v_weights.to(q_weights.dtype))
            return ops.jagged_dense_attention(k_weights.transpose(1, 2), rows.x, value, attn_bias)
    scores, _ = jagged_dense_bmm(q_weights, offsets, k_weights, size)
    scores, _ = jagged_dense_elementwise_add_jagged_output(scores, [offsets], attn_bias)
    weights, _ = jagged_softmax(scores, offsets, size)
    return jagged_jagged_bmm(weights, v_weights.to(weights.dtype), offsets, size)


def sll_jagged_flash_attention_basic(
    q_weights: Tensor,
    k_weights: Tensor,
    v_weights: Tensor,
    offsets: Tensor,
    max_seq_len: Integer,
    use_mask: bool = False,
    allow_tf32: bool = True,
) -> Tensor:
    """Self-attention with weights divided by `max_seq_len`: ``out_i = Σ_j softmax_j(q_i · k_j) v_j / max_seq_len``.

    Scores are not scaled. `use_mask` zeroes the weights of keys before the query, j < i, *after* the softmax, so that
    the weights of a row do not sum to one. Rows of the result from position `max_seq_len` on are 0. Values from there
    on are ignored, but their keys still enter the softmax, as on FBGEMM's CPU; its CUDA kernel ignores the keys, too.
    FBGEMM's CPU refuses such segments with `use_mask`. The gradients are those of this result; FBGEMM's CPU gradients
    differ for truncated segments.

    The score matrices are not stored.

    Args:
        q_weights: ``[T, D]`` floating point.
        k_weights: ``[T, D]`` of the same dtype.
        v_weights: ``[T, E]`` of the same dtype.
        offsets: ``[S+1]``; they must cover all rows.
        max_seq_len: Maximal length, also the divisor.
        use_mask: Whether to zero the weights of keys before the query.
        allow_tf32: Ignored; see :func:`sll_jagged_dense_bmm`.

    Returns:
        ``[T, E]``.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match, or `max_seq_len` is not positive.

    >>> q, v = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
    >>> sll_jagged_flash_attention_basic(q, q, v, torch.tensor([0, 2]), 2).tolist()
    [[1.0], [1.0]]
    >>> sll_jagged_flash_attention_basic(q, q, v, torch.tensor([0, 2]), 2, use_mask=True).tolist()
    [[1.0], [0.75]]
    """
    names = ("q_weights", "k_weights", "v_weights")
    for tensor, name in zip((q_weights, k_weights, v_weights), names, strict=True):
        check_tensor(tensor, name, 2)
    q, k, v = (t.unsqueeze(1) for t in (q_weights, k_weights, v_weights))
    size = integer(max_seq_len, "max_seq_len")
    keep = _check_attention(q, k, v, offsets, size)
    v = v if keep is None else only(keep, v)
    if use_mask:
        # Masking after a softmax equals the softmax over the remaining keys times their share of the total weight.
        out, left = _attend(q, k, v, offsets, Window(0, None))
        _, total = _attend(q, k, v[..., :1], offsets)
        values = out * (left - total).exp().unsqueeze(-1).to(out.dtype)
    else:
        values = _attend(q, k, v, offsets, lse=False)[0]
    values = (values / size).squeeze(1)
    return values if keep is None else only(keep, values)


def sll_multi_head_jagged_flash_attention(
    q_weights: Tensor,
    k_weights: Tensor,
    v_weights: Tensor,
    offsets: Tensor,
    max_seq_len: Integer,
    allow_tf32: bool = True,
) -> Tensor:
    """Multi-head self-attention with weights divided by `max_seq_len` and unscaled scores.

    As :func:`sll_jagged_flash_attention_basic` without a mask, but segments are truncated to `max_seq_len` tokens
    before the softmax; later rows are 0. FBGEMM implements it for CUDA only.

    Args:
        q_weights: ``[H, T, D]`` floating point.
        k_weights: ``[H, T, D]`` of the same dtype.
        v_weights: ``[H, T, D]`` of the same dtype.
        offsets: ``[S+1]``; they must cover all rows.
        max_seq_len: Maximal length, also the divisor.
        allow_tf32: Ignored; see :func:`sll_jagged_dense_bmm`.

    Returns:
        ``[H, T, D]``.

    Raises:
        LayoutError: If the offsets are invalid or do not cover all rows.
        ShapeError: If shapes do not match, or `max_seq_len` is not positive.

    >>> q, v = torch.zeros(1, 3, 1), torch.tensor([[[2.0], [6.0], [9.0]]])
    >>> sll_multi_head_jagged_flash_attention(q, q, v, torch.tensor([0, 3]), 2).tolist()
    [[[2.0], [2.0], [0.0]]]
    """
    names = ("q_weights", "k_weights", "v_weights")
    for tensor, name in zip((q_weights, k_weights, v_weights), names, strict=True):
        check_tensor(tensor, name, 3)
    q, k, v = (t.transpose(0, 1) for t in (q_weights, k_weights, v_weights))
    size = integer(max_seq_len, "max_seq_len")
    keep = _check_attention(q, k, v, offsets, size)
    mask = None if keep is None else Prefix(size)
    values = _attend(q, k, v, offsets, mask, lse=False)[0] / size
    return (values if keep is None else only(keep, values)).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, mask: Mask | None = None, *, lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention with scale 1; if not `lse`, the output twice."""
    batches = (Jagged(t, offsets) for t in (q, k, v))
    found = attention(*batches, mask=mask, scale=1.0, return_lse=lse)
    out, sums = (found, found) if isinstance(found, Jagged) else found
    return out.values, sums.values


def _check_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_seq_len: int) -> Tensor | None:
    """Check sizes and offsets, and return the boolean mask of tokens to keep, None for all."""
    if max_seq_len < 1:
        raise ShapeError(explain_values("max_seq_len", "must be positive", max_seq_len=max_seq_len))
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        seen = {"q_weights": tuple(q.shape), "k_weights": tuple(k.shape), "v_weights": tuple(v.shape)}
        raise ShapeError(explain_values("q_weights", "must have the tokens of k_weights and v_weights", **seen))
    x = Jagged(q, offsets)
    if not can_look(offsets):
        return kept(offsets, q.shape[0], max_seq_len)
    x.validate()
    longest = int(x.lengths.max()) if x.num_segments else 0
    return kept(offsets, q.shape[0], max_seq_len) if longest > max_seq_len else None
