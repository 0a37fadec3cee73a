"""Machine code: its loops, its instructions, and what the tools tell of it."""

import json

import pytest
from codegen_cases import HMMA, assemble

from flexjag.codegen.read import sass as machine
from flexjag.codegen.read.disassemble import (
    disassemble,
    list_instructions,
    read_usage,
    resource_usage,
    tensor_core_instructions,
)
from flexjag.errors import CodegenError


def test_a_wait_laid_out_elsewhere_belongs_to_the_loop_but_is_none() -> None:
    code = machine.parse(
        assemble(
            "MOV R1, RZ",
            f"top:{HMMA}",
            "spin:SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R1]",
            "@!P1 BRA @spin@",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1]",
            "@!P2 BRA @cold@",
            "warm:BRA.U UP1, @skip@",
            HMMA,
            "skip:@P0 BRA @top@",
            "EXIT",
            "cold:SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1]",
            "@!P2 BRA @cold@",
            "BRA @warm@",
            "end:BRA @end@",
        )
    )
    (loop,) = machine.product_loops(code)
    assert [x.address // 16 for x in loop] == [*range(1, 9), 10, 11, 12]


def test_threads_that_meet_again_go_on_behind_their_own_barrier() -> None:
    """The same barrier register serves two branches in a row; no loop leads from the second back to the first."""
    code = machine.parse(
        assemble(
            "BSSY B0, @after@",
            "@P0 BRA @meet@",
            HMMA,
            "meet:BSYNC B0",
            "after:MOV R1, RZ",
            "BSSY.RECONVERGENT B0, @last@",
            "@P0 BRA @again@",
            HMMA,
            "again:BSYNC.RECONVERGENT B0",
            "last:EXIT",
        )
    )
    assert machine.product_loops(code) == []


def test_threads_that_meet_again_go_where_their_barrier_said() -> None:
    """What lies behind the meeting point, a loop here, is not on their way."""
    code = assemble("BSSY B0, @far@", "BSYNC B0", f"top:{HMMA}", "@P0 BRA @top@", "far:EXIT")
    assert machine.product_loops(machine.parse(code)) == []


def test_an_outer_loop_is_not_a_main_loop() -> None:
    code = machine.parse(assemble("outer:MOV R1, RZ", f"top:{HMMA}", "@P0 BRA @top@", "@P1 BRA @outer@", "EXIT"))
    assert [len(loop) for loop in machine.product_loops(code)] == [2]


def test_instructions_have_kinds() -> None:
    names = {
        "mma": "HMMA.16816.F32 HGMMA.64x64x16.F32 UTCHMMA IMMA.16832.S8.S8 QGMMA.64x64x32.F32",
        "global load": "LDG.E LDGSTS.E.BYPASS.128 UTMALDG.2D",
        "global store": "STG.E REDG.E.ADD.F32 ATOMG.E.ADD",
        "local load": "LDL.LU",
        "local store": "STL.64",
        "shared": "LDS.U.128 STS LDSM.16.MT88.4",
        "special": "MUFU.EX2",
        "float": "FFMA FMNMX3",
        "integer": "IMAD.WIDE LOP3.LUT UIADD3",
        "predicate/select": "ISETP.GE.AND FSEL PLOP3.LUT",
        "control": "BRA.U EXIT",
        "other": "NEWOP.X",
    }
    for kind, group in names.items():
        for name in group.split():
            assert machine.Instruction(0, "", name, "").kind == kind, name
    assert machine.count(machine.parse(assemble("@P1 LDL.LU R3, [R1]"))) == {"local load": 1}


def test_what_guards_an_instruction_is_told_from_predicates_that_it_reads() -> None:
    """``P2R R169, PR, RZ, 0x8`` reads all of them; nvdisasm (12.8 to 13.1) calls that its predicate."""
    listing = assemble("@!UP1 MOV R1, RZ", "P2R R169, RZ, 0x8").replace('"P2R"', '"P2R", "predicate": "PR"')
    assert [x.predicate for x in machine.parse(listing)] == ["!UP1", ""]


def test_no_listing_and_no_such_function_have_no_instructions() -> None:
    assert machine.parse("") == machine.parse(assemble("EXIT"), "other") == ()
    assert len(machine.parse(assemble("EXIT"), "attend")) == 1


def test_a_kernel_has_its_subroutines_and_not_the_next_kernel() -> None:
    head, functions = json.loads(assemble("CALL 0x20", "EXIT"))
    (trap,) = json.loads(assemble("BPT.TRAP 0x1", "RET R2", name="$__internal_0_$trap"))[1]
    (other,) = json.loads(assemble("NOP", name="other"))[1]
    listing = json.dumps([head, [*functions, trap | {"start": 32}, other]])
    assert [(x.address, x.name) for x in machine.parse(listing)] == [
        (0, "CALL"),
        (16, "EXIT"),
        (32, "BPT"),
        (48, "RET"),
    ]
    assert machine.parse(listing, "attend") == machine.parse(listing)
    assert [x.name for x in machine.parse(listing, "other")] == ["NOP"]


def test_families_of_tensor_core_instructions() -> None:
    assert tensor_core_instructions("wgmma.mma_async.sync.aligned", "") == ("wgmma",)
    assert tensor_core_instructions("wgmma.fence.sync.aligned;", "/*0000*/ WARPGROUP.ARRIVE ;") == ()
    assert tensor_core_instructions("", "HGMMA.64x64x16.F32") == ("wgmma",)
    assert tensor_core_instructions("tcgen05.mma.cta_group::1.kind::f16", "") == ("tcgen05",)
    assert tensor_core_instructions("mma.sync.aligned.m16n8k16", "UTCHMMA gdesc[UR8]") == ("mma", "tcgen05")


def test_usage_of_several_kernels_is_refused() -> None:
    line = "  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:632\n"
    assert read_usage(line)["registers"] == 40
    for text in ("", line + line):
        with pytest.raises(CodegenError, match="one kernel"):
            read_usage(text)


def test_a_binary_that_is_none_is_refused() -> None:
    pytest.importorskip("triton")
    for read in (disassemble, list_instructions, resource_usage):
        with pytest.raises(CodegenError, match=r"cubin: must be a CUDA binary that (cuobjdump|nvdisasm) reads"):
            read(b"not a binary")
