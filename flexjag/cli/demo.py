"""``flexjag demo``: pack real files, attend over their bytes, check the result, and compare with padding."""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexjag.algebra.masks import Causal, Window
from flexjag.api.attention import attention
from flexjag.api.explain import facts
from flexjag.api.plan import Plan, plan
from flexjag.cli import demo_arms as cli_arms
from flexjag.cli.demo_arms import ARMS, Inputs, Result
from flexjag.cli.options import Say, gigabytes, human_bytes, progress, whole
from flexjag.errors import CommandError
from flexjag.extras import needs
from flexjag.jagged import Jagged

if TYPE_CHECKING:
    from rich.table import Table

    from flexjag.cli.options import Commands

HEADS, DIM, WINDOW, SEED = 4, 32, 256, 0
MASK = Causal() & Window(WINDOW, 0)
LONGEST = 4096  # the check against the reference is dense, so it bounds what a segment may be
SAMPLES = 3
NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


def add_command(commands: Commands) -> None:
    """Register the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="attention over the bytes of real files, checked and compared with padding",
        description="Pack files as bytes, one file a segment; run causal attention over a window of 256 bytes, forward "
        "and backward; check it against the reference; compare time and memory with padded attention; save a picture.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files and folders (default: Python's standard library)"
    )
    parser.add_argument("--tokens", type=whole(1), default=16384, help="bytes in all (default 16384)")
    parser.add_argument("--longest", type=whole(1, LONGEST), default=2048, help="bytes of one file (default 2048)")
    parser.add_argument(
        "--budget", type=gigabytes, default=4.0, metavar="GB", help="skip arms that need more (default 4)"
    )
    parser.add_argument(
        "--picture", default="flexjag-demo.png", metavar="FILE", help="default flexjag-demo.png; '' for none"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


@dataclass(frozen=True, eq=False)
class Packed:
    """Files as one jagged batch.

    Attributes:
        paths: Paths of the files.
        bytes: Bytes of the files, uint8 ``[T]``.
        cut: Number of files that were truncated.
    """

    paths: list[Path]
    bytes: Jagged
    cut: int


@dataclass(frozen=True)
class Check:
    """Largest error of one tensor on the sample, and its tolerance."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; False for NaN."""
        return self.error <= self.tolerance


def run(args: argparse.Namespace) -> int:
    """Run the demo; with the hidden ``--arm``, only measure that arm's memory.

    Returns:
        0, or 1 if the check fails.

    Raises:
        CommandError: If there is nothing to read.
        MissingExtraError: If the picture or the table is requested, and matplotlib or rich is not installed.
        OSError: If a file cannot be read, or the picture not be written.
    """
    if args.arm is not None:
        if len(args.paths) != 1:
            raise CommandError(f"--arm: expected the one file that a demo writes for itself, got {args.paths!r}")
        packed = torch.load(args.paths[0], weights_only=True)
        inputs = make_inputs(Jagged(packed["bytes"], packed["offsets"]))
        print(json.dumps({"extra_bytes": cli_arms.extra_bytes(args.arm, inputs)}))
        return 0
    if args.picture:  # before the long part
        needs("pictures", "matplotlib")
    if not args.json:
        needs("progress", "rich")
    packed = pack(find_files(args.paths), args.tokens, args.longest)
    with progress(4 + len(ARMS) + cli_arms.ROUNDS, quiet=args.json) as say:
        say("attention, forward and backward")
        inputs = make_inputs(packed.bytes)
        made = plan(inputs.q, inputs.k, mask=MASK)
        seen = attend(inputs, made)
        if args.picture:  # before the long part, so that a folder that is not there is told at once
            say("drawing")
            _draw(made, args.picture)
        say("checking against the reference")
        checks = check(inputs, seen)
        results = _compare(packed.bytes, inputs, args.budget, say)
    passed = all(c.passed for c in checks.values())
    if args.json:
        print(json.dumps(_report(args, packed, made, checks, results)))
    else:
        _print(args, packed, made, checks, results)
    return 0 if passed else 1


def find_files(paths: Iterable[str]) -> Iterator[Path]:
    """The files at `paths`, folders walked in sorted order; without paths, the standard library's own modules.

    Raises:
        CommandError: If a path does not exist, is neither file nor folder, or a folder holds no file.
    """
    paths = list(paths)
    if not paths:
        library = Path(sysconfig.get_path("stdlib") or os.path.dirname(os.__file__))
        sources = sorted(f for f in library.rglob("*.py") if not NOT_LIBRARY & set(f.relative_to(library).parts))
        random.Random(SEED).shuffle(sources)  # sorted, the first few would all be long
        if not sources:
            raise CommandError(f"PATH: no sources of the standard library in {str(library)!r}; name files or folders")
        yield from sources
    for name in paths:
        path = Path(name)
        if path.is_file():
            yield path
        elif path.is_dir():
            files = _walk(path)
            first = next(files, None)
            if first is None:
                raise CommandError(f"PATH: no files in folder {name!r}")
            yield first
            yield from files
        else:
            raise CommandError(
                f"PATH: {'is neither file nor folder' if path.exists() else 'no such file or folder'}: {name!r}"
            )


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for path in (Path(where, name) for name in sorted(names)) if path.is_file())


