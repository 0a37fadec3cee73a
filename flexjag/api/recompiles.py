"""Why compiled functions are compiled again, said in terms of what their caller passed."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flexjag.algebra.node import Node
from flexjag.algebra.normalizers import Normalizer
from flexjag.api.plan import Plan
from flexjag.errors import shown
from flexjag.jagged import Jagged
from flexjag.upstream import on_recompiling

SWITCH = "FLEXJAG_EXPLAIN_RECOMPILES"
"""Environment variable that has every recompilation of a process explained on stderr, if it is neither empty nor 0."""


@dataclass(frozen=True)
class Recompile:
    """A function that is compiled once more, and why no graph of it serves the call.

    Attributes:
        function: The function with its file and line.
        changes: For each graph that there is, that of the last call first, the first thing that differs, and what to do
            about it; without duplicates.
    """

    function: str
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.function}: {self.changes[0] if self.changes else 'PyTorch names no reason'}"


class Recompiles(list[Recompile]):
    """Recompilations in the order in which they happened; as text, a line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


@contextmanager
def explain_recompiles(show: Callable[[str], Any] | None = None) -> Iterator[Recompiles]:
    """Collect why functions are compiled again, in this process, while the context is open.

    A function that ``torch.compile`` made compiles a graph when it is first called, and another one whenever an input
    is of another kind than those that its graphs are for. Each such recompilation becomes a :class:`Recompile`, whose
    text says in one line what changed and what to do instead. With ``FLEXJAG_EXPLAIN_RECOMPILES=1`` in the environment
    when flexjag is imported, the same lines of all recompilations go to stderr.

    Of several differences PyTorch names the first. The lines say what differs from the graph of the last call;
    :attr:`Recompile.changes` has the other graphs, too.

    Args:
        show: Called with the text of each recompilation at once, for instance ``print``.

    Yields:
        The list that the recompilations are added to.

    Example (not a doctest: those clear the globals in which TorchDynamo keeps its own)::

        fn = torch.compile(lambda x: fj.attention(x, x, x).values, fullgraph=True)
        x = fj.Jagged.from_lengths(torch.randn(5, 2, 16), [2, 3])
        with fj.explain_recompiles() as seen:
            out = fn(x), fn(x), fn(x.to(torch.bfloat16))
        print(seen)  # x.values is bfloat16, and the graph is for float32; convert it before the call
    """
    import torch._dynamo  # noqa: F401  # batches made from here on are marked as varying

    found = Recompiles()

    def note(frame: Any, reasons: list[str]) -> None:
        found.append(_recompile(frame, reasons))
        if show is not None:
            show(str(found[-1]))

    end = on_recompiling(note)
    try:
        yield found
    finally:
        end()


def _recompile(frame: Any, reasons: list[str]) -> Recompile:
    code = frame.f_code
    changes = [_change(reason, frame.f_locals) for reason in reasons]
    function = f"{code.co_qualname} ({Path(code.co_filename).name}:{code.co_firstlineno})"
    return Recompile(function, tuple(dict.fromkeys(changes)))


@dataclass(frozen=True)
class _Subject:
    """What a guard is about.

    Attributes:
        name: Its expression in the names of the compiled function.
        path: What the expression's parts are, from the function's argument on; empty if they cannot be found.
        parts: The names of these parts.
    """

    name: str
    path: tuple[Any, ...]
    parts: tuple[str, ...]

    @property
    def value(self) -> Any:
        """What it is in the call that recompiles."""
        return self.path[-1] if self.path else None

    @property
    def owner(self) -> Any:
        """What it is an attribute or entry of: the innermost object that is no tuple, list or dict."""
        return next((x for x in self.path[-2::-1] if not isinstance(x, (tuple, list, dict))), None)

    def within(self, kind: type) -> str | None:
        """The part of an object of this kind that it is or belongs to; None if it belongs to none."""
        for one, part in zip(self.path, self.parts[1:], strict=False):
            if isinstance(one, kind):
                return part
        return None


def _subject(source: str, names: Mapping[str, Any]) -> _Subject:
    """Look up a guard's expression among a function's local variables."""
    parts: list[Any] = []
    try:
        node = ast.parse(source, mode="eval").body
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                parts.append(node.attr)
            elif isinstance(node, ast.Subscript):
                parts.append((ast.literal_eval(node.slice),))
            else:
                raise LookupError(source)
            node = node.value
        path = [names[node.id]]
        for part in reversed(parts):
            path.append(path[-1][part[0]] if isinstance(part, tuple) else getattr(path[-1], part))
    except (SyntaxError, LookupError, ValueError, TypeError, AttributeError):
        return _Subject(_readable(source), (), ())
    written = [node.id, *(str(part[0]) if isinstance(part, tuple) else part for part in reversed(parts))]
    return _Subject(_readable(source), tuple(path), tuple(written))


