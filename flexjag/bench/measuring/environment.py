"""Hardware and software of a measurement, without names of hosts, users or paths; and the amount of free memory."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flexjag.bench.measuring import nvml


def describe(device: str) -> dict[str, Any]:
    """Device, versions, threads, commit and date of a run on `device` (``"cpu"`` or ``"cuda"``)."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _physical_memory(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "attn_gym": _version("attn_gym"),
        "commit": _commit(),
    }
    if device == "cuda":
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["driver"] = nvml.driver_version()
        facts["device_memory_bytes"] = torch.cuda.get_device_properties().total_memory
    return facts


def free_memory(device: str) -> int | None:
    """Bytes that can still be allocated on `device`; None if the system does not say."""
    if device == "cuda":  # memory that torch's allocator holds unused counts as free
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    known = [x for x in (_meminfo("MemAvailable"), _cgroup_free()) if x is not None]
    return min(known) if known else None


def cpu_model() -> str:
    """The processor's name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _meminfo(key: str) -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_free() -> int | None:
    """Bytes left below the container's memory limit (cgroup v2); None without a limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.exists() or not used.exists() or not limit.read_text().strip().isdigit():
        return None
    return int(limit.read_text()) - int(used.read_text())


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that contains this package, marked if files differ from it; None outside of a checkout.

    The environment variable ``FLEXJAG_COMMIT`` overrides it, for copies without the history.
    """
    if os.environ.get("FLEXJAG_COMMIT"):
        return os.environ["FLEXJAG_COMMIT"]
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "environment.py") is None:
        return None  # an installed package inside somebody else's checkout
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../..")
    return f"{git('rev-parse', 'HEAD')}{' with changes' if changed else ''}"
