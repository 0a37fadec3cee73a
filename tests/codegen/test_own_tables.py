"""The section of docs/kernels.md on our own kernels lists what is launched, and says what assembling says."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexjag.codegen import cache
from flexjag.codegen.show.own_page import (
    DIMS,
    LISTINGS,
    Row,
    cell,
    markers,
    put_section,
    read_section,
    render_section,
    rows,
)
from flexjag.codegen.targets import TARGETS, get_target
from flexjag.codegen.worker import Worker
from flexjag.errors import CodegenError

PAGE = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
SAMPLE = {"ops": "softmax_lines", "normalizers": "of_keys", "softmax": "softmax_forward"}
"""One kernel of each listing, in all its forms."""

WRITTEN = [name for name in LISTINGS if markers(name)[0] in PAGE]
"""A listing comes into the page when its kernels are settled."""

pytest.importorskip("triton")


@pytest.mark.parametrize("name", WRITTEN)
def test_the_page_lists_every_kernel_that_is_launched(name: str) -> None:
    assert [row for row, _ in read_section(PAGE, name)] == list(rows(LISTINGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_the_page_says_what_the_assembler_says(name: str) -> None:
    listing, column = LISTINGS[name], list(TARGETS).index("sm_90")
    if f"triton {cache.versions()['triton']}," not in PAGE.partition(markers(name)[0])[2]:
        pytest.skip("the page was made with another Triton")
    said = [cells[column] for row, cells in read_section(PAGE, name) if row.name == SAMPLE[name]]
    target = get_target("sm_90")
    with Worker() as worker:
        made = worker.call("assemble_ops", target, DIMS, listing.dtypes, [SAMPLE[name]], listing.module)
    assert said
    assert said == [cell(usage, target) for usage in made]


@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_of_ours_spills_or_asks_for_too_much(name: str) -> None:
    assert not [(row, cells) for row, cells in read_section(PAGE, name) if "**" in " ".join(cells)]


def test_the_page_has_the_ragged_operations() -> None:
    assert "ops" in WRITTEN


def test_a_section_takes_the_place_of_the_old_one_and_of_nothing_else() -> None:
    begin, end = markers("ops")
    first, second = (f"{begin}\n{text}\n{end}" for text in ("one", "two"))
    page = put_section("# Kernels\n\ntable\n", "ops", first)
    assert page == f"# Kernels\n\ntable\n\n{first}\n"
    assert put_section(f"{page}\nbehind\n", "ops", second) == f"# Kernels\n\ntable\n\n{second}\n\nbehind\n"
    assert first in put_section(page, "normalizers", "\n".join(markers("normalizers")))


def test_lines_are_read_as_they_are_written() -> None:
    row = Row("silu, D 64, bfloat16", "forward", "M 16, CAREFUL", 4)
    columns = [["9 / 0 / 1.0"], ["8 / **4** / 1.0"], ["7 / 0 / 1.0"], ["6 / 0 / 1.0"]]
    wanted = [(row, [text for (text,) in columns])]
    assert read_section(render_section("normalizers", [row], columns), "normalizers") == wanted
    with pytest.raises(CodegenError, match="has no section"):
        read_section("# Kernels", "ops")
