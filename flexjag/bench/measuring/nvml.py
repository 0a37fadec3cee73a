"""Driver version, energy and power from NVIDIA's management library, by ``nvidia-ml-py`` (extra ``bench``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flexjag.errors import MissingExtraError
from flexjag.extras import needs


class NvmlError(RuntimeError):
    """NVML or its Python bindings are not installed, or a query failed."""


@contextmanager
def _nvml() -> Iterator[Any]:
    """Yield the bindings; their errors are re-raised as NvmlError."""
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
    """Version of the driver; None if it cannot be queried.

    >>> driver_version() is None or "." in driver_version()
    True
    """
    try:
        with _nvml() as pynvml:
            return pynvml.nvmlSystemGetDriverVersion()
    except NvmlError:
        return None


class Device:
    """The current GPU of torch.

    Raises:
        NvmlError: If NVML does not know it, or cannot be queried.
    """

    def __init__(self) -> None:
        with _nvml() as pynvml:
            # Torch and NVML number devices differently where some are hidden, so they are matched by their identity.
            name = f"GPU-{str(torch.cuda.get_device_properties().uuid).removeprefix('GPU-')}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)

    def joules(self) -> float:
        """Energy in joules that the device has used since its driver was loaded."""
        with _nvml() as pynvml:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def watts(self) -> float:
        """Power in watts: now, or averaged over the last second, depending on the device."""
        with _nvml() as pynvml:
            return pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
