"""Dataflow analysis of a kernel in Triton's GPU dialect: address dependences of loads, and operands of matrix products.

Two properties of each value are propagated along definitions and uses: whether it varies between iterations of a loop,
and along which tensor axes it varies. Shared and tensor memory are tracked too. A buffer holds what is written to it,
whichever slot an iteration uses: the multi-buffered copies of a software pipeline are analysed like plain loads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property

from flexjag.codegen.read.ttgir import KernelIR, Op, Value

DOTS = ("tt.dot", "tt.dot_scaled", "ttng.warp_group_dot", "ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled")
"""Operations that compute a matrix product."""

LOADS = (
    "tt.load",
    "tt.descriptor_load",
    "tt.descriptor_gather",
    "ttg.async_copy_global_to_local",
    "ttng.async_tma_copy_global_to_local",
    "ttng.async_tma_gather",
)
"""Operations that read global memory."""

_VIEWS = ("ttg.memdesc_", "ttng.tmem_subslice", "ttg.warp_group_dot_wait", "ttng.warp_group_dot_wait")
_ALLOCATIONS = ("ttg.local_alloc", "ttng.tmem_alloc")
_READS = ("ttg.local_load", "ttng.tmem_load")
_WRITES = ("ttg.local_store", "ttng.tmem_store", "ttng.tmem_copy")
_CONVERSIONS = (
    *("ttg.convert_layout", "tt.trans", "tt.reshape", "tt.bitcast", "tt.fp_to_fp", "ttg.fp4_to_fp", *_READS),
    *("arith.extf", "arith.truncf", "arith.bitcast", "arith.extsi", "arith.extui", "arith.trunci"),
    *("arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui", "ttng.warp_group_dot_wait"),
)
_SCALINGS = ("arith.mulf", "arith.addf", "arith.subf", "arith.divf")


class Dataflow:
    """Def-use analysis of one kernel.

    Args:
        kernel: The parsed kernel.
    """

    def __init__(self, kernel: KernelIR) -> None:
        self.ops = list(kernel.ops())

    @cached_property
    def buffers(self) -> Mapping[Value, frozenset[Op]]:
        """For each buffer value the allocations that it may be a view of."""
        found: dict[Value, frozenset[Op]] = defaultdict(frozenset)
        for op in self.ops:
            if op.name in _ALLOCATIONS:
                found[op.results[0]] = frozenset([op])
        views = [op for op in self.ops if op.name.startswith(_VIEWS) or op.name == "arith.select" or op.regions]
        changed = True
        while changed:
            changed = False
            for target, sources in _pairs(views, same_place=True):
                union = found[target].union(*(found[s] for s in sources))
                if union != found[target]:
                    found[target], changed = union, True
        return {value: held for value, held in found.items() if held}

    @cached_property
    def writes(self) -> Mapping[Op, list[Op]]:
        """For each allocation the operations that write to it, itself included if it is initialized."""
        found: dict[Op, list[Op]] = defaultdict(list)
        for op in self.ops:
            if op.name in _ALLOCATIONS and op.operands:
                found[op].append(op)
            elif (target := destination(op)) is not None:
                for buffer in self.buffers.get(target, ()):
                    found[buffer].append(op)
        return found

    def varying(self, loop: Op) -> set[Value]:
        """Values made in `loop`, and buffers, that may differ between two of its iterations.

        Of a buffer the contents count, not the slot in use; of a load the address counts, not the mask.
        """
        carried = loop.regions[0].arguments[1:]
        inside = list(loop.walk())
        found = {loop.regions[0].arguments[0]}
        for argument, first, later in zip(carried, loop.operands[3:], loop.regions[0].yielded, strict=True):
            if later is not argument and later is not first and not (self.buffers.get(argument)):
                found.add(argument)
        dirty: set[Op] = set()

        def varies(value: Value) -> bool:
            held = self.buffers.get(value)
            return any(b in dirty for b in held) if held else value in found

        changed = True
        while changed:
            before = len(found), len(dirty)
            for op in inside:
                target = destination(op)
                if any(varies(s) for s in sources(op)):
                    if target is not None:
                        dirty |= self.buffers.get(target, frozenset())
                    if op.name in _ALLOCATIONS and op.operands:
                        dirty.add(op)
            for made, used in _pairs(inside, same_place=False):
                if made not in found and any(varies(s) for s in used):
                    found.add(made)
            changed = (len(found), len(dirty)) != before
        return {v for v in found if not self.buffers.get(v)} | {v for v, b in self.buffers.items() if b & dirty}

    @cached_property
    def axes(self) -> Mapping[Value, frozenset[int]]:
        """Axes along which each tensor may vary from element to element; empty for scalars and splats."""
        found: dict[Value, frozenset[int]] = defaultdict(frozenset)
        changed = True
        while changed:
            changed = False
            for op in self.ops:
                if op.results and self.buffers.get(op.results[0]):
                    continue
                if op.name in _READS:
                    held = self.buffers.get(op.operands[0], frozenset())
                    used = frozenset(a for b in held for w in self.writes[b] for s in sources(w) for a in found[s])
                else:
                    used = frozenset(a for s in sources(op) for a in found[s])
                for made, new in _axes(op, used, found):
                    if not new <= found[made]:
                        found[made], changed = found[made] | new, True
        return dict(found)

    @cached_property
    def operands(self) -> set[Op]:
        """Loads whose value, up to type, layout and a constant factor, is an operand of a matrix product."""
        carried: dict[Value, list[Value]] = defaultdict(list)
        for made, used in _pairs([op for op in self.ops if op.regions], same_place=True):
            carried[made] += used
        constants = self._constants()
        found: set[Op] = set()
        seen: set[Value] = set()
        todo = [value for op in self.ops if op.name in DOTS for value in op.operands[:2]]
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            todo += carried[value]
            for buffer in self.buffers.get(value, ()):
                for write in self.writes[buffer]:
                    if write.name in LOADS:
                        found.add(write)
                    elif write.name not in DOTS:
                        todo.append(write.operands[0])
            op = value.maker
            if op is None or value.is_argument:
                continue
            if op.name in LOADS:
                found.add(op)
            elif op.name in _CONVERSIONS:
                todo.append(op.operands[value.index] if op.name.endswith("_wait") else op.operands[0])
            elif op.name in _SCALINGS or op.name == "arith.select":
                rest = [v for v in op.operands[op.name == "arith.select" :] if v not in constants]
                todo += rest if len(rest) == 1 else []
        return found

    def _constants(self) -> set[Value]:
        return {op.results[0] for op in self.ops if op.name == "arith.constant"}

    def accumulators(self, loop: Op) -> int:
        """Number of accumulators that the matrix products of `loop` carry from one iteration to the next."""
        found: set[Value | Op] = set()
        for op in loop.walk():
            if op.name.startswith("ttng.tc_gen5_mma"):
                adds = op.operands[_flag_at(op)].maker
                is_never = adds is not None and re.match(r"arith.constant (false|0)\b", adds.name + adds.text)
                kept = [b for b in self.buffers.get(op.operands[2], ()) if not self._is_set(b, loop)]
                found.update([] if is_never else kept)
            elif op.name in DOTS:
                found |= self._carried_sum(op, loop)
        return len(found)

    def _is_set(self, buffer: Op, loop: Op) -> bool:
        """Whether an iteration of `loop` overwrites a buffer with a value independent of its previous contents."""
        inside = set(loop.walk())
        for write in self.writes[buffer]:
            if write not in inside or write.name not in _WRITES:
                continue
            todo, seen, is_own = [write.operands[0]], set[Value](), False
            while todo and not is_own:
                value = todo.pop()
                op = value.maker
                if value in seen or value.is_argument or op is None or op not in inside:
                    continue
                seen.add(value)
                is_own = op.name in _READS and buffer in self.buffers.get(op.operands[0], ())
                todo += op.operands
            if not is_own:
                return True
        return False

    def _carried_sum(self, dot: Op, loop: Op) -> set[Value | Op]:
        """Loop-carried values of the product's shape and type that `dot` adds to, possibly scaled or converted."""
        carried = set(loop.regions[0].arguments[1:])
        found: set[Value | Op] = set()
        todo, seen = [dot.operands[2]], set[Value]()
        while todo:
            value = todo.pop()
            op = value.maker
            if value in seen or op is None:
                continue
            seen.add(value)
            if value in carried and _carried_shape(loop, value) == dot.shapes[-1]:
                found.add(value)
            if value.is_argument:
                continue
            if op.name == "ttng.warp_group_dot_wait":
                todo.append(op.operands[value.index])
            elif op.name in DOTS:
                todo.append(op.operands[2])
            elif not op.regions:
                todo += op.operands
        return found


