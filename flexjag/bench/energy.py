"""Joules, from the counters that devices keep themselves. Where there is none, no energy: nothing is estimated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from flexjag.bench import nvml
from flexjag.bench.measure import median

POWERCAP = Path("/sys/class/powercap")


class NoCounterError(RuntimeError):
    """Nothing here counts energy; the message says what was looked for."""


class Counter(Protocol):
    """Counts energy.

    Attributes:
        name: What counts, for the record.
    """

    name: str

    def read(self) -> float:
        """Joules since some fixed moment. To be called at least once per wrap-around of the counter."""
        ...

    def watts(self) -> float | None:
        """What a sensor of its own says is drawn now; None without one. A check of the counter, no more."""
        ...


class NvmlCounter:
    """The total-energy counter of an NVIDIA GPU (Volta or newer): the whole board, idle power included.

    Raises:
        NoCounterError: If the GPU has none.
    """

    name = "NVML total energy, the whole GPU"

    def __init__(self) -> None:
        try:
            self._device = nvml.Device()
            self._device.joules()
        except (nvml.NvmlError, AttributeError) as e:  # torch of ROCm may not know a uuid
            raise NoCounterError(f"the GPU counts no energy: {e}") from None

    def read(self) -> float:
        """Joules since the driver was loaded."""
        return self._device.joules()

    def watts(self) -> float | None:
        """The GPU's power sensor."""
        try:
            return self._device.watts()
        except nvml.NvmlError:
            return None


class RaplCounter:
    """The package counters of Intel and AMD processors, all sockets together: cores, caches and memory controller.

    The counters wrap around, at 2⁶⁴ µJ or much earlier, at what ``max_energy_range_uj`` says.

    Args:
        root: Where Linux shows them.

    Raises:
        NoCounterError: If there is none, or it may not be read.
    """

    name = "RAPL, all processor packages"

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 is a part of it, and counted there.
        packages = sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1)
        if not packages:
            raise NoCounterError(f"no processor counts energy: no intel-rapl in {root}")
        self._files = [p / "energy_uj" for p in packages]
        try:
            self._ranges = [int((p / "max_energy_range_uj").read_text()) for p in packages]
            self._last = [int(f.read_text()) for f in self._files]
        except OSError as e:
            raise NoCounterError(f"the processor's energy counter cannot be read: {e.strerror}") from None
        self._microjoules = 0

    def read(self) -> float:
        """Joules since this object was made."""
        for i, file in enumerate(self._files):
            now = int(file.read_text())
            step = now - self._last[i]
            self._microjoules += step if step >= 0 else step + self._ranges[i] + 1
            self._last[i] = now
        return self._microjoules / 1e6

    def watts(self) -> float | None:
        """There is no sensor."""
        return None


def find_counter(device: str) -> Counter:
    """The energy counter of `device` (``"cpu"`` or ``"cuda"``).

    Raises:
        NoCounterError: If it has none.
    """
    return NvmlCounter() if device == "cuda" else RaplCounter()


@dataclass(frozen=True)
class Usage:
    """What some repeated calls took.

    Attributes:
        joules: Of all calls together.
        seconds: Of each call, in order.
        elapsed: From the first reading of the counter to the last, in seconds.
        sampled: What a power sensor said about once a second, in watts.
    """

    joules: float
    seconds: Sequence[float]
    elapsed: float
    sampled: Sequence[float] = ()

    def extra(self, tokens: int, counter: Counter) -> dict[str, Any]:
        """What the tables say of it, for calls of `tokens` tokens."""
        calls = len(self.seconds)
        found = {
            "calls": calls,
            "joules_per_call": self.joules / calls,
            "watts": self.joules / self.elapsed,
            "tokens_per_joule": calls * tokens / self.joules if self.joules > 0 else None,
            "counter": counter.name,
        }
        return found | ({"watts_by_sensor": median(self.sampled)} if self.sampled else {})


def measure_energy(call: Callable[[], object], seconds: float, counter: Counter, device: str) -> Usage:
    """Repeat `call` for at least `seconds`, and read the counter before and after.

    The counters move in steps of about a tenth of a second, so ten seconds are needed for a percent.

    Args:
        call: What is measured; warmed up.
        seconds: How long at least. There is at least one call.
        counter: Read before, after and about once a second between, so that no wrap-around is missed.
        device: ``"cuda"`` waits for the device after every call.
    """
    each: list[float] = []
    sampled: list[float | None] = []
    _wait(device)
    before, start = counter.read(), time.perf_counter()
    end, looked = start, start
    while not each or end - start < seconds:
        began = end
        call()
        _wait(device)
        end = time.perf_counter()
        each.append(end - began)
        if end - looked > 1:
            counter.read()
            sampled.append(counter.watts())
            looked = end
    return Usage(counter.read() - before, each, end - start, [w for w in sampled if w is not None])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
