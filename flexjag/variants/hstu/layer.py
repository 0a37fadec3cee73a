"""HSTU layers (Actions Speak Louder than Words, arXiv 2402.17152; generative-recommenders) on jagged batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexjag.algebra.normalizers import Pointwise
from flexjag.api.attention import attention
from flexjag.api.plan import Plan
from flexjag.errors import LayoutError, PlanError, ScoreError, ShapeError, explain_values
from flexjag.jagged import Jagged
from flexjag.offsets import as_int
from flexjag.ops.select import jagged_concat
from flexjag.variants.hstu.bias import HSTUBias
from flexjag.variants.hstu.norm import HeadNorm, LayerNorm


class KVCache(NamedTuple):
    """Keys and values of one layer's history, per segment.

    Attributes:
        k: ``[T_kv, H, D]``.
        v: ``[T_kv, H, E]``, on the offsets of `k`.
    """

    k: Jagged
    v: Jagged


class HSTULayer(nn.Module):
    """HSTU layer: gated attention with a pointwise normalizer and a residual connection.

    With f₁ and f₂ affine and φ the SiLU::

        u, v, q, k = split(φ(f₁(LayerNorm(x))))
        o = (φ(scale · q kᵀ + bias) · s ⊙ mask) v         φ, s and mask: from the plan
        y = x + f₂(dropout(LayerNorm(o) ⊙ u))              over all heads' features at once

    The split, φ of the biased scores, and the gate after a norm are in the paper's equations. The scale,
    s = 1 / maximal length, the norm of the input, the residual, dropout and the initialization follow the public code
    (generative-recommenders), which has two versions. As in its ``STULayer``, the norms have gain and shift, and f₁ has
    a shift. By default φ is applied to all of u, v, q and k, f₂ has a shift, and the only input of f₂ is the gated
    output, as in its research model; that model's ``concat_ua`` adds u and the normed output to the input of f₂.
    ``STULayer`` is ``silu="u", concat_u=True, concat_x=True, output_bias=False``, and has `group_norm`, too.

    Args:
        width: Number of features of a token.
        heads: H.
        dim: D, query and key features per head.
        value_dim: E, value and gate features per head. Default: D.
        bias: Bias added to the scores: one per layer, as in the public code, or one shared by several layers.
        scale: Factor on ``q·k``. Default ``1 / sqrt(D)``.
        dropout: Dropout probability, 0 to 1.
        attention_dropout: Dropout probability of attention weights, below 1; see :func:`flexjag.attention`.
        eps: Added to the variance in the norms.
        silu: Projections that φ is applied to: ``"uvqk"`` for all four, ``"u"`` for the gate only.
        concat_u: Concatenate u to the input of f₂, in front.
        concat_x: Concatenate the attention output o (x in the public code) to the input of f₂, after u.
        concat_ua: Concatenate u and ``LayerNorm(o)`` to the input of f₂; excludes the former two.
        group_norm: Normalize each head of o separately, with one gain and one shift per head.
        output_bias: Whether f₂ has a shift.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ShapeError: If a size is out of range, `bias` has another number of heads, or options exclude each other.

    >>> from flexjag import plan
    >>> from flexjag.algebra.normalizers import SiLU
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
        attention_dropout: float = 0.0,
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
        width, heads, dim, value_dim = as_int(width), as_int(heads), as_int(dim), as_int(value_dim)
        value_dim = dim if value_dim is None else value_dim
        for name, size in (("width", width), ("heads", heads), ("dim", dim), ("value_dim", value_dim)):
            if not isinstance(size, int) or size < 1:
                raise ShapeError(explain_values(name, "must be an int of at least 1", **{name: size}))
        if not 0 <= dropout <= 1:
            raise ShapeError(explain_values("dropout", "must be a probability", dropout=dropout))
        if not 0 <= attention_dropout < 1:
            rule = "must be a probability below 1"
            raise ShapeError(explain_values("attention_dropout", rule, attention_dropout=attention_dropout))
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
        self.dropout, self.attention_dropout = nn.Dropout(dropout), attention_dropout
        inputs = 1 + concat_u + concat_x + 2 * concat_ua
        self.output = nn.Linear(inputs * features, width, output_bias, **factory)
        self._reset_linear()

    def reset_parameters(self) -> None:
        """Initialize weights by ``xavier_uniform_``, shifts by 0 and gains by 1, and reset `bias`."""
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
            plan: Plan for x's layout with ``normalizer=SiLU(s)`` and, for instance, ``mask=hstu_mask(x)``: one per
                batch, shared by all layers. Its score, if any, is applied before the layer's bias.
            times: ``[T]``, the time of each query; required by a bias by time, see :func:`next_times`.
            kv_times: ``[T]``, the time of each token. Default: `times`.

        Returns:
            ``[T, width]`` on the offsets of `x`.

        Raises:
            ShapeError: If width, dtype or device of `x` differ from the layer's.
            PlanError: If the plan's normalizer is not pointwise, or the plan was made for another layout.
            LayoutError: If times have other offsets than the tokens.
            ScoreError: If times are given without a bias by time, or missing with one.
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
        """Run the layer on new tokens, which attend to themselves and a cached history.

        Equals the last rows of the forward over history and new tokens. In a stack of layers this requires that new
        tokens leave the outputs of the history unchanged: with a causal :func:`hstu_mask` they do if they are targets,
        or if `contextual` and `min_full` are 0 and the history's `times` do not change.

        Args:
            x: ``[T_q, width]``, the new tokens of each segment; there may be none.
            cache: The cache returned for the history; None without a history. It is not modified.
            plan: Plan for the new tokens as queries and history plus new tokens as keys, with a mask that aligns the
                queries with the last keys: ``plan(new, whole, mask=hstu_mask(new, whole), ...)``.
            times: ``[T_q]``, the times of the new queries.
            kv_times: ``[T_kv]``, the times of history and new tokens. Default, without a history: `times`.

        Returns:
            ``[T_q, width]``, and the cache with the new tokens appended to each segment. To score other targets next,
            pass the old cache again.

        Raises:
            LayoutError: If the cache has another number of segments, or times have other offsets than the tokens.
            ShapeError: If width, dtype or device of `x` or of the cache differ from the layer's.
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
        rate = self.attention_dropout if self.training else 0.0
        out = attention(q, k, v, plan=plan, scale=self.scale, dropout=rate)
        assert isinstance(out, Jagged)
        added = self.output(self.dropout(self._gate(u, out.values.flatten(1))))
        return x.with_values(x.values + added), KVCache(k, v)

    def _project(self, x: Jagged) -> tuple[Tensor, Jagged, Jagged, Jagged]:
        """Gate ``[T, H * E]``, values ``[T, H, E]``, queries and keys ``[T, H, D]``."""
        values, keys = self.heads * self.value_dim, self.heads * self.dim
        uvqk = self.projection(self.input_norm(x.values))
        if self.silu == "uvqk":
            # In place where no gradient needs its argument: on a CPU, fresh memory of this size takes longer.
            uvqk = functional.silu(uvqk, inplace=not torch.is_grad_enabled())
        u, *rest = uvqk.split([values, values, keys, keys], 1)
        if self.silu == "u":
            u = functional.silu(u)
        v, q, k = (x.with_values(t.unflatten(1, (self.heads, -1))) for t in rest)
        return u, v, q, k

    def _gate(self, u: Tensor, out: Tensor) -> Tensor:
        """Input of f₂, from the gate and the attention output, both ``[T, H * E]``."""
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
        """The sizes, and the options that differ from their defaults."""
        scale = "" if self.scale is None else f", scale={self.scale}"
        silu = "" if self.silu == "uvqk" else f", silu={self.silu!r}"
        chosen = [name for name in ("concat_u", "concat_x", "concat_ua", "group_norm") if getattr(self, name)]
        dropout = f", attention_dropout={self.attention_dropout}" if self.attention_dropout else ""
        options = scale + silu + dropout + "".join(f", {name}=True" for name in chosen)
        return f"width={self.width}, heads={self.heads}, dim={self.dim}, value_dim={self.value_dim}{options}"


class HSTU(nn.Module):
    """Stack of HSTU layers that share one plan.

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
