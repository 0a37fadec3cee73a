"""Base class and decorator of mask, score and normalizer nodes: frozen fields with axes, equality, hash and text."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform, get_args

import numpy as np
import torch
from torch import Tensor

from flexjag.errors import NodeError, explain_values, shown
from flexjag.moving import Change, Movable
from flexjag.offsets import as_int, index_tensor, mark_varying

NUMBERS: tuple[type[Any], ...] = (int, float, np.number)

NodeType = TypeVar("NodeType", bound=type)
NodeKind = TypeVar("NodeKind")


Align = Literal["start", "end"]

Axis = Literal["query token", "key token", "pair", "segment", "query head"]
"""Axes of a node's tensors. Pairs are (query, key) of one segment, in row-major matrices back to back."""

BATCH: tuple[Axis, ...] = ("query token", "key token", "pair", "segment")
"""Axes whose size changes from batch to batch."""


def along(
    axis: Axis | None, *, default: Any = MISSING, in_place_of_none: str | None = None, per_head: bool = False
) -> Any:
    """Declare a node's field that may hold a tensor, with the axis that the tensor is indexed by.

    Checks, padding, marking and copies follow from the axis. Heads are a tensor's first dimension, all other axes its
    last. A 0-d tensor is shared by all entries; pairs with a dimension for queries and one for keys are shared by all
    segments, by local positions.

    Args:
        axis: The axis; None for tensors that do not depend on the batch, such as boundaries.
        default: The field's default.
        in_place_of_none: Name of the field that is used along this axis if this one is None.
        per_head: The tensor has a first dimension of heads besides the axis: H, or 1 if all heads share it.

    Raises:
        NodeError: If there is no such axis.
    """
    if axis is not None and axis not in get_args(Axis):
        raise NodeError(explain_values("axis", f"must be None or one of {', '.join(get_args(Axis))}", axis=axis))
    declared = {"axis": axis, "in_place_of_none": in_place_of_none, "per_head": per_head}
    return field(default=default, metadata=declared)


@dataclass_transform(frozen_default=True, field_specifiers=(along,))
def node(cls: NodeType) -> NodeType:
    """Make `cls` a frozen dataclass that compares tensors by identity, so that it has a hash.

    Raises:
        NodeError: If a field's `in_place_of_none` names no field.
    """
    made: Any = dataclass(frozen=True, eq=False, repr=False)(cls)  # type: ignore[assignment]
    # Kept apart, because Dynamo refuses to read the fields' metadata once a graph has changed any dictionary.
    shown = (f for f in fields(made) if "axis" in f.metadata)  # pyright: ignore[reportUnknownArgumentType]
    names: Any = fields(made)  # pyright: ignore[reportUnknownArgumentType]
    made._of, made._names = made, tuple(f.name for f in names)
    made._axes = tuple((f.name, *f.metadata.values()) for f in shown)
    for name, _, other, _ in made._axes:
        if other is not None and other not in made._names:
            raise NodeError(explain_values(name, "in_place_of_none must name a field", in_place_of_none=other))
    return made  # pyright: ignore[reportUnknownVariableType]


def is_of_batch(x: Tensor, axis: Axis | None, per_head: bool) -> bool:
    """True if the size of a tensor along an axis changes from batch to batch; False for pairs that segments share."""
    return axis in BATCH and x.ndim > 0 and not (axis == "pair" and x.ndim - per_head == 2)


def check_tensor(error: type[ValueError], name: str, given: object, hint: str = "") -> None:
    """Check that an argument is a tensor.

    Args:
        error: What to raise.
        name: The argument.
        given: Its value.
        hint: What else would do, after "must be a tensor".
    """
    if not isinstance(given, Tensor):
        raise error(explain_values(name, f"must be a tensor{hint}", **{name: given}))


def finite(error: type[ValueError], name: str, given: Any) -> float:
    """A finite number of Python or NumPy as a float; in a traced graph it may be a symbol, and is not looked at.

    Raises:
        error: If it is none.
    """
    if torch.compiler.is_compiling():  # where NumPy's numbers are tensors
        return float(given)
    found = float(given) if isinstance(given, NUMBERS) else math.nan
    if isinstance(given, bool) or not math.isfinite(found):
        raise error(explain_values(name, "must be a finite number", **{name: given}))
    return found


def check_align(error: type[ValueError], align: str) -> None:
    """Check that an alignment of queries and keys is one."""
    if align not in ("start", "end"):
        raise error(explain_values("align", "must be 'start' or 'end'", align=align))


