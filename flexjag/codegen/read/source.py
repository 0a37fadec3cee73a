"""Source locations of a compiled kernel's operations in its Triton source."""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cached_property

from flexjag.codegen.read.ttgir import KernelIR, Op


class Source:
    r"""The Triton source of a kernel, queried by operation.

    The compiler records lines of the file it read. `text` may be that file, or a part of it from the kernel's
    definition on: the line of the definition in both gives the offset. If `text` does not define the kernel, queries
    return "unknown".

    Args:
        kernel: The parsed kernel.
        text: Its Triton source code.

    >>> from flexjag.codegen.read.ttgir import parse
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

    def __init__(self, kernel: KernelIR, text: str) -> None:
        self.kernel = kernel
        self.text = textwrap.dedent(text)
        self.lines = self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree of the source; empty if the text alone is not valid Python."""
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return ast.Module(body=[], type_ignores=[])

    @cached_property
    def shift(self) -> int | None:
        """Offset from the compiler's line numbers to those of the text; None if the text does not define the kernel."""
        origin = self.kernel.origin
        for node in ast.walk(self.tree):
            if origin and isinstance(node, ast.FunctionDef) and node.name == self.kernel.name:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if origin[1] in (first, node.lineno):  # the same file; releases differ in which they record
                    return 0
                return node.lineno - origin[1]
        return None

    def numbers(self, op: Op) -> list[int]:
        """Line numbers, from 1, of the call stack at `op`, innermost function first; empty if unknown."""
        if self.shift is None or self.kernel.origin is None:
            return []
        file = self.kernel.origin[0]
        found = [line + self.shift for path, line, _ in self.kernel.frames(op) if path == file]
        return found if all(1 <= n <= len(self.lines) for n in found) else []

    def line(self, load: Op) -> str:
        """Source line of a load, or of the call to a helper that only returns it; empty if unknown."""
        frames, origin = self.kernel.frames(load), self.kernel.origin
        seen = [self._statement(n) for n in self.numbers(load)]
        if not seen or origin is None or (frames[0][0] == origin[0] and not re.search(r"load|gather", seen[0])):
            return ""
        return next((text for text in seen if not text.startswith("return ")), seen[0])

    def _statement(self, number: int) -> str:
        """The line, or the whole statement if it spans several lines: the compiler may record any of them."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Assign | ast.AugAssign | ast.Return):
                continue
            last = node.end_lineno or node.lineno
            if node.lineno < last and node.lineno <= number <= last:
                return " ".join((ast.get_source_segment(self.text, node) or "").split())
        return self.lines[number - 1].strip()

    def function(self, op: Op) -> str:
        """Name of the source function that contains `op`; empty if unknown."""
        for number in self.numbers(op)[:1]:
            for node in ast.walk(self.tree):
                if isinstance(node, ast.FunctionDef) and node.lineno <= number <= (node.end_lineno or 0):
                    return node.name
        return ""

    def is_masked(self, loop: Op) -> bool | None:
        """The negated ``IS_FULL_BLOCKS`` argument (FlexAttention's) of calls leading to `loop`; None without one."""
        for number in self.numbers(loop):
            for node in ast.walk(self.tree):
                if not isinstance(node, ast.Call) or not node.lineno <= number <= (node.end_lineno or 0):
                    continue
                for keyword in node.keywords:
                    given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                    if keyword.arg == "IS_FULL_BLOCKS" and isinstance(given, bool):
                        return not given
        return None
