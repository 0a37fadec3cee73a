"""FBGEMM's deduplication of the indices of a batch, per feature."""

from __future__ import annotations

import torch
from torch import Tensor

from flexjag import ops
from flexjag.errors import LayoutError, ShapeError, explain_values
from flexjag.interop.fbgemm.common import (
    Integer,
    check_index,
    check_lengths,
    check_range,
    check_tensor,
    read,
    size_of,
)
from flexjag.interop.fbgemm_lengths import asynchronous_complete_cumsum
from flexjag.jagged import Jagged, check_offsets, segment_ids
from flexjag.ops.checks import can_look
from flexjag.ops.packed import unknown_size
from flexjag.ops.register import define


def jagged_hash_size_cumsum(offsets: Tensor, indices: Tensor, batch_size: Integer) -> tuple[Tensor, Tensor]:
    """Offsets of the hash spaces that the indices of F features need, for :func:`jagged_unique_indices`.

    FBGEMM implements it for CUDA only.

    Args:
        offsets: Offsets ``[F·B+1]`` of the B segments of each feature, int32 or int64.
        indices: ``[T]``, not negative.
        batch_size: B.

    Returns:
        `hash_size_cumsum` ``[F+1]``, the exclusive cumulative sum of the largest index plus one of each feature (0 for
        a feature without indices), and `hash_size_offsets`, 0 to F. Both in the dtype of `offsets`.

    Raises:
        LayoutError: If offsets are invalid, indices are negative, or B does not divide the number of segments.
        ShapeError: If `batch_size` is not a positive integer.

    >>> jagged_hash_size_cumsum(torch.tensor([0, 1, 3, 3, 4]), torch.tensor([5, 2, 0, 7]), 2)
    (tensor([ 0,  6, 14]), tensor([0, 1, 2]))
    """
    check_index(indices, "indices")
    check_index(offsets, "offsets", indices)
    size = size_of(batch_size, "batch_size")
    features = (offsets.shape[0] - 1) // max(size, 1)
    if offsets.shape[0] != features * size + 1:
        seen: dict[str, object] = {"offsets": tuple(offsets.shape), "batch_size": size}
        raise LayoutError(explain_values("offsets", "must be those of batch_size segments per feature", **seen))
    check_lengths(indices, "indices")
    rows = read(indices, offsets[:: max(size, 1)].contiguous(), mask=False)
    largest = rows.narrow(ops.segment_max(rows.x, fill=-1)).to(offsets.dtype)
    return asynchronous_complete_cumsum(largest + 1), torch.arange(
        features + 1, device=offsets.device, dtype=offsets.dtype
    )


