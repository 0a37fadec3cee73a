"""FlexAttention's kernel options as measured on a GPU: the JSON file that :mod:`flexjag.bench.tuning.tune` writes.

An entry is keyed by device, versions of PyTorch and Triton, and kind of `Work`. Entries with another key are ignored,
so one file serves several machines. Segment lengths are not part of the key: they vary from batch to batch, and the
options are constants of a graph.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flexjag import caches
from flexjag.algebra import scores as s
from flexjag.algebra.tree import reads_pairs
from flexjag.lowering.recipe import Recipe

SCHEMA = 1
DIMS = (16, 32, 64, 128, 256)
"""Head dimensions of the file's keys; others are rounded up to them, as the kernels do."""

Options = dict[str, int | bool | str]
ScoreKind = Literal["none", "formula", "lookup"]
Phase = Literal["inference", "forward", "backward"]

FORWARD = ("BLOCK_M", "BLOCK_N")
BACKWARD = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")


@dataclass(frozen=True)
class Device:
    """A GPU and the versions of the compilers that build its kernels.

    Attributes:
        name: The driver's name for the GPU.
        capability: Compute capability, such as ``"9.0"``.
        torch: PyTorch's version.
        triton: Triton's version.
    """

    name: str
    capability: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Work:
    """A class of plans and inputs that share their best options.

    Attributes:
        dtype: Of q, k and v, such as ``"bfloat16"``.
        dim: D, rounded up to one of `DIMS`.
        value_dim: E, rounded up to one of `DIMS`.
        score: ``"none"``, ``"formula"`` of positions, or ``"lookup"``: a read for each query-key pair.
        exact: The mask equals its spans: no predicate is evaluated.
        phase: ``"forward"`` and ``"backward"`` of training; ``"inference"`` is a forward without gradients, where the
            FLASH backend is possible. If FLASH is tuned but unavailable, the options for ``"forward"`` are used.
    """

    dtype: str
    dim: int
    value_dim: int
    score: ScoreKind
    exact: bool
    phase: Phase


@dataclass(frozen=True)
class Entry:
    """The best options measured for one device and kind of work.

    Attributes:
        device: The device.
        work: The kind of work.
        options: FlexAttention's kernel options; empty if the built-in ones are the fastest.
        measured: The measurements, for human readers.
    """

    device: Device
    work: Work
    options: Options
    measured: Mapping[str, Any]


def lookup(recipe: Recipe, q: Tensor, v: Tensor, need_lse: bool = False) -> Options:
    """The file's options for a plan and q ``[T_q, H, D]``, v ``[T_kv, G, E]``; called while a graph is traced.

    Args:
        recipe: The recipe.
        q: Only its dtype, device and D are used.
        v: Only its E is used.
        need_lse: Return the log-sum-exp, too, which rules out FLASH: it was not measured with it.

    Returns:
        The options; empty without an entry. They are constants: the same for every batch of a structure, and until
        the process ends, even if the file changes.
    """
    dim, value_dim = rounded(q.shape[2]), rounded(v.shape[2])
    if dim is None or value_dim is None:
        return {}
    kind, grad, flash = score_kind(recipe.score), torch.is_grad_enabled(), recipe.head_of is None and not need_lse
    return dict(_constants(q.device, q.dtype, dim, value_dim, kind, recipe.exact, grad, flash))


def rounded(dim: int) -> int | None:
    """Round a head dimension up to one of `DIMS`; None if it exceeds all of them.

    >>> rounded(48), rounded(64), rounded(512)
    (64, 64, None)
    """
    for most in DIMS:
        if dim <= most:
            return most
    return None


def score_kind(score: s.Score | None) -> ScoreKind:
    """Cost class of a score in a kernel: ``"none"``, ``"formula"`` of positions, or ``"lookup"`` per query-key pair.

    >>> score_kind(s.SoftCap(30.0)), score_kind(s.RelativeBias(torch.zeros(1, 3)) >> s.SoftCap(30.0))
    ('formula', 'lookup')
    """
    if score is None:
        return "none"
    return "lookup" if reads_pairs(score) else "formula"


@torch.compiler.assume_constant_result
def _constants(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    score: ScoreKind,
    exact: bool,
    grad: bool,
    flash: bool,
) -> tuple[tuple[str, int | bool | str], ...]:
    """The options that a graph holds as constants, as pairs: Dynamo takes no dict from a function it does not trace."""
    here = this_device(device)
    if here is None:
        return ()
    known = entries()

    def at(phase: Phase) -> Options | None:
        return known.get((here, Work(dtype_name(dtype), dim, value_dim, score, exact, phase)))

    if grad:
        return tuple({**(at("forward") or {}), **(at("backward") or {})}.items())
    found = at("inference")
    if found is None or (found.get("BACKEND") == "FLASH" and not (flash and flash_is_installed())):
        found = at("forward")
    return tuple((found or {}).items())


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in the file, without ``torch.``.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


