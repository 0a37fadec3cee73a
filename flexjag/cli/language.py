"""Masks and scores as text, for the command line: ``causal & (window(256) | prefix(4))``, ``alibi >> softcap(30)``.

The grammar, read by recursive descent; nothing is ever evaluated as Python::

    mask    := both ("|" both)*
    both    := unary ("&" unary)*
    unary   := "~" unary | "(" mask ")" | call
    score   := link (">>" link)*
    link    := "(" score ")" | call
    call    := NAME [ "(" [ argument ("," argument)* ] ")" ]
    argument := [ NAME "=" ] ( NUMBER | "none" | "start" | "end" | "[" INTEGER ("," INTEGER)* "]" )

Names ignore case, and ``None`` and quoted words will do, so the printed form of a mask without tensors reads back.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.errors import FlexjagError, LanguageError, ScoreError, explain_values

MOST_OPERATORS = 100  # keeps the parser and every interpretation of the result far from Python's recursion limit
TABLE_SEED, TABLE_STD = 0, 0.02  # a relative table of zeros would do nothing
FARTHEST = 2**16  # a wider relative table is a slip of the finger, and takes gigabytes

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)"
    r"|(?P<word>'\w*'|\"\w*\")|(?P<sign>>>|[()\[\],=&|~])|(?P<end>\Z)|(?P<bad>.))",
    re.DOTALL,
)
_WORDS = {"none": None, "start": "start", "end": "end"}
_UNKNOWN_WORD = object()
_KINDS = {  # kind of parameter: the types it takes, and how to say so
    "size": ((int, torch.Tensor), "an integer of at least 1, or a list of one per segment such as [1, 2, 3]"),
    "bound": ((int, torch.Tensor), "an integer, or a list of one per segment such as [1, 2, 3]"),
    "limit": (
        (int, NoneType, torch.Tensor),
        "an integer, none, or a list of one per segment such as [1, 2, 3]",
    ),
    "align": ((str,), "start or end"),
    "integer": ((int,), "an integer"),
    "number": ((int, float), "a number"),
}
_PYTHON_WORDS = {"and": "&", "or": "|", "not": "~", "!": "~"}
_PYTHON_ONLY = (
    "keys",
    "queries",
    "rows",
    "samegroup",
    "dense",
    "maskmod",
    "perhead",
    "scoremod",
    "relativebias",
    "bucketedbias",
    "bucketed",
    "t5bias",
    "timebias",
    "time",
)

NodeType = TypeVar("NodeType", m.Mask, s.Score)


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


@dataclass(frozen=True)
class _Form:
    """Syntax of a node: its parameters in order with their kinds, and the number of required ones."""

    parameters: dict[str, str]
    required: int
    make: Callable[..., Any]

    def usage(self, name: str) -> str:
        """The call's syntax for messages: ``window(left[, right[, align]])``."""
        given = list(self.parameters)
        text = ", ".join(given[: self.required])
        for index, parameter in enumerate(given[self.required :], self.required):
            text += f"[, {parameter}" if index else f"[{parameter}"
        return f"{name}({text}{']' * (len(given) - self.required)})" if given else name


_MASKS = {
    "full": _Form({}, 0, m.Full),
    "causal": _Form({"align": "align"}, 0, m.Causal),
    "window": _Form({"left": "limit", "right": "limit", "align": "align"}, 1, m.Window),
    "prefix": _Form({"n": "bound"}, 1, m.Prefix),
    "chunked": _Form({"size": "size", "align": "align"}, 1, m.Chunked),
    "global": _Form({"n": "bound"}, 1, m.GlobalTokens),
}


def _score_forms(heads: int) -> dict[str, _Form]:
    def relative(max_distance: int) -> s.RelativeBias:
        if not 0 <= max_distance <= FARTHEST:
            raise ScoreError(explain_values("max_distance", f"must be 0 to {FARTHEST}", max_distance=max_distance))
        generator = torch.Generator().manual_seed(TABLE_SEED)
        return s.RelativeBias(TABLE_STD * torch.randn(heads, 2 * max_distance + 1, generator=generator))

    return {
        "alibi": _Form({}, 0, lambda: s.Alibi.from_heads(heads)),
        "softcap": _Form({"cap": "number"}, 1, lambda cap: s.SoftCap(float(cap))),
        "relative": _Form({"max_distance": "integer"}, 1, relative),
    }