def pack(files: Iterable[Path], tokens: int, longest: int) -> Packed:
    """Pack the beginnings of `files`: `longest` bytes of each, `tokens` in all. Empty files are empty segments.

    Raises:
        CommandError: If all files are empty.
        OSError: If one cannot be read.
    """
    paths: list[Path] = []
    pieces: list[bytes] = []
    cut, left = 0, tokens
    for path in files:
        if not left:
            break
        with path.open("rb") as file:
            piece = file.read(min(longest, left) + 1)
        taken = piece[: min(longest, left)]
        cut += len(taken) < len(piece)
        left -= len(taken)
        paths.append(path)
        pieces.append(taken)
    if left == tokens:
        raise CommandError(f"PATH: nothing to attend over, every file is empty: {[str(p) for p in paths[:3]]}")
    values = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)
    return Packed(paths, Jagged.from_lengths(values, [len(piece) for piece in pieces]), cut)


class Model(nn.Module):
    """Bytes to queries, keys and values: an embedding and a linear layer, random but the same every time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, HEADS * DIM)
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM, bias=False)

    def forward(self, x: Jagged) -> tuple[Jagged, Jagged, Jagged]:
        """Map bytes ``[T]`` to q, k and v, ``[T, H, D]`` each."""
        qkv = self.qkv(self.embedding(x.values.int())).view(-1, 3, HEADS, DIM)
        q, k, v = (x.with_values(part) for part in qkv.unbind(1))
        return q, k, v


def make_inputs(x: Jagged) -> Inputs:
    """Inputs of one layer's attention for the bytes ``[T]``, with a gradient for its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        q, k, v = Model()(x)
        grad = torch.randn(q.values.shape)
    return Inputs(q, k, v, x.with_values(grad), MASK, _dense)


def _dense(size: int) -> Tensor:
    """:data:`MASK` over one segment, without flexjag, for the padded arms."""
    i = torch.arange(size)
    return (i <= i[:, None]) & (i >= i[:, None] - WINDOW)


def attend(inputs: Inputs, made: Plan) -> list[Tensor]:
    """Run forward, and backward into the embedding, over the whole batch.

    Returns:
        The output and the gradients of q, k and v, each ``[T, H, D]``.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    for x in (q, k, v):
        x.values.retain_grad()
    out = attention(q, k, v, plan=made)
    assert isinstance(out, Jagged)
    out.values.backward(inputs.grad.values)
    grads = [x.values.grad for x in (q, k, v)]
    return [out.values.detach(), *(torch.zeros(0) if g is None else g for g in grads)]


def check(inputs: Inputs, seen: list[Tensor]) -> dict[str, Check]:
    """Compare what :func:`attend` returned with the dense reference, on a sample of segments.

    The sample is the shortest, the median and the longest segment. The tolerance is twice what the reference itself
    loses in float32 against float64, and the rounding of the largest value.

    Returns:
        A check each for the output and the gradients of q, k and v, by name.
    """
    offsets = inputs.q.offsets.tolist()
    order = sorted((n, index) for index, n in enumerate(inputs.q.lengths.tolist()) if n)
    picks = {order[(len(order) - 1) * part // (SAMPLES - 1)][1] for part in range(SAMPLES)}
    worst = torch.zeros(3, len(seen), dtype=torch.float64)
    for rows in (slice(offsets[index], offsets[index + 1]) for index in sorted(picks)):
        for head in range(HEADS):  # one at a time: the reference holds a dense matrix of every head
            parts = [x.values.detach()[rows, head : head + 1] for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
            exact = _reference(*(x.double() for x in parts))
            rounded = _reference(*parts)
            for column, (got, right, near) in enumerate(zip(seen, exact, rounded, strict=True)):
                errors = [got[rows, head : head + 1] - right, near - right, right]
                largest = torch.stack([x.abs().max() for x in errors])
                worst[:, column] = torch.maximum(worst[:, column], largest)
    epsilon = torch.finfo(torch.float32).eps
    return {
        name: Check(float(error), 2 * float(near + epsilon * size))
        for name, (error, near, size) in zip(("output", "dq", "dk", "dv"), worst.T, strict=True)
    }


def _reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """The reference's output and gradients for one segment."""
    x = [Jagged.from_lengths(t.clone().requires_grad_(), [t.shape[0]]) for t in (q, k, v)]
    out = attention(*x, mask=MASK, backend="reference")
    assert isinstance(out, Jagged)
    return [out.values.detach(), *torch.autograd.grad(out.values, [t.values for t in x], grad)]


