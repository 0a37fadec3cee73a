"""The main loops of a compiled attention kernel: what each of them loads, and what it costs.

Said of the code that runs, not of the code that was written: loads come from Triton's last GPU dialect, after the
compiler moved them out of loops and into pipelines, and instructions from the machine code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexjag.codegen import sass as machine
from flexjag.codegen.dataflow import DOTS, LOADS, Dataflow, address
from flexjag.codegen.source import Source
from flexjag.codegen.ttgir import Kernel, Op, parse
from flexjag.errors import CodegenError, explain_values

Body = tuple[machine.Instruction, ...]


@dataclass(frozen=True)
class Load:
    """A read of global memory in a main loop.

    Attributes:
        source: The line of Triton that reads, stripped: ``tmp3 = tl.load(in_ptr9 + tmp2)``. Where a helper function
            only returns what it reads, the line that calls it. Empty if the compiler did not keep the place or
            `triton_source` is not where the kernel came from.
        kind: What is read, by what the address depends on.

            - ``"operand"``: feeds a matrix product (K and V; in the loop over queries Q and dO), whatever the address.
            - ``"tile list"``: one number per iteration, such as the BlockMask's next tile.
            - ``"scalar"``: one number, the same in every iteration.
            - ``"row"``: a tensor along the side that stays (queries in the loop over keys), the same in every
              iteration.
            - ``"column"``: a tensor along the side that the loop walks, another one in every iteration. In the loop
              over keys this is a gather by key.
            - ``"element"``: a tensor along both sides that changes with the iteration: one number per score.
        count: How often the loop's body has it.
    """

    source: str
    kind: str
    count: int


@dataclass(frozen=True)
class Loop:
    """A loop with matrix products in it, and none of whose inner loops has any.

    Attributes:
        over: ``"kv"`` if it walks along the keys (forward, dQ), ``"q"`` if along the queries (dK and dV). By the name
            of the function it is in where that is one of FlexAttention's; otherwise by its results: one that
            accumulates (the output, dQ) is ``"kv"``, two (dK and dV) are ``"q"``; ``"unknown"`` with any other number.
        masked: Whether it runs over PARTIAL tiles, with the mask applied (True), or over FULL ones (False). None if the
            source does not say so, as FlexAttention's does.
        loads: Its reads of global memory.
        instructions: Machine instructions of its body. None if the loops of the machine code are not those of the
            Triton code, one for one, with the same products in each (unrolled, peeled, or merged by the compiler): then
            nobody can say which belong to this one.
        mix: The same by kind (:data:`flexjag.codegen.sass.CLASSES`, ``"mma"`` and ``"other"``), most frequent first;
            empty if `instructions` is None. ``"local load"`` and ``"local store"`` are spilled registers.
        function: The Triton function it is in, ``"forward_inner"``; empty if unknown.
    """

    over: str
    masked: bool | None
    loads: tuple[Load, ...]
    instructions: int | None
    mix: dict[str, int]
    function: str = ""

    @property
    def kv_indexed(self) -> int:
        """Loads in the body that are indexed by the KV position, besides operands.

        In a loop over keys those that change with the iteration. In a loop over queries the keys are the side that
        stays. Where `over` is unknown all that are indexed by any position, so that 0 is always a proof.
        """
        kinds = {"kv": ("column", "element"), "q": ("row", "element")}.get(self.over, ("row", "column", "element"))
        return sum(load.count for load in self.loads if load.kind in kinds)


def read_loops(ttgir: str, listing: str, triton_source: str) -> tuple[Loop, ...]:
    """The main loops of one kernel, in the order of its Triton code.

    Args:
        ttgir: Its last GPU dialect, with locations (``asm["ttgir"]``).
        listing: Its machine code (:func:`flexjag.codegen.disassemble.list_instructions`); empty if there is none.
        triton_source: The source it was compiled from: the whole file, or from the kernel's definition on.

    Returns:
        A loop for each ``scf.for`` with matrix products and no inner loop that has any; none if there are none.

    Raises:
        CodegenError: If the dialect's text is not of a form known here, or hides loads from this analysis: warps with
            roles of their own (the loads are in another warp's loop), or a call in a loop that was not inlined.

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
    """All that is said of one loop."""
    varying = flow.varying(op)
    seen: Counter[tuple[str, str]] = Counter()
    for load in op.walk():
        if load.name not in LOADS:
            continue
        changes = any(value in varying for value in address(load))
        axes = frozenset(a for value in address(load) for a in flow.axes.get(value, ()))
        if load in flow.operands:
            kind = "operand"
        elif "tma" in load.name or "descriptor" in load.name:  # one address stands for a whole block
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
    """Whether it is a loop with products of its own."""
    if op.name not in ("scf.for", "scf.while"):
        return False
    inner = [x for x in op.walk() if x.name in ("scf.for", "scf.while")]
    return any(x.name in DOTS for x in op.walk()) and not any(y.name in DOTS for x in inner for y in x.walk())


def _check_visible(kernel: Kernel, loops: list[Op]) -> None:
    """Raise if there may be loads in the loops that are not seen in them."""
    hidden = [op.name for op in kernel.ops() if op.name.startswith(("ttg.warp_specialize", "ttg.warp_return"))]
    hidden += [op.name for loop in loops for op in (loop, *loop.walk()) if op.name in ("tt.call", "scf.while", "cf.br")]
    if hidden:
        raise CodegenError(
            explain_values("ttgir", "must keep each loop's loads in the loop", kernel=kernel.name, seen=hidden[:3])
        )


def _match(kernel: Kernel, loops: list[Op], code: Sequence[machine.Instruction]) -> list[Body | None]:
    """The machine code of each loop; None for all unless each has its own, with exactly its products."""
    nobody: list[Body | None] = [None for _ in loops]
    if not loops or not code:
        return nobody
    is_fma = not any(x.kind == "mma" for x in code)
    left = machine.product_loops(code, fma=min(_fma(kernel, loop) for loop in loops) if is_fma else 0)
    if len(left) != len(loops):
        return nobody
    found: list[Body | None] = []
    for loop in loops:
        # The two sides of a branch may be laid out in either order, so equal products are taken in order and unequal
        # ones by their number. Multiply-adds that are not products blur that number: there only the order counts.
        fits = [body for body in (left[:1] if is_fma else left) if _does(body, loop, kernel)]
        if not fits:
            return nobody
        found.append(fits[0])
        left = [body for body in left if body is not fits[0]]
    return found


def _products(loop: Op) -> list[tuple[int, int, int, str]]:
    """Sizes M, N, K of the matrix products of a loop, and their operands' type."""
    found = []
    for op in loop.walk():
        if op.name in DOTS:
            (left, element), (right, _) = op.shapes[:2]
            found.append((math.prod(left[:-1]), right[-1], left[-1], element))
    return found


def _fma(kernel: Kernel, loop: Op) -> int:
    """How many multiply-adds each thread has to do for a loop's products."""
    return sum(m * n * k for m, n, k, _ in _products(loop)) // max(1, 32 * kernel.num_warps)


def _does(body: Body, loop: Op, kernel: Kernel) -> bool:
    """Whether one iteration of the machine code does the products of one iteration of `loop`.

    - A warp's instruction, ``HMMA.16816``, names M (16 or 8), N (8) and K; one of four warps, ``HGMMA.64x128x16``, too.
      The sum over a block's warps must be the products' M·N·K.
    - A block's, ``UTCHMMA``, has them in a register. The largest takes 128 rows, 256 columns and 32 bytes of K, and
      Triton uses the largest that fits.
    - Without tensor cores there is a multiply-add per thread for each, and fewer than another iteration's on top.
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
    """Multiply-adds of one instruction, per warp; 0 if its name does not say."""
    if group := re.match(r"[A-Z]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)\b", opcode):
        return math.prod(int(size) for size in group.groups()) / 4
    if warp := re.match(r"[A-Z]MMA\.(16|8)8(\d+)\b", opcode):
        return int(warp[1]) * 8 * int(warp[2])
    return 0