def address(op: Op) -> list[Value]:
    """Operands that form the address of a load: pointers, or a descriptor and coordinates; not its mask."""
    if op.name in ("tt.load", "ttg.async_copy_global_to_local"):
        return op.operands[:1]
    if op.name.startswith("ttng.async_tma"):
        return op.operands[: _tma_coordinates(op) + 1]
    return op.operands


def destination(op: Op) -> Value | None:
    """The buffer that an operation writes to; None if it writes to none."""
    if op.name == "ttg.async_copy_global_to_local" or op.name in _WRITES:
        return op.operands[1]
    if op.name.startswith("ttng.async_tma") and op.name in LOADS:
        return op.operands[_tma_coordinates(op) + 1]
    return op.operands[2] if op.name.startswith("ttng.tc_gen5_mma") else None


def sources(op: Op) -> list[Value]:
    """Operands on which an operation's results, and the values it writes, depend."""
    if op.name in LOADS:
        return address(op)
    if op.name in _READS or op.name in _WRITES or op.name.startswith("ttg.memdesc_"):
        return op.operands[:1]
    return op.operands[:2] if op.name.startswith("ttng.tc_gen5_mma") else op.operands


def _tma_coordinates(op: Op) -> int:
    """Number of coordinates, in brackets, after the descriptor of a TMA operation."""
    return op.text[op.text.index("[") : op.text.index("]")].count("%")


