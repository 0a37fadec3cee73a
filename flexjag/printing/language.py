"""What the languages that programs are printed in have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from flexjag.printing.program import OPERATIONS, Instruction, Symbol, Value, refuse


class Language(ABC):
    """How programs are written in one language.

    A printed function takes symbols, then ``captures`` and ``numbers``: the tensors and the whole numbers that its
    program reads. Each instruction is a line of it. What is written here is right for Python; a language overrides
    what it writes in another way.

    Attributes:
        name: Of the language, for messages.
        header: What stands before printed functions.
        words: For each of :data:`~flexjag.printing.program.OPERATIONS` but ``load``, what is written for it: ``{0}``
            is its first argument and so on, ``{dtype}`` the dtype of its result.
    """

    name: ClassVar[str]
    header: ClassVar[str] = ""
    words: ClassVar[Mapping[str, str]]

    @abstractmethod
    def dtype(self, dtype: torch.dtype) -> str:
        """A dtype."""

    @abstractmethod
    def load(self, line: Instruction) -> str:
        """The entry of a captured tensor at :attr:`Instruction.indices`."""

    def constant(self, x: float, dtype: torch.dtype) -> str:
        """A number that is to be of a dtype, in parentheses if it is negative."""
        if isinstance(x, float):
            return f"{x!r}" if x - x == 0.0 else f'float("{x!r}")'
        return f"{x!r}" if isinstance(x, bool) or x >= 0 else f"({x!r})"

    def value(self, x: Value, dtype: torch.dtype = torch.int64) -> str:
        """A symbol, or a number that is to be of a dtype."""
        return x.name if isinstance(x, Symbol) else self.constant(x, dtype)

    def capture(self, line: Instruction) -> str:
        """The tensor that a ``load`` or a ``bucketize`` reads."""
        return f"captures[{line.args[0]}]"

    def expression(self, line: Instruction) -> str:
        """What an instruction makes."""
        if line.op == "load":
            return self.load(line)
        if line.op not in self.words:
            refuse(f"it needs {line.op}, {OPERATIONS[line.op]}, for which there is no word in {self.name}")
        word, dtype = self.words[line.op], _dtype_of_arguments(line)
        args = [self.value(x, dtype) for x in line.args]
        if line.op == "bucketize":
            args[0] = self.capture(line)
        return word.format(*args, dtype=self.dtype(line.result.dtype)) if "{dtype}" in word else word.format(*args)

    def line(self, line: Instruction) -> str:
        """An instruction, as a line of a function."""
        return f"    {line.result.name} = {self.expression(line)}"

    def lines(self, lines: Iterable[Instruction]) -> list[str]:
        """Instructions, as lines of a function.

        Raises:
            NotImplementedError: If one of them has no word in the language.
        """
        return [self.line(line) for line in lines]

    def function(self, name: str, parameters: Sequence[Symbol], lines: Sequence[str], returned: str) -> str:
        """A function.

        Args:
            name: What it is called.
            parameters: What it takes, besides captures and numbers.
            lines: Its lines.
            returned: What it returns.
        """
        taken = ", ".join([*[x.name for x in parameters], "captures", "numbers"])
        return "\n".join([f"def {name}({taken}):", *lines, f"    return {returned}", ""])

    def spread(self, x: str, like: str) -> str:
        """A number that may be the same for several queries or keys, repeated for each of another's."""
        return x

    def place(self, line: Instruction) -> str:
        """Where a ``load`` finds its entry, in some form that tells the caller."""
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
"""Words that languages share."""

FUNCTIONS = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf", "floor", "ceil")
"""Operations of one argument that most languages have a function of the same name for."""


def with_bounds(words: Mapping[str, str]) -> dict[str, str]:
    """Words, and those of a minimum and a maximum for what differs from them in its derivative only."""
    low, high = words["maximum"], words["minimum"]
    return {**words, "clamp_min": low, "clamp_max": high, "relu": low}


def _dtype_of_arguments(line: Instruction) -> torch.dtype:
    """The dtype that the constants among an instruction's arguments are of: of a comparison, that of its symbols."""
    dtype = line.result.dtype
    if dtype == torch.bool:
        return next((x.dtype for x in line.args if isinstance(x, Symbol)), dtype)
    return dtype
