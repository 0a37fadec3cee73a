"""The few questions that only NVIDIA's management library answers, asked through ``nvidia-ml-py`` (extra ``bench``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flexjag.errors import MissingExtraError
from flexjag.extras import needs


class NvmlError(RuntimeError):
    """The library or its bindings are not there, or it does not answer."""


@contextmanager
def _nvml() -> Iterator[Any]:
    """The bindings; whatever keeps NVML from answering is an NvmlError."""
    try:
        needs("bench", "pynvml")
    except MissingExtraError as absent:
        raise NvmlError(str(absent)) from None
    import pynvml

    try:
        pynvml.nvmlInit()  # again and again only counts
        yield pynvml
    except pynvml.NVMLError as e:
        raise NvmlError(f"NVML: {e}") from None


def driver_version() -> str | None:
    """The driver's version; None if it cannot be asked.

    >>> driver_version() is None or "." in driver_version()
    True
    """
    try:
        with _nvml() as pynvml:
            return pynvml.nvmlSystemGetDriverVersion()
    except NvmlError:
        return None


class Device:
    """The GPU that torch uses now.

    Raises:
        NvmlError: If NVML does not know it, or cannot be asked.
    """

    def __init__(self) -> None:
        with _nvml() as pynvml:
            # Torch and NVML number devices differently where some are hidden, so they are matched by their identity.
            name = f"GPU-{str(torch.cuda.get_device_properties().uuid).removeprefix('GPU-')}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)

    def joules(self) -> float:
        """What the device has used since its driver was loaded."""
        with _nvml() as pynvml:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def watts(self) -> float:
        """What it draws now, or on average over the last second, which depends on the device."""
        with _nvml() as pynvml:
            return pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