def _flag_at(op: Op) -> int:
    """Index of the operand of a ``tc_gen5_mma`` that enables accumulation; a token in brackets may precede it."""
    head = op.text[: op.text.rfind(" : ")]
    third = [m.end() for m in re.finditer(r"%[\w$.\-]+(?:#\d+)?", head)][2]
    return 4 if re.match(r"\[%", head[third:]) else 3


def _carried_shape(loop: Op, value: Value) -> tuple[tuple[int, ...], str] | None:
    """Shape and element type of a loop-carried tensor; None for scalars."""
    types = loop.text[loop.text.find("->") :]
    depth, parts, start = 0, [], types.find("(") + 1
    for i in range(start, len(types)):
        depth += (types[i] in "<({[") - (types[i] in ">)}]")
        if (types[i] == "," and depth == 0) or depth < 0:
            parts.append(types[start:i])
            start = i + 1
        if depth < 0:
            break
    found = re.search(r"tensor<((?:\d+x)+)(\w+|!)", parts[value.index - 1])
    return (tuple(int(n) for n in found[1].split("x")[:-1]), found[2]) if found else None


def _pairs(ops: Iterable[Op], *, same_place: bool) -> list[tuple[Value, list[Value]]]:
    """Each value that `ops` define, arguments of their regions included, with the values it is computed from.

    Args:
        ops: The operations.
        same_place: True for values passed on unchanged only (a view's buffer, a branch's result); False for all
            dependences (also a branch's condition, a loop's bounds).
    """
    found: list[tuple[Value, list[Value]]] = []
    for op in ops:
        if op.name == "scf.for":
            region = op.regions[0]
            found.append((region.arguments[0], [] if same_place else op.operands[:3]))
            for i, argument in enumerate(region.arguments[1:]):
                passed = [op.operands[3 + i], region.yielded[i]]
                found.append((argument, passed))
                found.append((op.results[i], passed if same_place else [*op.operands[:3], *passed]))
        elif op.name == "scf.if":
            for i, made in enumerate(op.results):
                passed = [region.yielded[i] for region in op.regions]
                found.append((made, passed if same_place else [*op.operands, *passed]))
        elif op.regions:
            inner = [] if same_place else [v for x in op.walk() for v in x.operands]
            found += [(v, [*op.operands, *inner]) for v in (*op.results, *(a for r in op.regions for a in r.arguments))]
        elif op.name == "arith.select" and same_place:
            found.append((op.results[0], op.operands[1:]))
        elif op.name.endswith("dot_wait"):
            found += [(made, [op.operands[i]]) for i, made in enumerate(op.results)]
        else:
            found += [(made, op.operands[:1] if same_place else sources(op)) for made in op.results]
    return found


def _axes(op: Op, used: frozenset[int], found: Mapping[Value, frozenset[int]]) -> list[tuple[Value, frozenset[int]]]:
    """Axes along which each result of `op` may vary, given those of its operands."""
    if op.regions and op.name != "tt.reduce":
        pairs = _pairs([op], same_place=True)
        return [(made, frozenset(a for v in values for a in found[v])) for made, values in pairs]
    if op.name == "tt.make_range":
        new = frozenset([0])
    elif op.name == "arith.constant":
        is_splat = "dense<[" not in op.text
        new = frozenset() if is_splat or not op.shapes else frozenset(range(len(op.shapes[-1][0])))
    elif op.name == "tt.expand_dims":
        at = op.attribute("axis") or 0
        new = frozenset(a + (a >= at) for a in used)
    elif op.name == "tt.reduce":
        at = op.attribute("axis") or 0
        new = frozenset(a - (a > at) for a in used if a != at)
    elif op.name in ("tt.trans", "ttg.memdesc_trans"):
        order = re.search(r"order = array<i32: ([\d, ]+)>", op.text)
        places = [int(n) for n in order[1].split(",")] if order else []
        new = frozenset(places.index(a) for a in used) if places else used
    elif op.name in ("tt.reshape", "tt.join", "tt.split", "tt.cat", "tt.gather", "tt.scan", "tt.histogram", *DOTS) or (
        "descriptor" in op.name
    ):
        new = frozenset(range(len(op.shapes[-1][0]))) if op.results and op.shapes else frozenset()
    else:
        new = used
    return [(made, new) for made in op.results]