def _readable(source: str) -> str:
    """The expression without the dictionaries in which modules hold what belongs to them.

    >>> _readable("self._modules['layers']._modules['0'].weight")
    'self.layers.0.weight'
    """
    return re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", source)


PLAN_PARTS = {
    "made_tiles": "whether it has tiles (refine_tiles, block_size, normalizer)",
    "sample": "the heads, dtype or gradients of its q",
    "tables": "whether k has offsets of its own",
    "layout": "whether k has offsets of its own, or in max_tokens",
    "sandwiches": "the spans of its mask",
    "reading": "what its mask's function reads",
    "head_of": "whether its mask depends on the head",
    "kernel_masks": "its mask",
    "kernel_score": "its score",
}
"""What differs in a plan by its attribute, where that is no argument of :func:`flexjag.plan`."""

STATES = {
    "grad_mode": "whether gradients are recorded (torch.no_grad, torch.inference_mode)",
    "autocast(cpu)_enabled": "whether autocast is on",
    "autocast(cuda)_enabled": "whether autocast is on",
}
DTYPES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32"}


def _change(reason: str, names: Mapping[str, Any]) -> str:
    """One line of what a failed guard means, and what to do about it."""
    text = re.sub(r"^\d+/\d+\w*: ", "", reason).split("\nUser stack trace:")[0]
    guard = " ".join(re.split(r"\s+# ", text)[0].split())
    for pattern, explain in RULES:
        match = re.match(pattern, guard)
        try:
            line = None if match is None else explain(match, names)
        except Exception:  # of a repr or a property of a user's object: an explanation must not end the program
            line = None
        if line is not None:
            return line
    return f"PyTorch's guard failed: {guard}"


def _of_plan(subject: _Subject, detail: str = "") -> str | None:
    """The change of something in a plan; None if it is in no plan."""
    part = subject.within(Plan)
    if part is None:
        return None
    name = subject.name.split(f".{part}")[0]
    what = PLAN_PARTS.get(part, f"its {part}")
    return f"{name} differs in {what}{detail}; make every plan by one call with arguments of one kind"


def _tensor(match: re.Match[str], names: Mapping[str, Any]) -> str | None:
    """A tensor's dtype, gradient, sizes or strides."""
    source, what, rest = match.groups()
    subject = _subject(source, names)
    values = re.findall(r"(?:expected|actual) (\w+)", rest)
    x, name = subject.value, subject.name
    if not isinstance(x, Tensor):
        return None
    if what == "dtype":
        new, old = str(x.dtype).removeprefix("torch."), values[0].lower()
        return f"{name} is {new}, and the graph is for {DTYPES.get(old, old)}; convert it before the call"
    if what == "requires_grad":
        needs = "needs a gradient, and did not before" if x.requires_grad else "needs no gradient, and did before"
        return f"{name} {needs}: each has a graph; keep it the same in every step"
    if what == "size":
        return _size(subject, int(re.findall(r"index (\d+)", rest)[0]), int(values[0]), int(values[1]))
    if what == "stride":
        return (
            f"{name} has other strides, {list(x.stride())}: each order in memory has a graph; call contiguous() before"
        )
    return _of_plan(subject) or f"{name} has another {what}: each has a graph"


def _size(subject: _Subject, dim: int, old: int, new: int) -> str:
    """A size for which the graph is compiled as a constant."""
    name, owner = f"{subject.name}.shape[{dim}]", subject.owner
    line = f"{name} is {new}, and the graph is for {old}"
    if isinstance(owner, Jagged) and dim > 0:
        return f"{line}: numbers of heads and features are part of a graph"
    if min(old, new) < 2:
        return f"{line}: PyTorch makes one more graph for each of the sizes 0 and 1; nothing needs to be done"
    if isinstance(owner, (Jagged, Plan)) or subject.within(Plan) is not None:
        return f"{line} only: it was made before torch._dynamo was loaded; import that before batches are made"
    if isinstance(owner, Node):
        return f"{line} only: PyTorch makes this size a symbol now, once; nothing needs to be done"
    advice = f"call torch._dynamo.maybe_mark_dynamic({subject.name}, {dim}) before, or pass a Jagged, which does"
    return f"{line} only: PyTorch makes this size a symbol now; {advice}"


def _kind(match: re.Match[str], names: Mapping[str, Any]) -> str | None:
    """The class of an argument, or of something in it."""
    source, rest = match.groups()
    subject = _subject(source, names)
    if not subject.path:
        return None
    found = re.findall(r"type=<class '(?:\w+\.)*(\w+)'>|HINT: type (\w+)", rest)
    was = f", was {found[0][0] or found[0][1]}" if found else ""
    value = "None" if subject.value is None else type(subject.value).__name__
    plan = _of_plan(subject, f" ({value}{was})")
    if plan is not None:
        return plan
    if isinstance(subject.value, (Node, Normalizer)):
        advice = "each structure has a graph; what varies in one structure belongs in a tensor"
        return f"{subject.name} is {shown(subject.value)}{was}: {advice}"
    return f"{subject.name} is of type {value}{was}: each has a graph"


