"""Who can run what: one rule per backend, and the order in which ``auto`` asks.

A rule returns None if the backend can run the case, else one sentence saying why not. The rules read structure and
metadata only, so the same ones explain a plan, choose a backend and reject an impossible request.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag import costs, mods, printing
from flexjag import masks as m
from flexjag import scores as s
from flexjag.algebra.facts import as_window, diagonal_align
from flexjag.algebra.tree import is_by_position, walk
from flexjag.errors import BackendError, PlanError, explain_values
from flexjag.launching import DTYPES, HAS_TRITON
from flexjag.layout import Layout
from flexjag.nodes import Node
from flexjag.normalizers import GELU, Identity, Normalizer, Pointwise, Sigmoid, SiLU, Softmax, StickBreaking
from flexjag.upstream import ROWS, cpu_flex_misplaces

BACKENDS = ("reference", "tiled", "segments", "flex", "varlen", "triton")
LONG_LEARNED = 16384  # keys over which a learned bias, a gradient of all keys per call of segments, wastes too much
SHARED = 2**22  # numbers in a bias for all segments, if it depends on the head: 16 MB in float32
WIDEST = 256  # features that a Triton program keeps of a token
HALF = (torch.float16, torch.bfloat16)
ASSUMED_DIMS = (1, 1, 64, 64)  # H, G, D and E where nothing says them


@dataclass(frozen=True)
class Case:
    """What a backend must cope with. None means not known yet.

    Attributes:
        layout: Where the tokens sit.
        mask: The mask.
        score: The score, or None.
        normalizer: The normalizer.
        tracing: A graph is being traced.
        dtype: Of q, k and v.
        grad: Some input needs a gradient.
        lse: The log-sum-exp is wanted.
        dims: ``(H, G, D, E)``.
        scale: Factor on ``q·k``.
        block_size: Tile size.
        plain: A ``torch.func`` transform or forward-mode AD is at work, which know plain torch operations only.
    """

    layout: Layout
    mask: m.Mask
    score: s.Score | None
    normalizer: Normalizer
    tracing: bool = False
    dtype: torch.dtype | None = None
    grad: bool | None = None
    lse: bool = False
    dims: tuple[int, int, int, int] | None = None
    scale: float = 1.0
    block_size: int = 128
    plain: bool = False

    @property
    def on_cuda(self) -> bool:
        """Whether a CUDA (or ROCm) device's kernels will run."""
        return self.layout.on_gpu and self.layout.device.type in ("cuda", "cpu")


def _reference(case: Case) -> str | None:
    return "it loops over segments on the host, which cannot be traced" if case.tracing else None


def _tiled(case: Case) -> str | None:
    return None


def _segments(case: Case) -> str | None:
    if case.tracing:
        return "it loops over segments on the host, which cannot be traced"
    if not s.is_additive(case.score):
        return f"scaled_dot_product_attention only adds a bias, and {case.score!r} is more than that"
    return None


def _flex(case: Case) -> str | None:
    if not case.on_cuda:
        if case.layout.device.type != "cpu":
            return f"FlexAttention is not tested on {case.layout.device.type}"
        if case.grad:
            return "FlexAttention has no backward on CPU"
        if case.lse:
            return "FlexAttention's CPU kernel does not return the log-sum-exp"
        for fn, is_score in [] if case.tracing else printing.functions(case.mask, case.score):
            if cpu_flex_misplaces(fn, is_score):  # in a graph, its lowering says so
                return f"{ROWS}, as {getattr(fn, '__name__', type(fn).__name__)} does"
    if case.dtype == torch.float64:
        return "FlexAttention's kernels have no float64"
    if case.on_cuda and case.block_size % 128:
        return f"FlexAttention's CUDA kernels work in tiles of 128; got block_size={case.block_size}"
    if case.on_cuda and case.dims is not None and min(case.dims[2:]) < 16:
        return f"FlexAttention's CUDA kernels need D >= 16 and E >= 16; got D={case.dims[2]}, E={case.dims[3]}"
    return None


def varlen_window(case: Case) -> tuple[int, int] | None:
    """The mask as ``varlen_attn``'s ``window_size`` (bottom-right, -1 unlimited), or None if it is not one."""
    window = as_window(case.mask)
    if window is None:
        return None
    left, right, align = window
    if (left, right) != (None, None) and align == "start" and not case.layout.is_self:
        return None
    return (-1 if left is None else left, -1 if right is None else right)


