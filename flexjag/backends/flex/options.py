"""FlexAttention's kernel options for a GPU: the largest blocks whose registers do not spill.

FlexAttention's defaults are tuned for plain kernels. With a mask of bounds, a score and varying sizes, they exceed the
registers (a forward of head dimension 64 on an H200 spills 1.7 to 10.4 kB per thread), and a relative bias needs more
shared memory than the GPU has. These were chosen from the compiled code (``docs/kernels.md``, before and after), not
yet from time on a GPU. Options measured on the GPU at hand (:mod:`flexjag.backends.flex.tuning`) override them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexjag.algebra import tree
from flexjag.backends.flex import tuning
from flexjag.lowering.recipe import Recipe

HALF = (torch.float16, torch.bfloat16)


def kernel_options(recipe: Recipe, q: Tensor, v: Tensor, need_lse: bool = False) -> dict[str, Any]:
    """The options for a plan and q ``[T_q, H, D]``, v ``[T_kv, G, E]``; called while a graph is traced."""
    return built_in(recipe, q, v) | tuning.lookup(recipe, q, v, need_lse)


def built_in(recipe: Recipe, q: Tensor, v: Tensor) -> dict[str, Any]:
    """The built-in options, without measurements."""
    # Fewer than 128 queries would else go to another kernel, by a guard: a second graph (see mend_flex_short_queries).
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if recipe.layout.in_whole_tiles(recipe.block_size):
        options["IS_DIVISIBLE"] = True  # no bounds checks and no remainders
    dim = max(q.shape[2], v.shape[2])
    if q.dtype in HALF and dim <= 128:
        options |= _blocks(_capability(), dim, reads_by_key(recipe))
    return options


def _blocks(capability: tuple[int, int], dim: int, by_key: bool) -> dict[str, Any]:
    """Blocks and warps for 16-bit inputs; empty (FlexAttention's defaults) on GPUs that were not examined.

    Args:
        capability: Compute capability.
        dim: The larger of D and E.
        by_key: The mask or the score reads a tensor for each query-key pair.
    """
    if capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return {}
    options = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 32 if dim > 64 and by_key else 64, "fwd_num_warps": 8}
    if capability == (8, 0) and dim > 64:
        return options | {"bwd_num_warps": 8}
    if capability == (9, 0) and dim <= 64 and not by_key:
        return options  # the default backward fits
    blocks = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32}
    return options | blocks | {"bwd_num_warps": 8}


def reads_by_key(recipe: Recipe) -> bool:
    """True if the mask or the score reads a tensor for each query-key pair, which takes registers."""
    return tuning.score_kind(recipe.score) == "lookup" or any(map(tree.reads_pairs, recipe.kernel_masks))


@torch.compiler.assume_constant_result
def _capability() -> tuple[int, int]:
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability()
