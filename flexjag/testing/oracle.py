"""The assertion that a backend computes what the dense float64 reference computes, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra import user_functions as functions
from flexjag.algebra.normalizers import Normalizer, Softmax, StickBreaking
from flexjag.api.attention import attention
from flexjag.api.plan import Plan
from flexjag.api.plan import plan as make_plan
from flexjag.backends.base import HALF
from flexjag.backends.choose import BACKENDS, choose
from flexjag.jagged import Jagged
from flexjag.testing.rounding.bounds import rounding_bounds

REST: dict[type[Normalizer], str] = {Softmax: "return_lse", StickBreaking: "return_remainder"}
"""Argument of :func:`~flexjag.api.attention.attention` that requests a normalizer's second result, if it has one."""

_Row = tuple[str, Tensor, Tensor, Tensor, Tensor | float]


@dataclass(frozen=True, eq=False)
class Trial:
    """Inputs of an attention call and its loss, shared by the tested computation and the reference."""

    q: Jagged
    k: Jagged
    v: Jagged
    plan: Plan
    scale: float
    learned: Sequence[Tensor]
    grad_out: Tensor
    grad_lse: Tensor
    lse: bool
    backward: bool

    @staticmethod
    def make(
        q: Jagged,
        k: Jagged,
        v: Jagged,
        plan: Plan,
        scale: float | None,
        learned: Sequence[Tensor] | None,
        *,
        lse: bool,
        backward: bool,
        seed: int,
    ) -> Trial:
        """Create a trial: fill in defaults, and draw the weights of the loss from `seed`."""
        dtype, device = q.values.dtype, q.values.device
        scale = 1.0 / math.sqrt(max(1, q.values.shape[2])) if scale is None else scale
        learned = functions.learned_tensors(plan.score, dtype, plan.place) if learned is None else learned
        g = torch.Generator().manual_seed(seed)
        shape = (*q.values.shape[:2], v.values.shape[2])
        grad_out, grad_lse = (torch.randn(n, generator=g).to(device, dtype) for n in (shape, shape[:2]))
        return Trial(q, k, v, plan, scale, learned, grad_out, grad_lse * lse, lse, backward)


@dataclass(frozen=True, eq=False)
class Result:
    """Results of a run: the output, the log-sum-exp or remainder, and gradients of q, k, v and learned tensors."""

    out: Tensor
    lse: Tensor
    grads: list[Tensor]


def _run(backend: str, dtype: torch.dtype, trial: Trial) -> Result:
    """Run one backend in one precision, and differentiate a weighted sum of its results."""
    inputs = (trial.q, trial.k, trial.v)
    leaves = [x.values.detach().to(dtype).requires_grad_(trial.backward) for x in inputs]
    q, k, v = (x.with_values(t) for x, t in zip(inputs, leaves, strict=True))
    rest = REST[type(trial.plan.normalizer)] if trial.lse else ""
    got = attention(
        q,
        k,
        v,
        plan=trial.plan,
        scale=trial.scale,
        return_lse=rest == "return_lse",
        return_remainder=rest == "return_remainder",
        backend=backend,
    )
    out, lse = (x.values for x in got) if isinstance(got, tuple) else (got.values, got.values.new_zeros(0))
    grads: list[Tensor] = []
    if trial.backward:
        loss = (out * trial.grad_out.to(dtype)).sum()
        if trial.lse:
            loss = loss + (torch.where(torch.isfinite(lse), lse, 0.0) * trial.grad_lse.to(lse.dtype)).sum()
        found = torch.autograd.grad(loss, [*leaves, *trial.learned], allow_unused=True, materialize_grads=True)
        grads = [x.detach() for x in found]
    return Result(out.detach(), lse.detach(), grads)


