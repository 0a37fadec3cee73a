"""What is said of a kernel's loops, on code written by hand for the corners."""

import pytest
from codegen_cases import COLUMN, ELEMENT, HEAD, HMMA, ROW, SCALARS, SOURCE, TAIL, VIA_ROW, VIA_TILE, assemble, module

from flexjag.codegen.read import ttgir
from flexjag.codegen.read.dataflow import LOADS
from flexjag.codegen.read.loops import Load, Loop, read_loops
from flexjag.errors import CodegenError


def kinds(loop: Loop) -> list[str]:
    return [load.kind for load in loop.loads for _ in range(load.count)]


@pytest.mark.parametrize(
    ("body", "expected", "kv_indexed"),
    [
        (ROW, ["row", "operand"], 0),
        (ROW + SCALARS, ["row", "tile list", "scalar", "operand"], 0),
        (ROW + COLUMN, ["row", "column", "operand"], 1),
        (ROW + COLUMN + ELEMENT, ["row", "column", "element", "operand"], 2),
        (ROW + VIA_ROW.replace(", %mm", ""), ["row", "row", "operand"], 0),
        (ROW + SCALARS + VIA_TILE, ["row", "tile list", "scalar", "column", "operand"], 1),
    ],
)
def test_loads_are_told_by_what_their_address_depends_on(body: str, expected: list[str], kv_indexed: int) -> None:
    (loop,) = read_loops(module(body), "", "")
    assert sorted(kinds(loop)) == sorted(expected)
    assert (loop.over, loop.kv_indexed) == ("kv", kv_indexed)


def test_a_buffer_with_changing_contents_makes_what_is_read_from_it_change() -> None:
    """Only what is copied differs from the row of above: the slots are used alike."""
    moving = ROW.replace("%tr, %rd", "%mv, %rd")
    moving = (
        "      %ms = tt.splat %at : i32 -> tensor<16x1xi32> loc(#loc1)\n"
        "      %mv = tt.addptr %tr, %ms : tensor<16x1x!tt.ptr<i32>>, tensor<16x1xi32> loc(#loc1)\n" + moving
    )
    (loop,) = read_loops(module(moving + VIA_ROW.replace(", %mm", "")), "", "")
    assert sorted(kinds(loop)) == ["column", "column", "operand"]


def test_a_carried_value_that_is_handed_on_unchanged_does_not_change() -> None:
    """Once as it came, once as it began; a third, set to something else, does change."""
    body = ROW + COLUMN.replace("%at", "%same")
    for handed_on, expected in (("%same", "row"), ("%c0", "row"), ("%c1", "column")):
        text = (
            module(body)
            .replace("%acc = %cst,", "%acc = %cst, %same = %c0,")
            .replace("-> (tensor<16x16xf32>, i32", "-> (tensor<16x16xf32>, i32, i32")
            .replace("%out:3", "%out:4")
            .replace("scf.yield %o,", f"scf.yield %o, {handed_on},")
        )
        (loop,) = read_loops(text, "", "")
        assert sorted(kinds(loop)) == sorted(["row", expected, "operand"])


def test_names_end_with_their_loop() -> None:
    after = "    %late = arith.addi %next, %c1 : i32 loc(#loc1)\n"
    with pytest.raises(CodegenError, match="%next"):
        read_loops(module(ROW).replace(TAIL, after + TAIL), "", "")


def test_names_are_those_of_their_own_loop() -> None:
    first, second = read_loops(module(ROW + COLUMN, ROW.replace("#loc4", "#loc1")), "", "")
    assert (first.kv_indexed, second.kv_indexed) == (1, 0)


def test_lines_functions_and_masks_come_from_the_source() -> None:
    (loop,) = read_loops(module(ROW), "", SOURCE)
    assert loop.loads == (Load("bias = tl.load(t + i)", "row", 1), Load("for i in range(n):", "operand", 1))
    assert (loop.function, loop.masked) == ("attend", True)
    whole = "\n" * 39 + SOURCE
    assert read_loops(module(ROW), "", whole) == (loop,)
    assert read_loops(module(ROW), "", SOURCE.replace("False", "True"))[0].masked is False


def test_a_statement_of_several_lines_is_quoted_whole() -> None:
    spread = SOURCE.replace("bias = tl.load(t + i)", "bias = tl.load(\n            t,\n        )")
    # The compiler tells the line of the last argument: here the one that follows the loop's head by two.
    text = module(ROW).replace('kernel (1).py":47:16', 'kernel (1).py":48:12')
    assert read_loops(text, "", spread)[0].loads[0].source == "bias = tl.load( t, )"


@pytest.mark.parametrize("source", ["", "def other(): pass", "not python at all ("])
def test_a_source_that_is_not_the_kernels_answers_nothing(source: str) -> None:
    (loop,) = read_loops(module(ROW), "", source)
    assert {load.source for load in loop.loads} == {""}
    assert (loop.function, loop.masked, loop.over) == ("", None, "kv")


def test_a_source_whose_lines_do_not_load_is_not_quoted() -> None:
    edited = SOURCE.replace("tl.load(t + i)", "0")
    assert read_loops(module(ROW), "", edited)[0].loads[0].source == ""


