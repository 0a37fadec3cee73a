"""The few questions that only NVIDIA's management library answers, asked through ctypes: it comes with the driver."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

SUCCESS = 0
LIBRARY = "libnvidia-ml.so.1"


class NvmlError(RuntimeError):
    """The library is not there, or does not answer."""


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as e:
        raise NvmlError(f"no {LIBRARY}: {e}") from None
    _ask(library, "nvmlInit_v2")
    return library


def _ask(library: ctypes.CDLL, name: str, *args: object) -> None:
    try:
        status = getattr(library, name)(*args)
    except AttributeError:
        raise NvmlError(f"this driver has no {name}") from None
    if status != SUCCESS:
        library.nvmlErrorString.restype = ctypes.c_char_p
        why = library.nvmlErrorString(status)
        raise NvmlError(f"{name}: {why.decode() if why else f'status {status}'}")


def driver_version() -> str | None:
    """The driver's version; None if it cannot be asked.

    >>> driver_version() is None or "." in driver_version()
    True
    """
    text = ctypes.create_string_buffer(96)
    try:
        _ask(_library(), "nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
    except NvmlError:
        return None
    return text.value.decode()


class Device:
    """The GPU that torch uses now.

    Raises:
        NvmlError: If NVML does not know it.
    """

    def __init__(self) -> None:
        # Torch and NVML number devices differently where some are hidden, so they are matched by their identity.
        name = f"GPU-{str(torch.cuda.get_device_properties().uuid).removeprefix('GPU-')}"
        self._library, self._handle = _library(), ctypes.c_void_p()
        _ask(self._library, "nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._handle))

    def joules(self) -> float:
        """What the device has used since its driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        _ask(self._library, "nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def watts(self) -> float:
        """What it draws now, or on average over the last second, which depends on the device."""
        milliwatts = ctypes.c_uint()
        _ask(self._library, "nvmlDeviceGetPowerUsage", self._handle, ctypes.byref(milliwatts))
        return milliwatts.value / 1e3
