"""All exceptions of flexjag, and the functions that format their messages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARRAYS: tuple[type[Any], ...] = (Tensor, np.ndarray)
MANY, FEW = 32, 8  # lists of more entries than MANY are shown by their first FEW


class FlexjagError(Exception):
    """Base class of all errors that flexjag raises deliberately."""


class LayoutError(FlexjagError, ValueError):
    """Raised for offsets or lengths that do not describe a jagged batch, or two layouts that do not match."""


class ShapeError(FlexjagError, ValueError):
    """Raised for tensors whose shapes, dtypes or devices do not match."""


class SegmentError(FlexjagError, IndexError):
    """Raised for a segment index that is out of range or not an integer."""


class MaskError(FlexjagError, ValueError):
    """Raised for a mask that is malformed or does not match the layout it is compiled for."""


class ScoreError(FlexjagError, ValueError):
    """Raised for a score function that is malformed or does not match the number of heads."""


class PositionError(FlexjagError, ValueError):
    """Raised for rotary positions, or parameters of their scaling, that are out of range."""


class AmbiguousMaskError(FlexjagError, TypeError):
    """Raised for a mask used as a truth value, mostly by a mistaken ``and``, ``or`` or ``not``."""


class PlanError(FlexjagError, ValueError):
    """Raised for invalid arguments of a plan, bounds that its batch exceeds, or a plan used with another layout."""


class BackendError(FlexjagError, RuntimeError):
    """Raised if the chosen backend cannot run a plan. The message names one that can."""


class BuildError(BackendError):
    """Raised if the C++ compiler cannot make the CPU kernels of a plan. The message holds its first error."""


class DifferentiationError(FlexjagError, RuntimeError):
    """Raised for an unsupported derivative. The message names a backend or function that supports it."""


class KVCacheError(FlexjagError, RuntimeError):
    """Raised if a KVCache is full, has no such layer or tokens, or is used in another order than step by step."""


class TargetError(FlexjagError, ValueError):
    """Raised for a GPU architecture that kernels cannot be compiled for."""


class CodegenError(FlexjagError, RuntimeError):
    """Raised if kernels cannot be compiled or run without a GPU. The cause is the worker's traceback, if any."""


class LanguageError(FlexjagError, ValueError):
    """Raised for command-line text of a mask or score that does not parse.

    Args:
        text: The complete text.
        column: Column of the error, counted from 0.
        problem: Description of the error.

    >>> print(LanguageError("causal &", 8, "expected a mask, got the end"))
    expected a mask, got the end
      causal &
              ^
    """

    def __init__(self, text: str, column: int, problem: str) -> None:
        super().__init__(text, column, problem)
        self.text, self.column, self.problem = text, column, problem

    def __str__(self) -> str:
        text = "".join(" " if c.isspace() else c for c in self.text)  # a newline would misplace the caret
        return f"{self.problem}\n  {text}\n  {' ' * self.column}^"

    @property
    def line(self) -> str:
        """The message in one line, with the column counted from 1."""
        return f"{self.problem}, at column {self.column + 1} of {self.text!r}"


class CommandError(FlexjagError, ValueError):
    """Raised for invalid command-line arguments; printed in one line, with exit code 2."""


class CacheError(FlexjagError, ValueError):
    """A setting of the caches on disk that makes no sense."""


class DataError(FlexjagError, ValueError):
    """Raised for samples or budgets that cannot be batched, and for a state of other data than it is loaded for."""


class MissingExtraError(FlexjagError, ImportError):
    """A package that only a part of flexjag needs is not installed. The message names the extra that brings it."""


class NodeError(FlexjagError, TypeError):
    """Raised for a class of masks or scores that is declared wrongly."""


class UnknownNodeError(FlexjagError, NotImplementedError):
    """Raised for a mask or score node that an interpretation has no case for. The message says how to register one."""


def explain_values(argument: str, rule: str, **seen: object) -> str:
    """Format an error message: the argument, the rule it violates, and the values received.

    >>> explain_values("offsets", "must start at 0", offsets=[1, 3])
    'offsets: must start at 0; got offsets=[1, 3]'
    """
    values = ", ".join([f"{name}={shown(value)}" for name, value in seen.items()])
    return f"{argument}: {rule}; got {values}" if seen else f"{argument}: {rule}"


def shown(value: Any) -> str:
    """Repr of a value, also in a traced graph: Dynamo can format a symbolic size but has no ``repr`` of it.

    Of a long list the first entries are shown, of a large tensor or array its dtype and shape.

    >>> shown([1, (2,), "x"])
    "[1, (2,), 'x']"
    >>> shown([7] * 1000), shown(torch.zeros(8, 32))
    ('[7, 7, 7, 7, 7, 7, 7, 7, ... 1000 entries]', '<float32[8, 32]>')
    """
    if isinstance(value, int):
        return f"{value}"
    if isinstance(value, ARRAYS):
        shape: tuple[int, ...] = tuple(value.shape)
        large = math.prod(shape) > MANY
        return f"<{str(value.dtype).removeprefix('torch.')}{list(shape)}>" if large else repr(value)
    if type(value) not in (list, tuple):
        return repr(value)
    count: int = len(value)
    items: list[str] = []
    for x in value[:FEW] if count > MANY else value:
        items.append(shown(x))
    if count > MANY:
        items.append(f"... {count} entries")
    inside = ", ".join(items)
    if type(value) is list:
        return f"[{inside}]"
    return f"({inside},)" if len(items) == 1 else f"({inside})"


def assert_on_device(holds: Tensor, message: str) -> None:
    """Assert that a boolean scalar is True, without a device sync; on a GPU a later call reports the failure."""
    torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
