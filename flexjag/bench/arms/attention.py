"""Implementations of attention over a jagged batch: flexjag's backends, loops over segments, padding, PyTorch's own."""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexjag.algebra.facts import as_window
from flexjag.algebra.masks import Causal, Full
from flexjag.algebra.normalizers import Softmax
from flexjag.algebra.scores import Alibi, RelativeBias, Score
from flexjag.api.attention import attention
from flexjag.api.plan import plan
from flexjag.backends import choose
from flexjag.backends.base import Case
from flexjag.bench.arms import exact
from flexjag.bench.arms.kinds import KINDS, MAX_DISTANCE
from flexjag.bench.measuring.padded import Expected, Padding, Tensors, with_gradients
from flexjag.bench.suites.registry import Arm
from flexjag.jagged import Jagged

LOOP = "SDPA loop over segments"
SLICED = "SDPA loop over slices q[a:b]"
PADDED = "padded SDPA, mask per segment"
SHARED = "padded SDPA, one mask for all"
DENSE = "padded dense softmax"
PADDED_FLEX = "padded flex_attention, compiled"
NESTED = "NestedTensor SDPA"
GYM = "attention-gym document mask + flex_attention, compiled"
VARLEN = "varlen_attn"
AUTO = "flexjag auto"
FLEX = "flexjag flex"
WITH_PLAN = ", planning included"
BACKENDS = ("auto", *(x for x, b in choose.BACKENDS.items() if Softmax in b.promises.normalizers and x != "reference"))
SLOW = (PADDED_FLEX, GYM)  # both compile a kernel per kind


