"""Energy in joules, from the devices' own counters. Without a counter none is reported: nothing is estimated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from flexjag.bench.measuring import nvml
from flexjag.bench.measuring.measure import median

POWERCAP = Path("/sys/class/powercap")


class NoCounterError(RuntimeError):
    """The device has no readable energy counter; the message names the one that was looked for."""


class Counter(Protocol):
    """An energy counter.

    Attributes:
        name: Description of the counter and its scope, for the record.
    """

    name: str

    def read(self) -> float:
        """Energy in joules since a fixed moment. Must be called at least once per wrap-around of the counter."""
        ...

    def watts(self) -> float | None:
        """Present power in watts from a separate sensor, as a check of the counter only; None without a sensor."""
        ...


class NvmlCounter:
    """The total-energy counter of an NVIDIA GPU (Volta or newer): the whole board, idle power included.

    Raises:
        NoCounterError: If the GPU has no such counter.
    """

    name = "NVML total energy, the whole GPU"

    def __init__(self) -> None:
        try:
            self._device = nvml.Device()
            self._device.joules()
        except (nvml.NvmlError, AttributeError) as e:  # torch of ROCm may not know a uuid
            raise NoCounterError(f"the GPU counts no energy: {e}") from None

    def read(self) -> float:
        """Energy in joules since the driver was loaded."""
        return self._device.joules()

    def watts(self) -> float | None:
        """Present power in watts from the GPU's power sensor; None if it cannot be read."""
        try:
            return self._device.watts()
        except nvml.NvmlError:
            return None


class RaplCounter:
    """The package counters of Intel and AMD processors, all sockets together: cores, caches and memory controller.

    The counters wrap around at ``max_energy_range_uj``, which may be far below 2⁶⁴ µJ.

    Args:
        root: The sysfs directory of the powercap framework.

    Raises:
        NoCounterError: If there is no package counter, or no permission to read it.
    """

    name = "RAPL, all processor packages"

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 is a part of it, whose energy the package's counter includes.
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
        """Energy in joules since this object was created."""
        for i, file in enumerate(self._files):
            now = int(file.read_text())
            step = now - self._last[i]
            self._microjoules += step if step >= 0 else step + self._ranges[i] + 1
            self._last[i] = now
        return self._microjoules / 1e6

    def watts(self) -> float | None:
        """None: RAPL has no separate power sensor."""
        return None


def find_counter(device: str) -> Counter:
    """The energy counter of `device` (``"cpu"`` or ``"cuda"``).

    Raises:
        NoCounterError: If the device has none that can be read.
    """
    return NvmlCounter() if device == "cuda" else RaplCounter()


@dataclass(frozen=True)
class Usage:
    """Energy and time of repeated calls.

    Attributes:
        joules: Energy of all calls together.
        seconds: Duration of each call, in order.
        elapsed: Seconds from the first reading of the counter to the last.
        sampled: Power in watts, read from a sensor about once a second.
    """

    joules: float
    seconds: Sequence[float]
    elapsed: float
    sampled: Sequence[float] = ()

    def extra(self, tokens: int, counter: Counter) -> dict[str, Any]:
        """Figures for the tables: joules per call, watts, tokens per joule, for calls of `tokens` tokens each."""
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
        call: The function to measure, warmed up before.
        seconds: Minimum duration in seconds. There is at least one call.
        counter: The counter, read before, after and about once a second between, so that no wrap-around is missed.
        device: With ``"cuda"`` the device is synchronized after every call.
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
