"""Ragged operations on jagged batches: products, reductions, normalization, selection, padding.

Each is a plain-torch kernel that loops over segments (any device, any dtype, the meaning), registered with
``torch.library`` where a graph could not be traced through it. On CUDA tensors in float32, bfloat16 and float16, Triton
kernels take its place, which look at offsets only where nobody says how large the result is. Gradients are
deterministic. Under ``torch.compile(fullgraph=True)`` new offsets, totals and numbers of segments use the same graph.
In eager mode there are derivatives of any order, in reverse and forward mode, and ``torch.func`` (``vmap`` by a loop).
"""

from flexjag.ops.bmm import jagged_dense_bmm, jagged_jagged_bmm
from flexjag.ops.elementwise import jagged_dense_elementwise_add, jagged_dense_elementwise_mul
from flexjag.ops.matrices import array_jagged_bmm, jagged2_softmax, jagged_jagged_bmm_jagged_out
from flexjag.ops.norm import jagged_layer_norm, jagged_rms_norm
from flexjag.ops.padding import dense_to_jagged, jagged_to_padded_dense
from flexjag.ops.segment import segment_broadcast, segment_max, segment_mean, segment_min, segment_sum
from flexjag.ops.select import jagged_concat, jagged_index_select, jagged_split
from flexjag.ops.softmax import jagged_softmax
from flexjag.ops.target import jagged_dense_attention

__all__ = [
    "array_jagged_bmm",
    "dense_to_jagged",
    "jagged2_softmax",
    "jagged_concat",
    "jagged_dense_attention",
    "jagged_dense_bmm",
    "jagged_dense_elementwise_add",
    "jagged_dense_elementwise_mul",
    "jagged_index_select",
    "jagged_jagged_bmm",
    "jagged_jagged_bmm_jagged_out",
    "jagged_layer_norm",
    "jagged_rms_norm",
    "jagged_softmax",
    "jagged_split",
    "jagged_to_padded_dense",
    "segment_broadcast",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_sum",
]
