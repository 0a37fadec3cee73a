"""Reports on the kernels compiled for a target: a table, JSON, and files of their code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexjag.codegen.read.loops import Loop
from flexjag.codegen.targets import Target

CODE = {"triton": "py", "ttgir": "ttgir", "ptx": "ptx", "sass": "sass", "amdgcn": "amdgcn"}
"""File-name suffix by kind of code that a kernel may have."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled GPU kernel: its code and its static resource usage.

    Attributes:
        name: Kernel name.
        phase: ``"forward"``, ``"delta"`` (the row sums ``Σ out ⊙ grad_out`` that the backward starts from),
            ``"backward"`` (dQ, dK and dV in one kernel) or ``"glue"`` (Inductor's other kernels around these).
        triton: Triton source code.
        ttgir: Triton's GPU dialect, after its passes.
        ptx: PTX, NVIDIA's virtual instruction set; empty on AMD.
        sass: SASS, NVIDIA's machine code, as text; empty on AMD.
        amdgcn: AMD's machine code as text; empty on NVIDIA.
        binary: The cubin or hsaco that a driver loads.
        registers: Registers per thread.
        spilled_bytes: Bytes per thread that the code stores to local memory because registers ran out.
        stack_bytes: Stack frame per thread in bytes, spills included.
        shared_bytes: Shared memory per thread block in bytes.
        num_warps: Warps per thread block.
        num_stages: Stages of the software pipeline.
        blocks: Tile sizes by name (``BLOCK_M``, ...).
        constants: Other compile-time integers and switches.
        resident_blocks: Thread blocks that fit on one multiprocessor.
        occupancy: Theoretical occupancy: resident warps over the maximum, 0 to 1.
        tensor_cores: Families of tensor-core instructions used: ``mma``, ``wgmma``, ``tcgen05``, ``mfma``.
        instructions: Total number of machine instructions.
        loops: The main loops: those with matrix products in them.
        num_configs: Number of configurations that the launcher would autotune over; this is the first.
    """

    name: str
    phase: str
    triton: str
    ttgir: str
    ptx: str
    sass: str
    amdgcn: str
    binary: bytes
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]
    constants: Mapping[str, Any]
    resident_blocks: int
    occupancy: float
    tensor_cores: tuple[str, ...]
    instructions: int
    loops: tuple[Loop, ...]
    num_configs: int

    @property
    def code(self) -> dict[str, str]:
        """The kernel's code by kind (keys of :data:`CODE`), without empty kinds."""
        return {kind: text for kind in CODE if (text := getattr(self, kind))}

    @property
    def kv_indexed(self) -> int:
        """Number of loads in the main loops that are indexed by the key's position, K and V themselves excluded."""
        return sum(loop.kv_indexed for loop in self.loops)

    @property
    def loop_instructions(self) -> int | None:
        """Machine instructions in all main loops' bodies; None if they could not be attributed to loops."""
        counts = [loop.instructions for loop in self.loops if loop.instructions is not None]
        return sum(counts) if len(counts) == len(self.loops) else None

    def facts(self) -> dict[str, Any]:
        """All attributes except the code, JSON-serializable."""
        kept = {k: v for k, v in vars(self).items() if k not in CODE and k not in ("binary", "loops")}
        loops = [{**asdict(loop), "kv_indexed": loop.kv_indexed} for loop in self.loops]
        return {**kept, "blocks": dict(self.blocks), "constants": dict(self.constants), "loops": loops}


def phase_of(wrapper: str, name: str) -> str:
    """Phase of a kernel (:attr:`Kernel.phase`), from its wrapper and its name, which lists the fused operations."""
    if "_tem_" in name and "flex_attention" in name:
        return wrapper
    is_reduction = "_per_" in name or "_red_" in name
    return "delta" if is_reduction and "flex_attention_backward" in name else "glue"


def headline(kernel: Kernel) -> dict[str, str]:
    """A kernel's row of the table that `print` shows: cells by column title."""
    loops = kernel.loops
    return {
        "kernel": kernel.phase,
        "registers": str(kernel.registers),
        "spilled": f"{kernel.spilled_bytes} B",
        "shared": f"{kernel.shared_bytes / 1024:.1f} KiB" + ("" if kernel.resident_blocks else ", too much"),
        "warps": str(kernel.num_warps),
        "stages": str(kernel.num_stages),
        "blocks": blocks_text(kernel.blocks),
        "occupancy": f"{kernel.occupancy:.0%}",
        "tensor cores": ", ".join(kernel.tensor_cores) or "none",
        "instructions": f"{kernel.instructions:,}",
        "in loops": "" if not loops else "?" if kernel.loop_instructions is None else f"{kernel.loop_instructions:,}",
        "KV gathers": str(kernel.kv_indexed) if loops else "",
    }


def blocks_text(blocks: Mapping[str, int]) -> str:
    """Tile sizes as text: ``128x64``, or ``64x128, 128x64`` for a backward's two loops.

    >>> blocks_text({"BLOCK_M": 128, "BLOCK_N": 64})
    '128x64'
    """
    pairs = [(blocks.get(f"BLOCK_M{i}"), blocks.get(f"BLOCK_N{i}")) for i in ("", "1", "2")]
    found = [f"{m}x{n}" for m, n in pairs if m and n]
    return ", ".join(found) or ", ".join(f"{v}" for v in blocks.values())


@dataclass(frozen=True, eq=False, repr=False)
class Listing:
    """The kernels compiled for one target.

    Attributes:
        target: The GPU architecture.
        kernels: The kernels in the order they run, forward first.
        about: Parameters of the compilation: tokens, heads, dtype, mask, score, kernel options.
        versions: Versions of torch, triton and flexjag by name.
        wrappers: The host code that launches the kernels, by phase.
    """

    target: Target
    kernels: tuple[Kernel, ...]
    about: Mapping[str, Any]
    versions: Mapping[str, str]
    wrappers: Mapping[str, str]

    def __getitem__(self, phase: str) -> Kernel:
        """The first kernel of a phase: ``report["forward"]``.

        Raises:
            KeyError: If no kernel has that phase.
        """
        for kernel in self.kernels:
            if kernel.phase == phase:
                return kernel
        raise KeyError(f"no {phase!r} among the kernels {[k.phase for k in self.kernels]}")

    @property
    def shown(self) -> tuple[Kernel, ...]:
        """The kernels that `print` shows: all but the glue."""
        return tuple(k for k in self.kernels if k.phase != "glue")

    def to_json(self, indent: int | None = 2) -> str:
        """The report without the code, as JSON text."""
        found = {
            "target": {"name": self.target.name, "device": self.target.device},
            "about": dict(self.about),
            "versions": dict(self.versions),
            "kernels": [k.facts() for k in self.kernels],
        }
        return json.dumps(found, indent=indent)

    def save(self, directory: str | Path) -> Path:
        """Write ``report.json``, ``report.txt``, every kernel's code and the host code into a directory.

        Returns:
            The directory, made if it was not there.
        """
        where = Path(directory)
        where.mkdir(parents=True, exist_ok=True)
        (where / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        (where / "report.txt").write_text(f"{self}\n", encoding="utf-8")
        for phase, text in self.wrappers.items():
            (where / f"{phase}_wrapper.py").write_text(text, encoding="utf-8")
        for i, kernel in enumerate(self.kernels):
            for kind, text in kernel.code.items():
                (where / f"{i}_{kernel.phase}.{CODE[kind]}").write_text(text, encoding="utf-8")
            end = "hsaco" if kernel.amdgcn else "cubin"
            (where / f"{i}_{kernel.phase}.{end}").write_bytes(kernel.binary)
        return where

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target.name!r}, {[k.phase for k in self.kernels]})"

    def _repr_html_(self) -> str:
        from flexjag.codegen.show.html import to_html

        return to_html(self)


