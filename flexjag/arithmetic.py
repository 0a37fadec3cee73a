"""Arithmetic operators for classes that define an elementwise combination."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self


class Arithmetic:
    """Mixin with ``+ - * /`` and negation, between objects of a subclass and with numbers on either side."""

    __array_ufunc__ = None  # NumPy scalars on the left defer to these operators

    @abstractmethod
    def _combine(self, other: Any, fn: Callable[[Any, Any], Any]) -> Self:
        """Apply `fn` elementwise to the values of both operands; `other` may be a number."""

    def __add__(self, other: Self | float) -> Self:
        return self._combine(other, operator.add)

    def __sub__(self, other: Self | float) -> Self:
        return self._combine(other, operator.sub)

    def __mul__(self, other: Self | float) -> Self:
        return self._combine(other, operator.mul)

    def __truediv__(self, other: Self | float) -> Self:
        return self._combine(other, operator.truediv)

    def __radd__(self, other: float) -> Self:
        return self._combine(other, operator.add)

    def __rmul__(self, other: float) -> Self:
        return self._combine(other, operator.mul)

    def __rsub__(self, other: float) -> Self:
        return self._combine(other, lambda a, b: b - a)

    def __rtruediv__(self, other: float) -> Self:
        return self._combine(other, lambda a, b: b / a)

    def __neg__(self) -> Self:
        return self._combine(0, lambda a, b: -a)
