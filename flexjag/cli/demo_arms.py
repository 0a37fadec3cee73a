"""The demo's rivals: the same attention three ways, each timed and its memory measured in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexjag.algebra.masks import Mask
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.errors import CommandError
from flexjag.jagged import Jagged

Step = Callable[[], Tensor]
ROUNDS, LEAST_ROUNDS, ENOUGH_SECONDS = 5, 3, 8.0


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of every arm.

    Attributes:
        q: Queries ``[T, H, D]``.
        k: Keys ``[T, H, D]``.
        v: Values ``[T, H, D]``.
        grad: Gradient of the output, ``[T, H, D]``.
        mask: The mask, which depends on positions only.
        dense: Function of N that returns the mask of one segment of N tokens, bool ``[N, N]``, for the padded arms.
    """

    q: Jagged
    k: Jagged
    v: Jagged
    grad: Jagged
    mask: Mask
    dense: Callable[[int], Tensor]

    def like(self, lengths: list[int]) -> Inputs:
        """Zeros of the same dimensions with other segment lengths, for warming up."""
        _, heads, dim = self.q.values.shape
        x = Jagged.from_lengths(torch.zeros(sum(lengths), heads, dim), lengths)
        return Inputs(x, x, x, x, self.mask, self.dense)


@dataclass(frozen=True)
class Arm:
    """One implementation of the attention.

    Attributes:
        name: Name on the command line and in JSON.
        title: Name in the table.
        prepare: ``prepare(inputs)`` returns a step: forward and backward once, returning the output.
        need: ``need(S, N, H, D)``: estimated bytes of memory for a step.
    """

    name: str
    title: str
    prepare: Callable[[Inputs], Step]
    need: Callable[[int, int, int, int], int]


def _jagged(inputs: Inputs) -> Step:
    """Step of flexjag's attention. Every step plans anew, as every batch must."""
    q, k, v = (x.with_values(x.values.detach().clone().requires_grad_()) for x in (inputs.q, inputs.k, inputs.v))

    def step() -> Tensor:
        for x in (q, k, v):
            x.values.grad = None
        out = attention(q, k, v, plan=plan(q, k, mask=inputs.mask))
        assert isinstance(out, Jagged)
        out.values.backward(inputs.grad.values)
        return out.values.detach()

    return step


def _padded(inputs: Inputs, run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Step:
    """Step of a padded attention. Padding and the mask are made before the step, in the rivals' favour.

    A causal mask keeps padding, which comes last, from every real token. So one [N, N] mask does for all segments.
    """
    padded = [x.to_padded().detach().transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    q, k, v = (x.requires_grad_() for x in padded[:3])
    mask, grad, lengths = inputs.dense(q.shape[2]), padded[3], inputs.q.lengths

    def step() -> Tensor:
        for x in (q, k, v):
            x.grad = None
        out = run(q, k, v, mask)
        out.backward(grad)
        return Jagged.from_padded(out.detach().transpose(1, 2), lengths).values

    return step


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q / math.sqrt(q.shape[3])) @ k.transpose(2, 3)
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), 3) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("flexjag", "flexjag", _jagged, lambda s, n, h, d: 0),
        Arm(
            "sdpa", "padded SDPA + mask", lambda x: _padded(x, _sdpa), lambda s, n, h, d: 40 * s * n * h * d + 9 * n * n
        ),
        Arm(
            "dense",
            "padded dense softmax",
            lambda x: _padded(x, _softmax),
            lambda s, n, h, d: 40 * s * n * h * d + 12 * s * h * n * n,
        ),
    )
}


@dataclass
class Result:
    """Measurements of one arm: seconds per run, and peak bytes above the inputs; None if not measured."""

    name: str
    title: str
    seconds: list[float]
    extra_bytes: int | None = None
    difference: float | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, object]:
        """The measurements as a dict for JSON, times in seconds."""
        times = None
        if self.seconds:
            spread = {"median": statistics.median(self.seconds), "min": min(self.seconds), "max": max(self.seconds)}
            times = {**spread, "runs": len(self.seconds)}
        return {
            "name": self.name,
            "title": self.title,
            "seconds": times,
            "extra_bytes": self.extra_bytes,
            "largest_difference": self.difference,
            "skipped": self.skipped,
        }


def _status(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None if the system does not report it."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _peak() -> int | None:
    """Peak resident bytes so far. Linux's getrusage starts a child at its parent's peak, so /proc goes first."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def extra_bytes(name: str, inputs: Inputs) -> int | None:
    """Peak resident memory in bytes during one forward and backward, above that just before.

    A tiny step comes first, so that code loaded on first use is not counted. Call it in a process of its own.
    """
    arm = ARMS[name]
    arm.prepare(inputs.like([16, 5]))()
    step = arm.prepare(inputs)
    gc.collect()
    with contextlib.suppress(OSError):  # a peak from before the step can only make the figure too high
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = _status("VmRSS") or _peak()
    step()
    after = _peak()
    return None if before is None or after is None else max(0, after - before)


def measure_memory(name: str, arguments: Sequence[str]) -> int | None:
    """Run :func:`extra_bytes` in a fresh Python process: this command line again with a hidden option.

    Raises:
        CommandError: If that process fails; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "flexjag", "demo", "--arm", name, *arguments]
    # The child must find what this process found, in the same order, installed or not.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        assert done.returncode == 0
        return json.loads(done.stdout)["extra_bytes"]
    except (AssertionError, ValueError, KeyError):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise CommandError(f"measuring {name} failed with exit code {done.returncode}: {said}") from None


def measure_times(results: Sequence[Result], inputs: Inputs, say: Callable[[str], None]) -> None:
    """Time the arms that are not skipped, in turns, into `results`, and compare their outputs with the first one's."""
    runs = [(r, ARMS[r.name].prepare(inputs)) for r in results if r.skipped is None]
    first: Tensor | None = None
    say("warming up")
    for result, step in runs:  # not timed: libraries load and allocators grow
        out = step()
        first = out if first is None else first
        result.difference = float((out - first).abs().max())
    began = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - began > ENOUGH_SECONDS:
            break
        say(f"timing, round {turn + 1}")
        for result, step in runs:
            start = time.perf_counter()
            step()
            result.seconds.append(time.perf_counter() - start)