@cache
def this_device(device: torch.device) -> Device | None:
    """The file's key for a torch device; None unless it is a CUDA (or ROCm) GPU and Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    triton = importlib.import_module("triton").__version__
    return Device(torch.cuda.get_device_name(device), f"{major}.{minor}", str(torch.__version__), triton)


def flash_is_installed() -> bool:
    """True if ``BACKEND="FLASH"`` is available: FlexAttention imports it from the package ``flash_attn.cute``."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # of flash_attn itself
        return False


def path() -> Path | None:
    """The file's path: ``$FLEXJAG_TUNING``, else ``tuning.json`` in the cache folder (:mod:`flexjag.caches`).

    None if ``$FLEXJAG_TUNING`` is set and empty, which switches tuning off.
    """
    named = os.environ.get("FLEXJAG_TUNING")
    if named is not None:
        return Path(named) if named else None
    return caches.folder() / "tuning.json"


@cache
def entries() -> Mapping[tuple[Device, Work], Options]:
    """The file's options by key, read once per process. Unusable entries are skipped with a warning."""
    file = path()
    if file is None:
        return {}
    if not file.exists():
        if "FLEXJAG_TUNING" in os.environ:
            _warn(file, "is not there, though FLEXJAG_TUNING names it")
        return {}
    try:
        found = read(file)
    except (OSError, ValueError) as reason:
        _warn(file, f"cannot be read: {reason}")
        return {}
    usable = {}
    for entry in found:
        wrong = objection(entry)
        if wrong is None:
            usable[entry.device, entry.work] = entry.options
        else:
            _warn(file, f"an entry is left out: {wrong}")
    return usable


def _warn(file: Path, what: str) -> None:
    warnings.warn(f"flexjag's tuned kernel options: {file} {what}", stacklevel=3)


def read(file: Path) -> list[Entry]:
    """Read the entries of a file.

    Raises:
        ValueError: If it is not JSON of schema SCHEMA, or an entry has missing or unknown fields.
        OSError: If it cannot be read.
    """
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"it must be a JSON object with schema {SCHEMA}")
    try:
        return [
            Entry(Device(**x["device"]), Work(**x["work"]), dict(x["options"]), x["measured"]) for x in found["entries"]
        ]
    except (KeyError, TypeError) as reason:
        raise ValueError(f"an entry is not as it should be: {reason!r}") from None


def write(file: Path, new: Iterable[Entry]) -> None:
    """Merge entries into a file; an entry replaces the one for the same device and work.

    Raises:
        ValueError: If the file exists and is not a tuning file.
        OSError: If it cannot be read or written.
    """
    kept = {(x.device, x.work): x for x in (read(file) if file.exists() else [])}
    kept |= {(x.device, x.work): x for x in new}
    ordered = sorted(kept.values(), key=lambda x: (astuple(x.device), astuple(x.work)))
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"schema": SCHEMA, "entries": [asdict(x) for x in ordered]}, indent=1) + "\n")
    unfinished.replace(file)


def objection(entry: Entry) -> str | None:
    """The reason why FlexAttention's lowering would reject an entry's options, or None.

    Blocks are powers of two that divide a tile of 128, the backward's loops need one side to divide the other, and
    FLASH takes a mask of spans alone, without gradients.
    """
    work, options = entry.work, entry.options
    wrong = _misfit(entry.device) or _misfit(work)
    if wrong is not None or not options:
        return wrong
    if options.get("BACKEND") == "FLASH":
        bare = len(options) == 1 and work.exact and (work.score, work.phase) == ("none", "inference")
        return None if bare else f"FLASH is not for {work}"
    values = _values(work.phase)
    for name, value in options.items():
        if not any(value == x and type(value) is type(x) for x in values.get(name, ())):
            return f"{name}={value!r} is no option of a {work.phase}"
    absent = [name for name in values if name not in options and not name.endswith(("BACKEND", "USE_TMA"))]
    if absent:
        return f"{absent[0]} is missing"
    if work.phase != "backward":
        return None
    n1, m1, m2, n2 = (int(options[f"bwd_BLOCK_{x}"]) for x in ("N1", "M1", "M2", "N2"))
    if n1 % m1 or m2 % n2:
        return f"in blocks of {m1}x{n1} and {m2}x{n2}, M1 must divide N1 and N2 must divide M2"
    return None


def _misfit(key: Device | Work) -> str | None:
    """The first field of a key with a wrong type or an unknown phase, as a message; None if all are right."""
    types = {"dim": int, "value_dim": int, "exact": bool}
    for name, value in asdict(key).items():
        if type(value) is not types.get(name, str):
            return f"{name}={value!r} is not of type {types.get(name, str).__name__}"
    if isinstance(key, Work) and key.phase not in get_args(Phase):
        return f"there is no phase {key.phase!r}"
    return None


def _values(phase: Phase) -> Mapping[str, tuple[int | bool | str, ...]]:
    """The allowed values of each option of a phase."""
    prefix, blocks = ("bwd_", BACKWARD) if phase == "backward" else ("fwd_", FORWARD)
    ours: dict[str, tuple[int | bool | str, ...]] = {
        **dict.fromkeys(blocks, (16, 32, 64, 128)),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3, 4, 5),
        "USE_TMA": (False, True),
    }
    return {"BACKEND": ("TRITON",)} | {prefix + name: values for name, values in ours.items()}