def test_without_locations_the_loads_are_still_told_apart() -> None:
    lines = [ttgir._split_location(line)[0] for line in module(ROW + COLUMN).splitlines()]
    bare = "\n".join(line for line in lines if not line.startswith("#loc"))
    (loop,) = read_loops(bare, "", SOURCE)
    assert sorted(kinds(loop)) == ["column", "operand", "row"]
    assert (loop.kv_indexed, loop.masked, {load.source for load in loop.loads}) == (1, None, {""})


def test_locations_of_every_form() -> None:
    kernel = ttgir.parse(module(ROW))
    (copy,) = [op for op in kernel.ops() if op.name in LOADS and "%tr" in op.text]
    file = "/somewhere/kernel (1).py"
    assert kernel.frames(copy) == ((file, 47, 16), (file, 41, 8))
    (loop,) = [op for op in kernel.ops() if op.name == "scf.for"]
    assert kernel.frames(loop) == ((file, 46, 8), (file, 41, 8))
    (last,) = [op for op in kernel.ops() if "%pp," in op.text]
    assert kernel.frames(last)[0] == ("/usr/lib/helpers.py", 9, 4)


def test_a_loop_that_accumulates_two_results_walks_the_queries() -> None:
    two = (
        module(ROW + COLUMN)
        .replace("%acc = %cst,", "%acc = %cst, %acc2 = %cst,")
        .replace("-> (tensor<16x16xf32>, i32", "-> (tensor<16x16xf32>, tensor<16x16xf32>, i32")
        .replace("%out:3", "%out:4")
        .replace("scf.yield %o,", "scf.yield %o, %qk,")
        .replace("%q, %kt, %cst :", "%q, %kt, %acc2 :")
    )
    (loop,) = read_loops(two, "", "")
    assert (loop.over, sorted(kinds(loop)), loop.kv_indexed) == ("q", ["column", "operand", "row"], 1)


def test_loads_out_of_sight_are_refused() -> None:
    called = module(ROW + "\n      tt.call @helper(%t) : (!tt.ptr<i32>) -> () loc(#loc1)")
    with pytest.raises(CodegenError, match=r"tt\.call"):
        read_loops(called, "", "")
    roles = module(ROW).replace(
        TAIL, "    ttg.warp_specialize(%t)\n    default {\n      ttg.warp_yield\n    } : (!tt.ptr<i32>) -> ()\n" + TAIL
    )
    with pytest.raises(CodegenError):
        read_loops(roles, "", "")


@pytest.mark.parametrize("text", ["", "module {\n}", HEAD, module(ROW).replace("%next = ", "%other = ")])
def test_text_that_is_no_kernel_is_refused(text: str) -> None:
    with pytest.raises(CodegenError, match="ttgir"):
        read_loops(text, "", "")


ONE_LOOP = (
    "MOV R1, RZ",
    f"top:{HMMA}",
    HMMA,
    "LDG.E R2, desc[UR4][R2.64]",
    HMMA,
    "STL [R1], R2",
    HMMA,
    "@P0 BRA @top@",
    "EXIT",
)


def test_a_loop_gets_its_machine_code() -> None:
    (loop,) = read_loops(module(ROW), assemble(*ONE_LOOP), "")
    assert loop.instructions == 7
    assert loop.mix == {"mma": 4, "global load": 1, "local store": 1, "control": 1}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param((*ONE_LOOP[:-1], *[line.replace("top", "two") for line in ONE_LOOP[1:]]), id="two-for-one"),
        pytest.param((ONE_LOOP[0], f"top:{HMMA}", *[HMMA] * 7, "@P0 BRA @top@", "EXIT"), id="unrolled"),
        pytest.param((HMMA, "EXIT"), id="no-loop"),
        pytest.param((f"top:{HMMA.replace('16816', '99')}", *[HMMA] * 3, "@P0 BRA @top@", "EXIT"), id="unknown-shape"),
    ],
)
def test_machine_code_that_does_not_fit_is_not_guessed_at(code: tuple[str, ...]) -> None:
    (loop,) = read_loops(module(ROW), assemble(*code), "")
    assert (loop.instructions, loop.mix) == (None, {})


def test_another_kernels_machine_code_is_not_taken() -> None:
    (loop,) = read_loops(module(ROW), assemble(*ONE_LOOP, name="other"), "")
    assert loop.instructions is None


def test_products_without_tensor_cores_are_multiply_adds() -> None:
    """One warp does 2 * 16**3 multiply-adds: 256 in each thread."""
    ffma = "FFMA R0, R1, R2, R0"
    code = (
        "MOV R1, RZ",
        f"top:{ffma}",
        *[ffma] * 259,
        "@P0 BRA @top@",
        "small:FFMA R0, R0, R0, R0",
        "@P0 BRA @small@",
        "EXIT",
    )
    fp32 = module(ROW).replace("bf16", "f32")
    assert read_loops(fp32, assemble(*code), "")[0].instructions == 261
    twice = (*code[:2], *[ffma] * 519, *code[-4:])
    assert read_loops(fp32, assemble(*twice), "")[0].instructions is None