def assert_matches_reference(
    q: Jagged,
    k: Jagged,
    v: Jagged,
    *,
    mask: m.Mask | None = None,
    score: s.Score | None = None,
    plan: Plan | None = None,
    backend: str = "auto",
    scale: float | None = None,
    learned: Sequence[Tensor] | None = None,
    lse: bool = True,
    backward: bool = True,
    seed: int = 0,
    norms: bool = False,
) -> dict[str, float]:
    """Assert that a backend agrees with the dense reference in float64, forward and backward, up to rounding.

    For each tensor the allowed error is ``2 * (worst error of the reference in the same precision + rounding)``. The
    rounding term is elementwise (:func:`~flexjag.testing.rounding.bounds.rounding_bounds`), an error analysis.

    Args:
        q: ``[T_q, H, D]``, in the precision to test.
        k: ``[T_kv, G, D]``.
        v: ``[T_kv, G, E]``.
        mask: The mask. Default: all.
        score: The score. Default: none.
        plan: A plan made before, instead of mask and score.
        backend: Name of the backend to test.
        scale: Factor on ``q·k``. Default ``1 / sqrt(D)``.
        learned: Tensors in the score whose gradients are compared. Default: all that require gradients.
        lse: Compare the log-sum-exp, too, or the remainder, if the normalizer has one.
        backward: Compare the gradients of q, k, v and `learned`, too.
        seed: Seed of the weights of the loss.
        norms: Bound each tensor's error as a whole, too: tighter than its entries' worst case in half precision.

    Returns:
        The largest ratio of error to allowed error for each tensor compared: ``out``, ``lse``, ``grad_q``, ...

    Raises:
        AssertionError: If an error exceeds its bound, naming each such tensor, the error, the bound and the index.

    >>> x = Jagged.from_lengths(torch.randn(8, 2, 16, dtype=torch.float64), [3, 0, 5])
    >>> sorted(assert_matches_reference(x, x, x, mask=m.Causal(), backend="tiled"))
    ['grad_k', 'grad_q', 'grad_v', 'lse', 'out']
    """
    plan = make_plan(q, k, mask=mask, score=score) if plan is None else plan
    lse = lse and type(plan.normalizer) in REST
    dtype = q.values.dtype
    trial = Trial.make(q, k, v, plan, scale, learned, lse=lse, backward=backward, seed=seed)
    return check_against_reference(
        trial,
        lambda _: _run(backend, dtype, trial),
        f"backend={backend!r}",
        _compute(backend, trial),
        norms=norms,
    )


def check_against_reference(
    trial: Trial, run: Callable[[Result], Result], name: str, compute: torch.dtype, *, norms: bool = False
) -> dict[str, float]:
    """Compare a computation of a trial with the reference.

    Args:
        trial: The trial.
        run: The computation. It is passed the reference's result in float64.
        name: Name of the computation, for messages.
        compute: Dtype of its intermediates.
        norms: Bound each tensor's error as a whole, too. The bounds of single entries are for the worst case, which in
            half precision, and for what is learned from all scores, may be larger than the entries.

    Returns:
        The largest ratio of error to allowed error for each tensor compared.

    Raises:
        AssertionError: If a ratio is over 1.
    """
    q, k, v, plan = trial.q, trial.k, trial.v, trial.plan
    dtype = q.values.dtype
    exact = _run("reference", torch.float64, trial)
    same = exact if dtype == torch.float64 else _run("reference", dtype, trial)
    got = run(exact)
    bounds = rounding_bounds(
        q.values,
        k.values,
        v.values,
        plan.layout,
        plan.mask,
        plan.score,
        scale=trial.scale,
        grad_out=trial.grad_out,
        grad_lse=trial.grad_lse,
        dtype=dtype,
        compute=compute,
        learned=trial.learned,
        normalizer=plan.normalizer,
    )
    rows: list[_Row] = [("out", exact.out, same.out, got.out, bounds.out)]
    if trial.lse:
        rows.append((REST[type(plan.normalizer)].removeprefix("return_"), exact.lse, same.lse, got.lse, bounds.lse))
    if trial.backward:
        names = ["grad_q", "grad_k", "grad_v", *(f"grad_learned[{i}]" for i in range(len(trial.learned)))]
        limits = [bounds.q, bounds.k, bounds.v, *bounds.learned]
        rows += zip(names, exact.grads, same.grads, got.grads, limits, strict=True)
    ratios, faults = {}, []
    for row in rows:
        ratios[row[0]], fault = _compare(*row)
        if norms and fault is None:
            terms = plan.layout.num_kv * (plan.layout.num_q if "learned" in row[0] else 1)
            norm, fault = _compare_norms(*row[:4], dtype, terms)
            ratios[row[0]] = max(ratios[row[0]], norm)
        faults += [fault] if fault else []
    if faults:
        where = f"q_lengths={q.lengths.tolist()}, kv_lengths={k.lengths.tolist()}"
        raise AssertionError(
            f"{name} differs from the reference by more than rounding in {dtype}: {'; '.join(faults)}; "
            f"{where}, plan={plan!r}"
        )
    return ratios


