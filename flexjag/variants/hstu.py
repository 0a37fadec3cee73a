"""HSTU layers (Actions Speak Louder than Words, arXiv 2402.17152; generative-recommenders) on jagged batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexjag.attention import attention
from flexjag.errors import LayoutError, PlanError, ScoreError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.normalizers import Pointwise
from flexjag.ops.select import jagged_concat
from flexjag.plan import Plan
from flexjag.variants.hstu_bias import HSTUBias
from flexjag.variants.hstu_norm import HeadNorm, LayerNorm


class KVCache(NamedTuple):
    """The keys and values of one layer's history, per segment.

    Attributes:
        k: ``[T_kv, H, D]``.
        v: ``[T_kv, H, E]``, with k's offsets.
    """

    k: Jagged
    v: Jagged


class HSTULayer(nn.Module):
    """One layer of HSTU: attention without a softmax, gated, with a residual.

    With f₁ and f₂ affine and φ the SiLU::

        u, v, q, k = split(φ(f₁(LayerNorm(x))))
        o = (φ(scale · q kᵀ + bias) · s ⊙ mask) v         φ, s and mask are the plan's
        y = x + f₂(dropout(LayerNorm(o) ⊙ u))              over all heads' features at once

    The paper's equations have the split, φ of the scores and their bias, and the gate after a norm. The scale,
    s = 1 / maximal length, the norm of the input, the residual, dropout and the starting values are those of the public
    code (generative-recommenders), whose two versions differ. As its ``STULayer``, this layer has norms with gain and
    shift, and a shift in f₁. By default φ is of all four of u, v, q and k, f₂ has a shift, and f₂'s only input is the
    gated output, as in its research model, which with ``concat_ua`` gives f₂ u and the normed output beside it.
    ``STULayer`` is ``silu="u", concat_u=True, concat_x=True, output_bias=False``, and has `group_norm`, too.

    Args:
        width: Features of a token.
        heads: H.
        dim: D, features of a head's query and key.
        value_dim: E, features of a head's value and gate. Default: D.
        bias: Added to the scores. Give each layer its own, as the public code does, or several layers the same one.
        scale: Factor on ``q·k``. Default ``1 / sqrt(D)``.
        dropout: Probability, 0 to 1.
        eps: Of the norms.
        silu: Of which projections φ is taken: ``"uvqk"`` for all four, ``"u"`` for the gate only.
        concat_u: Give f₂ also u, before all others.
        concat_x: Give f₂ also the attention's output o (which the public code calls x there), after u.
        concat_ua: Give f₂ also u and ``LayerNorm(o)``; not together with the former two.
        group_norm: Norm each head of o for itself, with one gain and one shift per head.
        output_bias: Whether f₂ has a shift.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ShapeError: If a size is out of range, `bias` is for another number of heads, or options do not go together.

    >>> from flexjag import plan
    >>> from flexjag.normalizers import SiLU
    >>> from flexjag.variants import hstu_mask
    >>> x = Jagged.from_lengths(torch.randn(9, 32), [5, 0, 4])
    >>> layer = HSTULayer(32, heads=2, dim=16, bias=HSTUBias(2, max_distance=7))
    >>> layer(x, plan(x, mask=hstu_mask(x), normalizer=SiLU(1 / 8)))
    Jagged(segments=3, tokens=9, values=[9, 32] float32, device=cpu)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dim: int,
        value_dim: int | None = None,
        *,
        bias: HSTUBias | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        eps: float = 1e-6,
        silu: Literal["uvqk", "u"] = "uvqk",
        concat_u: bool = False,
        concat_x: bool = False,
        concat_ua: bool = False,
        group_norm: bool = False,
        output_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = dim if value_dim is None else value_dim
        for name, size in (("width", width), ("heads", heads), ("dim", dim), ("value_dim", value_dim)):
            if not isinstance(size, int) or size < 1:
                raise ShapeError(explain_values(name, "must be an int of at least 1", **{name: size}))
        if not 0 <= dropout <= 1:
            raise ShapeError(explain_values("dropout", "must be a probability", dropout=dropout))
        if bias is not None and bias.heads != heads:
            raise ShapeError(explain_values("bias", "must be made for the layer's heads", bias=bias.heads, heads=heads))
        if silu not in ("uvqk", "u"):
            raise ShapeError(explain_values("silu", "must be 'uvqk' or 'u'", silu=silu))
        if concat_ua and (concat_u or concat_x):
            seen = {"concat_u": concat_u, "concat_x": concat_x}
            raise ShapeError(explain_values("concat_ua", "goes without concat_u and concat_x", **seen))
        factory = {"device": device, "dtype": dtype}
        self.width, self.heads, self.dim, self.value_dim = width, heads, dim, value_dim
        self.scale, self.silu, self.group_norm = scale, silu, group_norm
        self.concat_u, self.concat_x, self.concat_ua = concat_u, concat_x, concat_ua
        features = heads * value_dim
        self.input_norm = LayerNorm(width, eps, **factory)
        self.projection = nn.Linear(width, 2 * heads * (dim + value_dim), **factory)
        self.bias = bias
        self.attention_norm = HeadNorm(heads, eps, **factory) if group_norm else LayerNorm(features, eps, **factory)
        self.dropout = nn.Dropout(dropout)
        inputs = 1 + concat_u + concat_x + 2 * concat_ua
        self.output = nn.Linear(inputs * features, width, output_bias, **factory)
        self._reset_linear()

    def reset_parameters(self) -> None:
        """Weights by Glorot and Bengio (``xavier_uniform_``), the rest neutral; also those of the bias."""
        self.input_norm.reset_parameters()
        self.attention_norm.reset_parameters()
        self._reset_linear()
        if self.bias is not None:
            self.bias.reset_parameters()

    def _reset_linear(self) -> None:
        for linear in (self.projection, self.output):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Jagged, plan: Plan, *, times: Jagged | None = None, kv_times: Jagged | None = None) -> Jagged:
        """Run the layer.

        Args:
            x: ``[T, width]``.
            plan: For x's layout, with ``normalizer=SiLU(s)`` and for instance ``mask=hstu_mask(x)``. Made once per
                batch and shared by all layers. A score that it holds comes before the layer's own bias.
            times: ``[T]``, when each query is asked; needed by a bias by time, see :func:`next_times`.
            kv_times: ``[T]``, when each token happened. Default: `times`.

        Returns:
            ``[T, width]`` on x's offsets.

        Raises:
            ShapeError: If x has other features than the layer, or another dtype or device.
            PlanError: If the plan's normalizer is not pointwise, or it was made for another layout.
            LayoutError: If times do not lie like tokens.
            ScoreError: If times are missing, or are not needed.
        """
        return self.decode(x, None, plan, times=times, kv_times=kv_times)[0]

    def decode(
        self,
        x: Jagged,
        cache: KVCache | None,
        plan: Plan,
        *,
        times: Jagged | None = None,
        kv_times: Jagged | None = None,
    ) -> tuple[Jagged, KVCache]:
        """Run the layer on new tokens, which attend themselves and a history seen before.

        The output is the last rows of the forward over history and new tokens. In a stack that takes a history whose
        own outputs stay what they were: with a causal :func:`hstu_mask` if the new tokens are targets, or if
        `contextual` and `min_full` are 0 and the history's `times` do not change.

        Args:
            x: ``[T_q, width]``, the new tokens of each segment; there may be none.
            cache: What this method returned for the history; None if there is none. It is not changed.
            plan: Of the new tokens' layout against that of history and new tokens together, with a mask that lines
                queries up with the last keys: ``plan(new, whole, mask=hstu_mask(new, whole), ...)``.
            times: ``[T_q]``, of the new queries.
            kv_times: ``[T_kv]``, of history and new tokens. Default, without a history: `times`.

        Returns:
            ``[T_q, width]``, and the cache with the new tokens at each segment's end. To ask for other targets next,
            pass the old cache again.

        Raises:
            LayoutError: If the cache has another number of segments, or times do not lie like tokens.
            ShapeError: If x or the cache has other features than the layer, or another dtype or device.
            PlanError: As :meth:`forward`.
            ScoreError: As :meth:`forward`.
        """
        self._check(x, cache, plan)
        u, v, q, k = self._project(x)
        if cache is not None:
            k, v = jagged_concat([cache.k, k]), jagged_concat([cache.v, v])
            v = k.with_values(v.values)
        if self.bias is not None:
            own = self.bias(x, None if cache is None else k, times=times, kv_times=kv_times)
            plan = plan.with_score(own if plan.score is None else plan.score >> own)
        elif times is not None or kv_times is not None:
            raise ScoreError(explain_values("times", "go with a bias by time, and the layer has none", bias=None))
        out = attention(q, k, v, plan=plan, scale=self.scale)
        assert isinstance(out, Jagged)
        added = self.output(self.dropout(self._gate(u, out.values.flatten(1))))
        return x.with_values(x.values + added), KVCache(k, v)

    def _project(self, x: Jagged) -> tuple[Tensor, Jagged, Jagged, Jagged]:
        """The gate ``[T, H * E]``, and values, queries and keys ``[T, H, E or D]``."""
        values, keys = self.heads * self.value_dim, self.heads * self.dim
        uvqk = self.projection(self.input_norm(x.values))
        if self.silu == "uvqk":
            uvqk = functional.silu(uvqk)
        u, *rest = uvqk.split([values, values, keys, keys], 1)
        if self.silu == "u":
            u = functional.silu(u)
        v, q, k = (x.with_values(t.unflatten(1, (self.heads, -1))) for t in rest)
        return u, v, q, k

    def _gate(self, u: Tensor, out: Tensor) -> Tensor:
        """What is projected to the width, of the gate and the attention's output, both ``[T, H * E]``."""
        normed = self.attention_norm(out)
        parts = [normed * u]
        if self.concat_ua:
            parts = [u, normed, *parts]
        if self.concat_x:
            parts = [out, *parts]
        if self.concat_u:
            parts = [u, *parts]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _check(self, x: Jagged, cache: KVCache | None, plan: Plan) -> None:
        if not isinstance(x, Jagged):
            raise ShapeError(explain_values("x", "must be a flexjag.Jagged", type=type(x).__name__))
        if x.values.ndim != 2 or x.values.shape[1] != self.width:
            rule = f"values must be [T, width] with width {self.width}"
            raise ShapeError(explain_values("x", rule, shape=tuple(x.values.shape)))
        weight = self.projection.weight
        if x.device != weight.device:
            seen = {"x": str(x.device), "layer": str(weight.device)}
            raise ShapeError(explain_values("x", "must be on the device of the layer", **seen))
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            seen = {"x": x.dtype, "layer": weight.dtype}
            raise ShapeError(explain_values("x", "must have the dtype of the layer, without autocast", **seen))
        if not isinstance(plan, Plan):
            raise PlanError(explain_values("plan", "must come from flexjag.plan", type=type(plan).__name__))
        if not isinstance(plan.normalizer, Pointwise):
            rule = "HSTU's is pointwise: make the plan with normalizer=SiLU(1 / maximal length)"
            raise PlanError(explain_values("normalizer", rule, normalizer=plan.normalizer))
        for name, part, dim in () if cache is None else (("k", cache.k, self.dim), ("v", cache.v, self.value_dim)):
            if part.num_segments != x.num_segments:
                seen = {"cache": part.num_segments, "x": x.num_segments}
                raise LayoutError(explain_values("cache", "must have as many segments as x", **seen))
            if tuple(part.values.shape[1:]) != (self.heads, dim):
                seen = {name: tuple(part.values.shape), "heads": self.heads, "dim": dim}
                raise ShapeError(explain_values("cache", f"{name} must be [T, heads, dim] of this layer", **seen))

    def extra_repr(self) -> str:
        """The sizes, and what was chosen that is not the default."""
        scale = "" if self.scale is None else f", scale={self.scale}"
        silu = "" if self.silu == "uvqk" else f", silu={self.silu!r}"
        chosen = [name for name in ("concat_u", "concat_x", "concat_ua", "group_norm") if getattr(self, name)]
        options = scale + silu + "".join(f", {name}=True" for name in chosen)
        return f"width={self.width}, heads={self.heads}, dim={self.dim}, value_dim={self.value_dim}{options}"


