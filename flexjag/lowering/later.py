"""Attributes that are made when one of them is first read, for objects that serve one eager call."""

from __future__ import annotations

from typing import Any, ClassVar, Self


class Later:
    """Base of a frozen dataclass, some of whose attributes are made together when one of them is first read.

    What a traced graph reads must be there from the start: the graph would depend on who had read it before.

    Attributes:
        later: Names of those attributes.
    """

    later: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def without(cls, **known: Any) -> Self:
        """Construct with all attributes but the later ones."""
        made = object.__new__(cls)
        vars(made).update(known)
        return made

    def make(self) -> dict[str, Any]:
        """The later attributes, by name."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Make the later attributes; only called for what is not there yet."""
        if name not in type(self).later:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        vars(self).update(self.make())
        return vars(self)[name]