def as_text(listing: Listing) -> str:
    """The text that `print` shows: a table of the kernels, then their main loops."""
    about = ", ".join(f"{k}={v}" for k, v in listing.about.items() if v is not None)
    rows = [headline(k) for k in listing.shown]
    titles = list(rows[0]) if rows else []
    widths = {t: max(len(t), *(len(r[t]) for r in rows)) for t in titles}
    lines = [
        f"{listing.target.name} ({listing.target.device}), not run: {about}",
        "  ".join(t.ljust(widths[t]) if t == "kernel" else t.rjust(widths[t]) for t in titles),
    ]
    for r in rows:
        lines.append("  ".join(r[t].ljust(widths[t]) if t == "kernel" else r[t].rjust(widths[t]) for t in titles))
    for kernel in listing.shown:
        for loop in kernel.loops:
            mix = ", ".join(f"{n} {kind}" for kind, n in sorted(loop.mix.items(), key=lambda x: -x[1]) if n)
            tiles = {True: " of PARTIAL tiles", False: " of FULL tiles", None: ""}[loop.masked]
            lines.append(f"{kernel.phase}: loop over {loop.over}{tiles}: {mix or 'not told apart in the machine code'}")
            lines += [f"    {load.count} x {load.kind}: {load.source}" for load in loop.loads]
    glue = len(listing.kernels) - len(listing.shown)
    return "\n".join([*lines, *([f"and {glue} small kernels around them"] if glue else [])])
