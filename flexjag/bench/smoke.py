"""Smoke tests of every backend on a device, in under a minute: ``python -m flexjag.bench.smoke DEVICE OUT.json``.

Each computes a small problem and compares it with float64 on the host. Each runs in a separate process, several at a
time: most of the time is compilation on the host, and a kernel that crashes does not affect the other checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexjag import ops
from flexjag.algebra.masks import Causal, Prefix, Window
from flexjag.algebra.normalizers import SiLU, StickBreaking
from flexjag.algebra.scores import Alibi
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.bench.measuring.padded import Tensors
from flexjag.bench.run import write
from flexjag.jagged import Jagged
from flexjag.variants import HSTUBias, HSTULayer, next_times

LENGTHS = [300, 7, 0, 129, 1, 64]
HEADS, DIM = 4, 64
MASK = Causal() & (Window(50, 0) | Prefix(4))
ALLOWED = {torch.bfloat16: 0.03, torch.float32: 1e-4}
"""Maximum relative error of a result in norm, by dtype: a few roundings of the inputs. This detects kernels that do not
work; the tests check accuracy."""
SECONDS = 55.0  # time limit of one check
AT_A_TIME = 8


def _given(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs (q, k, v, slopes) and the output's gradient, with the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(sum(LENGTHS), HEADS, DIM, generator=generator) for _ in range(4)]
    # Rounded to bfloat16 before anything is computed, so that all precisions see the same inputs.
    *qkv, grad = (x.to(torch.bfloat16).to(device, dtype) for x in drawn)
    slopes = torch.linspace(0.01, 0.1, HEADS).to(device, torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in (*qkv, slopes)], grad


def _attend(backend: str, parts: Callable[[Tensor], dict[str, Any]], learns: bool) -> Callable[..., Tensors]:
    """A check of ``attention`` with one backend: output and gradients (of the slopes too, if `learns`)."""

    def run(device: str, dtype: torch.dtype, exact: bool) -> Tensors:
        leaves, grad = _given(device, dtype)
        q = Jagged.from_lengths(leaves[0], LENGTHS)
        k, v = (q.with_values(x) for x in leaves[1:3])
        chosen = "reference" if exact else backend if device == "cuda" or backend in ("segments", "tiled") else "tiled"
        out = attention(q, k, v, backend=chosen, **parts(leaves[3]))
        assert isinstance(out, Jagged)
        wanted = leaves if learns else leaves[:3]
        return (out.values.detach(), *torch.autograd.grad(out.values, wanted, grad))

    return run


def _compiled(device: str, dtype: torch.dtype, exact: bool) -> Tensors:
    """Attention with planning inside ``torch.compile(fullgraph=True)``: output and gradients."""
    leaves, grad = _given(device, dtype)
    offsets = Jagged.from_lengths(leaves[0].detach(), LENGTHS).offsets

    def forward(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        x = Jagged(q, offsets)
        made = plan(x, mask=MASK, score=Alibi(slopes))
        out = attention(x, x.with_values(k), x.with_values(v), plan=made, backend="reference" if exact else "auto")
        assert isinstance(out, Jagged)
        return out.values

    out = (forward if exact else torch.compile(forward, fullgraph=True))(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def _normalizer(kind: Callable[[], Any]) -> Callable[..., Tensors]:
    return _attend("triton", lambda slopes: {"mask": Causal(), "score": Alibi(slopes), "normalizer": kind()}, True)


def _ragged(device: str, dtype: torch.dtype, exact: bool) -> Tensors:
    """Ragged ops in sequence: softmax over segments, product with a dense matrix."""
    leaves, grad = _given(device, dtype)
    x = leaves[0].flatten(1)
    dense = leaves[1][: len(LENGTHS) * DIM].reshape(len(LENGTHS), DIM, HEADS * DIM)
    if exact:
        pieces = x.split(LENGTHS)
        soft = torch.cat([torch.softmax(piece, 0) for piece in pieces])
        out = torch.cat([piece @ d.T for piece, d in zip(soft.split(LENGTHS), dense, strict=True)])
    else:
        soft = ops.jagged_softmax(Jagged.from_lengths(x, LENGTHS))
        out = ops.jagged_dense_bmm(soft, dense.transpose(1, 2)).values
    return (out.detach(), *torch.autograd.grad(out, leaves[:2], grad.flatten(1)[:, :DIM]))


def _hstu(device: str, dtype: torch.dtype, exact: bool) -> Tensors:
    """An HSTU layer with biases by position and time: output and gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = HSTULayer(HEADS * 16, HEADS, 16, bias=HSTUBias(HEADS, max_distance=63, time_buckets=16))
    layer = layer.to(device, dtype)
    x = torch.randn(sum(LENGTHS), HEADS * 16, generator=torch.Generator().manual_seed(1))
    x = x.to(torch.bfloat16).to(device, dtype).requires_grad_()
    jagged = Jagged.from_lengths(x, LENGTHS)
    times = jagged.with_values(torch.arange(sum(LENGTHS), device=device) ** 2 % 9973)
    made = plan(jagged, mask=Causal(), normalizer=SiLU(1 / 300))
    out = layer(jagged, made, times=next_times(times), kv_times=times).values
    return (out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


def _plan(device: str, dtype: torch.dtype, exact: bool) -> Tensors:
    """Tile counts of a plan made on the device, and on the host if `exact`."""
    x = Jagged.from_lengths(torch.zeros(sum(LENGTHS), device="cpu" if exact else device), LENGTHS)
    made = plan(x, mask=MASK).block_mask
    return tuple(
        t.to(torch.float64 if exact else torch.float32)
        for t in (made.kv_num_blocks, made.full_kv_num_blocks, made.q_num_blocks, made.full_q_num_blocks)
        if t is not None
    )


CHECKS: dict[str, Callable[[str, torch.dtype, bool], Tensors]] = {
    "plan on the device": _plan,
    "flex, eager": _attend("flex", lambda slopes: {"mask": MASK, "score": Alibi(slopes)}, True),
    "flex, eager, without a score": _attend("flex", lambda slopes: {"mask": MASK}, False),
    "varlen_attn": _attend("varlen", lambda slopes: {"mask": Causal()}, False),
    "plan and flex in one compiled graph": _compiled,
    "Triton, SiLU": _normalizer(lambda: SiLU(1 / 64)),
    "Triton, stick-breaking": _normalizer(StickBreaking),
    "tiled": _attend("tiled", lambda slopes: {"mask": MASK, "score": Alibi(slopes)}, True),
    "segments": _attend("segments", lambda slopes: {"mask": MASK, "score": Alibi(slopes)}, True),
    "ragged operations": _ragged,
    "HSTU layer": _hstu,
}
"""By name: function of the device, the dtype and `exact` (compute the reference) that returns results to compare."""


def _error(got: Tensor, exact: Tensor) -> float:
    """Relative error ‖got − exact‖ / ‖exact‖; the absolute one if `exact` is zero."""
    off, whole = float((got.double() - exact).norm()), float(exact.norm())
    return off / whole if whole else off


def check(name: str, device: str) -> dict[str, Any]:
    """Run one check in this process.

    Returns:
        ``name``, ``passed``, the ``seconds`` of the first and the second call, the relative ``errors`` of its results,
        and ``wrong``, the full error text or None.
    """
    torch.set_float32_matmul_precision("highest")
    run, dtype = CHECKS[name], torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, Any] = {"name": name, "passed": False, "seconds": [], "errors": [], "wrong": None}
    try:
        results: Tensors = ()
        for _ in range(2):
            start = time.monotonic()
            results = tuple(x.cpu() for x in run(device, dtype, False))
            found["seconds"].append(round(time.monotonic() - start, 3))
        found["errors"] = [_error(x, y) for x, y in zip(results, run("cpu", torch.float64, True), strict=True)]
        off = [f"result {i} by {x:.2g}" for i, x in enumerate(found["errors"]) if not x <= ALLOWED[dtype]]
        found["wrong"] = f"off in norm: {', '.join(off)}; allowed {ALLOWED[dtype]:.2g}" if off else None
        found["passed"] = not off
    except Exception:  # any exception is a failed check
        found["wrong"] = traceback.format_exc()
    return found


def check_all(device: str, out: Path, names: Sequence[str] = tuple(CHECKS)) -> list[dict[str, Any]]:
    """Run checks in subprocesses, :data:`AT_A_TIME` at a time, and write `out` after each.

    Returns:
        The results of :func:`check`, in the order of `names`.
    """
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        waiting = {pool.submit(_in_a_process, name, device): name for name in names}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            write({"checks": [found[x] for x in names if x in found]}, out)
    return [found[x] for x in names]


def _in_a_process(name: str, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "flexjag.bench.smoke", device, "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"name": name, "passed": False, "seconds": [], "wrong": f"ended after the {SECONDS:.0f} s that it had"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        wrong = f"ended with exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return {"name": name, "passed": False, "seconds": [], "wrong": wrong}


if __name__ == "__main__":
    if sys.argv[2] == "--only":
        print(json.dumps(check(sys.argv[3], sys.argv[1])))
    else:
        sys.exit(not all(x["passed"] for x in check_all(sys.argv[1], Path(sys.argv[2]))))
