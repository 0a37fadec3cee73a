"""Every exception flexjag raises, and the one way it words them."""

from __future__ import annotations

import torch
from torch import Tensor


class FlexjagError(Exception):
    """Base class of every error raised on purpose by flexjag."""


class LayoutError(FlexjagError, ValueError):
    """Offsets or lengths that do not describe a jagged batch, or two layouts that do not fit."""


class ShapeError(FlexjagError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class SegmentError(FlexjagError, IndexError):
    """An index that names no segment of a batch."""


class MaskError(FlexjagError, ValueError):
    """A mask that is malformed, or that does not fit the layout it is compiled for."""


class ScoreError(FlexjagError, ValueError):
    """A score function that is malformed, or that does not fit the heads it is applied to."""


class AmbiguousMaskError(FlexjagError, TypeError):
    """A mask used as a Python truth value, almost always a mistaken ``and``, ``or`` or ``not``."""


class PlanError(FlexjagError, ValueError):
    """A plan used with a layout it was not made for, or bounds that cannot hold."""


class BackendError(FlexjagError, RuntimeError):
    """A backend asked to run what it cannot run. The message names one that can."""


class DifferentiationError(FlexjagError, RuntimeError):
    """A derivative that is not offered. The message names what offers it."""


class TargetError(FlexjagError, ValueError):
    """A GPU architecture that kernels cannot be made for."""


class CodegenError(FlexjagError, RuntimeError):
    """Kernels that could not be made or run without a GPU. The worker's traceback, if there is one, is the cause."""


class LanguageError(FlexjagError, ValueError):
    """Command-line text for a mask or score that does not parse.

    Args:
        text: The whole text.
        column: Where it goes wrong, 0 for the first character.
        problem: What was expected there.

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
        """The same in one line, the column counted from 1."""
        return f"{self.problem}, at column {self.column + 1} of {self.text!r}"


class CommandError(FlexjagError, ValueError):
    """A command line that asks for what cannot be done. Told in one line, with exit code 2."""


class CacheError(FlexjagError, ValueError):
    """A setting of the caches on disk that makes no sense."""


class MissingExtraError(FlexjagError, ImportError):
    """A package that only a part of flexjag needs is not installed. The message names the extra that brings it."""


class UnknownNodeError(FlexjagError, NotImplementedError):
    """A mask or score node without a case for some interpretation. The message says what to register."""


def explain_values(argument: str, rule: str, **seen: object) -> str:
    """Word an error as every flexjag error is worded: the argument, the rule, the values.

    >>> explain_values("offsets", "must start at 0", offsets=[1, 3])
    'offsets: must start at 0; got offsets=[1, 3]'
    """
    values = ", ".join([f"{name}={shown(value)}" for name, value in seen.items()])
    return f"{argument}: {rule}; got {values}" if seen else f"{argument}: {rule}"


def shown(value: object) -> str:
    """The value's repr, also inside a graph, where Dynamo has none of a size that varies but can format it.

    >>> shown([1, (2,), "x"])
    "[1, (2,), 'x']"
    """
    if isinstance(value, int):
        return f"{value}"
    if type(value) not in (list, tuple):
        return repr(value)
    items: list[str] = []
    for x in value:  # type: ignore[attr-defined]
        items.append(shown(x))  # pyright: ignore[reportUnknownArgumentType]
    inside = ", ".join(items)
    if type(value) is list:
        return f"[{inside}]"
    return f"({inside},)" if len(items) == 1 else f"({inside})"


def assert_on_device(holds: Tensor, message: str) -> None:
    """Fail if a boolean scalar is False, without waiting for the device: a later call reports it there."""
    torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
