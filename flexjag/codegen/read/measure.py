"""Static resource usage of an assembled kernel, read from its code. For the worker only: it starts the disassembler."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexjag.codegen.make.assemble import Assembled
from flexjag.codegen.read.disassemble import disassemble, list_instructions, tensor_core_instructions
from flexjag.codegen.read.loops import read_loops
from flexjag.codegen.read.sass import parse, size
from flexjag.codegen.report import Kernel
from flexjag.codegen.targets import Target


def measure(made: Assembled, target: Target, phase: str) -> Kernel:
    """Measure one assembled kernel: registers, spills, occupancy, loops and instructions."""
    is_amd = target.vendor == "amd"
    sass = "" if is_amd else disassemble(made.asm["cubin"])
    listing = "" if is_amd else list_instructions(made.asm["cubin"])
    ttgir, ptx = made.asm["ttgir"], made.asm.get("ptx", "")
    registers, stack, spilled = _amd_usage(made.asm["amdgcn"]) if is_amd else _nvidia_usage(made)
    blocks = {k: v for k, v in made.constants.items() if "BLOCK" in k and type(v) is int and "SPARSE" not in k}
    return Kernel(
        name=made.name,
        phase=phase,
        triton=made.source,
        ttgir=ttgir,
        ptx=ptx,
        sass=sass,
        amdgcn=made.asm["amdgcn"] if is_amd else "",
        binary=made.asm["hsaco" if is_amd else "cubin"],
        registers=registers,
        spilled_bytes=spilled,
        stack_bytes=stack,
        shared_bytes=made.shared_bytes,
        num_warps=made.num_warps,
        num_stages=made.num_stages,
        blocks=blocks,
        constants={k: v for k, v in made.constants.items() if k not in blocks},
        resident_blocks=target.resident_blocks(registers, made.shared_bytes, made.num_warps),
        occupancy=target.occupancy(registers, made.shared_bytes, made.num_warps),
        tensor_cores=_amd_tensor_cores(made.asm["amdgcn"]) if is_amd else tensor_core_instructions(ptx, sass),
        instructions=count_amdgcn(made.asm["amdgcn"]) if is_amd else size(parse(listing)),
        loops=() if is_amd else read_loops(ttgir, listing, made.source),
        num_configs=made.num_configs,
    )


@dataclass(frozen=True)
class Usage:
    """Resources of one multiprocessor that a kernel uses; attributes as in :class:`flexjag.codegen.report.Kernel`."""

    name: str
    phase: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    resident_blocks: int
    tensor_cores: tuple[str, ...]


def read_usage(made: Assembled, target: Target, phase: str) -> Usage:
    """The subset of :func:`measure` that needs no disassembly, which takes twice as long as compiling."""
    is_amd = target.vendor == "amd"
    registers, stack, spilled = _amd_usage(made.asm["amdgcn"]) if is_amd else _nvidia_usage(made)
    return Usage(
        name=made.name,
        phase=phase,
        registers=registers,
        stack_bytes=stack,
        spilled_bytes=spilled,
        shared_bytes=made.shared_bytes,
        num_warps=made.num_warps,
        resident_blocks=target.resident_blocks(registers, made.shared_bytes, made.num_warps),
        tensor_cores=_amd_tensor_cores(made.asm["amdgcn"]) if is_amd else tensor_core_instructions(made.asm["ptx"], ""),
    )


def _nvidia_usage(made: Assembled) -> tuple[int, int, int]:
    """Registers, stack bytes and spilled bytes per thread, as reported by ptxas."""
    used = re.search(r"Used (\d+) registers", made.log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", made.log)
    if used is None or frame is None:
        raise RuntimeError(f"the assembler did not say what {made.name} uses: {made.log!r}")
    return int(used[1]), int(frame[1]), int(frame[2])


def _amd_usage(text: str) -> tuple[int, int, int]:
    """Vector registers, scratch bytes and spilled bytes per lane, from the metadata of an AMD assembly."""

    def read(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return read("vgpr_count"), read("private_segment_fixed_size"), 4 * read("vgpr_spill_count")


def _amd_tensor_cores(text: str) -> tuple[str, ...]:
    return ("mfma",) if "v_mfma_" in text else ()


def count_amdgcn(text: str) -> int:
    """Number of machine instructions in an AMD assembly."""
    return len(re.findall(r"^\t(?:s|v|ds|global|buffer|flat|scratch)_\w+", text, re.MULTILINE))
