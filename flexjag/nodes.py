"""What mask, score and normalizer nodes share: frozen fields, structural equality, a hash, their text and tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

import torch
from torch import Tensor

from flexjag.errors import explain_values, shown

NodeType = TypeVar("NodeType", bound=type)
NodeKind = TypeVar("NodeKind")


Axis = Literal["query token", "key token", "segment", "query head"]
"""What the tensors of a node may have an entry for."""


def along(axis: Axis | None, *, default: Any = MISSING, in_place_of_none: str | None = None) -> Any:
    """A node's field that may hold a tensor, and what the tensor has an entry for: checks follow from it.

    Heads are a tensor's first dimension, everything else is its last. A tensor without dimensions serves all.

    Args:
        axis: What there is an entry for; None if nothing of the batch, as for boundaries.
        default: The field's default.
        in_place_of_none: The field that is read along this axis where this one is None.
    """
    return field(default=default, metadata={"axis": axis, "in_place_of_none": in_place_of_none})


@dataclass_transform(frozen_default=True, field_specifiers=(along,))
def node(cls: NodeType) -> NodeType:
    """Make `cls` a frozen dataclass that compares tensors by identity, so that it has a hash."""
    made: Any = dataclass(frozen=True, eq=False, repr=False)(cls)  # type: ignore[assignment]
    # Kept apart, because Dynamo refuses to read the fields' metadata once a graph has changed any dictionary.
    shown = (f for f in fields(made) if "axis" in f.metadata)  # pyright: ignore[reportUnknownArgumentType]
    names: Any = fields(made)  # pyright: ignore[reportUnknownArgumentType]
    made._of, made._names = made, tuple(f.name for f in names)
    made._axes = tuple((f.name, *f.metadata.values()) for f in shown)
    return made  # pyright: ignore[reportUnknownVariableType]


def check_tensor(error: type[ValueError], name: str, given: object, hint: str = "") -> None:
    """Check that what a node was given as a tensor is one.

    Args:
        error: What to raise.
        name: The argument.
        given: Its value.
        hint: What else would do, after "must be a tensor".
    """
    if not isinstance(given, Tensor):
        raise error(explain_values(name, f"must be a tensor{hint}", **{name: given}))


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds integers, of any width and sign; bools are none."""
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def saturated(integers: Tensor) -> Tensor:
    """Integers of any dtype as int64; what only uint64 can hold becomes the largest."""
    if integers.dtype != torch.uint64:
        return integers.to(torch.int64)
    signed = integers.view(torch.int64)
    return torch.where(signed < 0, torch.iinfo(torch.int64).max, signed)


def check_node(error: type[ValueError], kind: type[NodeKind], given: object) -> NodeKind:
    """Check that an argument is a node of a kind, Mask or Score, and return it."""
    if isinstance(given, kind):
        return given
    name = kind.__name__.lower()
    if isinstance(given, Tensor):
        hint, seen = "; wrap a boolean matrix in Dense" if name == "mask" else "", {"shape": tuple(given.shape)}
    elif isinstance(given, type):
        hint, seen = ", not its class", {name: given.__name__}
    else:
        hint, seen = f"; wrap a function in {kind.__name__}Mod", {name: given}
    raise error(explain_values(name, f"must be a flexjag {name}{hint}", **seen))


class Along(NamedTuple):
    """A tensor that a node holds, and what it has an entry for.

    Attributes:
        name: The field.
        axis: The axis; None if nothing of the batch.
        tensor: The tensor.
    """

    name: str
    axis: Axis | None
    tensor: Tensor


def tensors_along(node: Node | None) -> list[Along]:
    """The tensors in the :func:`along` fields of a node and of its nodes."""
    found: list[Along] = []
    for one in () if node is None else walk(node):
        for name, axis, other in getattr(one, "_axes", ()):  # a user's node may forget the decorator
            value = getattr(one, name)
            value = getattr(one, other) if value is None and other is not None else value
            if isinstance(value, Tensor):
                found.append(Along(name, axis, value))
    return found


def head_counts(node: Node | None) -> set[int]:
    """For how many query heads a node's tensors are made; empty if it does not matter."""
    return {x.tensor.shape[0] for x in tensors_along(node) if x.axis == "query head"}


def check_held(error: type[ValueError], node: Node | None, sizes: Mapping[Axis, int], device: torch.device) -> None:
    """Check that a node's tensors fit a batch; metadata only.

    Args:
        error: What to raise.
        node: The mask, score or normalizer.
        sizes: How many there are of the axes that are known.
        device: The batch's. A number in a tensor may also be on a CPU, as everywhere in torch.
    """
    for name, axis, x in tensors_along(node):
        if x.device != device and not (x.ndim == 0 and x.device.type == "cpu"):
            raise error(explain_values(name, "must be on the batch's device", device=str(x.device), batch=str(device)))
        if axis is None or axis not in sizes or x.ndim == 0:
            continue
        entries = x.shape[0 if axis == "query head" else -1]
        if entries != sizes[axis]:
            counted = {"entries": entries, f"{axis.split()[-1]}s": sizes[axis]}
            raise error(explain_values(name, f"must have one entry per {axis}", **counted))


