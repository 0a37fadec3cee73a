"""Triton's GPU dialect as text, read into operations with their operands, regions and source lines.

Just enough of MLIR's textual form for what Triton prints: one operation a line, regions in braces. Triton's own
bindings could parse it too, but only with the very version that wrote it and without the regions' structure.
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
"""A place in a source file: path, line from 1, column from 0."""


@dataclass(eq=False)
class Value:
    """An SSA value.

    Attributes:
        maker: The operation whose result, or whose region's argument, it is; None for a kernel's argument.
        index: Which result or argument of it, from 0.
        is_argument: Whether it is a region's argument.
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
        """What the terminator hands on."""
        return self.ops[-1].operands if self.ops else []


@dataclass(eq=False)
class Op:
    """An operation.

    Attributes:
        name: Dialect and name: ``tt.load``.
        operands: The values it uses, in order of text. Of an ``scf.for`` the bounds and the step, then the initial
            values of what it carries.
        results: What it makes.
        text: All after the name, types included, without the location.
        parent: The operation it lies in, None at the top of the kernel.
        regions: Its regions.
        location: The text within ``loc(...)``, empty if there is none.
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
        """Sizes and element types of the tensors and buffers in its types; ``!`` for pointers."""
        found = _SHAPE.findall(self.text[self.text.rfind(" : ") :])
        return [(tuple(int(n) for n in sizes.split("x")[:-1]), element) for sizes, element in found]

    def walk(self) -> Iterator[Op]:
        """All operations inside it, in order of text."""
        for region in self.regions:
            for op in region.ops:
                yield op
                yield from op.walk()

    def attribute(self, name: str) -> int | None:
        """An integer attribute."""
        found = re.search(rf"\b{name} = (-?\d+) : i32", self.text)
        return int(found[1]) if found else None


@dataclass(eq=False)
class Kernel:
    """A kernel in Triton's GPU dialect.

    Attributes:
        name: Its name.
        body: A pseudo-operation ``tt.func`` that holds all others.
        num_warps: Warps of a block.
        aliases: Locations by their ``#loc`` name.
    """

    name: str
    body: Op
    num_warps: int
    aliases: dict[str, str]

    def ops(self) -> Iterator[Op]:
        """All operations, in order of text."""
        return self.body.walk()

    def frames(self, op: Op) -> tuple[Frame, ...]:
        """Where `op` was written: the innermost function's line first, then its caller's, and so on."""
        return _frames(op.location, self.aliases, 0)

    @property
    def origin(self) -> Frame | None:
        """Where the kernel itself was written."""
        frames = self.frames(self.body)
        return frames[0] if frames else None


def parse(text: str) -> Kernel:
    """Read a module in Triton's GPU dialect.

    Args:
        text: What Triton keeps as ``asm["ttgir"]``.

    Returns:
        Its public kernel.

    Raises:
        CodegenError: If the text holds no kernel, or is not of the form that this reader knows.

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
            kernel = Kernel(found[2], body, int(warps[1]) if warps else 0, {})
    if kernel is None:
        raise CodegenError(explain_values("ttgir", "must hold a kernel", start=text[:60]))
    kernel.aliases.update(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    return kernel


class _Reader:
    """Reads a kernel's lines. Names are those of the region they are in: siblings use them again."""

    def __init__(self, body: Op, arguments: str) -> None:
        region = Region()
        body.regions.append(region)
        self.open: list[Op] = [body]
        self.scopes: list[dict[str, Value]] = [{}]
        for name in re.findall(rf"({_NAME}): ", arguments):
            self.scopes[-1][name] = Value(None)

    def read(self, lines: Iterator[str]) -> None:
        """Read up to the end of the kernel."""
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
        """One line that holds an operation, or its beginning up to a region."""
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
        """Begin a region of the innermost open operation."""
        self.open[-1].regions.append(Region(arguments=list(names.values())))
        self.scopes.append(dict(names))

    def arguments(self, line: str) -> None:
        """A block's head: ``^bb0(%a: f32 loc(...), ...):``. Blocks after the first are control flow Triton drops."""
        region = self.open[-1].regions[-1]
        if region.ops:
            raise CodegenError(explain_values("ttgir", "must have one block per region", line=line))
        for name in re.findall(rf"({_NAME}): ", line):
            value = Value(self.open[-1], len(region.arguments), is_argument=True)
            region.arguments.append(value)
            self.scopes[-1][name] = value

    def close(self, line: str, location: str) -> None:
        """The end of a region, perhaps the beginning of the operation's next."""
        self.scopes.pop()
        if line.endswith("{"):
            self.enter({})
            return
        op = self.open.pop()
        op.location = location
        op.text += line[1:]

    def find(self, name: str) -> Value:
        """The value of that name, from the innermost region outward."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise CodegenError(explain_values("ttgir", "must define what it uses", name=name))


def _split_location(line: str) -> tuple[str, str]:
    """A line without its trailing ``loc(...)``, and what is in the parentheses."""
    at = line.rfind(" loc(")
    while at >= 0 and line.endswith(")"):
        inside = line[at + 5 : -1]
        if _matching(line, at + 4) == len(line) - 1:
            return line[:at], inside
        at = line.rfind(" loc(", 0, at)
    return line, ""


def _matching(text: str, at: int) -> int:
    """Where the parenthesis or bracket at `at` closes; paths in quotes may hold any. -1 if nowhere."""
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
    """The frames of a location.

    A file's line is one frame; ``callsite(callee at caller)`` puts the callee's before the caller's; a name keeps those
    of what it names; of ``fused[...]`` the first that has any; ``unknown`` has none.
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
    """Where the ``<...>`` of a fused location's metadata ends; 0 without."""
    if not text.startswith("fused<"):
        return 0
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == ">" and depth == 0:
            return i
    return 0


def _is_balanced(text: str) -> bool:
    """Whether all that opens in `text` closes in it."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    return bare.count("(") == bare.count(")") and bare.count("[") == bare.count("]") and bare.count('"') == 0


def _split_commas(text: str) -> list[str]:
    """The parts of a list, at commas outside parentheses, brackets and quotes."""
    parts, start = [], 0
    for i, character in enumerate(text):
        if character == "," and _is_balanced(text[start:i]):
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
