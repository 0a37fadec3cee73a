"""Disassembly of machine code with the tools in the Triton package."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from flexjag.errors import CodegenError, explain_values

_TIMEOUT_S = 300


def disassemble(cubin: bytes, tool_dir: Path | None = None) -> str:
    """Disassemble machine code to text.

    Args:
        cubin: A CUDA binary.
        tool_dir: Folder of ``cuobjdump`` and ``nvdisasm``. Default: those in the Triton package, else those on PATH.

    Returns:
        Output of ``cuobjdump -sass``: a ``Function : NAME`` line per kernel, its instructions by address.

    Raises:
        CodegenError: If the tool is not found, or rejects the binary.

    >>> from flexjag.errors import CodegenError
    >>> try:
    ...     disassemble(b"", Path("/nowhere"))
    ... except CodegenError as error:
    ...     print(error)
    tool_dir: must hold the executable; got executable='cuobjdump', tool_dir='/nowhere'
    """
    return _run("cuobjdump", cubin, tool_dir, "-sass")


def list_instructions(cubin: bytes, tool_dir: Path | None = None) -> str:
    """Disassemble machine code to JSON, for :func:`flexjag.codegen.read.sass.parse`.

    It does not replace the text: the operands of some instructions come in another order (``LDGSTS``) or lose a
    comma (``LDS``), and a set of predicates that ``P2R`` reads appears as its guard.

    Args:
        cubin: A CUDA binary.
        tool_dir: As for :func:`disassemble`.

    Returns:
        Output of ``nvdisasm -json``. The versions of CUDA 12.8 (in Triton 3.6) and 13.1 (in 3.7 and 3.8) agree.

    Raises:
        CodegenError: As :func:`disassemble`.
    """
    return _run("nvdisasm", cubin, tool_dir, "-json")


def resource_usage(cubin: bytes, tool_dir: Path | None = None) -> dict[str, int]:
    """Registers and memory of a kernel: per thread, and static shared memory per block.

    Args:
        cubin: A CUDA binary with one kernel.
        tool_dir: As for :func:`disassemble`.

    Returns:
        ``registers`` per thread; ``stack`` and ``local``, bytes per thread; ``shared``, static bytes per block,
        without the dynamic shared memory of a launch.

    Raises:
        CodegenError: As :func:`disassemble`, or if the binary does not hold exactly one kernel.
    """
    return read_usage(_run("cuobjdump", cubin, tool_dir, "--dump-resource-usage"))


def read_usage(text: str) -> dict[str, int]:
    r"""Parse the output of ``cuobjdump --dump-resource-usage``.

    Raises:
        CodegenError: If it does not describe exactly one kernel.

    >>> read_usage(" Function f:\n  REG:255 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:632 TEXTURE:0")
    {'registers': 255, 'stack': 8, 'local': 0, 'shared': 1024}
    """
    lines = re.findall(r"^\s*REG:\d+.*$", text, re.MULTILINE)
    if len(lines) != 1:
        raise CodegenError(explain_values("cubin", "must hold one kernel", kernels=len(lines), seen=text[:200]))
    seen = {name: int(number) for name, number in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", lines[0])}
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "shared": "SHARED"}
    return {ours: seen[theirs] for ours, theirs in names.items()}


_FAMILIES = {
    "mma": (r"\b(?:w?mma)\.sync\b", r"\b[HIDQOBE]MMA\."),
    "wgmma": (r"\bwgmma\.mma_async\b", r"\b[HIQB]GMMA\."),
    "tcgen05": (r"\btcgen05\.mma\b", r"\bUTC[A-Z]*MMA\b"),
}


def tensor_core_instructions(ptx: str, sass: str) -> tuple[str, ...]:
    """Families of tensor-core instructions that a kernel uses.

    Args:
        ptx: PTX of the kernel; may be empty.
        sass: Machine code of the kernel, as text; may be empty.

    Returns:
        Those of ``"mma"`` (a warp's), ``"wgmma"`` (four warps', Hopper) and ``"tcgen05"`` (a block's, Blackwell) that
        are in either text.

    >>> tensor_core_instructions("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", "")
    ('mma',)
    >>> tensor_core_instructions("", "/*0000*/ FFMA R0, R1, R2, R0 ;")
    ()
    """
    return tuple(name for name, (p, s) in _FAMILIES.items() if re.search(p, ptx) or re.search(s, sass))


def _tool(name: str, tool_dir: Path | None) -> Path:
    """Path of an executable."""
    if tool_dir is not None:
        found = shutil.which(name, path=str(tool_dir))
    else:
        triton = importlib.util.find_spec("triton")
        packaged = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
        found = (shutil.which(name, path=str(packaged)) if packaged else None) or shutil.which(name)
    if found is None:
        place = "the Triton package, PATH" if tool_dir is None else str(tool_dir)
        raise CodegenError(explain_values("tool_dir", "must hold the executable", executable=name, tool_dir=place))
    return Path(found)


def _run(name: str, cubin: bytes, tool_dir: Path | None, option: str) -> str:
    """Run a tool on a binary, by way of a file, and return its output."""
    tool = _tool(name, tool_dir)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        try:
            done = subprocess.run([tool, option, file], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CodegenError(explain_values(name, "must run", tool=str(tool), error=str(error))) from error
    if done.returncode or not done.stdout.strip():
        said = (done.stderr or done.stdout).strip()[-400:]
        rule = f"must be a CUDA binary that {name} reads"
        raise CodegenError(explain_values("cubin", rule, code=done.returncode, said=said))
    return done.stdout
