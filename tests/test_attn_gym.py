"""attention-gym's masks through MaskMod: per segment exactly what attention-gym gives for one sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import jagged, make_qkv
from torch.nn.attention.flex_attention import create_mask

import flexjag as fj

pytest.importorskip("attn_gym", reason="attention-gym is not installed")

from attn_gym.masks import (
    causal_mask,
    generate_dilated_sliding_window,
    generate_natten,
    generate_prefix_lm_mask,
    generate_sliding_window,
)

SEQUENCES = [40, 1, 0, 17, 128, 5]
IMAGES_8X8, IMAGES_6X6 = [64, 64, 64], [36, 36]
CASES: dict[str, tuple[Callable[..., torch.Tensor], list[int]]] = {
    "causal": (causal_mask, SEQUENCES),
    "sliding_window": (generate_sliding_window(7), SEQUENCES),
    "prefix_lm": (generate_prefix_lm_mask(9), SEQUENCES),
    "dilated": (generate_dilated_sliding_window(5, 3), SEQUENCES),
    "natten_8x8": (generate_natten(8, 8, 3, 5), IMAGES_8X8),
    "natten_6x6": (generate_natten(6, 6, 5, 3), IMAGES_6X6),
}
EACH = pytest.mark.parametrize(("mod", "lengths"), CASES.values(), ids=CASES.keys())


def theirs(mod: Callable[..., torch.Tensor], length: int) -> torch.Tensor:
    """attention-gym's mask of one sequence, evaluated by torch."""
    return create_mask(mod, 1, 1, length, length, device="cpu")[0, 0] if length else torch.zeros(0, 0).bool()


@EACH
@pytest.mark.parametrize("block", [16, 128])
def test_mask_per_segment(mod: Callable[..., torch.Tensor], lengths: list[int], block: int) -> None:
    plan = fj.plan(jagged(lengths), mask=fj.MaskMod(mod), block_size=block)
    expected = torch.block_diag(*(theirs(mod, n) for n in lengths if n)).bool()
    assert torch.equal(plan.to_dense(), expected)
    rows, cols = plan.grid
    padded = torch.nn.functional.pad(expected, (0, cols * block - len(expected), 0, rows * block - len(expected)))
    tiles = padded.view(rows, block, cols, block).transpose(1, 2).flatten(2)
    assert plan.num_tiles == int(tiles.any(2).sum())
    assert plan.num_full == int(tiles.all(2).sum())


@EACH
@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
def test_attention_per_segment(mod: Callable[..., torch.Tensor], lengths: list[int], backend: str) -> None:
    q, k, v = make_qkv(lengths)
    got = fj.attention(q, k, v, mask=fj.MaskMod(mod), backend=backend).to_list()
    for out, *qkv in zip(got, *(x.to_list() for x in (q, k, v)), strict=True):
        x, y, z = (t.transpose(0, 1)[None] for t in qkv)
        mask = theirs(mod, len(out))
        if len(out):
            expected = torch.nn.functional.scaled_dot_product_attention(x, y, z, attn_mask=mask)
            torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-11, atol=1e-12)  # float64


def test_combined_with_nodes_of_our_own() -> None:
    mask = fj.MaskMod(generate_dilated_sliding_window(5, 3)) | ~fj.MaskMod(causal_mask) & fj.Prefix(2)
    plan = fj.plan(jagged(SEQUENCES), mask=mask, block_size=16)
    pieces = [
        theirs(generate_dilated_sliding_window(5, 3), n) | (~theirs(causal_mask, n) & (torch.arange(n) < 2))
        for n in SEQUENCES
        if n
    ]
    assert torch.equal(plan.to_dense(), torch.block_diag(*pieces).bool())


def test_same_tiles_as_our_nodes() -> None:
    """What the user need not write: refined, the opaque predicates prove what the interval nodes prove."""
    x = jagged(SEQUENCES)
    pairs = [
        (causal_mask, fj.Causal()),
        (generate_sliding_window(7), fj.Window(7, 0)),
        (generate_prefix_lm_mask(9), fj.Causal() | fj.Prefix(9)),
    ]
    for mod, node in pairs:
        opaque, exact = (fj.plan(x, mask=m, block_size=16) for m in (fj.MaskMod(mod), node))
        assert (opaque.num_tiles, opaque.num_full) == (exact.num_tiles, exact.num_full)
        assert torch.equal(opaque.to_dense(), exact.to_dense())