def _compare_norms(
    name: str, exact: Tensor, same: Tensor, got: Tensor, dtype: torch.dtype, terms: int
) -> tuple[float, str | None]:
    """Ratio of the error's Euclidean norm to its likely bound, with a message if it is over 1, else None.

    Roundings of random sign add up like a random walk: by the square root of the number of terms, in float32, in
    which GPUs add. The inputs' dtype rounds a few times. A factor of 2 allows for the order of sums, another for a
    likely excess.
    """
    finite = torch.isfinite(exact)
    exact, same, got = (x.double()[finite] for x in (exact, same, got))
    unit = torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps
    allowed = 4 * ((same - exact).norm() + unit * exact.norm()) + torch.finfo(torch.float64).tiny
    ratio = float((got - exact).norm() / allowed)
    if ratio <= 1:
        return ratio, None
    return ratio, f"{name} is off by {(got - exact).norm():.3g} in norm, allowed {allowed:.3g} of {exact.norm():.3g}"


def _compute(backend: str, trial: Trial) -> torch.dtype:
    """Dtype of a backend's intermediates."""
    q, k, v, plan = trial.q.values, trial.k.values, trial.v.values, trial.plan
    if backend == "auto":
        dims = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
        lse = trial.lse and isinstance(plan.normalizer, Softmax)
        known = {"dtype": q.dtype, "grad": trial.backward, "lse": lse, "dims": dims, "scale": trial.scale}
        backend = choose(plan.case(**known))[0]
    wide = isinstance(plan.normalizer, BACKENDS[backend].promises.wide)
    return torch.float32 if wide and q.dtype in HALF else q.dtype


def _compare(name: str, exact: Tensor, same: Tensor, got: Tensor, rounding: Tensor | float) -> tuple[float, str | None]:
    """Largest ratio of error to allowed error, with a message if it is over 1, else None."""
    if got.shape != exact.shape:
        return torch.inf, f"{name} has shape {list(got.shape)} instead of {list(exact.shape)}"
    if not exact.numel():
        return 0.0, None
    exact, same, got = exact.double(), same.double(), got.double()
    infinite = torch.isinf(exact)
    noise = (same - exact).masked_fill(infinite, 0.0).abs().max()
    allowed = (2 * (noise + rounding)).expand(exact.shape) + torch.finfo(torch.float64).tiny
    error = torch.where(infinite & (got == exact), 0.0, (got - exact).abs())
    ratio = (error / allowed).nan_to_num(nan=torch.inf, posinf=torch.inf)
    worst = int(ratio.argmax())
    if not ratio.flatten()[worst] > 1:
        return float(ratio.max()), None
    at = [int(x) for x in torch.unravel_index(torch.tensor(worst), exact.shape)]
    values = f"{got.flatten()[worst]:.9g} instead of {exact.flatten()[worst]:.9g}"
    return float(ratio.max()), (
        f"{name}{at} is {values} (error {error.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}, "
        f"{int((ratio > 1).sum())} of {ratio.numel()} off)"
    )
