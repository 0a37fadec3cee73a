"""Every ragged op beside a plain loop over segments: the table that the tests of ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad, rms_norm

from flexjag import Jagged, ops

D, E, M = 3, 2, 2
LONG, CUT = 50, 4
"""Padded lengths: over every segment of the edge table, and under many."""

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """One way to call one op.

    Attributes:
        shapes: The shapes of the operands that need gradients; letters are sizes: S segments, T and U tokens of two
            batches, P entries of the matrices T × U, Q of the matrices U × U.
        run: The call, on the two batches' offsets and the operands.
        loop: The same by a loop, on the two batches' lengths and the operands.
        segments: What belongs to each segment of a result: "t", "u" tokens, "s" a row, "p", "q" a matrix, or
            "" if the result is made of something else.
    """

    shapes: tuple[tuple[int | str, ...], ...]
    run: Callable[..., Result]
    loop: Callable[..., Result]
    segments: str = "t"

    def operands(self, lengths: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        """Random normal operands that need gradients."""
        other = others(lengths)
        sizes = {
            "S": len(lengths),
            "T": sum(lengths),
            "U": sum(other),
            "P": sum(n * m for n, m in zip(lengths, other, strict=True)),
            "Q": sum(m * m for m in other),
        }
        generator = torch.Generator().manual_seed(seed)
        found = []
        for shape in self.shapes:
            concrete = [n if isinstance(n, int) else sizes[n] for n in shape]
            found.append(torch.randn(concrete, generator=generator, dtype=torch.float64).to(dtype).requires_grad_())
        return found


def others(lengths: Sequence[int]) -> list[int]:
    """The lengths of the second batch."""
    return [(3 * n + 1) % 5 for n in reversed(lengths)]


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def both(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """The offsets of the two batches."""
    return offsets_of(lengths, dtype), offsets_of(others(lengths), dtype)


def _cat(parts: Sequence[Tensor], like: Tensor, *shape: int) -> Tensor:
    return torch.cat(list(parts)) if parts else like.reshape(-1)[:0].reshape(0, *shape)


def _stack(parts: Sequence[Tensor], like: Tensor, *shape: int) -> Tensor:
    return torch.stack(list(parts)) if parts else like.reshape(-1)[:0].reshape(0, *shape)


def _softmax(a: list[int], b: list[int], x: Tensor) -> Tensor:
    return _cat([t.softmax(0) for t in x.split(a)], x, *x.shape[1:]) if a else x


def _dense_bmm(a: list[int], b: list[int], x: Tensor, y: Tensor) -> Tensor:
    return _cat([t @ m for t, m in zip(x.split(a), y, strict=True)] if a else [], x, E) + y.sum() * 0


def _jagged_bmm(a: list[int], b: list[int], x: Tensor, y: Tensor) -> Tensor:
    return _stack([s.T @ t for s, t in zip(x.split(a), y.split(a), strict=True)] if a else [], x, D, E) + y.sum() * 0


def _jagged_out(a: list[int], b: list[int], x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.split(a), y.split(b), strict=True) if a else []
    return _cat([(s @ t.T).flatten() for s, t in pairs], x) + y.sum() * 0


def _matrices(p: Tensor, a: list[int], b: list[int]) -> list[Tensor]:
    sizes = [n * m for n, m in zip(a, b, strict=True)]
    return [t.view(n, m) for t, n, m in zip(p.split(sizes), a, b, strict=True)] if a else []


def _array_bmm(a: list[int], b: list[int], p: Tensor, y: Tensor) -> Tensor:
    parts = y.split(b) if a else []
    return _cat([m @ t for m, t in zip(_matrices(p, a, b), parts, strict=True)], y, D) + p.sum() * 0


def _matrix_softmax(dim: int) -> Callable[..., Tensor]:
    return lambda a, b, p: _cat([m.softmax(dim).flatten() for m in _matrices(p, a, b)], p)


def _elementwise(fn: Callable[[Tensor, Tensor], Tensor], width: int) -> Callable[..., Tensor]:
    """`dense` stands for zeros from `width` on."""

    def loop(a: list[int], b: list[int], x: Tensor, dense: Tensor) -> Tensor:
        rows = pad(dense, (0, 0, 0, LONG - width))
        return _cat([fn(t, r[: len(t)]) for t, r in zip(x.split(a) if a else [], rows, strict=True)], x, D) + 0 * x

    return loop


def _padded(width: int, fill: float) -> Callable[..., Tensor]:
    def loop(a: list[int], b: list[int], x: Tensor) -> Tensor:
        parts = x.split(a) if a else []
        return _stack([pad(t[:width], (0, 0, 0, width - len(t[:width])), value=fill) for t in parts], x, width, D)

    return loop


def _packed(a: list[int], b: list[int], dense: Tensor) -> Tensor:
    rows = pad(dense, (0, 0, 0, LONG - dense.shape[1]))
    return _cat([r[:n] for r, n in zip(rows, a, strict=True)], dense, D)


def _select(offsets: Tensor, other: Tensor, x: Tensor) -> Tensor:
    segment = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return ops.jagged_index_select(Jagged(x, offsets), torch.cat([segment.flip(0), segment // 2])).values


def _select_loop(a: list[int], b: list[int], x: Tensor) -> Tensor:
    parts = x.split(a) if a else []
    return _cat([parts[i] for i in [*reversed(range(len(a))), *(i // 2 for i in range(len(a)))]], x, D)


def _concat_loop(a: list[int], b: list[int], x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.split(a), y.split(b), strict=True) if a else []
    return _cat([t for pair in pairs for t in pair], x, D) + y.sum() * 0


def _split(offsets: Tensor, other: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    batch = Jagged(x, offsets)
    return tuple(piece.values for piece in ops.jagged_split(batch, [batch.lengths // 3, 2]))


def _split_loop(a: list[int], b: list[int], x: Tensor) -> tuple[Tensor, ...]:
    parts = x.split(a) if a else []
    ends = [(n // 3, min(n, n // 3 + 2)) for n in a]
    cuts = [(t[:lo], t[lo:hi], t[hi:]) for t, (lo, hi) in zip(parts, ends, strict=True)]
    return tuple(_cat([c[i] for c in cuts], x, D) for i in range(3))


def _reduced(fn: Callable[[Tensor], Tensor], empty: float = 0.0) -> Callable[..., Tensor]:
    def loop(a: list[int], b: list[int], x: Tensor) -> Tensor:
        return _stack([fn(t) if len(t) else t.sum(0) + empty for t in (x.split(a) if a else [])], x, D)

    return loop


def _segment_norm(rms: bool) -> Callable[..., Tensor]:
    def loop(a: list[int], b: list[int], x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        norm = (lambda t: rms_norm(t, t.shape, eps=1e-6)) if rms else (lambda t: layer_norm(t, t.shape))
        rows = _cat([norm(t.flatten()).view(t.shape) if len(t) else t for t in (x.split(a) if a else [])], x, D)
        return rows * weight + (bias[0] if bias else 0.0)

    return loop


def _attention(scale: float) -> Callable[..., Tensor]:
    def loop(a: list[int], b: list[int], q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        found = []
        for s, (x, y, z) in enumerate(zip(q, k.split(a), v.split(a), strict=True) if a else []):
            scores = scale * (x @ y.T) + (bias[0][s, : len(y)].T if bias else 0.0)
            found.append(scores.softmax(1) @ z)
        return _stack(found, q, M, E) + 0 * (k.sum() + v.sum() + sum(t.sum() for t in bias))

    return loop


def _values(fn: Callable[..., Jagged], *more: object, **keywords: object) -> Callable[..., Tensor]:
    """An op on the first batch and further operands."""
    return lambda a, b, x, *rest: fn(Jagged(x, a), *rest, *more, **keywords).values


def _rows(fn: Callable[..., Tensor], *more: object) -> Callable[..., Tensor]:
    return lambda a, b, x: fn(Jagged(x, a), *more)


X = ("T", D)
OPS: dict[str, Op] = {
    "jagged_softmax": Op((X,), _values(ops.jagged_softmax), _softmax),
    "jagged_softmax, heads": Op((("T", 2, D),), _values(ops.jagged_softmax), _softmax),
    "jagged_softmax, no features": Op((("T",),), _values(ops.jagged_softmax), _softmax),
    "jagged_dense_bmm": Op((X, ("S", D, E)), _values(ops.jagged_dense_bmm), _dense_bmm),
    "jagged_jagged_bmm": Op(
        (X, ("T", E)), lambda a, b, x, y: ops.jagged_jagged_bmm(Jagged(x, a), Jagged(y, a)), _jagged_bmm, "s"
    ),
    "jagged_jagged_bmm_jagged_out": Op(
        (X, ("U", D)),
        lambda a, b, x, y: ops.jagged_jagged_bmm_jagged_out(Jagged(x, a), Jagged(y, b)).values,
        _jagged_out,
        "p",
    ),
    "array_jagged_bmm": Op(
        (("P",), ("U", D)),
        lambda a, b, p, y: ops.array_jagged_bmm(Jagged(p, product(a, b)), Jagged(y, b), a).values,
        _array_bmm,
    ),
    "array_jagged_bmm, square": Op(
        (("Q",), ("U", D)),
        lambda a, b, p, y: ops.array_jagged_bmm(Jagged(p, product(b, b)), Jagged(y, b)).values,
        lambda a, b, p, y: _array_bmm(b, b, p, y),
        "u",
    ),
    "jagged2_softmax": Op(
        (("P",),), lambda a, b, p: ops.jagged2_softmax(Jagged(p, product(a, b)), a, b).values, _matrix_softmax(1), "p"
    ),
    "jagged2_softmax, dim 0": Op(
        (("P",),),
        lambda a, b, p: ops.jagged2_softmax(Jagged(p, product(a, b)), a, b, dim=0).values,
        _matrix_softmax(0),
        "p",
    ),
    "jagged2_softmax, square": Op(
        (("Q",),),
        lambda a, b, p: ops.jagged2_softmax(Jagged(p, product(b, b)), b).values,
        lambda a, b, p: _matrix_softmax(1)(b, b, p),
        "q",
    ),
    "jagged_dense_elementwise_add": Op(
        (X, ("S", LONG, D)), _values(ops.jagged_dense_elementwise_add), _elementwise(torch.add, LONG)
    ),
    "jagged_dense_elementwise_add, longer": Op(
        (X, ("S", CUT, D)),
        _values(ops.jagged_dense_elementwise_add, allow_longer=True),
        _elementwise(torch.add, CUT),
    ),
    "jagged_dense_elementwise_mul": Op(
        (X, ("S", LONG, D)), _values(ops.jagged_dense_elementwise_mul), _elementwise(torch.mul, LONG)
    ),
    "jagged_dense_elementwise_mul, longer": Op(
        (X, ("S", CUT, D)),
        _values(ops.jagged_dense_elementwise_mul, allow_longer=True),
        _elementwise(torch.mul, CUT),
    ),
    "jagged_to_padded_dense": Op((X,), _rows(ops.jagged_to_padded_dense, LONG), _padded(LONG, 0.0), "s"),
    "jagged_to_padded_dense, cut": Op((X,), _rows(ops.jagged_to_padded_dense, CUT, -2.5), _padded(CUT, -2.5), "s"),
    "dense_to_jagged": Op((("S", LONG, D),), lambda a, b, dense: ops.dense_to_jagged(dense, a).values, _packed),
    "dense_to_jagged, longer": Op(
        (("S", CUT, D),), lambda a, b, dense: ops.dense_to_jagged(dense, a, allow_longer=True).values, _packed
    ),
    "jagged_index_select": Op((X,), _select, _select_loop, ""),
    "jagged_concat": Op(
        (X, ("U", D)), lambda a, b, x, y: ops.jagged_concat([Jagged(x, a), Jagged(y, b)]).values, _concat_loop, ""
    ),
    "jagged_split": Op((X,), _split, _split_loop, ""),
    "segment_sum": Op((X,), _rows(ops.segment_sum), _reduced(lambda t: t.sum(0)), "s"),
    "segment_broadcast": Op(
        (("S", D), X),
        lambda a, b, rows, x: (Jagged(x, a) + ops.segment_broadcast(rows, Jagged(x, a))).values,
        lambda a, b, rows, x: x + _cat([r.expand(n, D) for r, n in zip(rows, a, strict=True)], rows, D),
    ),
    "segment_mean": Op((X,), _rows(ops.segment_mean), _reduced(lambda t: t.mean(0)), "s"),
    "segment_max": Op((X,), _rows(ops.segment_max), _reduced(lambda t: t.amax(0)), "s"),
    "segment_min": Op((X,), _rows(ops.segment_min, 9.0), _reduced(lambda t: t.amin(0), 9.0), "s"),
    "jagged_layer_norm": Op(
        (X, (D,), (D,)), _values(ops.jagged_layer_norm), lambda a, b, x, w, c: layer_norm(x, (D,), w, c)
    ),
    "jagged_layer_norm, segment": Op(
        (X, (D,), (D,)), _values(ops.jagged_layer_norm, per="segment"), _segment_norm(rms=False)
    ),
    "jagged_rms_norm": Op((X, (D,)), _values(ops.jagged_rms_norm), lambda a, b, x, w: rms_norm(x, (D,), w, 1e-6)),
    "jagged_rms_norm, segment": Op((X, (D,)), _values(ops.jagged_rms_norm, per="segment"), _segment_norm(rms=True)),
    "jagged_dense_attention": Op(
        (("S", M, D), X, ("T", E), ("S", LONG, M)),
        lambda a, b, q, k, v, bias: ops.jagged_dense_attention(q, Jagged(k, a), Jagged(v, a), bias),
        _attention(1.0),
        "s",
    ),
    "jagged_dense_attention, scaled": Op(
        (("S", M, D), X, ("T", E)),
        lambda a, b, q, k, v: ops.jagged_dense_attention(q, Jagged(k, a), Jagged(v, a), scale=0.5),
        _attention(0.5),
        "s",
    ),
}


def product(a: Tensor, b: Tensor) -> Tensor:
    """The offsets of the matrices a × b."""
    return pad(((a[1:] - a[:-1]) * (b[1:] - b[:-1])).cumsum(0), (1, 0))
