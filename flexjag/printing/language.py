"""Base class of the languages that programs are printed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from flexjag.printing.program import OPERATIONS, Instruction, Symbol, Value, refuse


class Language(ABC):
    """Printer of programs in one language.

    A printed function takes symbols, then ``captures`` and ``numbers``: the tensors and the whole numbers that its
    program reads. Each instruction is a line of it. The methods here print Python; a language overrides those
    whose syntax differs.

    Attributes:
        name: Name of the language, for messages.
        header: Source before the printed functions, such as imports.
        words: For each of :data:`~flexjag.printing.program.OPERATIONS` but ``load``, the template of its expression:
            ``{0}`` is its first argument and so on, ``{dtype}`` the dtype of its result.
    """

    name: ClassVar[str]
    header: ClassVar[str] = ""
    words: ClassVar[Mapping[str, str]]

    @abstractmethod
    def dtype(self, dtype: torch.dtype) -> str:
        """Name of a dtype in the language."""

    @abstractmethod
    def load(self, line: Instruction) -> str:
        """Expression of a captured tensor's entry at :attr:`Instruction.indices`."""

    def constant(self, x: float, dtype: torch.dtype) -> str:
        """Literal of a number in a dtype, in parentheses if it is negative."""
        if isinstance(x, float):
            return f"{x!r}" if x - x == 0.0 else f'float("{x!r}")'
        return f"{x!r}" if isinstance(x, bool) or x >= 0 else f"({x!r})"

    def value(self, x: Value, dtype: torch.dtype = torch.int64) -> str:
        """Name of a symbol, or literal of a number in a dtype."""
        return x.name if isinstance(x, Symbol) else self.constant(x, dtype)

    def capture(self, line: Instruction) -> str:
        """Expression of the captured tensor that a ``load`` or a ``bucketize`` reads."""
        return f"captures[{line.args[0]}]"

    def word(self, line: Instruction) -> str:
        """Template of an instruction's expression, an entry of :attr:`words` unless it depends on dtypes."""
        return self.words[line.op]

    def expression(self, line: Instruction) -> str:
        """Expression of an instruction's result."""
        if line.op == "load":
            return self.load(line)
        if line.op not in self.words:
            refuse(f"it needs {line.op}, {OPERATIONS[line.op]}, for which there is no word in {self.name}")
        word, dtype = self.word(line), _dtype_of_arguments(line)
        args = [self.value(x, dtype) for x in line.args]
        if line.op == "bucketize":
            args[0] = self.capture(line)
        return word.format(*args, dtype=self.dtype(line.result.dtype)) if "{dtype}" in word else word.format(*args)

    def line(self, line: Instruction) -> str:
        """Source line that assigns an instruction's result."""
        return f"    {line.result.name} = {self.expression(line)}"

    def lines(self, lines: Iterable[Instruction]) -> list[str]:
        """Source lines of instructions.

        Raises:
            NotImplementedError: If the language has no word for an operation.
        """
        return [self.line(line) for line in lines]

    def function(
        self, name: str, parameters: Sequence[Symbol], lines: Sequence[str], returned: str, dtype: torch.dtype
    ) -> str:
        """Source of a function.

        Args:
            name: Name of the function.
            parameters: Its parameters, besides captures and numbers.
            lines: Source lines of its body.
            returned: Expression of its return value.
            dtype: Dtype of its return value.
        """
        taken = ", ".join([*[x.name for x in parameters], "captures", "numbers"])
        return "\n".join([f"def {name}({taken}):", *lines, f"    return {returned}", ""])

    def slopes(
        self,
        name: str,
        parameters: Sequence[Symbol],
        lines: Sequence[str],
        slopes: Sequence[tuple[Instruction, Value]],
        learned: Sequence[int],
    ) -> str:
        """Source of a function of the derivatives by the entries of learned captures, see :func:`emit_slopes`.

        Args:
            name: Name of the function.
            parameters: The symbols ds, s, h, q and kv.
            lines: Source lines of its body.
            slopes: Lookups, each with the score's derivative by the entry.
            learned: Indices of the captures that need gradients.
        """
        dtype = parameters[0].dtype
        entries = [f"({line.args[0]}, {self.place(line)}, {self.value(slope, dtype)})" for line, slope in slopes]
        return self.function(name, parameters[1:], lines, f"[{', '.join(entries)}]", dtype)

    def spread(self, x: str, like: str) -> str:
        """Expression of `x`, which may be shared by several queries or keys, broadcast to the shape of `like`."""
        return x

    def place(self, line: Instruction) -> str:
        """Expression of the location that a ``load`` reads, in a form the language's caller understands."""
        indices = "".join([f"{self.value(i)}, " for i in line.indices])
        return f"({indices})"


OPERATORS: Mapping[str, str] = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "rshift": "{} >> {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "neg": "-{}",
    "detach": "{}",
    "not": "{} == 0",
}
"""Templates of operators that languages share."""

FUNCTIONS = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "floor", "ceil")
"""Operations of one argument for which most languages have a function of the same name."""


def with_bounds(words: Mapping[str, str]) -> dict[str, str]:
    """Add ``clamp_min``, ``clamp_max`` and ``relu`` to words: a maximum or minimum with another derivative."""
    low, high = words["maximum"], words["minimum"]
    return {**words, "clamp_min": low, "clamp_max": high, "relu": low}


def _dtype_of_arguments(line: Instruction) -> torch.dtype:
    """Dtype of the constants among an instruction's arguments: its result's; for a comparison that of its symbols."""
    dtype = line.result.dtype
    if dtype == torch.bool:
        return next((x.dtype for x in line.args if isinstance(x, Symbol)), dtype)
    return dtype
