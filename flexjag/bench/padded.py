"""Packed rows to padded ones and back, as users write it; and checks against float64, for suites that share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from flexjag.bench.measure import RESULTS, disagreement

Tensors = tuple[Tensor, ...]


class Padding:
    """Where each packed token sits in a padded batch.

    Args:
        lengths: Of the segments, S in number.
        device: Of the index.
        longest: N. Default: the longest.

    >>> padding = Padding([2, 1], "cpu")
    >>> padding.pad(torch.tensor([1, 2, 3])).tolist()
    [[1, 2], [3, 0]]
    """

    def __init__(self, lengths: Sequence[int], device: str, longest: int | None = None) -> None:
        self.segments, self.longest = len(lengths), max(lengths) if longest is None else longest
        rows = [torch.arange(n) + s * self.longest for s, n in enumerate(lengths)]
        self.index = torch.cat(rows).to(device)

    @property
    def fill(self) -> float:
        """The share of the padded batch that is not padding."""
        return self.index.shape[0] / (self.segments * self.longest)

    @cached_property
    def real(self) -> Tensor:
        """Boolean ``[S, N]``: which places hold a token."""
        flat = torch.zeros(self.segments * self.longest, dtype=torch.bool, device=self.index.device)
        return flat.index_fill_(0, self.index, True).view(self.segments, self.longest)

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """``[T, ...]`` to ``[S, N, ...]``, zeros or `fill` behind the segments' ends."""
        flat = x.new_full((self.segments * self.longest, *x.shape[1:]), fill).index_copy_(0, self.index, x)
        return flat.view(self.segments, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """``[S, N, ...]`` to ``[T, ...]``."""
        return x.flatten(0, 1).index_select(0, self.index)


class Expected:
    """What a computation should give, in float64 and rounded to its own precision; computed once, when first asked.

    Args:
        compute: From a dtype to outputs and gradients.
        dtype: Of the arms that are to be checked.
        names: Of those results.
        terms: As :func:`flexjag.bench.measure.disagreement` takes it, for all results or for each of `names`.
    """

    def __init__(
        self,
        compute: Callable[[torch.dtype], Tensors],
        dtype: torch.dtype,
        names: Sequence[str] = RESULTS,
        terms: int | Sequence[int] = 1,
    ) -> None:
        self._compute, self._dtype, self._names = compute, dtype, names
        self._terms = [terms] * len(names) if isinstance(terms, int) else terms

    def check(self, got: Tensors) -> str | None:
        """What is wrong with an arm's results, or None."""
        exact, rounded = self._results
        if len(got) != len(exact):
            return f"{len(got)} results instead of {len(exact)}"
        each = zip(got, exact, rounded, self._names, self._terms, strict=False)
        found = (disagreement([x], [y], [z], [name], terms) for x, y, z, name, terms in each)
        return next((wrong for wrong in found if wrong is not None), None)

    @cached_property
    def _results(self) -> tuple[Tensors, Tensors]:
        return self._compute(torch.float64), self._compute(self._dtype)


def with_gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Callable[[], Tensors]:
    """The call that returns a forward's output and the gradients of `leaves`."""

    def call() -> Tensors:
        out = forward()
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return call