def parse_mask(text: str) -> m.Mask:
    """Parse a mask.

    The names are ``full``, ``causal``, ``window``, ``prefix``, ``chunked`` and ``global``. ``~`` binds tighter than
    ``&``, and ``&`` tighter than ``|``, as in Python. Arguments are those of the nodes, with their defaults:
    ``window(256)`` is ``Window(256)``, that is up to 256 tokens back and none ahead.

    Args:
        text: The mask, such as ``causal & (window(256) | prefix(4))``, ``causal(end)``, ``prefix([1, 2, 3])`` or
            ``window(left=128, right=none, align=end)``.

    Returns:
        The mask. A list becomes a per-segment int64 tensor ``[S]``.

    Raises:
        LanguageError: If the text is not a mask. The message points at the column and says what was expected.

    >>> parse_mask("causal & (window(256) | prefix(4))")
    Causal() & (Window(256, 0) | Prefix(4))
    >>> parse_mask("window(left=128, right=none, align=end)")
    Window(128, None, align='end')
    """
    parser = _Parser(text, "mask", _MASKS | {"globaltokens": _MASKS["global"]}, list(_MASKS))
    return parser.whole(parser.mask, "'&', '|' or the end")


def parse_score(text: str, heads: int) -> s.Score:
    """Parse a score: ``alibi``, ``softcap(cap)`` and ``relative(max_distance)``, composed left to right by ``>>``.

    Args:
        text: The score, such as ``alibi >> softcap(30)``.
        heads: H, for the slopes of ``alibi`` and the table of ``relative``. The table is ``[H, 2R + 1]``, normal with
            standard deviation 0.02 from a fixed seed.

    Raises:
        LanguageError: If the text is not a score. The message points at the column and says what was expected.

    >>> parse_score("alibi >> softcap(30)", heads=8)
    Alibi(<float32[8]>) >> SoftCap(30.0)
    """
    forms = _score_forms(heads)
    parser = _Parser(text, "score", forms, list(forms))
    return parser.whole(parser.score, "'>>' or the end")