def _names(value: Any) -> tuple[str, ...]:
    """The names of a node's fields. Looking them up anew would cost microseconds in every call."""
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    if getattr(kind, "_of", None) is kind:
        return kind._names
    return (
        tuple([f.name for f in fields(value)]) if is_dataclass(value) else ()
    )  # a user's node may forget the decorator


class Node:
    """What mask and score nodes share: structural equality, a hash, and their text."""

    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in _names(self))
        return (type(self), *(("tensor", id(x)) if isinstance(x, Tensor) else x for x in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def structure(self) -> tuple[Any, ...]:
        """What the node *is* without what it holds: tensors by rank and dtype, functions by their code.

        Batches with equal structures run the same compiled kernel.
        """
        return (type(self), *(_structure(getattr(self, name)) for name in _names(self)))

    def __repr__(self) -> str:
        parts: list[str] = []
        for name in _names(self):
            value = getattr(self, name)
            if name == "align" and value == "start":
                continue
            if isinstance(value, Tensor):
                text = f"<{str(value.dtype).removeprefix('torch.')}{shown(list(value.shape))}>"
            elif callable(value):
                text = getattr(value, "__name__", type(value).__name__)
            else:
                text = repr(value)
            parts.append(f"align={text}" if name == "align" else text)
        return f"{type(self).__name__}({', '.join(parts)})"


def walk(node: Node) -> Iterator[Node]:
    """The node and all nodes in its fields, depth first."""
    yield node
    for name in _names(node):
        value = getattr(node, name)
        for x in value if isinstance(value, tuple) else (value,):  # pyright: ignore[reportUnknownVariableType]
            if isinstance(x, Node):
                yield from walk(x)


def held_tensors(node: Node) -> list[Tensor]:
    """The tensors in the fields of the node and of its nodes."""
    values = (getattr(one, name) for one in walk(node) for name in _names(one))
    return [x for x in values if isinstance(x, Tensor)]


def replaced(node: NodeKind, leaf: Callable[[Any], Any], axes: Collection[Axis] | None = None) -> NodeKind:
    """The node with every tensor and function in it, and in its nodes, replaced by `leaf` of it.

    The node itself if nothing changes. Nothing is checked again: `leaf` must keep shapes, dtypes and devices or widen.

    Args:
        node: The node.
        leaf: Applied to tensors and functions.
        axes: Only to fields along these; default to all.
    """
    values: dict[str, Any] = {}
    along = {name: axis for name, axis, _ in getattr(node, "_axes", ())}
    for name in _names(node):
        chosen = axes is None or along.get(name) in axes
        values[name] = _replaced(getattr(node, name), leaf if chosen else lambda x: x, leaf, axes)
    if all(new is getattr(node, name) for name, new in values.items()):
        return node
    twin = object.__new__(type(node))  # what copy.copy does, which Dynamo of torch 2.11 cannot trace, nor vars
    for name, value in (values if torch.compiler.is_compiling() else {**vars(node), **values}).items():
        object.__setattr__(twin, name, value)  # a user's node may have an __init__ of its own
    return twin


def _replaced(value: Any, own: Callable[[Any], Any], leaf: Callable[[Any], Any], axes: Collection[Axis] | None) -> Any:
    if isinstance(value, Node):
        return replaced(value, leaf, axes)
    if isinstance(value, tuple):
        new = tuple(_replaced(x, own, leaf, axes) for x in value)  # pyright: ignore[reportUnknownVariableType]
        return new if any(x is not y for x, y in zip(new, value, strict=True)) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return own(value) if isinstance(value, Tensor) or callable(value) else value


def _structure(value: Any) -> Any:
    if isinstance(value, Node):
        return value.structure()
    if isinstance(value, Tensor):
        return ("tensor", value.ndim, value.dtype)
    if isinstance(value, tuple):
        return tuple(_structure(x) for x in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, int):
        return int  # bounds end up in the spans, which are data
    if callable(value):  # a function, a functools.partial, or an object with __call__
        function: Any = getattr(value, "func", value)
        kind: Any = type(function)  # pyright: ignore[reportUnknownVariableType]
        call: Any = getattr(kind, "__call__", None)  # noqa: B004
        return getattr(function, "__code__", None) or getattr(call, "__code__", kind)
    return value
