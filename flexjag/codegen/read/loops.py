"""The main loops of a compiled attention kernel: their loads of global memory and their machine instructions.

Both describe the code that runs, not the source: loads are read from Triton's final GPU dialect, after code motion out
of loops and software pipelining, and instructions from the machine code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexjag.codegen.read import sass as machine
from flexjag.codegen.read.dataflow import DOTS, LOADS, Dataflow, address
from flexjag.codegen.read.source import Source
from flexjag.codegen.read.ttgir import KernelIR, Op, parse
from flexjag.errors import CodegenError, explain_values

Body = tuple[machine.Instruction, ...]


@dataclass(frozen=True)
class Load:
    """A load of global memory in a main loop.

    Attributes:
        source: The Triton source line of the load, stripped: ``tmp3 = tl.load(in_ptr9 + tmp2)``. For a load that a
            helper function only returns, the line of the call. Empty if the compiler kept no location or
            `triton_source` is not the kernel's source.
        kind: The access pattern, by the dependences of the address.

            - ``"operand"``: feeds a matrix product (K and V; in the loop over queries Q and dO), whatever the address.
            - ``"tile list"``: a scalar that changes with the iteration, such as the BlockMask's next tile.
            - ``"scalar"``: a loop-invariant scalar.
            - ``"row"``: a loop-invariant tensor along the stationary side (queries in the loop over keys).
            - ``"column"``: a tensor along the side that the loop walks, which changes with the iteration. In the loop
              over keys this is a gather by key.
            - ``"element"``: a tensor along both sides that changes with the iteration: one number per score.
        count: Number of such loads in the loop's body.
    """

    source: str
    kind: str
    count: int


@dataclass(frozen=True)
class Loop:
    """A main loop: it contains matrix products, and its inner loops contain none.

    Attributes:
        over: The axis of iteration: ``"kv"`` for keys (forward, dQ), ``"q"`` for queries (dK and dV). By the name of
            the enclosing function where that is one of FlexAttention's; otherwise by the number of accumulators: one
            (the output, dQ) is ``"kv"``, two (dK and dV) are ``"q"``; ``"unknown"`` with any other number.
        masked: True if the loop runs over PARTIAL tiles, with the mask applied; False if over FULL ones; None if the
            source passes no ``IS_FULL_BLOCKS``, as FlexAttention's does.
        loads: The loop's loads of global memory.
        instructions: Machine instructions in the body. None if the machine code's loops do not match those of the
            Triton code one to one, with equal matrix products (the compiler unrolled, peeled or merged some): then
            instructions cannot be attributed to loops.
        mix: Machine instructions by class (:data:`flexjag.codegen.read.sass.CLASSES`, ``"mma"`` and ``"other"``), most
            frequent first; empty if `instructions` is None. ``"local load"`` and ``"local store"`` are register spills.
        function: Name of the enclosing Triton function, such as ``"forward_inner"``; empty if unknown.
    """

    over: str
    masked: bool | None
    loads: tuple[Load, ...]
    instructions: int | None
    mix: dict[str, int]
    function: str = ""

    @property
    def kv_indexed(self) -> int:
        """Number of loads in the body, operands excluded, that are indexed by the KV position.

        In a loop over keys these are ``"column"`` and ``"element"`` loads; in a loop over queries, where keys are the
        stationary side, ``"row"`` and ``"element"``. If `over` is ``"unknown"``, loads indexed by any position count,
        so that 0 always proves that there are none.
        """
        kinds = {"kv": ("column", "element"), "q": ("row", "element")}.get(self.over, ("row", "column", "element"))
        return sum(load.count for load in self.loads if load.kind in kinds)


def read_loops(ttgir: str, listing: str, triton_source: str) -> tuple[Loop, ...]:
    """Find the main loops of one kernel, in the order of its Triton code.

    Args:
        ttgir: The kernel in Triton's final GPU dialect, with locations (``asm["ttgir"]``).
        listing: Its machine code (:func:`flexjag.codegen.read.disassemble.list_instructions`); empty if there is none.
        triton_source: The source it was compiled from: the whole file, or from the kernel's definition on.

    Returns:
        One record for each loop that contains matrix products and has no inner loop with any; may be empty.

    Raises:
        CodegenError: If `ttgir` has a construct that the parser does not know, or loads may lie outside the loop that
            uses them: warp specialization (they are in another warp's loop), or a call in a loop that was not inlined.

    >>> read_loops('''module {
    ...   tt.func public @nothing() {
    ...     tt.return loc(unknown)
    ...   } loc(unknown)
    ... } loc(unknown)''', "", "")
    ()
    """
    kernel = parse(ttgir)
    flow = Dataflow(kernel)
    loops = [op for op in kernel.ops() if _is_main(op)]
    _check_visible(kernel, loops)
    source = Source(kernel, triton_source)
    bodies = _match(kernel, loops, machine.parse(listing, kernel.name))
    return tuple(_describe(op, body, flow, source) for op, body in zip(loops, bodies, strict=True))


def _describe(op: Op, body: Body | None, flow: Dataflow, source: Source) -> Loop:
    """The record of one loop."""
    varying = flow.varying(op)
    seen: Counter[tuple[str, str]] = Counter()
    for load in op.walk():
        if load.name not in LOADS:
            continue
        changes = any(value in varying for value in address(load))
        axes = frozenset(a for value in address(load) for a in flow.axes.get(value, ()))
        if load in flow.operands:
            kind = "operand"
        elif "tma" in load.name or "descriptor" in load.name:  # one address for a whole block
            kind = "element" if changes else "row"
        elif not axes:
            kind = "tile list" if changes else "scalar"
        else:
            kind = "row" if not changes else "column" if len(axes) == 1 else "element"
        seen[source.line(load), kind] += 1
    function = source.function(op)
    if "dkdv" in function:
        over = "q"
    elif function in ("forward_inner", "bwd_dq_inner"):
        over = "kv"
    else:
        over = {1: "kv", 2: "q"}.get(flow.accumulators(op), "unknown")
    return Loop(
        over=over,
        masked=source.is_masked(op),
        loads=tuple(Load(line, kind, count) for (line, kind), count in seen.items()),
        instructions=None if body is None else len(body),
        mix={} if body is None else machine.count(body),
        function=function,
    )


def _is_main(op: Op) -> bool:
    """Whether `op` is a loop that contains matrix products and whose inner loops contain none."""
    if op.name not in ("scf.for", "scf.while"):
        return False
    inner = [x for x in op.walk() if x.name in ("scf.for", "scf.while")]
    return any(x.name in DOTS for x in op.walk()) and not any(y.name in DOTS for x in inner for y in x.walk())


def _check_visible(kernel: KernelIR, loops: list[Op]) -> None:
    """Raise CodegenError if loads that belong to the loops may lie outside them."""
    hidden = [op.name for op in kernel.ops() if op.name.startswith(("ttg.warp_specialize", "ttg.warp_return"))]
    hidden += [op.name for loop in loops for op in (loop, *loop.walk()) if op.name in ("tt.call", "scf.while", "cf.br")]
    if hidden:
        raise CodegenError(
            explain_values("ttgir", "must keep each loop's loads in the loop", kernel=kernel.name, seen=hidden[:3])
        )


def _match(kernel: KernelIR, loops: list[Op], code: Sequence[machine.Instruction]) -> list[Body | None]:
    """The machine code of each loop's body; None for all unless each matches one with exactly its matrix products."""
    nobody: list[Body | None] = [None for _ in loops]
    if not loops or not code:
        return nobody
    is_fma = not any(x.kind == "mma" for x in code)
    left = machine.product_loops(code, fma=min(_fma(kernel, loop) for loop in loops) if is_fma else 0)
    if len(left) != len(loops):
        return nobody
    found: list[Body | None] = []
    for loop in loops:
        # The two sides of a branch may be laid out in either order: loops with different products are matched by them,
        # loops with equal ones in order. Without tensor cores other multiply-adds count too, so only order is used.
        fits = [body for body in (left[:1] if is_fma else left) if _does(body, loop, kernel)]
        if not fits:
            return nobody
        found.append(fits[0])
        left = [body for body in left if body is not fits[0]]
    return found


def _products(loop: Op) -> list[tuple[int, int, int, str]]:
    """``(M, N, K, element type of the operands)`` of each matrix product of a loop."""
    found = []
    for op in loop.walk():
        if op.name in DOTS:
            (left, element), (right, _) = op.shapes[:2]
            found.append((math.prod(left[:-1]), right[-1], left[-1], element))
    return found


def _fma(kernel: KernelIR, loop: Op) -> int:
    """Multiply-adds per thread in one iteration's matrix products."""
    return sum(m * n * k for m, n, k, _ in _products(loop)) // max(1, 32 * kernel.num_warps)


def _does(body: Body, loop: Op, kernel: KernelIR) -> bool:
    """Whether one iteration of the machine code computes the matrix products of one iteration of `loop`.

    - Warp-wide instructions, ``HMMA.16816``, name M (16 or 8), N (8) and K; those of four warps, ``HGMMA.64x128x16``,
      too. Summed over a block's warps they must equal the products' M·N·K.
    - Block-wide instructions, ``UTCHMMA``, hold the sizes in a register. The largest takes 128 rows, 256 columns and
      32 bytes of K, and Triton uses the largest that fits.
    - Without tensor cores each thread issues its share of multiply-adds, and fewer than as many again for other work.
    """
    products = _products(loop)
    seen = [x.opcode for x in body if x.kind == "mma"]
    if any(opcode.startswith("UTC") for opcode in seen):
        bits = [int(re.sub(r"\D*(\d+).*", r"\1", element) or 0) for *_, element in products]
        steps = (
            math.ceil(m / 128) * math.ceil(n / 256) * math.ceil(k * b / 256)
            for (m, n, k, _), b in zip(products, bits, strict=True)
        )
        return len(seen) == sum(steps)
    if seen:
        done = sum(_multiplies(opcode) for opcode in seen) * kernel.num_warps
        return done == sum(m * n * k for m, n, k, _ in products)
    needed = _fma(kernel, loop)
    return needed <= sum(2 if x.name == "FFMA2" else x.name == "FFMA" for x in body) < 2 * needed


def _multiplies(opcode: str) -> float:
    """Multiply-adds per warp of one tensor-core instruction; 0 if its name has no sizes."""
    if group := re.match(r"[A-Z]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)\b", opcode):
        return math.prod(int(size) for size in group.groups()) / 4
    if warp := re.match(r"[A-Z]MMA\.(16|8)8(\d+)\b", opcode):
        return int(warp[1]) * 8 * int(warp[2])
    return 0