def is_integer(x: Tensor) -> bool:
    """True for integer dtypes of any width and sign; False for bool."""
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def saturated(integers: Tensor) -> Tensor:
    """Cast integers to int64; uint64 values beyond its range become the largest int64."""
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


def field_names(value: Any) -> tuple[str, ...]:
    """The names of a node's fields, in order. Looking them up anew would cost microseconds in every call."""
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    if getattr(kind, "_of", None) is kind:
        return kind._names
    if not is_dataclass(value):
        rule = "must be decorated by flexjag.extend.node: what it holds would be neither checked, compared nor copied"
        raise NodeError(explain_values(kind.__name__, rule, type=kind))
    return tuple([f.name for f in fields(value)])  # a subclass without the decorator has its base's fields


class Node(Movable):
    """Base class of mask, score and normalizer nodes: structural equality, hash, text and declarations.

    Attributes:
        by_position: The node's value depends only on the local positions of query and key, apart from its tensors per
            token or segment. Without such tensors, one bias serves all segments.
        reads_pairs: The node reads a table for each (query, key) pair, which costs a kernel registers.
        printable: The node's case is known to translate to kernel source, with indices in range. If False, the
            translation is attempted for each plan, and indices are clamped.
    """

    by_position: ClassVar[bool] = False
    reads_pairs: ClassVar[bool] = True
    printable: ClassVar[bool] = False
    _axes: ClassVar[tuple[tuple[str, Axis | None, str | None, bool], ...]] = ()

    def __post_init__(self) -> None:
        """Take NumPy's integers and arrays for Python's and torch's, and tell TorchDynamo which sizes will change."""
        if torch.compiler.is_compiling():
            return
        for name, *_ in self._axes:
            value = getattr(self, name)
            own = index_tensor(as_int(value))
            if own is not value:
                object.__setattr__(self, name, own)
        self.mark(declared=True)

    def changed(self, change: Change) -> Self:
        """The node with `change` of every tensor in it, in its nodes and in what its functions close over.

        A tensor that learns is no parameter any more where it is moved; gradients flow back to the one here.
        """
        from flexjag.algebra.user_functions import frozen  # which knows nodes by their classes

        return frozen(self, change)

    def mark(self, *, declared: bool) -> None:
        """Mark the last dimension of tensors along :data:`BATCH` as dynamic, but of pairs that all segments share.

        Args:
            declared: Only those of :func:`along` fields. Else also those of fields that declare no axis.
        """
        axes: dict[str, tuple[Axis | None, bool]] = {name: (axis, per_head) for name, axis, _, per_head in self._axes}
        for name in axes if declared else field_names(self):
            x = getattr(self, name)
            if isinstance(x, Tensor) and is_of_batch(x, *axes.get(name, ("pair", False))):
                mark_varying(x, x.ndim - 1)

    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in field_names(self))
        return (type(self), *(("tensor", id(x)) if isinstance(x, Tensor) else x for x in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def structure(self) -> tuple[Any, ...]:
        """Structural key: node types, tensors by rank and dtype, functions by their code.

        Batches with equal structures run the same compiled kernel.
        """
        return (type(self), *(_structure(getattr(self, name)) for name in field_names(self)))

    def __repr__(self) -> str:
        parts: list[str] = []
        for name in field_names(self) if is_dataclass(self) else ():
            value = getattr(self, name)
            named = name in ("align", "symmetric")
            if named and value == getattr(type(self), name):  # the default
                continue
            if isinstance(value, Tensor):
                text = f"<{str(value.dtype).removeprefix('torch.')}{shown(list(value.shape))}>"
            elif callable(value):
                text = getattr(value, "__name__", type(value).__name__)
            else:
                text = repr(value)
            parts.append(f"{name}={text}" if named else text)
        return f"{type(self).__name__}({', '.join(parts)})"


def _structure(value: Any) -> Any:
    if isinstance(value, Node):
        return value.structure()
    if isinstance(value, Tensor):
        return ("tensor", value.ndim, value.dtype)
    if isinstance(value, tuple):
        return tuple(_structure(x) for x in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, int) and not isinstance(value, bool):
        return int  # bounds end up in the spans, which are data
    if callable(value):  # a function, a functools.partial, or an object with __call__
        function: Any = getattr(value, "func", value)
        kind: Any = type(function)  # pyright: ignore[reportUnknownVariableType]
        call: Any = getattr(kind, "__call__", None)  # noqa: B004
        return getattr(function, "__code__", None) or getattr(call, "__code__", kind)
    return value