def jagged_unique_indices(
    hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deduplicate the indices of each feature, or of several features that share a hash space.

    FBGEMM implements it for CUDA only.

    Args:
        hash_size_cumsum: Offsets ``[F+1]`` of the features' hash spaces. A feature with an empty hash space shares that
            of the next feature.
        hash_size_offsets: ``[F+1]`` from 0 to F: features ``hash_size_offsets[f]`` to ``hash_size_offsets[f + 1]`` - 1
            are deduplicated together.
        offsets: Offsets ``[F·B+1]`` of the B segments of each feature, int32 or int64.
        indices: ``[T]``, not negative, and smaller than the hash size of the feature, except for the last feature and
            those that share a hash space. FBGEMM asserts it in the kernel.

    Returns:
        The lengths ``[F·B]`` and offsets ``[F·B+1]`` of the result, in the dtype of `offsets`: the unique indices of
        a group of features are divided evenly among its segments, the first segments taking the remainder. The unique
        indices ``[U]``, sorted in each hash space. The inverse ``[T]`` int64: the position of each index in them.

    Raises:
        LayoutError: If offsets are invalid or do not match, or indices are out of range.

    >>> offsets = torch.tensor([0, 2, 3, 3, 5])
    >>> jagged_unique_indices(torch.tensor([0, 9, 18]), torch.arange(3), offsets, torch.tensor([4, 4, 1, 4, 0]))
    (tensor([1, 1, 1, 1]), tensor([0, 1, 2, 3, 4]), tensor([1, 4, 0, 4]), tensor([1, 1, 0, 3, 2]))
    """
    batch = _check_unique(hash_size_cumsum, hash_size_offsets, offsets, indices)
    features, segments = hash_size_cumsum.shape[0] - 1, offsets.shape[0] - 1
    feature = segment_ids(offsets, indices.shape[0]) // max(batch, 1)
    keys, inverse = sorted_unique(hash_size_cumsum.index_select(0, feature) + indices)
    unique = torch.zeros_like(keys).index_copy(0, inverse, indices)  # equal keys are equal indices

    # Number of keys of each group of features, and number of segments that share them.
    begins = torch.searchsorted(keys, hash_size_cumsum.index_select(0, hash_size_offsets))
    ends = torch.where(hash_size_offsets == features, keys.shape[0], begins)  # the last feature's indices are unbounded
    group = segment_ids(hash_size_offsets, features).repeat_interleave(batch)
    count = (ends[1:] - begins[:-1]).index_select(0, group)
    first = (hash_size_offsets * batch).index_select(0, group)
    share = (hash_size_offsets.diff() * batch).index_select(0, group)
    place = torch.arange(segments, device=offsets.device) - first
    lengths = (count // share + (place < count % share)).to(offsets.dtype)
    return lengths, asynchronous_complete_cumsum(lengths), unique, inverse


def _check_unique(hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor) -> int:
    """Check the arguments of :func:`jagged_unique_indices`, and return B."""
    check_index(indices, "indices")
    for tensor, name in (
        (hash_size_cumsum, "hash_size_cumsum"),
        (hash_size_offsets, "hash_size_offsets"),
        (offsets, "offsets"),
    ):
        check_index(tensor, name, indices)
    seen: dict[str, object] = {"hash_size_cumsum": tuple(hash_size_cumsum.shape)}
    features = hash_size_cumsum.shape[0] - 1
    if features < 1 or hash_size_offsets.shape != hash_size_cumsum.shape:
        seen |= {"hash_size_offsets": tuple(hash_size_offsets.shape)}
        raise LayoutError(explain_values("hash_size_offsets", "must be [F+1] as hash_size_cumsum, F > 0", **seen))
    if offsets.shape[0] < 1 or (offsets.shape[0] - 1) % features:
        seen |= {"offsets": tuple(offsets.shape)}
        raise LayoutError(explain_values("offsets", "must be those of as many segments per feature", **seen))
    batch = (offsets.shape[0] - 1) // features
    if can_look(indices):
        Jagged(indices, offsets).validate()
        check_offsets(hash_size_offsets, features, "hash_size_offsets")
        check_lengths(indices, "indices")
        check_lengths(hash_size_cumsum.diff(), "lengths of hash_size_cumsum")
        sizes = hash_size_cumsum.diff()
        sizes[-1] = 0  # 0 skips the check: the last feature's indices are unbounded
        size = sizes.index_select(0, segment_ids(offsets, indices.shape[0]) // max(batch, 1))
        wrong = ((indices >= size) & (size > 0)).nonzero()
        if wrong.numel():
            at = int(wrong[0])
            seen = {f"indices[{at}]": int(indices[at]), "hash_size": int(size[at])}
            raise LayoutError(explain_values("indices", "must be smaller than the hash size of the feature", **seen))
    return batch


@define("sorted_unique")
def sorted_unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique keys ``[U]``, and the inverse ``[T]``: the position of each key in them."""
    found, inverse = torch.unique(keys, sorted=True, return_inverse=True)
    return found, inverse


@sorted_unique.register_fake
def _(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty((unknown_size(),)), torch.empty_like(keys, dtype=torch.int64)


def jagged_acc_weights_and_counts(weights: Tensor, reverse_indices: Tensor, num_unique_indices: Integer) -> Tensor:
    """Sum of weights and count of occurrences of each unique index.

    Differentiable, which FBGEMM's is not.

    Args:
        weights: ``[T]`` floating point; summed in float32.
        reverse_indices: Unique index of each weight, ``[T]`` int32 or int64.
        num_unique_indices: U.

    Returns:
        ``[U, 2]`` float32: sums and counts.

    Raises:
        LayoutError: If indices are not 1-D integers, or out of range.
        ShapeError: If `weights` is not floating point or of another size, or U is not a non-negative integer.

    >>> jagged_acc_weights_and_counts(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0]), 2).tolist()
    [[5.0, 2.0], [2.0, 1.0]]
    """
    check_tensor(weights, "weights", 1)
    check_index(reverse_indices, "reverse_indices", weights)
    size = size_of(num_unique_indices, "num_unique_indices")
    if weights.shape != reverse_indices.shape or not weights.is_floating_point():
        seen: dict[str, object] = {
            "weights": tuple(weights.shape),
            "dtype": weights.dtype,
            "reverse_indices": tuple(reverse_indices.shape),
        }
        raise ShapeError(explain_values("weights", "must be floating point, one per reverse index", **seen))
    check_range(reverse_indices, "reverse_indices", size, "U")
    wide = weights.float()
    pairs = torch.stack([wide, torch.ones_like(wide)], 1)
    return pairs.new_zeros(size, 2).index_add(0, reverse_indices, pairs)
