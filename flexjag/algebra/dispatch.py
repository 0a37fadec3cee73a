"""Interpretations: functions on nodes, chosen by the node's type.

A mask or score node says what it *is*. What it *means* for some purpose (its spans, its dense form,
its FlexAttention mod) is an interpretation: one function per node type, in the file of that purpose.
A new purpose is a new file; a new node is one class plus its cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexjag.errors import UnknownNodeError


class Interpretation:
    """A function of a node whose cases are registered by node type.

    ``functools.singledispatch`` would do, but TorchDynamo cannot trace its weak-reference cache, and
    planning must be traceable.

    Args:
        name: What the interpretation computes, for error messages.
        of: The base class of the nodes that it is for.
        otherwise: The case of nodes that have none, where there is an answer that is always right.
        decorator: Name in :mod:`flexjag.extend`, where users register cases of their own.

    Attributes:
        cases: What is registered.
        checked: ``checked(result, node, *args)``, which what cases return passes if they are registered once it is
            set: those of users.

    >>> size = Interpretation("size", int)
    >>> @size.register(int)
    ... def _(node): return node
    >>> size(3)
    3
    """

    def __init__(
        self, name: str, of: type, otherwise: Callable[..., Any] | None = None, decorator: str | None = None
    ) -> None:
        self.name, self.of, self.otherwise, self.decorator = name, of, otherwise, decorator
        self.cases: dict[type, Callable[..., Any]] = {}
        self.checked: Callable[..., Any] | None = None

    def register(self, *node_types: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as the case of `node_types` and of their subclasses."""

        def decorate(case: Callable[..., Any]) -> Callable[..., Any]:
            for node_type in node_types:
                self.cases[node_type] = case if self.checked is None else _passed(case, self.checked)
            return case

        return decorate

    def knows(self, node: object) -> bool:
        """Whether the node's type, or one of its base classes, has a case."""
        return any(node_type in self.cases for node_type in type(node).__mro__)

    def __call__(self, node: Any, *args: Any) -> Any:
        """Run the case of the node's type, or of its nearest base class that has one.

        Raises:
            UnknownNodeError: If there is none.
        """
        for node_type in type(node).__mro__:
            if node_type in self.cases:
                return self.cases[node_type](node, *args)
        if self.otherwise is not None:
            return self.otherwise(node, *args)
        raise UnknownNodeError(
            f"{type(node).__name__}: this node has no {self.name}; got {node!r}. "
            f"Write one and decorate it with @{self.decorator or self.name}.register({type(node).__name__})"
            f"{' of flexjag.extend' if self.decorator else ''}."
        )


def _passed(case: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    return lambda node, *args: checked(case(node, *args), node, *args)
