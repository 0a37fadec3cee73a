"""What the commands share: progress that stays quiet for quick work, and argument types."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

PATIENCE = 2.0  # seconds of work before anything is shown

Say = Callable[[str], None]
if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Any]  # of whatever parser class


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Say]:
    """Show progress on stderr, from the third second on and only on a terminal.

    Args:
        total: How many steps there will be.
        quiet: Show nothing at all.

    Yields:
        ``say(text)``: the previous step is done, and this is the next one.
    """
    if quiet:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=total, completed=-1)
    lock, closed = threading.Lock(), threading.Event()

    def show() -> None:
        with lock:
            if bar.console.is_terminal and not closed.is_set():  # elsewhere rich prints an empty line
                bar.start()

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield lambda text: bar.update(task, description=text, advance=1)
    finally:
        timer.cancel()
        with lock:
            closed.set()
            if bar.live.is_started:
                bar.stop()


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`.

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
    """An argparse type: a size in GB, 0 or more.

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
    """Bytes for people, in powers of ten.

    >>> human_bytes(1536), human_bytes(2.5e9)
    ('2 kB', '2.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"
