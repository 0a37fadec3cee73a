"""Assertion that segments are isolated from each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexjag.api.attention import attention
from flexjag.jagged import Jagged

Attend = Callable[[Jagged, Jagged, Jagged], Any]


def _bits(x: Tensor) -> Tensor:
    """Bytes of a tensor, one row per token, so that -0.0 differs from 0.0 and NaN equals itself."""
    x = x.detach().clone(memory_format=torch.contiguous_format)  # a tensor of one element is contiguous with any stride
    return x.flatten().view(torch.uint8).view(x.shape[0], -1)


def _outputs(attend: Attend, q: Jagged, k: Jagged, v: Jagged) -> list[Jagged]:
    got = attend(q, k, v)
    found = list(got) if isinstance(got, (tuple, list)) else [got]
    for x in found:
        if not isinstance(x, Jagged) or x.values.shape[0] != q.values.shape[0]:
            raise AssertionError(f"the function must return Jagged batches with q's tokens; got {x!r}")
    return found


def assert_no_leak(attend: Attend | str, q: Jagged, k: Jagged, v: Jagged, *, seed: int = 0, **keywords: Any) -> None:
    """Assert that changing one segment leaves every other segment's output bitwise the same.

    For each segment in turn, q, k and v are replaced by random values ten times as large.

    Args:
        attend: A function ``attend(q, k, v)`` that returns a Jagged on q's offsets or a tuple of them, or the name of a
            backend, to test :func:`flexjag.attention` with its log-sum-exp.
        q: ``[T_q, ...]``.
        k: ``[T_kv, ...]``.
        v: ``[T_kv, ...]``.
        seed: Seed of the random values.
        **keywords: Passed to :func:`flexjag.attention` if `attend` names a backend (mask, score, plan, scale,
            return_lse).

    Raises:
        AssertionError: If another segment's output changes, naming the replaced segment and the first changed token.

    >>> x = Jagged.from_lengths(torch.randn(6, 1, 16), [2, 4])
    >>> assert_no_leak("tiled", x, x, x)
    """
    if isinstance(attend, str):
        keywords = {"return_lse": True, **keywords, "backend": attend}
        call: Attend = lambda q, k, v: attention(q, k, v, **keywords)  # noqa: E731
    elif keywords:
        raise TypeError(f"keywords go with a backend's name only; got {sorted(keywords)}")
    else:
        call = attend
    g = torch.Generator().manual_seed(seed)
    before = _outputs(call, q, k, v)
    for segment in range(q.num_segments):
        changed = [_with_other_values(x, segment, g) for x in (q, k, v)]
        after = _outputs(call, *changed)
        first, end = q.offsets[segment : segment + 2].tolist()
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            differs = (
                (_bits(a.values) != _bits(b.values)).any(1) if a.values.numel() else torch.zeros(0, dtype=torch.bool)
            )
            differs[first:end] = False
            if bool(differs.any()):
                token = int(torch.nonzero(differs)[0])
                raise AssertionError(
                    f"segment {segment} leaks: changing its values (tokens {first} to {end}) changed output {index} of "
                    f"{int(differs.sum())} tokens of other segments, first token {token}; "
                    f"q_lengths={q.lengths.tolist()}, kv_lengths={k.lengths.tolist()}"
                )


def _with_other_values(x: Jagged, segment: int, generator: torch.Generator) -> Jagged:
    first, end = x.offsets[segment : segment + 2].tolist()
    values = x.values.detach().clone()
    noise = torch.randn(values[first:end].shape, generator=generator) * 10
    values[first:end] = noise.to(values.device, values.dtype)
    return x.with_values(values.requires_grad_(x.values.requires_grad))
