"""About how many keys a mask lets a query attend."""

from __future__ import annotations

from flexjag import masks as m


def attended(mask: m.Mask, keys: float) -> float:
    """About how many of a segment's keys a query may attend.

    >>> attended(m.Window(127, 0) | m.Prefix(4), 1000.0), attended(m.Causal() & m.Prefix(4), 1000.0)
    (132.0, 4.0)
    """
    match mask:
        case m.And():
            return min(attended(mask.left, keys), attended(mask.right, keys))
        case m.Or():
            return min(keys, attended(mask.left, keys) + attended(mask.right, keys))
        case m.Causal():
            return keys / 2
        case m.Window():
            sides = [keys / 2 if x is None or not isinstance(x, int) else float(x) for x in (mask.left, mask.right)]
            return min(keys, sum(sides) + 1)
        case m.Prefix() if isinstance(mask.n, int):
            return min(keys, float(mask.n))
        case m.Chunked() if isinstance(mask.size, int):
            return min(keys, float(mask.size))
        case _:
            return keys


def extent(mask: m.Mask, keys: float) -> float:
    """About how many keys lie between the first and the last that a query may attend.

    >>> extent(m.Window(127, 0) | m.Prefix(4), 1000.0), extent(m.Causal() & m.Window(9, 9), 1000.0)
    (1000.0, 19.0)
    """
    match mask:
        case m.And():
            return min(extent(mask.left, keys), extent(mask.right, keys))
        case m.Or():
            return keys
        case _:
            return attended(mask, keys)