class HSTU(nn.Module):
    """Layers of HSTU one after another, all with one plan.

    Args:
        layers: At least one, all of the same width.

    Raises:
        ShapeError: If there is no layer, or the widths differ.

    >>> stack = HSTU(HSTULayer(32, heads=2, dim=16, dropout=0.1) for _ in range(3))
    >>> sum(p.numel() for p in stack.parameters())
    16224
    """

    def __init__(self, layers: Iterable[HSTULayer]) -> None:
        super().__init__()
        layers = list(layers)
        widths = sorted({layer.width for layer in layers})
        if len(widths) != 1:
            rule = "must be at least one, all of the same width"
            raise ShapeError(explain_values("layers", rule, layers=len(layers), widths=widths))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Jagged, plan: Plan, *, times: Jagged | None = None, kv_times: Jagged | None = None) -> Jagged:
        """Run all layers; arguments and errors as for :meth:`HSTULayer.forward`."""
        for layer in self.layers:
            x = layer(x, plan, times=times, kv_times=kv_times)
        return x

    def decode(
        self,
        x: Jagged,
        caches: Sequence[KVCache] | None,
        plan: Plan,
        *,
        times: Jagged | None = None,
        kv_times: Jagged | None = None,
    ) -> tuple[Jagged, list[KVCache]]:
        """Run all layers on new tokens, as :meth:`HSTULayer.decode` does, with one cache per layer.

        Raises:
            ShapeError: If there is not one cache per layer.
        """
        given = [None] * len(self.layers) if caches is None else list(caches)
        if len(given) != len(self.layers):
            seen = {"caches": len(given), "layers": len(self.layers)}
            raise ShapeError(explain_values("caches", "must be one per layer", **seen))
        made = []
        for layer, cache in zip(self.layers, given, strict=True):
            assert isinstance(layer, HSTULayer)
            x, cache = layer.decode(x, cache, plan, times=times, kv_times=kv_times)
            made.append(cache)
        return x, made
