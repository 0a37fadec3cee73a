"""Traversal of node trees, and operations derived from the axes of their fields.

Nodes declare the axis of each tensor (:func:`flexjag.algebra.node.along`). Padding, marking as dynamic, checks, copies
and collection are implemented here once for all nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexjag.algebra.node import Axis, Node, NodeKind, field_names, is_of_batch
from flexjag.errors import explain_values


def children(node: Node) -> list[Node]:
    """The nodes in a node's fields, in order; those in tuples, too."""
    found: list[Node] = []
    for name in field_names(node):
        value = getattr(node, name)
        found += [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Node)]  # pyright: ignore[reportUnknownVariableType]
    return found


def walk(node: Node | None) -> Iterator[Node]:
    """The node and all nodes below it, depth first; nothing of None."""
    if node is not None:
        yield node
        for child in children(node):
            yield from walk(child)


def rebuilt(node: NodeKind, change: Callable[[Any], Any]) -> NodeKind:
    """The node with its children replaced by `change` of them; itself if none changes."""
    return _with_fields(node, {name: _changed(getattr(node, name), change) for name in field_names(node)})


def replaced(node: NodeKind, leaf: Callable[[Any], Any], axes: Collection[Axis] | None = None) -> NodeKind:
    """The node with every tensor and function in it, and in its nodes, replaced by `leaf` of it.

    The node itself if nothing changes. Nothing is checked again: `leaf` must keep shapes, dtypes and devices or widen.

    Args:
        node: The node.
        leaf: Applied to tensors and functions.
        axes: Only to fields along these; default to all.
    """
    along = {name: axis for name, axis, *_ in getattr(node, "_axes", ())}

    def new(name: str) -> Any:
        value = _changed(getattr(node, name), lambda child: replaced(child, leaf, axes))
        return _leaves(value, leaf) if axes is None or along.get(name) in axes else value

    return _with_fields(node, {name: new(name) for name in field_names(node)})


def filled(node: NodeKind) -> NodeKind:
    """Replace None by the tensor that is used instead (`in_place_of_none`), in a node and its nodes."""
    instead = {name: other for name, _, other, _ in getattr(node, "_axes", ()) if other is not None}

    def new(name: str) -> Any:
        value = getattr(node, name)
        return getattr(node, instead[name]) if value is None and name in instead else _changed(value, filled)

    return _with_fields(node, {name: new(name) for name in field_names(node)})


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of a node, or of the nodes in a tuple; anything else as it is."""
    if isinstance(value, Node):
        return change(value)
    return _in_tuple(value, lambda x: _changed(x, change)) if isinstance(value, tuple) else value


def _leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return _in_tuple(value, lambda x: _leaves(x, leaf))  # pyright: ignore[reportUnknownArgumentType]
    return leaf(value) if isinstance(value, Tensor) or (callable(value) and not isinstance(value, Node)) else value


def _in_tuple(value: Any, change: Callable[[Any], Any]) -> Any:
    new = tuple([change(x) for x in value])
    return new if any(x is not y for x, y in zip(new, value, strict=True)) else value


def _with_fields(node: NodeKind, values: Mapping[str, Any]) -> NodeKind:
    if all(new is getattr(node, name) for name, new in values.items()):
        return node
    twin = object.__new__(type(node))  # what copy.copy does, which Dynamo of torch 2.11 cannot trace, nor vars
    for name, value in (values if torch.compiler.is_compiling() else {**vars(node), **values}).items():
        object.__setattr__(twin, name, value)  # a user's node may have an __init__ of its own
    return twin


class Along(NamedTuple):
    """A tensor in a node's field, with its axis.

    Attributes:
        name: The field.
        axis: The axis; None if nothing of the batch.
        tensor: The tensor.
        per_head: The tensor's first dimension is H, or 1 if all heads share it.
    """

    name: str
    axis: Axis | None
    tensor: Tensor
    per_head: bool

    @property
    def of_batch(self) -> bool:
        """True if the tensor's size changes from batch to batch."""
        return is_of_batch(self.tensor, self.axis, self.per_head)

    @property
    def heads(self) -> int | None:
        """H of a tensor that differs between heads; None of others."""
        if not self.tensor.ndim or not (self.per_head or self.axis == "query head"):
            return None
        return None if self.per_head and self.tensor.shape[0] == 1 else self.tensor.shape[0]


def tensors_along(node: Node | None) -> list[Along]:
    """The tensors in the :func:`along` fields of a node and of its nodes."""
    found: list[Along] = []
    for one in walk(node):
        for name, axis, other, per_head in one._axes:
            value = getattr(one, name)
            value = getattr(one, other) if value is None and other is not None else value
            if isinstance(value, Tensor):
                found.append(Along(name, axis, value, per_head))
    return found


def head_counts(node: Node | None) -> set[int]:
    """Sizes of the head axis among a node's tensors; empty if none is per head."""
    return {x.heads for x in tensors_along(node) if x.heads is not None}


def check_held(error: type[ValueError], node: Node | None, sizes: Mapping[Axis, int], device: torch.device) -> None:
    """Check that a node's tensors fit a batch; metadata only.

    Args:
        error: What to raise.
        node: The mask, score or normalizer.
        sizes: How many there are of the axes that are known.
        device: The batch's. A number in a tensor may also be on a CPU, as everywhere in torch.
    """
    for name, axis, x, _ in tensors_along(node):
        if x.device != device and not (x.ndim == 0 and x.device.type == "cpu"):
            raise error(explain_values(name, "must be on the batch's device", device=str(x.device), batch=str(device)))
        if axis is None or axis not in sizes or x.ndim == 0:
            continue
        entries = x.shape[0 if axis == "query head" else -1]
        if entries != sizes[axis]:
            counted = {"entries": entries, f"{axis.split()[-1]}s": sizes[axis]}
            raise error(explain_values(name, f"must have one entry per {axis}", **counted))


def held_tensors(node: Node | None) -> list[Tensor]:
    """The tensors in the fields of the node and of its nodes."""
    values = (getattr(one, name) for one in walk(node) for name in field_names(one))
    return [x for x in values if isinstance(x, Tensor)]


def mark(node: Node | None) -> None:
    """Tell TorchDynamo, if it is in use, which sizes of a node's tensors change from batch to batch.

    Those along :data:`~flexjag.algebra.node.BATCH` do, and those of fields that say nothing may.
    """
    for one in walk(node):
        one.mark(declared=False)


def is_by_position(mask: Node | None, score: Node | None, is_self: bool) -> bool:
    """True if mask and score depend on local positions only, so that one bias serves all segments.

    Args:
        mask: The mask, or None.
        score: The score, or None.
        is_self: Queries and keys share their offsets: then both alignments are the same.

    >>> from flexjag.algebra.masks import Causal, Prefix, Window
    >>> is_by_position(Causal() & Window(9, 0), None, True), is_by_position(Prefix(torch.tensor([2])), None, True)
    (True, False)
    """
    nodes = [*walk(mask), *walk(score)]
    aligned = is_self or all(getattr(one, "align", "start") == "start" for one in nodes)
    of_batch = (x for root in (mask, score) for x in tensors_along(root) if x.of_batch)
    return aligned and all(one.by_position for one in nodes) and not any(of_batch)


def reads_pairs(node: Node | None) -> bool:
    """True if a node or one of its nodes reads a table for each (query, key) pair."""
    return any(one.reads_pairs for one in walk(node))