class AttentionBatch:
    """One batch of the attention suite, and its arms. Each arm prepares its inputs beyond q, k, v and a bias itself.

    Args:
        kind: Mask and score: a key of :data:`KINDS`.
        lengths: Segment lengths.
        heads: Number of heads H.
        dim: Head dimension D.
        dtype: Dtype of the inputs.
        backward: Time forward and backward; False for the forward alone.
        device: ``"cpu"`` or ``"cuda"``.
        seed: Random seed of the values.
    """

    def __init__(
        self,
        kind: str,
        lengths: Sequence[int],
        heads: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        backward: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.kind, self.lengths, self.heads, self.dim = KINDS[kind], list(lengths), heads, dim
        self.backward, self.device, self.dtype = backward, device, dtype
        self.longest, self.padding = max(lengths), Padding(lengths, device)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (sum(lengths), heads, dim)
        drawn = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)]
        self.leaves, self.grad = drawn[:3], drawn[3]
        if self.kind.score == "relative bias":
            self.leaves.append(torch.randn(heads, 2 * MAX_DISTANCE + 1, generator=generator, device=device))
        if backward:
            for x in self.leaves:
                x.requires_grad_()
        names = ("output", "dq", "dk", "dv", "dbias")
        terms = [dim, dim, dim, dim, sum(n * n for n in self.lengths)]
        self.expected = Expected(self._exact, dtype, names, terms)

    def arms(self, compiled: bool = True) -> list[Arm]:
        """All arms of this case; without `compiled` not those of :data:`SLOW`, nor on a CPU our `flex`."""
        matrix = self.grad.element_size() * self.heads * len(self.lengths) * self.longest**2  # one padded score matrix
        forward_only = None
        if self.device == "cpu" and self.backward:
            forward_only = "flex_attention has no backward on CPU"
        plain = self.kind.score is None and as_window(self.kind.mask) is not None
        found = [
            self._arm(LOOP, self._loop),
            self._arm(SLICED, partial(self._loop, sliced=True), absent=None if self.backward else "as the other loop"),
            self._arm(PADDED, partial(self._padded, shared=False), 3 * matrix),
            self._arm(SHARED, partial(self._padded, shared=True), 2 * matrix, absent=self._reaches_padding),
            self._arm(DENSE, self._dense, 8 * matrix),
            self._arm(PADDED_FLEX, self._padded_flex, absent=forward_only or self._no_compiler),
            self._arm(GYM, self._gym, 16 * sum(self.lengths) ** 2, absent=forward_only or self._no_gym),
            self._arm(NESTED, self._nested, 3 * matrix, absent=self._no_nested),
            self._arm(VARLEN, self._varlen, absent=self._no_varlen if plain else "it takes no such mask"),
        ]
        for backend in BACKENDS:
            found.append(
                self._arm(f"flexjag {backend}", partial(self._flexjag, backend), absent=self._refusal(backend))
            )
        planned = partial(self._flexjag, "auto", ready=False)
        found.append(self._arm(AUTO + WITH_PLAN, planned, memory=False))
        left_out = () if compiled else (*SLOW, FLEX) if self.device == "cpu" else SLOW
        return [arm for arm in found if arm.name not in left_out]

    def _arm(
        self,
        name: str,
        forward: Callable[[], Callable[[], Tensor]],
        needs: int = 0,
        absent: str | None = None,
        memory: bool = True,
    ) -> Arm:
        return Arm(name, lambda: self._whole(forward()), self.expected.check, needs, absent, memory)

    def _whole(self, forward: Callable[[], Tensor]) -> Callable[[], Tensors]:
        """The call to be timed. It returns the output and, with `backward`, the gradients."""
        if self.backward:
            return with_gradients(forward, self.leaves, self.grad)

        def inference() -> Tensors:
            with torch.no_grad():
                return (forward(),)

        return inference

    def _exact(self, dtype: torch.dtype) -> Tensors:
        inputs = [x.detach().to(dtype) for x in self.leaves]
        with torch.no_grad():
            return exact.attend(self.kind, self.lengths, inputs, self.grad.to(dtype) if self.backward else None)

    def _score(self, leaves: Sequence[Tensor]) -> Score | None:
        if self.kind.score == "alibi":
            return Alibi.from_heads(self.heads, self.device)
        return RelativeBias(leaves[3]) if self.kind.score == "relative bias" else None

    # flexjag

    def _flexjag(self, backend: str, ready: bool = True) -> Callable[[], Tensor]:
        q, k, v = self._jagged()
        asked: dict[str, Any] = {"mask": self.kind.mask, "score": self._score(self.leaves)}
        if not ready:
            return lambda: _values(attention(q, k, v, backend=backend, **asked))
        made = plan(q, k, **asked)
        return lambda: _values(attention(q, k, v, plan=made, backend=backend))

    def _jagged(self) -> tuple[Jagged, Jagged, Jagged]:
        q = Jagged.from_lengths(self.leaves[0], self.lengths)
        return q, q.with_values(self.leaves[1]), q.with_values(self.leaves[2])

    def _refusal(self, backend: str) -> str | None:
        """Reason for which a backend cannot run this case; None if it can."""
        if backend == "auto":
            return None
        q = self._jagged()[0]
        layout = plan(q).layout
        dims = (self.heads, self.heads, self.dim, self.dim)
        score = self._score(self.leaves)
        asked = Case(layout, self.kind.mask, score, Softmax(), dtype=self.dtype, grad=self.backward, dims=dims)
        return choose.refusal(backend, asked) or (self._no_compiler if backend == "flex" else None)

    # Loops and padding

    def _loop(self, sliced: bool = False) -> Callable[[], Tensor]:
        """One SDPA call per segment, cut by ``split``, or by slices as is common: their gradients span the batch."""
        options, ends = self._options(), list(itertools.pairwise(itertools.accumulate(self.lengths, initial=0)))

        def one(bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
            n = q.shape[0]
            if bias is not None:
                out = scaled_dot_product_attention(x, y, z, attn_mask=bias[..., :n, :n])
            else:
                out = scaled_dot_product_attention(x, y, z, **options)
            return out[0].transpose(0, 1)

        bias = self._bias()

        def forward() -> Tensor:
            shared = bias()
            cuts = [([x[a:b] for a, b in ends] if sliced else x.split(self.lengths)) for x in self.leaves[:3]]
            return torch.cat([one(shared, *piece) for piece in zip(*cuts, strict=True)])

        return forward

    def _options(self) -> dict[str, Any]:
        return {"is_causal": True} if isinstance(self.kind.mask, Causal) else {}

    def _positions(self) -> tuple[Tensor, Tensor]:
        i = torch.arange(self.longest, device=self.device)[None, None, :, None]
        return i, i.transpose(2, 3)

    def _bias(self) -> Callable[[], Tensor | None]:
        """SDPA's ``attn_mask`` of mask and score by position, ``[1, H or 1, N, N]``; None if ``is_causal`` suffices."""
        i, j = self._positions()
        allowed = self.kind.allowed(i, j)
        if self.kind.score is None:
            given = None if isinstance(self.kind.mask, (Full, Causal)) else allowed
            return lambda: given
        banned = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -torch.inf)
        if self.kind.score == "alibi":
            slopes = Alibi.from_heads(self.heads, self.device).slopes
            fixed = (slopes[:, None, None] * (j - i)).to(self.dtype) + banned
            return lambda: fixed
        distance = (j - i).clamp(-MAX_DISTANCE, MAX_DISTANCE)[0, 0] + MAX_DISTANCE
        return lambda: self.leaves[3][:, distance][None].to(self.dtype) + banned

    def _padded(self, shared: bool) -> Callable[[], Tensor]:
        attend, padding = self._shared() if shared else self._per_segment(), self.padding

        def forward() -> Tensor:
            q, k, v = (padding.pad(x).transpose(1, 2) for x in self.leaves[:3])
            return padding.unpad(attend(q, k, v).transpose(1, 2))

        return forward

    @cached_property
    def _reaches_padding(self) -> str | None:
        """Reason for which one mask for all segments is wrong (a row would attend padding); None if it is right."""
        i = torch.arange(self.longest)
        allowed = self.kind.allowed(i[:, None], i[None])
        wrong = any(bool(allowed[:n, n:].any()) for n in set(self.lengths))
        return "a row would attend padding" if wrong else None

    def _shared(self) -> Callable[..., Tensor]:
        bias, options = self._bias(), self._options()

        def attend(*qkv: Tensor) -> Tensor:
            scores = bias()
            return scaled_dot_product_attention(*qkv, attn_mask=scores, **(options if scores is None else {}))

        return attend

    def _per_segment(self) -> Callable[..., Tensor]:
        bias, each = self._bias(), self._allowed

        def attend(*qkv: Tensor) -> Tensor:
            scores = bias()
            if scores is None or scores.dtype == torch.bool:
                return scaled_dot_product_attention(*qkv, attn_mask=each)
            scores = torch.where(each, scores.masked_fill(scores == -torch.inf, 0.0), -torch.inf)
            return scaled_dot_product_attention(*qkv, attn_mask=scores)

        return attend

    @property
    def _allowed(self) -> Tensor:
        """Mask of each segment, bool ``[S, 1, N, N]``. Rows of padding attend key 0, so that they are not NaN."""
        i, j = self._positions()
        real = self.padding.real[:, None, None]
        return torch.where(real.transpose(2, 3), self.kind.allowed(i, j) & real, j == 0)

    def _dense(self) -> Callable[[], Tensor]:
        """Padded attention by its definition: scores, masked softmax, product with v."""
        allowed, padding, bias = self._allowed, self.padding, self._bias()

        def forward() -> Tensor:
            q, k, v = (padding.pad(x).transpose(1, 2) for x in self.leaves[:3])
            scores = q * self.dim**-0.5 @ k.transpose(2, 3)
            added = bias()
            if added is not None and added.dtype != torch.bool:
                scores = scores + added.masked_fill(added == -torch.inf, 0.0)
            weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), 3)
            return padding.unpad((weights @ v).transpose(1, 2))

        return forward

    # PyTorch's own implementations

    @property
    def _no_compiler(self) -> str | None:
        import shutil

        if self.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler on CPU"
        return None

    def _mods(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
        allowed = self.kind.allowed
        mask = lambda b, h, i, j: allowed(i, j)  # noqa: E731
        if self.kind.score is None:
            return mask, None
        if self.kind.score == "alibi":
            slopes = Alibi.from_heads(self.heads, self.device).slopes

            def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return s + slopes[h] * (j - i)

            return mask, score

        table = self.leaves[3]

        def biased(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + table[h, (j - i).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]

        return mask, biased

    def _padded_flex(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, score = self._mods()
        real, padding, n = self.padding.real, self.padding, self.longest
        within = create_block_mask(
            lambda b, h, i, j: mask(b, h, i, j) & real[b, j], len(self.lengths), None, n, n, device=self.device
        )
        compiled = torch.compile(flex_attention)

        def forward() -> Tensor:
            q, k, v = (padding.pad(x).transpose(1, 2) for x in self.leaves[:3])
            out = compiled(q, k, v, score_mod=score, block_mask=within)
            return padding.unpad(out.transpose(1, 2))

        return forward

    @property
    def _no_gym(self) -> str | None:
        try:
            importlib.import_module("attn_gym.masks.document_mask")
        except ImportError:
            return "attn_gym is not installed"
        return self._no_compiler

    def _gym(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        module = importlib.import_module("attn_gym.masks.document_mask")
        mask, score = self._mods()
        total = sum(self.lengths)
        offsets = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], device=self.device)
        whole = create_block_mask(
            module.generate_doc_mask_mod(mask, offsets), None, None, total, total, device=self.device
        )
        compiled = torch.compile(flex_attention)

        def forward() -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in self.leaves[:3])
            return compiled(q, k, v, score_mod=score, block_mask=whole)[0].transpose(0, 1)

        return forward

    @property
    def _no_nested(self) -> str | None:
        if self.kind.score is not None or not isinstance(self.kind.mask, (Full, Causal)):
            return "it takes no such mask"
        return "on CPU it takes no causal mask" if self.device == "cpu" and self.kind.mask == Causal() else None

    def _nested(self) -> Callable[[], Tensor]:
        offsets = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], device=self.device)
        options = self._options()

        def forward() -> Tensor:
            with warnings.catch_warnings():  # nested tensors warn that they are a prototype
                warnings.simplefilter("ignore")
                q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in self.leaves[:3])
                return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).values()

        return forward

    @property
    def _no_varlen(self) -> str | None:
        if self.device == "cpu":
            return "torch.nn.attention.varlen runs on CUDA only"
        return None if self.dtype in (torch.float16, torch.bfloat16) else "it takes half precision only"

    def _varlen(self) -> Callable[[], Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], dtype=torch.int32, device=self.device)
        left, right = (-1 if x is None else x for x in (as_window(self.kind.mask) or (None, None))[:2])

        def forward() -> Tensor:
            q, k, v = self.leaves[:3]
            out = varlen_attn(q, k, v, ends, ends, self.longest, self.longest, window_size=(left, right))
            assert isinstance(out, Tensor)
            return out

        return forward


def _values(out: Jagged | tuple[Jagged, Jagged]) -> Tensor:
    assert isinstance(out, Jagged)
    return out.values
