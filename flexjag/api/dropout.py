"""Dropout of attention weights: its arguments, its seed, and a softmax's output without the weights dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexjag.algebra.dropping import Dropped
from flexjag.algebra.node import finite, is_integer
from flexjag.algebra.normalizers import Normalizer, StickBreaking
from flexjag.errors import PlanError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.recipe import Recipe
from flexjag.upstream import number


class Dropping(NamedTuple):
    """The dropout of one call.

    Attributes:
        kept: The share of the weights that are kept, 0-d float64.
        recipe: The call's recipe with the dropped pairs ruled out.
    """

    kept: Tensor
    recipe: Recipe


def dropping(
    recipe: Recipe, q: Jagged, rate: float, ids: Tensor | None, generator: torch.Generator | None
) -> Dropping | None:
    """Check the arguments of dropout and draw its seed; None without dropout.

    Raises:
        PlanError: If the normalizer is stick-breaking, or a generator is given in a traced graph.
        ShapeError: If the rate is no number of at least 0 and less than 1, `ids` are no integers ``[S]`` on q's device,
            or the generator is none of q's device.
    """
    rate = checked_rate(rate, recipe.normalizer)
    device = q.values.device
    if ids is not None and not (isinstance(ids, Tensor) and is_integer(ids) and ids.device == device):  # pyright: ignore[reportUnnecessaryIsInstance]
        rule = "must be integers [S] on q's device"
        raise ShapeError(explain_values("dropout_ids", rule, ids=getattr(ids, "dtype", ids), device=str(device)))
    if ids is not None and (ids.ndim != 1 or ids.shape[0] != q.num_segments):
        seen = {"shape": tuple(ids.shape), "segments": q.num_segments}
        raise ShapeError(explain_values("dropout_ids", "must be one per segment, [S]", **seen))
    if rate == 0:
        return None
    share = number(rate, torch.float64, device)
    below = (share * 2**32 - 2**31).round().clamp(max=2**31 - 1).to(torch.int32)
    dropped = Dropped(_seed(q.values, generator), below, q.values.shape[1], ids)
    return Dropping(1 - share, recipe.dropping(dropped))


def checked_rate(rate: float, normalizer: Normalizer) -> float:
    """The rate of dropout as a float.

    Raises:
        ShapeError: If it is no number of at least 0 and less than 1.
        PlanError: If it is not 0 and the normalizer is stick-breaking.
    """
    if isinstance(rate, Tensor):
        raise ShapeError(explain_values("dropout", "must be a number", shape=tuple(rate.shape)))
    rate = finite(ShapeError, "dropout", rate)
    if not 0 <= rate < 1:
        raise ShapeError(explain_values("dropout", "must be at least 0 and less than 1", dropout=rate))
    if rate != 0 and isinstance(normalizer, StickBreaking):
        rule = "is for a softmax and pointwise normalizers: a key that breaks off nothing leaves its share to others"
        raise PlanError(explain_values("dropout", rule, normalizer=normalizer))
    return rate


def rescaled(out: Tensor, lse_of_kept: Tensor, lse: Tensor, kept: Tensor) -> Tensor:
    """Output of a softmax whose denominator is over all keys, from that of the kept ones alone.

    Args:
        out: ``[T_q, H, E]``, a softmax over the kept keys.
        lse_of_kept: Its log-sum-exp ``[T_q, H]``.
        lse: The log-sum-exp of all keys, ``[T_q, H]``.
        kept: The share of the weights that are kept, 0-d.
    """
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of a row without keys: its kept one is -inf, too
    share = torch.exp(lse_of_kept - lse) / kept
    return (out * share[:, :, None]).to(out.dtype)


def _seed(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        # Graphs take two operators of equal arguments for one, random ones too, but never two empty tensors.
        return draw_seed(torch.empty(0, device=like.device))
    if torch.compiler.is_compiling():
        rule = "cannot be read in a traced graph, which draws from torch's default generator"
        raise PlanError(explain_values("generator", rule, generator="a torch.Generator"))
    if not isinstance(generator, torch.Generator) or generator.device.type != like.device.type:  # pyright: ignore[reportUnnecessaryIsInstance]
        seen = getattr(generator, "device", generator)
        rule = "must be a torch.Generator of q's device"
        raise ShapeError(explain_values("generator", rule, generator=str(seen), device=str(like.device)))
    return _drawn(like, generator)


def _drawn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device, generator=generator)


# An operator of its own, as Inductor would draw other numbers than eager mode does; a graph runs it once in each call,
# and checkpointing restores the generator's state before it runs it again.
@torch.library.custom_op("flexjag::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed(like: Tensor) -> Tensor:
    """An int64 number from the default generator of a tensor's device, 0-d."""
    return _drawn(like, None)


@draw_seed.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)
