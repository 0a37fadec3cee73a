"""The claim, on really compiled kernels: which masks gather by key in the main loop. Needs Triton, but no GPU."""

import importlib.util
import json
import re
import textwrap

import pytest

from flexjag.codegen.read import sass as machine
from flexjag.codegen.read import ttgir
from flexjag.codegen.read.dataflow import DOTS, Dataflow
from flexjag.codegen.read.disassemble import disassemble, list_instructions, resource_usage, tensor_core_instructions
from flexjag.codegen.read.loops import read_loops

# A really compiled kernel: one attention loop with the mask by intervals, by documents or with a bias per score.
KERNEL = """
import triton
import triton.language as tl


@triton.jit
def read_tile(base, rows, D: tl.constexpr):
    return tl.load(base + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def attend(Q, K, V, OUT, TILES, TABLE, n, MASK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    q = read_tile(Q, rows, D)
    acc = tl.zeros([M, D], tl.float32)
    top = tl.full([M], -1e30, tl.float32)
    for i in range(n):
        tile = tl.load(TILES + i)
        cols = tile * N + tl.arange(0, N)
        k = read_tile(K, cols, D)
        s = tl.dot(q, tl.trans(k))
        if MASK == "interval":
            low = tl.load(TABLE + rows)
            s = tl.where(cols[None, :] >= low[:, None], s, -1e30)
        elif MASK == "document":
            own = tl.load(TABLE + rows)
            other = tl.load(TABLE + cols)
            s = tl.where(own[:, None] == other[None, :], s, -1e30)
        elif MASK == "bias":
            s += tl.load(TABLE + rows[:, None] * 4096 + cols[None, :])
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        acc = acc * tl.exp2(top - new)[:, None]
        top = new
        v = read_tile(V, cols, D)
        acc = tl.dot(p.to(v.dtype), v, acc)
    tl.store(OUT + rows[:, None] * D + tl.arange(0, D)[None, :], acc)
"""
GATHERS = {
    "interval": {},
    "document": {"column": "other = tl.load(TABLE + cols)"},
    "bias": {"element": "s += tl.load(TABLE + rows[:, None] * 4096 + cols[None, :])"},
}


@pytest.fixture(scope="module")
def attend(tmp_path_factory):
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("kernels") / "attend.py"
    file.write_text(KERNEL)
    spec = importlib.util.spec_from_file_location("attend_kernel", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.attend


def compiled(kernel, arch: int, mask: str, stages: int):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    table = "*fp32" if mask == "bias" else "*i32"
    kinds = {"Q": "*bf16", "K": "*bf16", "V": "*bf16", "OUT": "*fp32", "TILES": "*i32", "TABLE": table, "n": "i32"}
    constants = {"MASK": mask, "M": 64, "N": 64, "D": 64}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(6)}
    source = ASTSource(
        fn=kernel, signature={**kinds, **dict.fromkeys(constants, "constexpr")}, constexprs=constants, attrs=aligned
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": stages}
    ).asm


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
BRANCHES = ("BRA", "JMP", "BSSY", "BSYNC", "EXIT", "WARPSYNC")  # calls name what they go to


def assert_lists_what_the_text_says(listing: str, text: str) -> None:
    """Address, guard and opcode of every instruction, and where branches go."""
    listed, printed = machine.parse(listing), LINE.findall(text)
    assert [(f"{x.address:04x}", x.predicate, x.opcode) for x in listed] == [line[:3] for line in printed]
    for x, (_, _, _, arguments) in zip(listed, printed, strict=True):
        if x.name in BRANCHES:
            assert x.arguments.replace(" ", "") == arguments.replace(" ", "")


@pytest.mark.parametrize(
    ("arch", "family", "stages"), [(80, "mma", 1), (80, "mma", 3), (90, "wgmma", 3), (100, "tcgen05", 3)]
)
@pytest.mark.parametrize("mask", list(GATHERS))
def test_compiled_kernels_gather_by_key_only_where_they_must(attend, arch, family, stages, mask) -> None:
    asm = compiled(attend, arch, mask, stages)
    code, text = list_instructions(asm["cubin"]), disassemble(asm["cubin"])
    assert_lists_what_the_text_says(code, text)
    (loop,) = read_loops(asm["ttgir"], code, KERNEL)
    assert (loop.over, loop.masked, loop.function) == ("kv", None, "attend")
    found = {load.kind: load.source for load in loop.loads if load.kind not in ("operand", "row")}
    assert found == {"tile list": "tile = tl.load(TILES + i)", **GATHERS[mask]}
    assert {x.source for x in loop.loads if x.kind == "operand"} == {
        "k = read_tile(K, cols, D)",
        "v = read_tile(V, cols, D)",
    }
    assert loop.kv_indexed == len(GATHERS[mask])
    assert loop.instructions is not None
    assert loop.instructions == sum(loop.mix.values()) < len(machine.parse(code))
    assert loop.mix["mma"] > 0
    assert loop.mix["special"] > 0
    assert tensor_core_instructions(asm["ptx"], text) == (family,)
    (body,) = machine.product_loops(machine.parse(code))
    product = next(x for x in body if x.kind == "mma")
    edited = json.loads(code)
    edited[1][0]["sass-instructions"][product.address // 16] = {"opcode": "NOP"}
    without = json.dumps(edited)
    assert len(machine.parse(without)) == len(machine.parse(code))
    assert read_loops(asm["ttgir"], without, KERNEL)[0].instructions is None
    assert 0 < resource_usage(asm["cubin"])["registers"] <= 255


def test_dataflow_follows_a_compiled_kernel_the_same_before_and_after_pipelining(attend) -> None:
    """Without stages the loads are in the loop as they were written; the pipeline must not change what is said."""
    seen = []
    for stages in (1, 2, 4):
        (loop,) = read_loops(compiled(attend, 80, "document", stages)["ttgir"], "", textwrap.indent(KERNEL, "  "))
        seen.append({load for load in loop.loads if load.kind != "row"})
    assert seen[0] == seen[1] == seen[2]


def test_operands_are_loads_that_reach_a_product(attend) -> None:
    kernel = ttgir.parse(compiled(attend, 90, "bias", 3)["ttgir"])
    flow = Dataflow(kernel)
    (loop,) = [op for op in kernel.ops() if op.name == "scf.for"]
    assert flow.accumulators(loop) == 1
    assert sum(op.name in DOTS for op in loop.walk()) == 2
    assert sum(op in flow.operands for op in loop.walk()) == 2
