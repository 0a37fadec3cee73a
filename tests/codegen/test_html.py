from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from flexjag.codegen.read.loops import Load, Loop
from flexjag.codegen.report import Kernel, Listing, headline
from flexjag.codegen.show import html
from flexjag.codegen.show.html import to_html
from flexjag.codegen.targets import get_target

VOID = {"br"}


class Seen(HTMLParser):
    """Elements, texts and attributes of a fragment; fails if an element is not closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1], data))

    def inside(self, tag):
        return [text for where, text in self.texts if where == tag]


def kernel(**changed):
    facts = {
        "name": "triton_tem_fused_flex_attention_0",
        "phase": "forward",
        "triton": "if a < b and b > c:\n    tl.load(x)  # </pre><script>alert('&amp;')</script>\n",
        "ttgir": "tt.func @f(%x: !tt.ptr<bf16>)\n",
        "ptx": ".visible .entry f()\n",
        "sass": "/*0000*/ MOV R1, c[0x0][0x28] ;\n",
        "amdgcn": "",
        "binary": b"",
        "registers": 168,
        "spilled_bytes": 0,
        "stack_bytes": 0,
        "shared_bytes": 98304,
        "num_warps": 4,
        "num_stages": 3,
        "blocks": {"BLOCK_M": 128, "BLOCK_N": 64},
        "constants": {},
        "resident_blocks": 2,
        "occupancy": 0.125,
        "tensor_cores": ("wgmma",),
        "instructions": 4321,
        "loops": (),
        "num_configs": 1,
    }
    return Kernel(**{**facts, **changed})


LOADS = (Load("k = tl.load(K + offs < n)", "operand", 1), Load("tmp3 = tl.load(in_ptr9 + tmp2)", "column", 2))
LOOPS = (
    Loop("kv", True, LOADS, 1300, {"float": 1000, "mma": 250, "integer": 50}),
    Loop("kv", False, (), None, {}),
)


def listing(*kernels, **about):
    return Listing(get_target("sm_90"), kernels, about, {"torch": "2.13.0", "triton": "3.7.0"}, {})


def test_the_heading_says_what_was_compiled_and_that_it_did_not_run():
    shown = listing(kernel(), mask="Causal() & Window(<int64[3]>, 0)", score=None, dtype="bfloat16")._repr_html_()
    seen = Seen(shown)
    assert seen.inside("b")[0] == "sm_90"
    assert "(NVIDIA H200), not run: mask=" in shown
    assert "Causal() & Window(<int64[3]>, 0)" in seen.inside("code")
    assert "bfloat16" in seen.inside("code")
    assert "score" not in seen.inside("p")
    assert seen.inside("small") == ["torch 2.13.0, triton 3.7.0"]


def test_the_table_has_what_print_has_and_counts_the_rest():
    first, second = kernel(loops=LOOPS), kernel(phase="backward", registers=255, spilled_bytes=64)
    shown = to_html(listing(first, second, kernel(phase="glue", triton="glued = 1")))
    seen = Seen(shown)
    assert seen.inside("th")[: len(headline(first))] == list(headline(first))
    cells = seen.inside("td")
    for one in (first, second):
        values = [text for name, text in headline(one).items() if name != "kernel" and text]
        start = cells.index(values[0])
        assert cells[start : start + len(values)] == values
    assert "and 1 small kernels around them" in shown
    assert "glued" not in shown


@pytest.mark.parametrize("spilled", [0, 8])
def test_spills_stand_out_and_nothing_else(spilled):
    seen = Seen(to_html(listing(kernel(), kernel(spilled_bytes=spilled))))
    alerts = [style for _, name, style in seen.attributes if name == "style" and html.ALERT in style]
    assert len(alerts) == (1 if spilled else 0)


def test_main_loops_show_tiles_instructions_and_loads():
    shown = to_html(listing(kernel(loops=LOOPS)))
    seen = Seen(shown)
    assert "over kv<br/>PARTIAL tiles" in shown
    assert "over kv<br/>FULL tiles" in shown
    assert "not told apart in the machine code" in shown
    assert "none" in seen.inside("td")
    kinds = [" 1,000 float", " 250 mma", " 50 integer"]
    assert [text for text in seen.inside("div") if text in kinds] == kinds
    widths = [float(x) for x in re.findall(r"width:([\d.]+)em'></span>", shown)]
    # Bars are rounded to 0.01 em.
    assert widths == pytest.approx([widths[0], widths[0] / 4, widths[0] / 20], abs=0.005)
    assert "1 \N{MULTIPLICATION SIGN} operand: " in seen.inside("div")
    assert "2 \N{MULTIPLICATION SIGN} column: " in seen.inside("div")
    assert set(seen.inside("code")) >= {load.source for load in LOADS}


def test_code_is_folded_and_escaped():
    one = kernel()
    seen = Seen(to_html(listing(one)))
    assert seen.inside("pre") == [one.triton, one.ttgir, one.ptx, one.sass]
    assert [text.partition(" (")[0] for text in seen.inside("summary")] == ["Triton", "TTGIR", "PTX", "SASS"]
    assert seen.elements.count("details") == 4
    assert ("details", "open") not in [(tag, name) for tag, name, _ in seen.attributes]
    assert "script" not in seen.elements


def test_kinds_of_code_that_are_not_there_are_not_shown():
    seen = Seen(to_html(listing(kernel(ptx="", sass="", amdgcn="s_endpgm\n"))))
    assert [text.partition(" (")[0] for text in seen.inside("summary")] == ["Triton", "TTGIR", "AMD GCN"]


@pytest.mark.parametrize("line", ["x = 1\n", "x"])
def test_very_long_code_is_cut_and_says_so(line):
    text = line * (html.MOST_CODE // len(line) + 1000)
    seen = Seen(to_html(listing(kernel(triton=text))))
    shown = seen.inside("pre")[0]
    assert text.startswith(shown)
    assert html.MOST_CODE - len(line) < len(shown) <= html.MOST_CODE
    assert shown.endswith(line)
    assert f"Triton (the first {len(shown):,} of {len(text):,} characters)" in seen.inside("summary")
    assert f"{len(text) - len(shown):,} characters are not shown; " in seen.inside("p")
    assert ".save(directory)" in seen.inside("code")


def test_code_that_just_fits_is_whole():
    text = "x" * html.MOST_CODE
    seen = Seen(to_html(listing(kernel(triton=text))))
    assert seen.inside("pre")[0] == text
    assert ".save(directory)" not in seen.inside("code")


def test_nothing_is_fetched_and_both_themes_can_read_it():
    seen = Seen(to_html(listing(kernel(loops=LOOPS, spilled_bytes=4), mask="Causal()")))
    assert not {"script", "link", "img", "iframe", "style"} & set(seen.elements)
    assert not {"src", "href", "onclick"} & {name for _, name, _ in seen.attributes}
    for _, name, style in seen.attributes:
        if name == "style" and re.search(r"background:(?!currentColor)", style):
            assert re.search(r"(?<!-)\bcolor:", style.partition("background:")[2]), style


def test_other_configurations_are_told():
    assert "the first of 6 configurations" in to_html(listing(kernel(num_configs=6)))
    assert "configurations" not in to_html(listing(kernel()))


@pytest.mark.parametrize("kernels", [(), (kernel(phase="glue"),)])
def test_a_listing_without_main_kernels(kernels):
    seen = Seen(to_html(listing(*kernels)))
    assert "details" not in seen.elements
    assert ("Nothing was assembled, so there is nothing to measure." in seen.inside("p")) == (not kernels)
