"""Occupancy as the vendors' calculators give it."""

from __future__ import annotations

import pytest

from flexjag.codegen.targets import TARGETS, get_target
from flexjag.errors import TargetError


@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 32, 0, 4, 16),  # threads: 2048 / 128
        ("sm_80", 255, 0, 4, 2),  # registers: 65536 / (255 -> 256 * 128)
        ("sm_80", 33, 0, 8, 6),  # 33 rounds to 40 registers a thread: 65536 / (40 * 256)
        ("sm_80", 32, 48 * 1024, 4, 3),  # shared memory: 164 / (48 + 1)
        ("sm_90", 32, 48 * 1024, 4, 4),  # 228 / (48 + 1)
        ("sm_90", 16, 0, 1, 32),  # blocks
        ("sm_90", 168, 227 * 1024, 8, 1),
        ("sm_90", 168, 228 * 1024, 8, 0),  # does not fit
        ("gfx942", 128, 64 * 1024, 4, 1),
        ("gfx942", 256, 0, 4, 2),  # 512 registers a lane on each of 4 SIMDs
    ],
)
def test_resident_blocks(name: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    target = get_target(name)
    assert target.resident_blocks(registers, shared, warps) == blocks
    assert target.occupancy(registers, shared, warps) == blocks * warps * target.lanes / target.max_threads


def test_targets_describe_themselves() -> None:
    for name, target in TARGETS.items():
        assert get_target(name) is get_target(target) is target
        assert target.properties().multi_processor_count == target.processors
    assert get_target("sm_100").arch == 100
    assert get_target("gfx942").arch == "gfx942"
    with pytest.raises(TargetError, match=r"target: must be one of .*; got target='H100'"):
        get_target("H100")


PRODUCTS = {
    "H100": "sm_90",
    "h200": "sm_90",
    "A100": "sm_80",
    "b200": "sm_100",
    "MI300": "gfx942",
    " mi300x ": "gfx942",
}


@pytest.mark.parametrize(("product", "target"), PRODUCTS.items(), ids=PRODUCTS.keys())
def test_a_product_is_told_its_target(product: str, target: str) -> None:
    message = rf"target: must be one of .*; for the {product.strip().upper()} say {target}; got target='{product}'"
    with pytest.raises(TargetError, match=message):
        get_target(product)
    assert target in TARGETS


def test_a_name_that_is_no_product_gets_no_advice() -> None:
    for name in ("sm_70", "", "rtx"):
        with pytest.raises(TargetError, match=rf"gfx942; got target='{name}'"):
            get_target(name)