def _compare(x: Jagged, inputs: Inputs, budget: float, say: Say) -> list[Result]:
    """Measure every arm's time and memory; arms that would need over `budget` GB are skipped."""
    results = [Result(arm.name, arm.title, []) for arm in ARMS.values()]
    shape = (x.num_segments, int(x.lengths.max()), HEADS, DIM)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "batch.pt")
        torch.save({"bytes": x.values, "offsets": x.offsets}, file)
        for result in results:
            need = ARMS[result.name].need(*shape)
            say(f"memory of {result.title}")
            if need > budget * 1e9:
                result.skipped = f"would need {human_bytes(need)}"
                continue
            try:
                result.extra_bytes = cli_arms.measure_memory(result.name, [file])
            except CommandError as error:
                if result is results[0]:
                    raise
                result.skipped = str(error)  # most likely out of memory; timing it here would end this process too
    cli_arms.measure_times(results, inputs, say)
    return results


def _draw(made: Plan, picture: str) -> None:
    try:
        made.show().savefig(picture)
    except ValueError as error:  # matplotlib's word for a format it does not know
        raise CommandError(f"--picture: {error}") from error


def _report(
    args: argparse.Namespace, packed: Packed, made: Plan, checks: dict[str, Check], results: list[Result]
) -> dict[str, object]:
    lengths = packed.bytes.lengths.tolist()
    return {
        "files": [str(path) for path in packed.paths],
        "lengths": lengths,
        "tokens": sum(lengths),
        "padded_tokens": len(lengths) * max(lengths),
        "threads": torch.get_num_threads(),
        "plan": facts(made),
        "check": {name: {"error": c.error, "tolerance": c.tolerance, "passed": c.passed} for name, c in checks.items()},
        "passed": all(c.passed for c in checks.values()),
        "arms": [r.to_json() for r in results],
        "picture": args.picture or None,
    }


def _print(
    args: argparse.Namespace, packed: Packed, made: Plan, checks: dict[str, Check], results: list[Result]
) -> None:
    from rich.console import Console

    lengths = packed.bytes.lengths.tolist()
    padded = len(lengths) * max(lengths)
    print(
        f"{len(lengths)} files ({packed.cut} cut short), {sum(lengths)} bytes; padded to {max(lengths)}: "
        f"{padded} places, {1 - sum(lengths) / padded:.0%} of them empty\n"
    )
    print(made.explain() + "\n")
    for name, c in checks.items():
        verdict = "agrees with the reference" if c.passed else "DIFFERS FROM THE REFERENCE"
        print(f"{name:<7} {verdict} on a sample: largest error {c.error:.1e}, tolerance {c.tolerance:.1e}")
    print()
    Console(width=None if os.isatty(1) else 120).print(_table(results))
    print(
        f"Medians of {len(results[0].seconds)} interleaved runs, threads: {torch.get_num_threads()}; "
        "flexjag's include planning,\nthe others' neither padding nor building the mask. "
        "Memory is the peak above the inputs, in a process of its own.\nDifference: the largest, from flexjag's output."
    )
    for r in results:
        if r.skipped:
            print(f"{r.title} is skipped: {r.skipped}")
    if args.picture:
        print(f"\nThe mask's tiles are drawn in {args.picture}")


def _table(results: list[Result]) -> Table:
    from rich.table import Table

    table = Table("forward + backward", "median", "spread", "x flexjag", "extra memory", "x flexjag", "difference")
    ours = results[0].to_json()["seconds"]
    for r in results:
        times = r.to_json()["seconds"]
        if not isinstance(times, dict) or not isinstance(ours, dict):
            table.add_row(r.title, "skipped")
            continue
        memory, ratio = "unknown", ""
        if r.extra_bytes is not None:
            memory = human_bytes(r.extra_bytes)
            ratio = f"{r.extra_bytes / max(1, results[0].extra_bytes or 1):.1f}"
        table.add_row(
            r.title,
            f"{1e3 * times['median']:.1f} ms",
            f"{1e3 * times['min']:.1f} to {1e3 * times['max']:.1f}",
            f"{times['median'] / ours['median']:.1f}",
            memory,
            ratio,
            "" if r is results[0] else f"{r.difference:.0e}",
        )
    return table
