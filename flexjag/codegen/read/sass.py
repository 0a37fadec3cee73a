"""Analysis of NVIDIA machine code: instruction counts by kind, and loops."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_BYTES = 16  # of an instruction, from Volta on
_TENSOR_CORE = re.compile(r"(?:[HIDQOBEF]|UTC[A-Z]*|[HIQB]G)MMA$")

CLASSES: dict[str, str] = {
    "global load": "LD LDG LDGSTS LDGMC UTMALDG UBLKCP UBLKPF",
    "global store": "ST STG RED REDG ATOM ATOMG UTMASTG UTMAREDG UBLKRED",
    "local load": "LDL",
    "local store": "STL",
    "shared": "LDS LDSM STS STSM ATOMS STAS REDAS",
    "tensor memory": "LDTM STTM UTCCP UTCATOMSWS UTCSHIFT",
    "float": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FMNMX FMNMX3 FSWZADD HADD2 HMUL2 HFMA2 HMNMX2 DADD DMUL DFMA DMNMX",
    "conversion": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    "special": "MUFU",
    "integer": "IADD IADD3 IADD32I VIADD IMAD IMUL IDP IMNMX VIMNMX VIMNMX3 VIADDMNMX IABS LEA LOP LOP3 LOP32I SHF SHL "
    "SHR SGXT BMSK BREV FLO POPC UIADD3 UIADD3X UIMAD ULEA ULOP3 USHF USGXT UBMSK UFLO UPOPC UBREV UVIADD UVIMNMX "
    "UIMNMX UIABS",
    "predicate/select": "ISETP FSETP FSETP2 HSETP2 DSETP FSEL SEL USEL UFSEL UISETP UFSETP PLOP3 UPLOP3 P2R R2P UP2UR "
    "UR2UP FCHK FSET HSET2 PSETP VOTE VOTEU",
    "move": "MOV MOV32I UMOV PRMT UPRMT CS2R S2R S2UR R2UR UR2R LDC LDCU ULDC MOVM CS2UR",
    "shuffle": "SHFL REDUX CREDUX MATCH",
    "synchronization": "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP WARPGROUPSET SYNCS FENCE MEMBAR ARRIVES ERRBAR CCTL "
    "CCTLL UTCBAR UTMACMDFLUSH UTMACCTL ELECT NANOSLEEP ACQBULK CGAERRBAR UCGABAR_ARV UCGABAR_WAIT UVIRTCOUNT",
    "control": "BRA BRX BRXU JMP JMX EXIT RET CALL BSSY BSYNC BREAK BMOV NOP BPT YIELD KILL PREEXIT",
}
"""Kinds of instructions with the opcodes of each; two further kinds are ``mma`` and ``other``."""

_CLASS = {name: kind for kind, names in CLASSES.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: Offset from the function's beginning, in bytes.
        predicate: Guard, such as ``P0`` or ``!UP1``, or empty.
        opcode: Opcode with its modifiers, such as ``HMMA.16816.F32.BF16``.
        arguments: Operands, as text.
    """

    address: int
    predicate: str
    opcode: str
    arguments: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Kind of the instruction: ``mma``, a key of :data:`CLASSES`, or ``other``."""
        return "mma" if _TENSOR_CORE.match(self.name) else _CLASS.get(self.name, "other")

    @property
    def is_conditional(self) -> bool:
        """True if the instruction, a branch, may also fall through."""
        guarded = bool(self.predicate) and self.predicate not in ("PT", "UPT")
        return guarded or "," in self.arguments  # BRA.U UP1, 0x2b0; BRA.DIV UR4, 0x2b0

    @property
    def target(self) -> int | None:
        """Target address of a branch, or of the branch that the instruction prepares; None if it has none."""
        found = re.search(r"(?:^|[\s,])(?:`\()?0x([0-9a-f]+)\)?\s*$", self.arguments)
        return int(found[1], 16) if found else None


def parse(listing: str, name: str | None = None) -> tuple[Instruction, ...]:
    """Parse the instructions of one kernel, including its own subroutines, which are listed after it.

    Args:
        listing: Output of ``nvdisasm -json`` (:func:`flexjag.codegen.read.disassemble.list_instructions`), or empty.
        name: Name of the kernel; by default the first.

    Returns:
        The instructions by address; empty if there is no such kernel.

    >>> code = '[{"predicate": "@!P0", "opcode": "BRA", "operands": "0x20"}, {"opcode": "EXIT"}]'
    >>> parse('[{}, [{"function-name": "f", "start": 0, "sass-instructions": %s}]]' % code)[0]
    Instruction(address=0, predicate='!P0', opcode='BRA', arguments='0x20')
    """
    functions = json.loads(listing)[1] if listing else []
    found: list[Instruction] = []
    at = (i for i, x in enumerate(functions) if name in (None, x["function-name"]))
    for function in functions[next(at, len(functions)) :]:
        if found and not function["start"]:  # another kernel
            break
        for i, x in enumerate(function["sass-instructions"]):
            guard = x.get("predicate", "")  # without an @ it is an operand of P2R
            predicate = guard[1:] if guard.startswith("@") else ""
            address = function["start"] + i * _BYTES
            found.append(Instruction(address, predicate, x["opcode"], x.get("operands", "")))
    return tuple(found)


def count(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Number of instructions of each kind, the most frequent first.

    >>> count([Instruction(16 * i, "", name, "") for i, name in enumerate(("LDG.E", "LDL", "LDL.64"))])
    {'local load': 2, 'global load': 1}
    """
    return dict(Counter(instruction.kind for instruction in instructions).most_common())


