"""``flexjag compile --target cpu``: the C++ of a plan, and how fast its kernels run beside a matrix product."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexjag.api.attention import attention

if TYPE_CHECKING:
    from flexjag.api.plan import Plan
    from flexjag.jagged import Jagged

SIDE = 1024  # of the matrices in the product
ROUNDS = 9


def measure(plan: Plan, q: Jagged, k: Jagged, v: Jagged, backward: bool) -> dict[str, Any]:
    """Compile a plan's CPU kernels and time them.

    Returns:
        The ``source``, the ``compiler``, the seconds of the ``first_call``, which compiles unless the cache has the
        kernels, ``seconds`` by pass (medians), ``flops`` of the pairs within the mask's spans by pass, ``rates``
        in FLOP/s, and the rate of ``torch.mm`` in the same dtype.

    Raises:
        BackendError: If the kernels cannot run the plan, or cannot be built.
    """
    from flexjag.kernels.cpp import build

    inputs = [x.with_values(x.values.requires_grad_(backward)) for x in (q, k, v)]
    source = plan.source("cpp")
    grad = torch.randn(*q.values.shape[:2], v.values.shape[2]).to(q.values.dtype)

    def forward() -> None:
        with torch.no_grad():
            attention(*inputs, plan=plan, backend="cpp")

    def both() -> None:
        out = attention(*inputs, plan=plan, backend="cpp").values
        torch.autograd.grad(out, [x.values for x in inputs], grad)

    a = torch.randn(SIDE, SIDE).to(q.values.dtype)
    passes: dict[str, Callable[[], object]] = {"forward": forward}
    if backward:
        passes["forward + backward"] = both
    start = time.perf_counter()
    for call in passes.values():
        call()
    first = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in (*passes, "torch.mm")}
    for _ in range(ROUNDS):
        for name, call in {**passes, "torch.mm": lambda: a @ a}.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(x) for name, x in times.items()}
    pairs = sum(int((x.outer.hi - x.outer.lo).sum()) for x in plan.sandwiches) / len(plan.sandwiches)
    one = 2 * pairs * q.values.shape[1] * (q.values.shape[2] + v.values.shape[2])
    flops = {"forward": one, "forward + backward": 3.5 * one}
    return {
        "source": source,
        "compiler": build.describe(),
        "threads": torch.get_num_threads(),
        "first_call": first,
        "seconds": {name: seconds[name] for name in passes},
        "flops": {name: flops[name] for name in passes},
        "rates": {name: flops[name] / seconds[name] for name in passes},
        "torch.mm": 2 * SIDE**3 / seconds["torch.mm"],
    }


def show(found: dict[str, Any], as_json: bool, folder: str | None) -> None:
    """Print the result, and write it into a folder if one is given."""
    if folder is not None:
        Path(folder, "kernels.cpp").write_text(found["source"])
        Path(folder, "report.json").write_text(json.dumps(found, indent=1))
    if as_json:
        print(json.dumps(found))
        return
    print(found["source"])
    compiler = found["compiler"]
    print(f"{compiler['version']}, {found['threads']} threads; first calls {found['first_call']:.2g} s")
    for name, rate in found["rates"].items():
        share = rate / found["torch.mm"]
        print(
            f"{name}: {found['seconds'][name] * 1e3:.3g} ms, {rate / 1e9:.3g} GFLOP/s, {share:.0%} of torch.mm's rate"
        )
    if folder is not None:
        print(f"saved in {folder}")
