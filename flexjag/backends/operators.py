"""Operators that graphs on a CPU hold, imported by ``import flexjag``.

A process that loads an exported program or a package of AOTInductor finds them then, without a call of attention first.
"""

from flexjag.backends import gathers
from flexjag.backends.cpp import operator as cpp
from flexjag.backends.normalized import stick_breaking

__all__ = ["cpp", "gathers", "stick_breaking"]