def _varlen(case: Case) -> str | None:
    if not case.on_cuda:
        return "torch.nn.attention.varlen runs on CUDA only"
    if case.score is not None:
        return "varlen_attn takes no score function"
    if varlen_window(case) is None:
        return f"varlen_attn knows causal masks and windows aligned to the segments' ends, not {case.mask!r}"
    if case.dtype is not None and case.dtype not in HALF:
        return f"varlen_attn takes float16 and bfloat16, not {case.dtype}"
    if case.scale <= 0:
        return f"the flash kernel masks before it scales, so it needs scale > 0; got {case.scale}"
    if case.tracing:
        return "it needs the longest length on the host, which would compile a graph per batch"
    if case.layout.has_spare:
        return "varlen_attn leaves the spare rows of a fixed-capacity plan unwritten"
    if case.lse and case.grad:
        return "varlen_attn drops the gradient of its log-sum-exp"
    if case.dims is not None:
        heads, groups, d, e = case.dims
        if d != e or d > 256 or d % 8:
            return f"varlen_attn needs D == E, a multiple of 8, at most 256; got D={d}, E={e}"
        if heads != groups and not varlen_has_gqa():
            return "this torch's varlen_attn has no grouped-query attention"
    return None


KERNELS = (SiLU, GELU, Identity, Sigmoid, StickBreaking)
"""The normalizers that there are Triton kernels for."""


def _triton(case: Case) -> str | None:
    if type(case.normalizer) not in KERNELS:
        return f"it has no kernels for the normalizer {case.normalizer!r}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if case.layout.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels run on CUDA only"
    if case.dtype is not None and case.dtype not in DTYPES:
        return f"its kernels compute with float32, float16 and bfloat16, not {case.dtype}"
    if case.dims is not None and max(case.dims[2:]) > WIDEST:
        return f"its kernels need D and E of at most {WIDEST}; got D={case.dims[2]}, E={case.dims[3]}"
    asked = [*printing.functions(case.mask, case.score), *_cases_to_try(case)]
    return printing.objection(asked, case.layout.device, case.tracing, (printing.Triton(), printing.Torch()))


def _cases_to_try(case: Case) -> Iterator[tuple[Callable[..., Tensor], bool]]:
    """The mods of nodes that are not known to be printable, and True for those of scores."""
    tables = mods.one_row()
    for one in (*walk(case.mask), *walk(case.score)):
        if one.printable or isinstance(one, m.MaskMod | s.ScoreMod):
            continue
        if isinstance(one, s.Score):
            yield _named(mods.score_case(one, tables), one), True
        elif mods.mask_case.knows(one):  # else its spans are exact, or leave masks that are in the tree, too
            yield _named(mods.mask_case(one, tables, case.layout), one), False


def _named(fn: Callable[..., Tensor], node: Node) -> Callable[..., Tensor]:
    named = functools.partial(fn)
    named.__name__ = type(node).__name__  # pyright: ignore[reportAttributeAccessIssue]
    return named


