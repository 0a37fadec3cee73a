"""``flexjag explain``: plan a batch given by its lengths, and print what was decided."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from flexjag.cli_tools import progress, whole
from flexjag.errors import CommandError, LanguageError
from flexjag.explain import facts
from flexjag.jagged import Jagged
from flexjag.language import parse_mask, parse_score
from flexjag.masks import Mask
from flexjag.plan import plan
from flexjag.scores import Score

if TYPE_CHECKING:
    from flexjag.cli_tools import Commands

MOST_TOKENS = 2**24  # a plan takes about 200 bytes a token
MOST_SEGMENTS = 2**20

Node = TypeVar("Node", Mask, Score)

_GENERATOR = re.compile(r"(?P<name>[a-z]+):(?P<numbers>[^x]*)x(?P<count>\d{1,9})")
_GENERATORS = {"constant": ("N", 1), "uniform": ("LOW,HIGH", 2), "lognormal": ("MEAN,SIGMA", 2)}
_FORMS = ", ".join(["N,N,...", *(f"{name}:{numbers}xCOUNT" for name, (numbers, _) in _GENERATORS.items())])


def add_command(commands: Commands) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="print the plan for lengths and a mask",
        description="Plan attention over a jagged batch and print what was decided and why.",
        epilog="Masks: full, causal, causal(end), window(left[, right[, align]]), prefix(n), chunked(size), global(n), "
        "combined by ~, & and | and parentheses; window(256) is 256 tokens back and none ahead; a number may be a list "
        "with one per segment. Scores: alibi, softcap(cap), relative(max_distance), composed by >>.",
    )
    lengths = f"segment lengths: {_FORMS}"
    parser.add_argument("--lengths", required=True, help=lengths)
    parser.add_argument("--kv-lengths", help="key/value lengths, if they differ from the queries'")
    parser.add_argument("--seed", type=whole(0), default=0, help="for random lengths (default 0)")
    parser.add_argument("--mask", default="full", help='for instance "causal & window(256)" (default full)')
    parser.add_argument("--score", help='for instance "alibi >> softcap(30)" (default none)')
    parser.add_argument("--heads", type=whole(1, 1024), default=8, help="query heads H (default 8)")
    parser.add_argument("--dim", type=whole(1, 2**16), default=64, help="head dimension D (default 64)")
    parser.add_argument("--block", type=whole(16, 2**16), default=128, help="tile size, a power of two (default 128)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the explanation, or its facts as JSON.

    Raises:
        CommandError: If the lengths, the mask or the score cannot be read.
        FlexjagError: If they do not fit together.
    """
    lengths = parse_lengths(args.lengths, args.seed, "--lengths")
    kv_lengths = parse_lengths(args.kv_lengths, args.seed + 1, "--kv-lengths") if args.kv_lengths is not None else None
    mask = _read("--mask", parse_mask, args.mask)
    score = None if args.score is None else _read("--score", parse_score, args.score, args.heads)
    with progress(1, quiet=args.json) as say:
        say(f"planning {sum(lengths)} tokens")
        q = _batch(lengths, args.heads, args.dim)
        k = None if kv_lengths is None else _batch(kv_lengths, args.heads, args.dim)
        made = plan(q, k, mask=mask, score=score, block_size=args.block)
        text = json.dumps(facts(made)) if args.json else made.explain()
    print(text)
    return 0


def _read(option: str, parse: Callable[..., Node], *given: object) -> Node:
    try:
        return parse(*given)
    except LanguageError as error:
        raise CommandError(f"{option}: {error.line}") from error


def _batch(lengths: list[int], heads: int, dim: int) -> Jagged:
    """A batch of zeros that takes the memory of one: planning reads its shape alone."""
    return Jagged.from_lengths(torch.zeros(1, 1, 1).expand(sum(lengths), heads, dim), lengths)


def parse_lengths(text: str, seed: int, option: str = "lengths") -> list[int]:
    """Segment lengths from the command line.

    Args:
        text: ``100,300,50``, or a generator with a count: ``constant:128x8``, ``uniform:1,512x64`` (both ends included)
            or ``lognormal:5,0.9x32`` (of the logarithm, at least 1 token).
        seed: For the random ones.
        option: What to call the text in errors.

    Raises:
        CommandError: If the text has none of these forms, or asks for over 2**24 tokens or 2**20 segments.

    >>> parse_lengths("100,0,50", seed=0), parse_lengths("constant:128x3", seed=0)
    ([100, 0, 50], [128, 128, 128])
    """
    lengths = _generate(text, seed, option) if ":" in text else _list(text, option)
    if sum(lengths) > MOST_TOKENS:
        raise CommandError(f"{option}: expected at most {MOST_TOKENS} tokens in all, got more from {text!r}")
    return lengths


def _wrong(option: str, text: str) -> CommandError:
    return CommandError(f"{option}: expected one of {_FORMS}; got {text!r}")


def _list(text: str, option: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise _wrong(option, text) from None
    if min(lengths) < 0:
        raise CommandError(f"{option}: a length must not be negative, got {min(lengths)} in {text!r}")
    return lengths


def _generate(text: str, seed: int, option: str) -> list[int]:
    found = _GENERATOR.fullmatch(text.strip().lower())
    if found is None or found["name"] not in _GENERATORS:
        raise _wrong(option, text)
    count, convert = int(found["count"]), float if found["name"] == "lognormal" else int
    try:
        numbers = [convert(part) for part in found["numbers"].split(",")]
    except ValueError:
        raise _wrong(option, text) from None
    if len(numbers) != _GENERATORS[found["name"]][1]:
        raise _wrong(option, text)
    if not 1 <= count <= MOST_SEGMENTS:
        raise CommandError(f"{option}: expected 1 to {MOST_SEGMENTS} segments, got {count} in {text!r}")
    generator = torch.Generator().manual_seed(seed)
    a, b = numbers[0], numbers[-1]
    if found["name"] == "lognormal":
        if not (b >= 0 and -100 <= a <= 100 and b <= 100):
            raise CommandError(f"{option}: expected MEAN within 100 and SIGMA from 0 to 100, got {text!r}")
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        return (a + b * normal).exp().clamp(1, MOST_TOKENS + 1).round().long().tolist()
    if not 0 <= a <= b <= MOST_TOKENS:
        raise CommandError(f"{option}: expected 0 <= LOW <= HIGH <= {MOST_TOKENS}, got {text!r}")
    return torch.randint(int(a), int(b) + 1, (count,), generator=generator).tolist()
