"""GPU architectures to compile for, and the occupancy of kernels on them.

Sources of the figures: CUDA C++ Programming Guide (compute capabilities), the A100, H100, H200 and Blackwell
architecture white papers, and AMD's CDNA3 white paper and instruction set guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from flexjag.errors import TargetError, explain_values

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU architecture, represented by one device.

    Attributes:
        name: Name of the architecture, such as ``sm_90``.
        device: The device whose figures are used.
        vendor: ``"nvidia"`` or ``"amd"``.
        capability: Compute capability; ``(0, 0)`` for AMD.
        processors: Streaming multiprocessors or compute units.
        lanes: Threads of a warp or wavefront.
        max_threads: Resident threads per processor.
        max_blocks: Resident thread blocks per processor.
        registers: 32-bit registers per processor.
        shared_per_processor: Bytes of shared memory per processor.
        shared_per_block: Maximum bytes of shared memory per thread block.
        shared_reserved: Bytes of shared memory that the driver reserves per thread block.
        l2_bytes: Last-level cache in bytes.
        memory_bytes: Device memory in bytes.
    """

    name: str
    device: str
    vendor: str
    capability: tuple[int, int]
    processors: int
    lanes: int
    max_threads: int
    max_blocks: int
    registers: int
    shared_per_processor: int
    shared_per_block: int
    shared_reserved: int
    l2_bytes: int
    memory_bytes: int

    @property
    def arch(self) -> int | str:
        """The `arch` of Triton's GPUTarget: 90, or ``"gfx942"``."""
        return self.name if self.vendor == "amd" else self.capability[0] * 10 + self.capability[1]

    def properties(self) -> SimpleNamespace:
        """The device's properties, as ``torch.cuda.get_device_properties`` returns them."""
        return SimpleNamespace(
            name=self.device,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory_bytes,
            multi_processor_count=self.processors,
            regs_per_multiprocessor=self.registers,
            max_threads_per_multi_processor=self.max_threads,
            warp_size=self.lanes,
            shared_memory_per_block=48 * KIB,
            shared_memory_per_block_optin=self.shared_per_block,
            shared_memory_per_multiprocessor=self.shared_per_processor,
            max_threads_per_block=1024,
            L2_cache_size=self.l2_bytes,
            gcnArchName=self.name if self.vendor == "amd" else "",
            is_integrated=0,
        )

    def resident_blocks(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Thread blocks that fit on one multiprocessor: the least of its limits on blocks, threads, registers, memory.

        Args:
            registers: Registers per thread.
            shared_bytes: Shared memory per thread block in bytes, static and dynamic.
            num_warps: Warps per thread block.

        >>> get_target("sm_90").resident_blocks(registers=168, shared_bytes=100 * 1024, num_warps=4)
        2
        """
        threads = num_warps * self.lanes
        # NVIDIA allocates registers per warp in units of 256, AMD per lane of a wavefront in units of 8.
        per_warp = -(-max(registers, 1) * self.lanes // 256) * 256
        limits = [
            self.max_blocks,
            self.max_threads // threads,
            self.registers // (per_warp * num_warps),
            self.shared_per_processor // (shared_bytes + self.shared_reserved or 1),
        ]
        return min(limits)

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> float:
        """Theoretical occupancy: resident warps over the maximum, 0 to 1. Arguments as in :meth:`resident_blocks`."""
        resident = self.resident_blocks(registers, shared_bytes, num_warps) * num_warps * self.lanes
        return resident / self.max_threads


def _nvidia(name: str, device: str, processors: int, shared_kib: int, l2_mib: int, memory_gib: int) -> Target:
    major = int(name[3:]) // 10
    return Target(
        name=name,
        device=device,
        vendor="nvidia",
        capability=(major, int(name[3:]) % 10),
        processors=processors,
        lanes=32,
        max_threads=2048,
        max_blocks=32,
        registers=64 * KIB,
        shared_per_processor=shared_kib * KIB,
        shared_per_block=(shared_kib - 1) * KIB,
        shared_reserved=KIB,
        l2_bytes=l2_mib * KIB**2,
        memory_bytes=memory_gib * KIB**3,
    )


TARGETS = {
    t.name: t
    for t in (
        _nvidia("sm_80", "NVIDIA A100-SXM4-80GB", 108, 164, 40, 80),
        _nvidia("sm_90", "NVIDIA H200", 132, 228, 60, 140),
        _nvidia("sm_100", "NVIDIA B200", 148, 228, 126, 180),
        Target(
            name="gfx942",
            device="AMD Instinct MI300X",
            vendor="amd",
            capability=(0, 0),
            processors=304,
            lanes=64,
            max_threads=2048,
            max_blocks=32,
            registers=4 * 512 * 64,
            shared_per_processor=64 * KIB,
            shared_per_block=64 * KIB,
            shared_reserved=0,
            l2_bytes=256 * KIB**2,
            memory_bytes=192 * KIB**3,
        ),
    )
}

PRODUCTS = {
    **dict.fromkeys(("a100",), "sm_80"),
    **dict.fromkeys(("h100", "h200", "gh200"), "sm_90"),
    **dict.fromkeys(("b200", "gb200"), "sm_100"),
    **dict.fromkeys(("mi300", "mi300a", "mi300x", "mi325x"), "gfx942"),
}
"""Target by product name, for hints in errors. A target is an architecture, and names one device for its figures."""


def get_target(name: str | Target) -> Target:
    """The target of this name; a target is returned as it is.

    Raises:
        TargetError: If no target has this name.

    >>> get_target("sm_80").device
    'NVIDIA A100-SXM4-80GB'
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        known = PRODUCTS.get(name.strip().lower()) if isinstance(name, str) else None
        hint = f"; for the {name.strip().upper()} say {known}" if known else ""
        raise TargetError(explain_values("target", f"must be one of {', '.join(TARGETS)}{hint}", target=name))
    return TARGETS[name]
