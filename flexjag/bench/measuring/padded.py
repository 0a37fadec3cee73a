"""Conversion of packed to padded tensors and back, as users write it; and checks against float64. Shared by suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from flexjag.bench.measuring.measure import RESULTS, disagreement

Tensors = tuple[Tensor, ...]


class Padding:
    """Index between the packed ``[T, ...]`` and the padded ``[S, N, ...]`` layout of a batch.

    Args:
        lengths: The S segment lengths.
        device: Device of the index.
        longest: Padded length N. Default: the longest segment.

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
        """Fraction of the padded batch that is tokens, T / (S·N)."""
        return self.index.shape[0] / (self.segments * self.longest)

    @cached_property
    def real(self) -> Tensor:
        """Padding mask, bool ``[S, N]``: True for tokens."""
        flat = torch.zeros(self.segments * self.longest, dtype=torch.bool, device=self.index.device)
        return flat.index_fill_(0, self.index, True).view(self.segments, self.longest)

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Pad ``[T, ...]`` to ``[S, N, ...]`` with `fill` on the right."""
        flat = x.new_full((self.segments * self.longest, *x.shape[1:]), fill).index_copy_(0, self.index, x)
        return flat.view(self.segments, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """Pack ``[S, N, ...]`` to ``[T, ...]``."""
        return x.flatten(0, 1).index_select(0, self.index)


class Expected:
    """Reference results in float64 and in the arms' precision, computed once, at the first check.

    Args:
        compute: Function of a dtype that returns outputs and gradients in it.
        dtype: Dtype of the arms to be checked.
        names: Names of the results.
        terms: Terms summed in free order (:func:`flexjag.bench.measuring.measure.disagreement`), for all results or
            for each.
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
        """Description of the first result that is off by more than rounding; None if all agree."""
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
    """A function that runs forward and backward, and returns the output and the gradients of `leaves`."""

    def call() -> Tensors:
        out = forward()
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return call
