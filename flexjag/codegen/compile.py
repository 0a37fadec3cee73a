"""``compile_for``: compile a plan or a function to GPU kernels, without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flexjag.api.attention import attention, check_inputs
from flexjag.api.plan import Plan
from flexjag.backends.choose import refusal
from flexjag.codegen import cache as store
from flexjag.codegen.payload import Payload, pack, unpack
from flexjag.codegen.report import Listing
from flexjag.codegen.targets import Target, get_target
from flexjag.codegen.worker import TIMEOUT_S, Worker, call
from flexjag.errors import BackendError, CodegenError, ShapeError, TargetError, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.outline import for_gpu, mark_sizes
from flexjag.offsets import mark_varying

TESTED_TORCH = ("2.11", "2.12", "2.13", "2.14")
"""PyTorch releases with whose internals the worker was tested."""


class Simulation(NamedTuple):
    """Results of simulated kernels.

    Attributes:
        out: The function's return value, on the CPU.
        grads: Gradients by the tensor that requires them: ``grads[q.values]``, ``grads[slopes]``.
    """

    out: Any
    grads: dict[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Report(Listing):
    """The kernels of one compilation: their code, their resource usage, and their simulation on the CPU.

    ``print`` it, display it in Jupyter, ``save`` it, or index it by phase: ``report["forward"].registers``.
    """

    job: _Job
    wiring: Any

    def simulate(
        self, *args: Any, grad_out: Any = None, timeout: float = TIMEOUT_S, worker: Worker | None = None
    ) -> Simulation:
        """Run these kernels on the CPU, in Triton's interpreter. Slow: seconds per few hundred tokens.

        Args:
            args: The arguments of :func:`compile_for` (``q, k, v`` for a plan), with the same shapes, strides, dtypes
                and sharing; values may differ. Default: those that were compiled for.
            grad_out: The gradient of the output, a Jagged or a tensor, or a tuple with one for each output; None runs
                the forward alone. With a plan it may follow `v`.
            timeout: Seconds after which the worker is stopped.
            worker: A running worker with ``interpret=True``, to save the start of one.

        Returns:
            ``(out, grads)``.

        Raises:
            CodegenError: If `grad_out` is given for kernels made with ``backward=False``, or the worker fails.
            ShapeError: If the arguments differ from those compiled for in shape, stride, dtype or sharing.
        """

        def run(*job: Any) -> Any:
            if worker is not None:
                return worker.call(*job, timeout=timeout)
            return call(*job, interpret=True, timeout=timeout)

        return _simulate(self, args, grad_out, run)


def compile_for(
    target: str | Target,
    plan: Plan | Callable[..., Any],
    *args: Any,
    backward: bool = True,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    assemble: bool = True,
    cache: bool = True,
    timeout: float = TIMEOUT_S,
    worker: Worker | None = None,
) -> Report:
    """Compile a plan or a function to GPU kernels, without a GPU.

    The kernels are FlexAttention's own, as Inductor generates and Triton assembles them for the target. All is done in
    a worker process; the state of this one does not change.

    Args:
        target: ``"sm_80"``, ``"sm_90"`` or ``"sm_100"``.
        plan: A plan, or a function or module that calls :func:`flexjag.attention` and can be compiled into one graph.
        args: ``q, k, v`` for a plan; else the function's arguments. Their values do not matter. What functions of a
            script or notebook refer to is sent along; those of an imported module are looked up there by name, so a
            global that was changed since the import is not seen.
        backward: Compile the backward's kernels, too. For a plan, q, k and v then count as requiring gradients.
        dtype: The dtype that q, k and v are converted to. Default: their own. For a plan only.
        scale: As in :func:`flexjag.attention`. For a plan only.
        return_lse: As in :func:`flexjag.attention`. For a plan only.
        kernel_options: FlexAttention's options, which override the plan's: ``{"BLOCK_M": 64, "bwd_num_warps": 8}``.
        assemble: Make machine code and measure it. False is quicker and enough for :meth:`Report.simulate`.
        cache: Read the result from the disk (:mod:`flexjag.caches`) if it is there, and write it.
        timeout: Seconds after which the worker is stopped.
        worker: A running worker, to save the start of one. With ``interpret=True`` it cannot `assemble`.

    Returns:
        The report.

    Raises:
        TargetError: If the target is unknown, or its vendor is not NVIDIA.
        BackendError: If the plan cannot run on the ``flex`` backend.
        CodegenError: If Triton is missing, this torch is not one of the tested ones, or the worker fails.
        MissingExtraError: If cloudpickle is not installed: it comes with ``flexjag[codegen]``.

    >>> from flexjag.api.plan import plan
    >>> x = Jagged.from_lengths(torch.zeros(300, 2, 64), [100, 200])
    >>> compile_for("sm_70", plan(x), x, x, x)
    Traceback (most recent call last):
    ...
    flexjag.errors.TargetError: target: must be one of sm_80, sm_90, sm_100, gfx942; got target='sm_70'
    """
    goal = get_target(target)
    check_support(goal)
    importlib.import_module("torch._dynamo")  # mark_varying() has no effect before it is loaded
    job = _job(plan, args, backward, dtype, scale, return_lse, dict(kernel_options or {}))
    wrappers, wiring, kernels = _make(job, goal, assemble, cache, timeout, worker)
    return Report(goal, tuple(kernels), job.about, store.versions(), wrappers, job, wiring)


def check_support(target: Target) -> None:
    """Check that kernels for `target` can be compiled in this environment.

    Raises:
        CodegenError: If Triton is missing or this torch is not one of the tested ones.
        TargetError: If the target's vendor is not NVIDIA.
    """
    if importlib.util.find_spec("triton") is None:
        raise CodegenError("triton: must be installed to make kernels (pip install triton); it was not found")
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in TESTED_TORCH:
        tested = ", ".join(TESTED_TORCH)
        raise CodegenError(explain_values("torch", f"must be one of the tested {tested}", torch=torch.__version__))
    if target.vendor != "nvidia":
        rule = "FlexAttention's kernels are made for NVIDIA's GPUs only (codegen.assemble takes any Triton kernel)"
        raise TargetError(explain_values("target", rule, target=target.name))


@dataclass(frozen=True, eq=False)
class _Job:
    """One compilation request.

    Attributes:
        fn: The function to compile.
        args: Its arguments.
        backward: Whether to compile the backward.
        options: FlexAttention's kernel options.
        about: Description of the computation, for the report.
        payload: ``(fn, args)``, split into structure and tensors.
        leaves: The caller's tensors by the id of their copies in the payload.
        dtype: The dtype that q, k and v are converted to.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    backward: bool
    options: dict[str, Any]
    about: dict[str, Any]
    payload: Payload
    leaves: dict[int, Tensor]
    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class _Attend:
    """Attention by a plan, as a function of q, k and v."""

    plan: Plan
    scale: float | None
    return_lse: bool

    def __call__(self, q: Jagged, k: Jagged, v: Jagged) -> Any:
        return attention(q, k, v, plan=self.plan, backend="flex", scale=self.scale, return_lse=self.return_lse)


