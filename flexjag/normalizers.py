"""Normalizers: what turns masked scores into weights."""

from __future__ import annotations

from flexjag.nodes import Node, node


class Normalizer(Node):
    """Base class of every normalizer."""


@node
class Softmax(Normalizer):
    """Weights ``exp(s_ij) / sum_k exp(s_ik)`` over the allowed keys; a row without any gets zeros.

    >>> Softmax()
    Softmax()
    """