def varlen_has_gqa() -> bool:
    """Whether this torch's ``varlen_attn`` takes ``enable_gqa`` (2.11 does not)."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_RULES: dict[str, Callable[[Case], str | None]] = {
    "reference": _reference,
    "tiled": _tiled,
    "segments": _segments,
    "flex": _flex,
    "varlen": _varlen,
    "triton": _triton,
}


def refusal(backend: str, case: Case) -> str | None:
    """Why `backend` cannot run the case, or None if it can.

    Raises:
        BackendError: If there is no such backend.
    """
    if backend not in _RULES:
        raise BackendError(f"backend: must be 'auto' or one of {', '.join(BACKENDS)}; got backend={backend!r}")
    if case.plain and backend not in ("reference", "tiled"):
        return "torch.func transforms and forward-mode AD know plain torch operations only"
    if not isinstance(case.normalizer, (Softmax, Pointwise, StickBreaking)):
        return f"it has no case for the normalizer {case.normalizer!r}"
    if isinstance(case.normalizer, Softmax) and backend == "triton":
        return "its kernels are for normalizers other than a softmax"
    if not isinstance(case.normalizer, Softmax) and backend not in ("reference", "tiled", "triton"):
        if backend != "segments":
            return f"its kernels compute a softmax, not {case.normalizer!r}"
        return _reference(case)  # without SDPA, any score will do
    return _RULES[backend](case)


def check_normalizer(layout: Layout, mask: m.Mask, normalizer: Normalizer, *, lse: bool, remainder: bool) -> None:
    """Check that a normalizer can do what is asked of it; metadata only.

    Raises:
        MaskError: If the mask is not one for this normalizer.
        PlanError: If it has no log-sum-exp or remainder, or cannot add the remainder of these queries.
    """
    if lse and not isinstance(normalizer, Softmax):
        raise PlanError(explain_values("return_lse", "only a softmax has a log-sum-exp", normalizer=normalizer))
    if remainder and not isinstance(normalizer, StickBreaking):
        rule = "only stick-breaking leaves a remainder"
        raise PlanError(explain_values("return_remainder", rule, normalizer=normalizer))
    if isinstance(normalizer, StickBreaking):
        diagonal_align(mask, layout.is_self)
        if normalizer.remainder and not layout.is_self:
            rule = "remainder=True adds each query's own value, so k and v need the very offsets of q: q.with_values"
            raise PlanError(explain_values("normalizer", rule, normalizer=normalizer))


def choose(case: Case) -> tuple[str, str]:
    """The backend ``auto`` takes, and why. On CPU it never starts a compiler by itself.

    On CUDA the order is by what the kernels are built for, not yet by a measurement of ours.
    """
    if case.plain:
        return "tiled", "torch.func transforms and forward-mode AD know plain torch operations only"
    if case.on_cuda and not isinstance(case.normalizer, Softmax):
        why_not = refusal("triton", case)
        if why_not is None:
            return "triton", "fused Triton kernels for normalizers that are not a softmax"
        return "tiled", f"plain torch over the tiles, because of triton: {why_not}"
    if case.on_cuda:
        if refusal("varlen", case) is None:
            return "varlen", "the mask is exactly one that the flash-attention kernel of varlen_attn implements"
        why_not = refusal("flex", case)
        if why_not is None:
            return "flex", "one fused FlexAttention kernel runs any mask and score"
        return "tiled", f"plain torch over the tiles, because of flex: {why_not}"
    if case.tracing:
        return "tiled", "a graph is being traced, and on CPU only tiled can be traced with gradients"
    why = refusal("segments", case)
    learned = torch.is_grad_enabled() and any(t.requires_grad for t in s.tensors(case.score))
    if why is None and learned and case.layout.num_kv > LONG_LEARNED and not _shares_bias(case):
        why = "each of its calls would make a gradient of all keys, for the learned bias"
    if why is not None:
        return "tiled", f"plain torch over the tiles, because of segments: {why}"
    expected = expected_seconds(case)
    name, other = sorted(expected, key=lambda backend: expected[backend])
    what = {
        "segments": "a run of one segment's queries at a time with the keys that they may attend",
        "tiled": "plain torch over the tiles",
    }[name]
    times = f"about {_about(expected[name])} ms expected, {other} {_about(expected[other])} ms"
    return name, f"{what}: {times}, by the lines of costs.json"


def _about(seconds: float) -> str:
    """Milliseconds to one digit, which is what the estimate is worth.

    >>> _about(0.0432), _about(0.00016)
    ('40', '0.2')
    """
    return f"{float(f'{seconds * 1e3:.1g}'):g}"


def expected_seconds(case: Case) -> dict[str, float]:
    """What the CPU backends are expected to take for a case, on the machine where ``costs.json`` was recorded."""
    layout, mask = case.layout, case.mask
    heads, _, d, e = case.dims or ASSUMED_DIMS
    sizes = layout.num_segments, layout.num_q, layout.num_kv, heads * (d + e) / costs.DIMS
    softmax = isinstance(case.normalizer, Softmax)
    if not softmax:
        kind = "pointwise"
    elif case.score is None and as_window(mask) in SDPA_WINDOWS and case.scale > 0:
        kind = "whole"
    elif _shares_bias(case):
        kind = "shared bias"
    else:
        kind = "runs"
    works = {
        "segments": costs.work_of_segments(f"segments, {kind}", mask, *sizes),
        "tiled": costs.work_of_tiles("tiled" if softmax else "tiled, pointwise", mask, *sizes),
    }
    return {backend: costs.seconds(work, bool(case.grad)) for backend, work in works.items()}


def _shares_bias(case: Case) -> bool:
    """Whether ``segments`` evaluates one bias for all segments; as far as their mean length tells."""
    layout = case.layout
    _, n, keys = costs.lengths(layout.num_segments, layout.num_q, layout.num_kv)
    runs = costs.work_of_segments("segments, runs", case.mask, layout.num_segments, layout.num_q, layout.num_kv, 1.0)
    small = n * keys <= min(2 * runs.scores, SHARED / (case.dims or (1,))[0])
    return small and is_by_position(case.mask, case.score, layout.is_self)


SDPA_WINDOWS = ((None, None, "start"), (None, None, "end"), (None, 0, "start"))
"""What ``scaled_dot_product_attention`` does without a mask tensor: all keys, or ``is_causal`` (top-left)."""


def pick(backend: str, case: Case) -> str:
    """Resolve a requested backend: ``"auto"`` by rule, a name only if it can run the case.

    Raises:
        BackendError: If the named backend cannot run it; the message names one that can.
    """
    if backend == "auto":
        return choose(case)[0]
    why_not = refusal(backend, case)
    if why_not is None:
        return backend
    able = next((b for b in (choose(case)[0], *BACKENDS) if refusal(b, case) is None), None)
    hint = f"use backend={able!r} or backend='auto'" if able else "no backend here can"
    raise BackendError(f"backend: {backend!r} cannot run this plan: {why_not}; {hint}")
