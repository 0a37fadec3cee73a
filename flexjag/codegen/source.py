"""From a compiled kernel's operations back to the lines of Triton they were written in."""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cached_property

from flexjag.codegen.ttgir import Kernel, Op


class Source:
    r"""The Triton source of a kernel.

    The compiler tells lines of the file it read. `text` may be that file, or a part of it from the kernel's definition
    on: where the kernel is defined in both says how far they are apart. A text without the kernel answers nothing.

    Args:
        kernel: The compiled kernel.
        text: Its source.

    >>> from flexjag.codegen.ttgir import parse
    >>> kernel = parse('''module {
    ...   tt.func public @copy(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>) {
    ...     %v = tt.load %x : !tt.ptr<f32> loc("copy.py":9:8)
    ...     tt.store %y, %v : !tt.ptr<f32> loc("copy.py":10:4)
    ...     tt.return loc("copy.py":10:4)
    ...   } loc("copy.py":8:0)
    ... } loc("copy.py":8:0)''')
    >>> source = Source(kernel, "def copy(x, y):\n    v = tl.load(x)\n    tl.store(y, v)")
    >>> [source.line(op) for op in kernel.ops()]
    ['v = tl.load(x)', '', '']
    """

    def __init__(self, kernel: Kernel, text: str) -> None:
        self.kernel = kernel
        self.text = textwrap.dedent(text)
        self.lines = self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The source as a syntax tree, empty if it is not Python by itself."""
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return ast.Module(body=[], type_ignores=[])

    @cached_property
    def shift(self) -> int | None:
        """What to add to a line of the compiler's to get one of the text; None if the kernel is not in the text."""
        origin = self.kernel.origin
        for node in ast.walk(self.tree):
            if origin and isinstance(node, ast.FunctionDef) and node.name == self.kernel.name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if origin[1] in (first, node.lineno):  # the same file; releases differ in which of the two they tell
                    return 0
                return node.lineno - origin[1]
        return None

    def numbers(self, op: Op) -> list[int]:
        """The lines of the text, from 1, that `op` was written in: the innermost function's first."""
        if self.shift is None or self.kernel.origin is None:
            return []
        file = self.kernel.origin[0]
        found = [line + self.shift for path, line, _ in self.kernel.frames(op) if path == file]
        return found if all(1 <= n <= len(self.lines) for n in found) else []

    def line(self, load: Op) -> str:
        """The line that reads, or that calls the function that returns what it reads; empty if unknown."""
        frames, origin = self.kernel.frames(load), self.kernel.origin
        seen = [self._statement(n) for n in self.numbers(load)]
        if not seen or origin is None or (frames[0][0] == origin[0] and not re.search(r"load|gather", seen[0])):
            return ""
        return next((text for text in seen if not text.startswith("return ")), seen[0])

    def _statement(self, number: int) -> str:
        """The line, or all of a statement that is spread over several: the compiler tells any of them."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.Return):
                continue
            last = node.end_lineno or node.lineno
            if node.lineno < last and node.lineno <= number <= last:
                return " ".join((ast.get_source_segment(self.text, node) or "").split())
        return self.lines[number - 1].strip()

    def function(self, op: Op) -> str:
        """The function `op` was written in; empty if unknown."""
        for number in self.numbers(op)[:1]:
            for node in ast.walk(self.tree):
                if isinstance(node, ast.FunctionDef) and node.lineno <= number <= (node.end_lineno or 0):
                    return node.name
        return ""

    def is_masked(self, loop: Op) -> bool | None:
        """What the calls that lead to `loop` say about IS_FULL_BLOCKS, as FlexAttention's do; None if nothing."""
        for number in self.numbers(loop):
            for node in ast.walk(self.tree):
                if not isinstance(node, ast.Call) or not node.lineno <= number <= (node.end_lineno or 0):
                    continue
                for keyword in node.keywords:
                    given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                    if keyword.arg == "IS_FULL_BLOCKS" and isinstance(given, bool):
                        return not given
        return None