def _job(
    plan: Plan | Callable[..., Any],
    args: tuple[Any, ...],
    backward: bool,
    dtype: torch.dtype | None,
    scale: float | None,
    return_lse: bool,
    options: dict[str, Any],
) -> _Job:
    about: dict[str, Any] = {"backward": backward or None, "kernel_options": options or None}
    if isinstance(plan, Plan):
        q, k, v = _check_qkv(args)
        dtype = q.values.dtype if dtype is None else dtype
        check_inputs(q, k, v)
        if not q.values.shape[0] or not k.values.shape[0]:
            raise CodegenError("plan: has no tokens, so there is no kernel to run")
        _check_flex(plan, q, v, dtype, return_lse)
        mark_sizes(plan)
        tokens = f"{plan.layout.num_q}x{plan.layout.num_kv}"
        about = {"mask": repr(plan.mask), "score": plan.score and repr(plan.score), "tokens": tokens} | about
        heads = f"{q.values.shape[1]}/{k.values.shape[1]}"
        about |= {"heads": heads, "dims": f"{q.values.shape[2]}/{v.values.shape[2]}", "dtype": str(dtype)[6:]}
        fn: Callable[..., Any] = _Attend(plan, scale, return_lse)
    elif callable(plan):
        if dtype is not None or scale is not None or return_lse:
            raise CodegenError("dtype, scale, return_lse: are for a plan; a function decides these itself")
        for x in pytree.tree_leaves(args, is_leaf=lambda x: isinstance(x, Jagged)):
            if isinstance(x, Jagged):
                mark_varying(x.values, 0)
                mark_varying(x.offsets, 0)
        fn, about = plan, {"function": getattr(plan, "__qualname__", type(plan).__name__)} | about
    else:
        rule = "must be a Plan or a function that calls flexjag.attention"
        raise CodegenError(explain_values("plan", rule, type=type(plan).__name__))
    given, leaves = _leaves(args, backward, dtype) if isinstance(plan, Plan) else (args, {})
    payload = pack((fn, given))
    if backward and not any(x.requires_grad for x in payload.tensors):
        raise CodegenError("backward: needs a tensor that requires a gradient, or backward=False for the forward")
    return _Job(fn, given, backward, options, about, payload, leaves, dtype)