class _Parser:
    """Recursive descent over the tokens of one text. `kind` is the word for what is parsed: mask or score."""

    def __init__(self, text: str, kind: str, forms: dict[str, _Form], shown: list[str]) -> None:
        self.text, self.kind, self.forms, self.shown = text, kind, forms, shown
        self.tokens = [
            _Token(str(t.lastgroup), t[str(t.lastgroup)], t.start(str(t.lastgroup))) for t in _TOKEN.finditer(text)
        ]
        self.at = 0
        self.operators = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def error(self, problem: str, token: _Token | None = None) -> LanguageError:
        return LanguageError(self.text, (token or self.next).column, problem)

    def expected(self, what: str) -> LanguageError:
        token = self.next
        got = "the end" if token.kind == "end" else repr(token.text)
        hint = ""
        if self.kind == "mask" and token.text.lower() in _PYTHON_WORDS:
            hint = f"; did you mean '{_PYTHON_WORDS[token.text.lower()]}'? masks combine with &, | and ~"
        return self.error(f"expected {what}, got {got}{hint}")

    def accept(self, sign: str) -> bool:
        found = self.next.kind == "sign" and self.next.text == sign
        self.at += found
        return found

    def require(self, sign: str, what: str = "") -> None:
        if not self.accept(sign):
            raise self.expected(what or f"'{sign}'")

    def operator(self, sign: str) -> bool:
        token = self.next
        if not self.accept(sign):
            return False
        self.operators += 1
        if self.operators > MOST_OPERATORS:
            raise self.error(f"more than {MOST_OPERATORS} operators and parentheses", token)
        return True

    def whole(self, rule: Callable[[], NodeType], follow: str) -> NodeType:
        node = rule()
        if self.next.kind != "end":
            raise self.expected(follow)
        return node

    def mask(self) -> m.Mask:
        mask = self.both()
        while self.operator("|"):
            mask = mask | self.both()
        return mask

    def both(self) -> m.Mask:
        mask = self.unary()
        while self.operator("&"):
            mask = mask & self.unary()
        return mask

    def unary(self) -> m.Mask:
        if self.operator("~"):
            return ~self.unary()
        if self.operator("("):
            mask = self.mask()
            self.require(")", "'&', '|' or ')'")
            return mask
        return self.call()

    def score(self) -> s.Score:
        score = self.link()
        while self.operator(">>"):
            score = score >> self.link()
        return score

    def link(self) -> s.Score:
        if self.operator("("):
            score = self.score()
            self.require(")", "'>>' or ')'")
            return score
        return self.call()

    def call(self) -> Any:
        token = self.next
        if token.kind != "name" or token.text.lower() in _PYTHON_WORDS:
            raise self.expected(f"a {self.kind} ({', '.join(self.shown)})")
        name = token.text.lower()
        if name not in self.forms:
            raise self.error(self.unknown(token.text), token)
        self.at += 1
        form = self.forms[name]
        given = self.arguments(name, form) if self.accept("(") else {}
        missing = list(form.parameters)[: form.required]
        if any(parameter not in given for parameter in missing):
            raise self.error(f"expected {form.usage(name)}: {missing[0]} is missing", token)
        try:
            return form.make(**given)
        except FlexjagError as error:
            raise self.error(f"{name}: {error}", token) from error

    def unknown(self, name: str) -> str:
        if name.lower() in _PYTHON_ONLY:
            return f"{name!r} can only be built in Python; known: {', '.join(self.shown)}"
        close = difflib.get_close_matches(name.lower(), self.shown, 1, 0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self.shown)}"

    def arguments(self, name: str, form: _Form) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.accept(")"):
            return given
        named = False
        while True:
            token, parameters = self.next, list(form.parameters)
            if self.tokens[min(self.at + 1, len(self.tokens) - 1)].text == "=":
                named, parameter = True, token.text.lower()
                self.at += 2
                if parameter not in form.parameters or parameter in given:
                    problem = "given twice" if parameter in given else f"no parameter of {form.usage(name)}"
                    raise self.error(f"{token.text!r} is {problem}", token)
            elif named or len(given) >= len(parameters):
                problem = (
                    "a name= after the first name=" if named else f"')': too many arguments for {form.usage(name)}"
                )
                raise self.error(f"expected {problem}", token)
            else:
                parameter = parameters[len(given)]
            given[parameter] = self.value(parameter, form.parameters[parameter])
            if self.accept(")"):
                return given
            self.require(",", "',' or ')'")

    def value(self, parameter: str, kind: str) -> Any:
        token = self.next
        value = self.literal()
        types, words = _KINDS[kind]
        if not isinstance(value, types):
            raise self.error(f"expected {parameter} to be {words}, got {token.text!r}", token)
        if isinstance(value, torch.Tensor) and int(value.min()) < (
            kind == "size"
        ):  # nodes look at no tensor's contents
            raise self.error(f"expected {parameter} to be at least {int(kind == 'size')} everywhere", token)
        return value

    def literal(self) -> Any:
        """Parse the next value, of any kind."""
        token = self.next
        if token.kind == "number":
            self.at += 1
            return self.number(token)
        if token.kind in ("name", "word"):
            self.at += 1
            return _WORDS.get(token.text.strip("'\"").lower(), _UNKNOWN_WORD)
        if self.accept("["):
            items = [self.item()]
            while not self.accept("]"):
                self.require(",", "',' or ']'")
                items.append(self.item())
            return torch.tensor(items)
        raise self.expected("a value")

    def item(self) -> int:
        token = self.next
        value = self.number(token) if token.kind == "number" else None
        if not isinstance(value, int):
            raise self.expected("an integer")
        self.at += 1
        return value

    def number(self, token: _Token) -> int | float:
        if not re.fullmatch(r"-?\d+", token.text):
            if not math.isfinite(float(token.text)):
                raise self.error("expected a finite number", token)
            return float(token.text)
        if len(token.text) > 10 or abs(int(token.text)) >= 2**31:
            raise self.error("expected a number of at most 2**31 - 1", token)
        return int(token.text)