def size(instructions: Iterable[Instruction]) -> int:
    """Number of instructions, without the padding after the last one.

    >>> size([Instruction(16 * i, "", name, "") for i, name in enumerate(("MOV", "EXIT", "BRA", "NOP"))])
    2
    """
    names = [x.name for x in instructions]
    while names and names[-1] in ("NOP", "BRA"):  # after the end: a loop to itself, then nothing
        names.pop()
    return len(names)


def product_loops(instructions: Sequence[Instruction], *, fma: int = 0) -> list[tuple[Instruction, ...]]:
    """Find the innermost loops that contain matrix products.

    A loop is a natural loop of the control flow: an edge back to a block that every path into the loop's blocks leads
    through, and all blocks that reach that edge. Blocks laid out far away (waits that were not over at once) belong to
    it, loops that merely wait within it do too.

    Args:
        instructions: A function.
        fma: The matrix products are on tensor cores if 0; otherwise they are fused multiply-adds, and this is their
            number per thread in the smallest product.

    Returns:
        The instructions of each loop by address, in the order of the loops' heads.

    >>> lines = ("", "MOV", ""), ("", "HMMA.16816.F32", ""), ("P0", "BRA", "0x10"), ("", "EXIT", "")
    >>> code = [Instruction(16 * i, *line) for i, line in enumerate(lines)]
    >>> [[x.name for x in loop] for loop in product_loops(code)]
    [['HMMA', 'BRA']]
    """
    found = []
    for members in _natural_loops(instructions):
        body = [instructions[i] for i in members]
        products = sum(2 if x.name == "FFMA2" else x.name == "FFMA" for x in body)
        if any(x.kind == "mma" for x in body) if not fma else products >= fma:
            found.append((members, tuple(body)))
    innermost = [body for members, body in found if not any(other < members for other, _ in found)]
    return sorted(innermost, key=lambda body: body[0].address)


def _natural_loops(instructions: Sequence[Instruction]) -> list[_Members]:
    """Indices of each loop's instructions; loops that share a head are merged."""
    starts, follows = _blocks(instructions)
    before: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(follows):
        for target in targets:
            before[target].append(block)
    dominators = _dominators(follows, before)
    loops: dict[int, set[int]] = {}
    for block, targets in enumerate(follows):
        for head in targets:
            if head not in dominators[block]:
                continue
            members = loops.setdefault(head, {head})
            todo = [block]
            while todo:
                at = todo.pop()
                if at not in members:
                    members.add(at)
                    todo += [b for b in before[at] if dominators[b]]
    ends = [*starts[1:], len(instructions)]
    return [_Members(i for b in sorted(blocks) for i in range(starts[b], ends[b])) for blocks in loops.values()]


class _Members(tuple[int, ...]):
    """Indices in ascending order, compared as sets."""

    def __lt__(self, other: tuple[int, ...]) -> bool:
        return set(self) < set(other)


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Start indices of the basic blocks, and the successors of each."""
    index = {x.address: i for i, x in enumerate(instructions)}
    joins: dict[str, int] = {}
    exits: dict[int, list[int]] = {}
    for i, x in enumerate(instructions):
        onward = [i + 1] if i + 1 < len(instructions) else []
        if x.name in ("BRA", "JMP"):
            to = [index[x.target]] if x.target in index else []
            exits[i] = to + (onward if x.is_conditional else [])
        elif x.name in ("EXIT", "RET", "BRX", "BRXU", "JMX", "KILL"):
            exits[i] = onward if x.is_conditional else []
        elif x.name == "BSSY" and x.target in index:  # sets up a barrier: where its threads go on once all are there
            joins[x.arguments.split(",")[-2].split()[-1]] = index[x.target]
        elif x.name == "BSYNC":
            join = joins.get(x.arguments.split()[-1])
            exits[i] = ([join] if join is not None else onward) + (onward if x.is_conditional else [])
    starts = sorted({0, *(t for to in exits.values() for t in to), *(i + 1 for i in exits)} - {len(instructions)})
    place = {start: block for block, start in enumerate(starts)}
    follows = []
    for block, _ in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else len(instructions)
        to = exits.get(end - 1, [end] if end < len(instructions) else [])
        follows.append(sorted({place[t] for t in to}))
    return starts, follows


def _dominators(follows: list[list[int]], before: list[list[int]]) -> list[set[int]]:
    """Dominators of each block, itself included: blocks on every path from the entry. Empty if it is unreachable."""
    order, seen, todo = [], {0}, [(0, iter(follows[0]))] if follows else []
    while todo:
        block, targets = todo[-1]
        fresh = next((t for t in targets if t not in seen), None)
        if fresh is None:
            order.append(block)
            todo.pop()
        else:
            seen.add(fresh)
            todo.append((fresh, iter(follows[fresh])))
    order.reverse()
    found: list[set[int]] = [set() for _ in follows]
    if order:
        found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [found[b] for b in before[block] if found[b]]
            new = {block} | (set.intersection(*ways) if ways else set())
            if new != found[block]:
                found[block], changed = new, True
    return found
