"""Parser of Triton's GPU dialect (TTGIR): text to operations with operands, regions and source locations.

It supports the subset of MLIR's textual form that Triton prints: one operation a line, regions in braces. Triton's own
bindings could parse it too, but only in the version that wrote it and without the structure of regions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from flexjag.errors import CodegenError, explain_values

_NAME = r"%[\w$.\-]+(?:#\d+)?"
_OPERATION = re.compile(rf'^(?:({_NAME}(?::\d+)?(?:, {_NAME}(?::\d+)?)*) = )?"?([a-z_]\w*\.[\w.]+)"?(.*)$', re.DOTALL)
_PAIR = re.compile(rf"({_NAME}) = ({_NAME})")
_FUNCTION = re.compile(r"tt\.func (?:(\w+) )?@([\w.$]+)\((.*)\)[^()]*\{$")
_SHAPE = re.compile(r"<((?:\d+x)+)(\w+|!)")

Frame = tuple[str, int, int]
"""A source location: path, line from 1, column from 0."""


@dataclass(eq=False)
class Value:
    """An SSA value.

    Attributes:
        maker: The operation that defines it, as a result or as a region argument; None for a kernel's argument.
        index: Index among that operation's results or region arguments, from 0.
        is_argument: True for a region argument, False for a result.
    """

    maker: Op | None
    index: int = 0
    is_argument: bool = False


@dataclass(eq=False)
class Region:
    """A region of one block: its arguments and its operations, the terminator last."""

    arguments: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def yielded(self) -> list[Value]:
        """Operands of the terminator: the values that the region yields."""
        return self.ops[-1].operands if self.ops else []


@dataclass(eq=False)
class Op:
    """An MLIR operation.

    Attributes:
        name: Dialect and name: ``tt.load``.
        operands: Operands in textual order. Of an ``scf.for``: the bounds and the step, then the initial values of
            the loop-carried arguments.
        results: Results.
        text: The text after the name, types included, location excluded.
        parent: The enclosing operation; None for the kernel's ``tt.func``.
        regions: Nested regions.
        location: The text within ``loc(...)``; empty if there is none.
    """

    name: str
    operands: list[Value]
    text: str
    parent: Op | None
    results: list[Value] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    location: str = ""

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and element type of each tensor and buffer in the operation's types; ``!`` for pointers."""
        found = _SHAPE.findall(self.text[self.text.rfind(" : ") :])
        return [(tuple(int(n) for n in sizes.split("x")[:-1]), element) for sizes, element in found]

    def walk(self) -> Iterator[Op]:
        """All nested operations, in textual order."""
        for region in self.regions:
            for op in region.ops:
                yield op
                yield from op.walk()

    def attribute(self, name: str) -> int | None:
        """Value of an i32 attribute; None if the operation has none of this name."""
        found = re.search(rf"\b{name} = (-?\d+) : i32", self.text)
        return int(found[1]) if found else None


@dataclass(eq=False)
class KernelIR:
    """A kernel parsed from Triton's GPU dialect.

    Attributes:
        name: Kernel name.
        body: The ``tt.func`` that contains all other operations.
        num_warps: Warps per thread block; 0 if the module does not give it.
        aliases: Text of the locations by their ``#loc`` alias.
    """

    name: str
    body: Op
    num_warps: int
    aliases: dict[str, str]

    def ops(self) -> Iterator[Op]:
        """All operations, in textual order."""
        return self.body.walk()

    def frames(self, op: Op) -> tuple[Frame, ...]:
        """Source call stack of `op`: the innermost function's line first, then its caller's, and so on."""
        return _frames(op.location, self.aliases, 0)

    @property
    def origin(self) -> Frame | None:
        """Source location of the kernel's definition; None if unknown."""
        frames = self.frames(self.body)
        return frames[0] if frames else None


