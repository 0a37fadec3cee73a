"""Helpers of all commands: progress that stays quiet for quick work, argument types, and batches as text."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from flexjag.algebra.masks import Mask
from flexjag.algebra.scores import Score
from flexjag.cli.language import parse_mask, parse_score
from flexjag.errors import CommandError, LanguageError

PATIENCE = 0.5  # seconds of work before anything is shown
MOST_TOKENS = 2**24  # a plan takes about 200 bytes a token
MOST_SEGMENTS = 2**20

LANGUAGE = (
    "Masks: full, causal, causal(end), window(left[, right[, align]]), prefix(n), chunked(size), global(n), "
    "combined by ~, & and | and parentheses; window(256) is 256 tokens back and none ahead, "
    "none is no limit; a number may be a list with one per segment. "
    "Scores: alibi, softcap(cap), relative(max_distance), composed by >>."
)

_GENERATOR = re.compile(r"(?P<name>[a-z]+):(?P<numbers>[^x]*)x(?P<count>\d{1,9})")
_GENERATORS = {"constant": ("N", 1), "uniform": ("LOW,HIGH", 2), "lognormal": ("MEAN,SIGMA", 2)}
_FORMS = ", ".join(["N,N,...", *(f"{name}:{numbers}xCOUNT" for name, (numbers, _) in _GENERATORS.items())])

Node = TypeVar("Node", Mask, Score)

Say = Callable[[str], None]
if TYPE_CHECKING:
    from rich.progress import Progress

    Commands = argparse._SubParsersAction[Any]  # of whatever parser class


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Say]:
    """Show progress on stderr where the work takes longer than a moment: a bar on a terminal, else a line a step.

    Without rich there are lines on a terminal, too.

    Args:
        total: Number of steps.
        quiet: Show nothing.

    Yields:
        ``say(text)``, which ends the previous step and starts the one that `text` describes.
    """
    if quiet:
        yield lambda text: None
        return
    bar = _bar(total)
    began, lock, late, closed = time.monotonic(), threading.Lock(), threading.Event(), threading.Event()
    shown = ""

    def line(text: str) -> None:  # where rich would print an empty one
        print(f"{time.monotonic() - began:4.0f} s  {text}", file=sys.stderr, flush=True)

    def show() -> None:
        with lock:
            if closed.is_set():
                return
            late.set()
            if bar is not None:
                bar.start()
            elif shown:
                line(shown)

    def say(text: str) -> None:
        nonlocal shown
        with lock:
            shown = text
            if bar is not None:
                bar.update(bar.task_ids[0], description=text, advance=1)
            elif late.is_set():
                line(text)

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield say
    finally:
        timer.cancel()
        with lock:
            closed.set()
            if bar is not None and bar.live.is_started:
                bar.stop()


def _bar(total: int) -> Progress | None:
    """A bar of so many steps on stderr, not yet drawn; None where that is no terminal or rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task("", total=total, completed=-1)
    return bar


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type that accepts a whole number from `low` to `high`.

    >>> whole(1)("8")
    8
    """

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return value

    return convert


def gigabytes(text: str) -> float:
    """An argparse type that accepts a size in GB, 0 or more.

    >>> gigabytes("4")
    4.0
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of GB, 0 or more, got {text!r}")
    return value


def human_bytes(count: float) -> str:
    """Format a number of bytes with a unit of powers of ten.

    >>> human_bytes(1536), human_bytes(2.5e9)
    ('2 kB', '2.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def add_batch_options(parser: argparse.ArgumentParser, lengths: str | None = None) -> None:
    """Add the options that describe a batch: lengths, heads, mask and score.

    Args:
        parser: Parser to add them to.
        lengths: Default of ``--lengths``; None makes it required.
    """
    default = "" if lengths is None else f" (default {lengths})"
    parser.add_argument(
        "--lengths", required=lengths is None, default=lengths, help=f"segment lengths: {_FORMS}{default}"
    )
    parser.add_argument("--kv-lengths", help="key/value lengths, if they differ from the queries'")
    parser.add_argument("--seed", type=whole(0), default=0, help="for random lengths (default 0)")
    parser.add_argument("--mask", default="full", help='for instance "causal & window(256)" (default full)')
    parser.add_argument("--score", help='for instance "alibi >> softcap(30)" (default none)')
    parser.add_argument("--heads", type=whole(1, 1024), default=8, help="query heads H (default 8)")


def read_mask(args: argparse.Namespace) -> tuple[Mask, Score | None]:
    """Parse the options ``--mask`` and ``--score``.

    Raises:
        CommandError: If one cannot be parsed, naming the column.
    """
    mask = _read("--mask", parse_mask, args.mask)
    return mask, None if args.score is None else _read("--score", parse_score, args.score, args.heads)


def _read(option: str, parse: Callable[..., Node], *given: object) -> Node:
    try:
        return parse(*given)
    except LanguageError as error:
        raise CommandError(f"{option}: {error.line}") from error


def parse_lengths(text: str, seed: int, option: str = "lengths") -> list[int]:
    """Parse segment lengths.

    Args:
        text: ``100,300,50``, or a generator with a count: ``constant:128x8``, ``uniform:1,512x64`` (both ends included)
            or ``lognormal:5,0.9x32`` (of the logarithm, at least 1 token).
        seed: Seed of the random lengths.
        option: Name of the option in errors.

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
