"""Ragged operations on jagged batches: products, reductions, normalization, selection, padding.

Each op is defined by a plain-torch kernel that loops over segments (any device, any dtype), registered with
``torch.library`` where the loop cannot be traced. On CUDA tensors in float32, bfloat16 and float16 a Triton kernel
replaces it, which reads the offsets on the host only if the size of the result is not given. Gradients are
deterministic. Under ``torch.compile(fullgraph=True)`` new offsets, totals and numbers of segments use the same graph.
Eager mode supports derivatives of any order, reverse and forward mode, and ``torch.func`` (``vmap`` runs a loop).
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