def parse(text: str) -> KernelIR:
    """Parse a module in Triton's GPU dialect.

    Args:
        text: The module's text, Triton's ``asm["ttgir"]``.

    Returns:
        The module's public kernel.

    Raises:
        CodegenError: If the text has no kernel or several, or a construct that this parser does not know.

    >>> kernel = parse('''module attributes {"ttg.num-warps" = 4 : i32} {
    ...   tt.func public @copy(%x: !tt.ptr<f32>, %y: !tt.ptr<f32>) attributes {noinline = false} {
    ...     %v = tt.load %x : !tt.ptr<f32> loc("copy.py":3:8)
    ...     tt.store %y, %v : !tt.ptr<f32> loc("copy.py":4:4)
    ...     tt.return loc("copy.py":4:4)
    ...   } loc("copy.py":2:0)
    ... } loc("copy.py":2:0)''')
    >>> [(op.name, kernel.frames(op)[0][1]) for op in kernel.ops()]
    [('tt.load', 3), ('tt.store', 4), ('tt.return', 4)]
    """
    warps = re.search(r'"ttg\.num-warps" = (\d+)', text)
    lines = iter(text.splitlines())
    kernel = None
    for line in lines:
        found = _FUNCTION.search(_split_location(line.strip())[0])
        if found and found[1] != "private":
            if kernel is not None:
                raise CodegenError(explain_values("ttgir", "must hold one kernel", seen=[kernel.name, found[2]]))
            body = Op("tt.func", [], "", None)
            _Reader(body, found[3]).read(lines)
            kernel = KernelIR(found[2], body, int(warps[1]) if warps else 0, {})
    if kernel is None:
        raise CodegenError(explain_values("ttgir", "must hold a kernel", start=text[:60]))
    kernel.aliases.update(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    return kernel


class _Reader:
    """Parser of a kernel's lines. Names are scoped by region: sibling regions reuse them."""

    def __init__(self, body: Op, arguments: str) -> None:
        region = Region()
        body.regions.append(region)
        self.open: list[Op] = [body]
        self.scopes: list[dict[str, Value]] = [{}]
        for name in re.findall(rf"({_NAME}): ", arguments):
            self.scopes[-1][name] = Value(None)

    def read(self, lines: Iterator[str]) -> None:
        """Parse lines up to the end of the kernel."""
        for raw in lines:
            line, location = _split_location(raw.strip())
            if line.startswith("}"):
                self.close(line, location)
                if not self.open:
                    return
            elif line.startswith("^"):
                self.arguments(line)
            elif line:
                self.operation(line, location)
        raise CodegenError(explain_values("ttgir", "must end every region", open=[op.name for op in self.open]))

    def operation(self, line: str, location: str) -> None:
        """Parse a line with an operation, or with its beginning up to a region."""
        found = _OPERATION.match(line)
        if not found:
            raise CodegenError(explain_values("ttgir", "has a line this reader does not know", line=line))
        op = Op(found[2], [], found[3], self.open[-1], location=location)
        self.open[-1].regions[-1].ops.append(op)
        inside: dict[str, Value] = {}
        if op.name in ("scf.for", "scf.while"):
            pairs = _PAIR.findall(op.text)
            # `%i = %from to %to step %by` and `iter_args(%carried = %initial, ...)`; a while has the second part alone
            for index, (name, _) in enumerate(pairs):
                inside[name] = Value(op, index, is_argument=True)
            used = re.findall(_NAME, op.text)
            op.operands = [self.find(name) for name in used if name not in inside]
        else:
            op.operands = [self.find(name) for name in re.findall(_NAME, op.text)]
        if line.endswith("{"):
            self.open.append(op)
            self.enter(inside)
        for group in (found[1] or "").split(", ") if found[1] else []:
            name, _, count = group.partition(":")
            made = [Value(op, len(op.results) + i) for i in range(int(count or 1))]
            op.results += made
            outer = self.scopes[-2] if line.endswith("{") else self.scopes[-1]
            outer.update({f"{name}#{i}": value for i, value in enumerate(made)} | {name: made[0]})

    def enter(self, names: dict[str, Value]) -> None:
        """Open a region of the innermost open operation, with `names` in scope."""
        self.open[-1].regions.append(Region(arguments=list(names.values())))
        self.scopes.append(dict(names))

    def arguments(self, line: str) -> None:
        """Parse a block's head: ``^bb0(%a: f32 loc(...), ...):``. Triton leaves one block per region; others raise."""
        region = self.open[-1].regions[-1]
        if region.ops:
            raise CodegenError(explain_values("ttgir", "must have one block per region", line=line))
        for name in re.findall(rf"({_NAME}): ", line):
            value = Value(self.open[-1], len(region.arguments), is_argument=True)
            region.arguments.append(value)
            self.scopes[-1][name] = value

    def close(self, line: str, location: str) -> None:
        """Close a region; the line may open the same operation's next one."""
        self.scopes.pop()
        if line.endswith("{"):
            self.enter({})
            return
        op = self.open.pop()
        op.location = location
        op.text += line[1:]

    def find(self, name: str) -> Value:
        """Look up a value by name, from the innermost region outward."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise CodegenError(explain_values("ttgir", "must define what it uses", name=name))


def _split_location(line: str) -> tuple[str, str]:
    """Split a line into the part before its trailing ``loc(...)`` and the text in the parentheses."""
    at = line.rfind(" loc(")
    while at >= 0 and line.endswith(")"):
        inside = line[at + 5 : -1]
        if _matching(line, at + 4) == len(line) - 1:
            return line[:at], inside
        at = line.rfind(" loc(", 0, at)
    return line, ""


def _matching(text: str, at: int) -> int:
    """Index at which the parenthesis or bracket at `at` closes, quoted text ignored; -1 if it does not."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        if text[i] == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and text[i] in "([":
            depth += 1
        elif not quoted and text[i] in ")]":
            depth -= 1
            if depth == 0:
                return i
    return -1


def _frames(text: str, aliases: dict[str, str], depth: int) -> tuple[Frame, ...]:
    """The frames of a location, innermost first.

    A file's line is one frame; ``callsite(callee at caller)`` puts the callee's before the caller's; a named location
    has those of the location it names; ``fused[...]`` those of its first part that has any; ``unknown`` has none.
    """
    text = text.strip()
    if depth > 64:
        raise CodegenError(explain_values("ttgir", "must not have locations within themselves", location=text))
    if text.startswith("#"):
        return _frames(aliases.get(text, ""), aliases, depth + 1)
    if text.startswith("loc("):
        return _frames(text[4:-1], aliases, depth + 1)
    if text.startswith("callsite("):
        inside = text[9 : _matching(text, 8)]
        for split in re.finditer(r" at ", inside):
            callee, caller = inside[: split.start()], inside[split.end() :]
            if _is_balanced(callee):
                return _frames(callee, aliases, depth + 1) + _frames(caller, aliases, depth + 1)
        return ()
    if text.startswith("fused"):
        start = text.find("[", _matching_angle(text))
        for part in _split_commas(text[start + 1 : _matching(text, start)]):
            if frames := _frames(part, aliases, depth + 1):
                return frames
        return ()
    if file := re.match(r'"((?:[^"\\]|\\.)*)":(\d+):(\d+)', text):
        return ((file[1], int(file[2]), int(file[3])),)
    if name := re.match(r'"(?:[^"\\]|\\.)*"\(', text):
        return _frames(text[name.end() : _matching(text, name.end() - 1)], aliases, depth + 1)
    return ()


def _matching_angle(text: str) -> int:
    """Index at which the ``<...>`` metadata of a fused location ends; 0 if it has none."""
    if not text.startswith("fused<"):
        return 0
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == ">" and depth == 0:
            return i
    return 0


def _is_balanced(text: str) -> bool:
    """Whether parentheses, brackets and quotes are balanced in `text`."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    return bare.count("(") == bare.count(")") and bare.count("[") == bare.count("]") and bare.count('"') == 0


def _split_commas(text: str) -> list[str]:
    """Split a list at commas outside parentheses, brackets and quotes."""
    parts, start = [], 0
    for i, character in enumerate(text):
        if character == "," and _is_balanced(text[start:i]):
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