def _none(match: re.Match[str], names: Mapping[str, Any]) -> str | None:
    """An argument that is given, or not."""
    subject = _subject(match[1], names)
    if not subject.path:
        return None
    now = "is None, and was given before" if subject.value is None else "is given, and was None before"
    return _of_plan(subject) or f"{subject.name} {now}: each has a graph"


def _entries(match: re.Match[str], names: Mapping[str, Any]) -> str:
    """A tuple, list or dictionary of another length."""
    subject = _subject(match[1], names)
    return _of_plan(subject) or f"{subject.name} has another number of entries: each has a graph"


def _number(match: re.Match[str], names: Mapping[str, Any]) -> str | None:
    """A number, a string or a truth value that is part of the graph."""
    subject, old = _subject(match[1], names), match[2]
    if not subject.path:
        return None
    value, owner = subject.value, subject.owner
    plan = _of_plan(subject, f" ({subject.name} is {shown(value)}, was {old})")
    if plan is not None:
        return plan
    line = f"{subject.name} is {shown(value)}, and the graph is for {old}"
    if isinstance(owner, Node):
        varies = any(name == subject.parts[-1] and axis == "segment" for name, axis, *_ in owner._axes)
        advice = "give what varies as a tensor with one entry per segment" if varies else "keep it the same"
        return f"{line}: the numbers of {type(owner).__name__} are part of a graph; {advice}"
    if isinstance(value, float):
        return f"{line}: keep it the same, or multiply by a tensor instead"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{line}: PyTorch makes this number a symbol now, once; keep it the same, or pass it in a tensor"
    return f"{line}: each has a graph"


def _function(match: re.Match[str], names: Mapping[str, Any]) -> str | None:
    """An object, mostly a function, that a graph knows by its identity."""
    subject = _subject(match[1], names)
    if not subject.path:
        return None
    line = f"{subject.name} is another object than before; make it once, outside of the step"
    return _of_plan(subject) or line


def _sizes(match: re.Match[str], names: Mapping[str, Any]) -> str:
    """A condition on sizes that vary."""
    condition = _readable(re.sub(r"(\S+?)\.size\(\)\[(\d)\]", r"\1.shape[\2]", match[0]))
    if re.match(r"2 <= \S+$", condition):
        return f"{condition} does not hold: PyTorch makes one more graph for each of the sizes 0 and 1; {NOTHING}"
    return f"{condition} does not hold, as it did before: PyTorch makes one more graph; {NOTHING}"


NOTHING = "nothing needs to be done"


def _shared(match: re.Match[str], names: Mapping[str, Any]) -> str:
    """Arguments that were one tensor and no longer are, or the other way round."""
    sources = re.findall(r"[A-Za-z_][\w.]*(?:\[[^\]]*\])*", match[1].replace(" is not ", " ").replace(" is ", " "))
    for source in sources:
        plan = _of_plan(_subject(source, names))
        if plan is not None:
            return plan
    alike = ", ".join(map(_readable, sources))
    return f"{alike} are one tensor, or no longer are: pass them alike in every step, such as q.with_values(...) for k"


RULES: tuple[tuple[str, Callable[[re.Match[str], Mapping[str, Any]], str | None]], ...] = (
    (r"tensor '(.+?)' (dtype|requires_grad|size|stride|device|rank) mismatch(.*)", _tensor),
    (r"___check_type_id\((.+?), \d+\)(.*)", _kind),
    (r"___check_obj_id\((.+?), \d+\)", _function),
    (r"(\S+) is (?:not )?None$", _none),
    (r"(?:not |len\()([^\s()]+)(?:$|\) [=!]= \d+$)", _entries),
    (r"Duplicate tensors? found: (.*)", _shared),
    (r"(\S+ is (?:not )?(?!None)[^\W\d]\S*)$", _shared),
    (r"(\S+) == (-?[\d.e+-]+|'.*'|True|False)$", _number),
    (r"GLOBAL_STATE changed: (.*?)\s*$", lambda m, _: f"{STATES.get(m[1], m[1])} changed: each has a graph"),
    (r".*\.size\(\)\[.*", _sizes),
)
"""Forms of guards, and what explains each; None from one that cannot leaves it to the next."""

if os.environ.get(SWITCH, "0") not in ("", "0"):
    on_recompiling(lambda frame, reasons: print(f"flexjag: {_recompile(frame, reasons)}", file=sys.stderr))