def _check_qkv(args: tuple[Any, ...]) -> tuple[Jagged, Jagged, Jagged]:
    if len(args) != 3 or not all(isinstance(x, Jagged) for x in args):
        raise ShapeError(explain_values("args", "a plan takes q, k and v", types=[type(x).__name__ for x in args]))
    return args


def _check_flex(plan: Plan, q: Jagged, v: Jagged, dtype: torch.dtype, return_lse: bool) -> None:
    heads, dim = q.values.shape[1:]
    dims = (heads, v.values.shape[1], dim, v.values.shape[2])
    why = refusal("flex", for_gpu(plan).case(dtype=dtype, lse=return_lse, dims=dims))
    if why is not None:
        raise BackendError(f"plan: its kernels are not FlexAttention's: {why}")


def _leaves(
    args: tuple[Any, ...], backward: bool, dtype: torch.dtype | None
) -> tuple[tuple[Any, ...], dict[int, Tensor]]:
    """Copies of q, k and v as leaves, and the caller's tensors by the copies' ids. A tensor given twice makes two."""
    made, whose = [], {}
    for x in args:
        leaf = x.values.detach().to(dtype or x.values.dtype, copy=True).requires_grad_(backward)
        mark_varying(leaf, 0)
        whose[id(leaf)] = x.values
        made.append(x.with_values(leaf))
    return tuple(made), whose


def _make(job: _Job, target: Target, assemble: bool, cache: bool, timeout: float, worker: Worker | None) -> Any:
    """Compile in a worker, or return the cached result of the same request."""
    options, precision = tuple(sorted(job.options.items())), torch.get_float32_matmul_precision()
    name = store.key(job.payload.digest(), target, job.backward, options, precision, assemble)
    made = store.load(name) if cache else None
    if made is None:
        structure, metas = job.payload.structure, job.payload.metas
        do = call if worker is None else worker.call
        made = do("make", structure, metas, target, job.backward, job.options, precision, assemble, timeout=timeout)
        if cache:
            store.store(name, made)
    return made


def _simulate(report: Report, args: tuple[Any, ...], grad_out: Any, run: Callable[..., Any]) -> Simulation:
    job = report.job
    payload, leaves = job.payload, job.leaves
    if leaves and len(args) == 4 and grad_out is None:
        args, grad_out = args[:3], args[3]
    if args:
        given, leaves = _leaves(_check_qkv(args), job.backward, job.dtype) if leaves else (args, {})
        payload = pack((job.fn, given))
        if payload.digest() != job.payload.digest():
            rule = "must be what the kernels were made for in shapes, strides, dtypes and which tensors are shared"
            raise ShapeError(f"args: {rule}; with a plan, share its offsets")
    if grad_out is not None and "backward" not in report.wrappers:
        raise CodegenError("grad_out: these kernels were made with backward=False")
    wrappers = dict(report.wrappers)
    if grad_out is None:
        wrappers.pop("backward", None)
    tangents = [x.values if isinstance(x, Jagged) else x for x in _as_tuple(grad_out)]
    outputs, found = _run(wrappers, report.wiring, payload.tensors, tangents, run)
    places = [outputs[i] if kind == "output" else payload.tensors[i] for kind, i in report.wiring.result]
    grads: dict[Tensor, Tensor] = {}
    for i, grad in found.items():
        owner = leaves.get(id(payload.tensors[i]), payload.tensors[i])  # q, k and v may share one owner
        grads[owner] = grads[owner] + grad if owner in grads else grad
    return Simulation(unpack(report.wiring.structure, places), grads)


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _run(
    wrappers: Mapping[str, str],
    wiring: Any,
    tensors: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    run: Callable[..., Any],
) -> tuple[list[Any], dict[int, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="flexjag-") as name:
        path = Path(name) / "tensors.pt"
        held = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), ([*tensors], [*tangents]))
        torch.save(held, path)
        return run("simulate", wrappers, wiring, path)
