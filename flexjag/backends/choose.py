"""Backend selection: the registry, the order in which ``auto`` tries backends, and the explanation of its choice.

A backend's capabilities are in its record (:mod:`flexjag.backends.base`). The rules read structure and metadata only,
so the same ones explain a plan, choose a backend and reject an impossible request.
"""

from __future__ import annotations

from flexjag.backends.base import CALLS, Backend, Case
from flexjag.backends.costs import seconds
from flexjag.backends.cpp.rule import CPP
from flexjag.backends.flex.rule import FLEX
from flexjag.backends.reference import REFERENCE
from flexjag.backends.segments.rule import SEGMENTS
from flexjag.backends.tiled.rule import TILED
from flexjag.backends.triton.rule import TRITON
from flexjag.backends.varlen import VARLEN
from flexjag.errors import BackendError, explain_values

OWN = (REFERENCE, TILED, SEGMENTS, CPP, FLEX, VARLEN, TRITON)
BACKENDS = {x.name: x for x in OWN}
"""All backends by name, flexjag's :data:`OWN` and registered ones."""

ON_CUDA, ELSEWHERE = ["varlen", "triton", "flex", "tiled"], ["segments", "cpp", "tiled"]
"""The backends that ``auto`` tries, in order. On CUDA the order is by the kernels' purpose, not yet by a measurement of
ours. In traced graphs, too, the first one that can run the case is taken. The last one runs everything."""

WHY = {
    "triton": "fused Triton kernels of this plan, whose tiles begin where segments begin if it is a softmax",
    "varlen": "the mask is exactly one that the flash-attention kernel of varlen_attn implements",
    "flex": "one fused FlexAttention kernel runs any mask and score",
    "cpp": "C++ kernels of this plan",
    "tiled": "plain torch over the tiles",
    "segments": "a run of one segment's queries at a time with the keys that they may attend",
}


def register(backend: Backend) -> None:
    """Register a backend for ``attention(backend=...)`` and, if `before` is set, for ``auto``.

    Raises:
        BackendError: If it is no record, its name is taken, or `before` is no backend that ``auto`` tries.

    >>> register(Backend("mine", "the reference again", "all", run=BACKENDS["reference"].run))
    >>> list(BACKENDS)[-1]
    'mine'
    >>> unregister("mine")
    """
    if not isinstance(backend, Backend):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BackendError(explain_values("backend", "must be a Backend", type=type(backend).__name__))
    if backend.name in BACKENDS or backend.name == "auto":
        raise BackendError(explain_values("name", "is taken", name=backend.name))
    orders = [order for order in (ON_CUDA, ELSEWHERE) if backend.before in order]
    if backend.before is not None and not orders:
        raise BackendError(explain_values("before", "must be a backend that auto asks", before=backend.before))
    BACKENDS[backend.name] = backend
    for order in orders:
        order.insert(order.index(backend.before), backend.name)  # type: ignore[arg-type]


def unregister(name: str) -> None:
    """Remove a backend that :func:`register` added.

    Raises:
        BackendError: If there is none of that name, or it is flexjag's own.
    """
    if name not in BACKENDS or BACKENDS[name] in OWN:
        raise BackendError(explain_values("name", "must be a backend that register() added", name=name))
    del BACKENDS[name]
    for order in (ON_CUDA, ELSEWHERE):
        order[:] = [x for x in order if x != name]


def refusal(backend: str, case: Case) -> str | None:
    """The reason why `backend` cannot run the case, or None if it can.

    Raises:
        BackendError: If there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend: must be 'auto' or one of {', '.join(BACKENDS)}; got backend={backend!r}")
    record = BACKENDS[backend]
    return record.promises.refuse(case) or record.refuse(case)


def choose(case: Case) -> tuple[str, str]:
    """The backend that ``auto`` selects, and the reason.

    It is the first that can run the case; off CUDA, those with a `cost` are compared by expected time.
    """
    name, expected, passed = _choose(case)
    why = WHY.get(name, BACKENDS[name].title)
    if not expected:
        return name, why + (passed if name == _order(case)[-1] else "")
    times = ", ".join(f"{other} {_about(t)} ms" for other, t in sorted(expected.items()) if other != name)
    return name, f"{why}: about {_about(expected[name])} ms expected, {times}, by the lines of costs.json"


def _order(case: Case) -> list[str]:
    return ON_CUDA if case.on_cuda else ELSEWHERE


def _choose(case: Case, without: str | None = None) -> tuple[str, dict[str, float], str]:
    """The selected backend, expected seconds by backend if compared, and the reason for the last skipped one."""
    able: list[str] = []
    passed, order = "", [name for name in _order(case) if name != without]
    for name in order:
        record = BACKENDS[name]
        if not isinstance(case.normalizer, record.promises.normalizers):
            continue
        why_not = refusal(name, case) or record.wasteful(case)
        if why_not is None:
            able.append(name)
        else:
            passed = f", because of {name}: {why_not}"
    expected = {} if case.on_cuda or case.tracing else expected_seconds(case, able)
    fastest = min(expected, key=expected.__getitem__, default=order[-1])
    first = next((name for name in able if name not in expected or name == fastest), fastest)
    return first, expected if first in expected and len(expected) > 1 else {}, passed


def _about(seconds: float) -> str:
    """Format seconds as milliseconds with one significant digit, the precision of the estimate.

    >>> _about(0.0432), _about(0.00016)
    ('40', '0.2')
    """
    return f"{float(f'{seconds * 1e3:.1g}'):g}"


def expected_seconds(case: Case, names: list[str]) -> dict[str, float]:
    """Expected CPU seconds of backends with a `cost`, on the machine where ``costs.json`` was recorded.

    They include the setup's seconds, spread over :data:`flexjag.backends.base.CALLS` calls.
    """
    records = [BACKENDS[name] for name in names]
    return {x.name: seconds(x.cost(case), bool(case.grad)) + x.setup / CALLS for x in records if x.cost is not None}


def pick(backend: str, case: Case, without: str | None = None) -> str:
    """Resolve a requested backend: the selected one for ``"auto"``, else the named one if it can run the case.

    Args:
        backend: The requested one.
        case: The requirements.
        without: A backend that ``auto`` must not select, since it failed.

    Raises:
        BackendError: If the named backend cannot run it; the message names one that can.
    """
    if backend == "auto":
        return _choose(case, without)[0]
    why_not = refusal(backend, case)
    if why_not is None:
        return backend
    able = next((b for b in (_choose(case)[0], *BACKENDS) if refusal(b, case) is None), None)
    hint = f"use backend={able!r} or backend='auto'" if able else "no backend here can"
    raise BackendError(f"backend: {backend!r} cannot run this plan: {why_not}; {hint}")
