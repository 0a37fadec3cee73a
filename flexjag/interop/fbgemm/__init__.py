"""FBGEMM's jagged-tensor functions without FBGEMM: same names, signatures and results, built on :mod:`flexjag.ops`.

``from flexjag.interop import fbgemm`` replaces ``torch.ops.fbgemm``, on every device and in every dtype that PyTorch
has, float64 included. Nothing is registered or patched, and FBGEMM may be installed beside it. Where FBGEMM reads
out of bounds or returns uninitialized memory, these functions raise or return zeros; each docstring states it, and
``docs/interop-fbgemm.md`` lists all differences. Unless a docstring says otherwise:

- `offsets` are int32 or int64. As in FBGEMM they may start above 0 and end before the last row; functions that read
  rows then ignore the rows outside, which get no gradient. Functions with a packed result need all rows covered.
- Offsets that decrease or exceed the number of rows, for which FBGEMM reads out of bounds, are a ``LayoutError``. On
  a CPU all contents are checked; on a GPU and in a compiled graph only those that the op itself must read.
- An ``int`` argument is a Python or NumPy integer or an integer tensor of one entry; an ``int[]`` is a sequence of
  these, a NumPy array or a 1-D tensor, also in a compiled graph.
- `max_length` and its other names truncate every segment to its first tokens, as in FBGEMM.
- Shapes that do not match are a ``ShapeError``.

>>> import torch
>>> from flexjag.interop import fbgemm
>>> values = torch.tensor([[1.0], [2.0], [3.0]])
>>> fbgemm.jagged_to_padded_dense(values, [torch.tensor([0, 1, 3])], [2], -1.0).squeeze(-1).tolist()
[[1.0, -1.0], [2.0, 3.0]]
"""

from flexjag.interop.fbgemm.padding import (
    dense_to_jagged,
    jagged_1d_to_dense,
    jagged_2d_to_dense,
    jagged_to_padded_dense,
    pack_segments,
    pack_segments_v2,
    stacked_jagged_1d_to_dense,
    stacked_jagged_2d_to_dense,
)
from flexjag.interop.fbgemm.products import (
    batched_dense_vec_jagged_2d_mul,
    jagged_dense_bmm,
    jagged_dense_dense_elementwise_add_jagged_output,
    jagged_dense_elementwise_add,
    jagged_dense_elementwise_add_jagged_output,
    jagged_dense_elementwise_mul,
    jagged_jagged_bmm,
    jagged_softmax,
)
from flexjag.interop.fbgemm.sll import (
    sll_dense_jagged_cat_jagged_out,
    sll_jagged_dense_bmm,
    sll_jagged_dense_elementwise_add,
    sll_jagged_dense_flash_attention,
    sll_jagged_flash_attention_basic,
    sll_jagged_jagged_bmm,
    sll_jagged_softmax,
    sll_multi_head_jagged_flash_attention,
)
from flexjag.interop.fbgemm.sll_packed import (
    sll_array_jagged_bmm_jagged_out,
    sll_jagged2_softmax,
    sll_jagged2_to_padded_dense,
    sll_jagged_dense_elementwise_mul_jagged_out,
    sll_jagged_jagged_bmm_jagged_out,
    sll_jagged_self_substraction_jagged_out,
)
from flexjag.interop.fbgemm_lengths import (
    asynchronous_batched_complete_cumsum,
    asynchronous_complete_cumsum,
    asynchronous_exclusive_cumsum,
    asynchronous_inclusive_cumsum,
    expand_into_jagged_permute,
    get_source_mask,
    offsets_range,
    repeat_arange,
)
from flexjag.interop.fbgemm_select import (
    jagged_1d_to_truncated_values,
    jagged_index_add_2d_forward,
    jagged_index_select,
    jagged_slice,
    keyed_jagged_index_select_dim1,
    masked_select_jagged_1d,
)
from flexjag.interop.fbgemm_unique import (
    jagged_acc_weights_and_counts,
    jagged_hash_size_cumsum,
    jagged_unique_indices,
)

__all__ = [
    "asynchronous_batched_complete_cumsum",
    "asynchronous_complete_cumsum",
    "asynchronous_exclusive_cumsum",
    "asynchronous_inclusive_cumsum",
    "batched_dense_vec_jagged_2d_mul",
    "dense_to_jagged",
    "expand_into_jagged_permute",
    "get_source_mask",
    "jagged_1d_to_dense",
    "jagged_1d_to_truncated_values",
    "jagged_2d_to_dense",
    "jagged_acc_weights_and_counts",
    "jagged_dense_bmm",
    "jagged_dense_dense_elementwise_add_jagged_output",
    "jagged_dense_elementwise_add",
    "jagged_dense_elementwise_add_jagged_output",
    "jagged_dense_elementwise_mul",
    "jagged_hash_size_cumsum",
    "jagged_index_add_2d_forward",
    "jagged_index_select",
    "jagged_jagged_bmm",
    "jagged_slice",
    "jagged_softmax",
    "jagged_to_padded_dense",
    "jagged_unique_indices",
    "keyed_jagged_index_select_dim1",
    "masked_select_jagged_1d",
    "offsets_range",
    "pack_segments",
    "pack_segments_v2",
    "repeat_arange",
    "sll_array_jagged_bmm_jagged_out",
    "sll_dense_jagged_cat_jagged_out",
    "sll_jagged2_softmax",
    "sll_jagged2_to_padded_dense",
    "sll_jagged_dense_bmm",
    "sll_jagged_dense_elementwise_add",
    "sll_jagged_dense_elementwise_mul_jagged_out",
    "sll_jagged_dense_flash_attention",
    "sll_jagged_flash_attention_basic",
    "sll_jagged_jagged_bmm",
    "sll_jagged_jagged_bmm_jagged_out",
    "sll_jagged_self_substraction_jagged_out",
    "sll_jagged_softmax",
    "sll_multi_head_jagged_flash_attention",
    "stacked_jagged_1d_to_dense",
    "stacked_jagged_2d_to_dense",
]
