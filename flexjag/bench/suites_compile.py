"""One graph for every batch: graphs and seconds over batches of different sizes through a compiled model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexjag.attention import attention
from flexjag.bench.measure import Results, describe_error, disagreement, ratio
from flexjag.bench.registry import ArmResult, CaseResult, Figure, Options, Tell, Trial, suite
from flexjag.jagged import Jagged
from flexjag.masks import Causal, Prefix, Window
from flexjag.plan import Plan, plan
from flexjag.scores import Alibi

HEADS, DIM = 4, 32
BATCHES, QUICK_BATCHES = 50, 4
LAYERS, QUICK_LAYERS = 2, 1
MOST_SEGMENTS, LONGEST = 16, 256
MASK = Causal() & (Window(64, 0) | Prefix(4))
SHORT = {"fw": "forward", "bw": "backward", "inference": "inference"}
EDGES = {20: [1], 21: [0, 0], 22: [0, 1], 23: [7]}
"""Batches whose sizes are 0 or 1, which a compiler treats as constants of their own."""

COMPILED, EAGER = "compiled", "eager"
TRAINING, INFERENCE = "training, auto", "inference, flex"


class Model(nn.Module):
    """Attention layers with residuals; the ALiBi slopes are learned."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for _ in range(layers)])
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, x: Jagged, p: Plan, backend: str) -> Jagged:
        """Attention of ``x [T, H·D]`` by a plan that all layers share."""
        for layer in self.layers:
            parts = layer(x.values).chunk(3, -1)
            q, k, v = (x.with_values(t.reshape(-1, HEADS, DIM)) for t in parts)
            out = attention(q, k, v, plan=p, backend=backend)
            assert isinstance(out, Jagged)
            x = x + out.with_values(out.values.flatten(1))
        return x


@dataclass
class Counter:
    """Counts the graphs that are compiled, and the seconds that takes Inductor.

    Attributes:
        generate: Whether Inductor generates code; otherwise graphs are traced, counted and run as they are.
        graphs: How many, by direction.
        seconds: Spent in Inductor.
    """

    generate: bool
    graphs: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0, "inference": 0})
    seconds: float = 0.0

    def backend(self, graph: Any, inputs: Any) -> Any:
        """A ``torch.compile`` backend that counts."""
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.compile_fx import compile_fx

        if self.generate:
            return compile_fx(graph, inputs, inner_compile=self._inductor)
        count = {f"{short}_compiler": partial(self._as_it_is, name) for short, name in SHORT.items()}
        return aot_autograd(**count)(graph, inputs)

    def _inductor(self, graph: Any, inputs: Any, **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        backward, inference = options.get("is_backward"), options.get("is_inference")
        self.graphs["backward" if backward else "inference" if inference else "forward"] += 1
        start = time.perf_counter()
        try:
            return compile_fx_inner(graph, inputs, **options)
        finally:
            self.seconds += time.perf_counter() - start

    def _as_it_is(self, direction: str, graph: Any, inputs: Any) -> Any:
        def call(args: list[Any]) -> Any:
            return graph(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        self.graphs[direction] += 1
        return call


def batch_lengths(count: int, seed: int) -> list[list[int]]:
    """Seeded lengths of `count` batches; those of :data:`EDGES` stand at their places."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        segments = int(torch.randint(2, MOST_SEGMENTS + 1, (), generator=generator))
        drawn = torch.randint(0, LONGEST, (segments,), generator=generator).tolist()
        out.append(EDGES.get(i, drawn))
    return out


@dataclass
class _Step:
    """One batch through the model, and what it takes to check it."""

    model: Model
    call: Callable[..., Jagged]
    x: Jagged
    training: bool
    backend: str

    def run(self) -> tuple[Tensor, ...]:
        """The output, and in training the parameters' gradients."""
        slopes = self.model.slopes if self.training else self.model.slopes.detach()
        p = plan(self.x, mask=MASK, score=Alibi(slopes))
        if not self.training:
            with torch.no_grad():
                return (self.call(self.x, p, self.backend).values,)
        out = self.call(self.x, p, self.backend).values
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(parameters, grads, strict=True))


def _trial(count: int, layers: int, training: bool, options: Options) -> Callable[[Tell], list[ArmResult]]:
    def run(tell: Tell) -> list[ArmResult]:
        from torch._inductor.utils import fresh_cache

        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            model = Model(layers).to(options.device)
            inputs = [(torch.randn(sum(n), HEADS * DIM), n) for n in batch_lengths(count, options.seed)]
        batches = [Jagged.from_lengths(values.to(options.device), lengths) for values, lengths in inputs]
        torch._dynamo.reset()
        try:
            with fresh_cache():
                return _measure(model, batches, training, Counter(generate=not options.quick), tell)
        finally:
            torch._dynamo.reset()

    return run


def _measure(model: Model, batches: list[Jagged], training: bool, counter: Counter, tell: Tell) -> list[ArmResult]:
    """Both arms, batch by batch, in turn the one and the other first. Results are kept and checked afterwards."""
    compiled = torch.compile(model, fullgraph=True, backend=counter.backend)
    calls = {COMPILED: (compiled, "auto" if training else "flex"), EAGER: (model, "auto")}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    compiling = 0.0
    for i, x in enumerate(batches):
        tell(f"batch {i + 1} of {len(batches)}")
        for name in sorted(calls, reverse=i % 2 == 0):
            if name in failed:
                continue
            call, backend = calls[name]
            graphs, start = sum(counter.graphs.values()), time.perf_counter()
            try:
                results[name].append(_Step(model, call, x, training, backend).run())
            except Exception as e:  # whatever a compiler throws is a result here
                failed[name] = f"batch {i + 1}: {describe_error(e)}"
                continue
            if x.values.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if sum(counter.graphs.values()) > graphs:
                compiling += seconds[name][-1]
    tell("checking")
    wrong = {name: _first_wrong(model, batches, training, results[name]) for name in calls if name not in failed}
    out = []
    for name in calls:
        if name in failed or wrong[name] is not None:
            status = "failed" if name in failed else "wrong"
            out.append(ArmResult(name, status, failed.get(name) or wrong[name]))
            continue
        extra: dict[str, Any] = {"total_seconds": sum(seconds[name])}
        if name == COMPILED:
            extra["graphs"] = {k: n for k, n in counter.graphs.items() if n}
            extra["seconds_of_batches_that_compiled"] = compiling
            extra["seconds_in_inductor"] = counter.seconds
        out.append(ArmResult(name, "ok", seconds=seconds[name], first_seconds=seconds[name][0], extra=extra))
    return out


def _first_wrong(model: Model, batches: list[Jagged], training: bool, results: list[tuple[Tensor, ...]]) -> str | None:
    """The first batch whose result is more than rounding away from the reference's."""
    exact_model = copy.deepcopy(model).double()
    for i, (x, got) in enumerate(zip(batches, results, strict=True)):
        exact = _Step(exact_model, exact_model, x.with_values(x.values.double()), training, "reference").run()
        rounded = _Step(model, model, x, training, "reference").run()
        names = ["output", *(f"gradient of {n}" for n, _ in model.named_parameters())]
        wrong = disagreement(got, exact, rounded, names, terms=max(1, x.values.shape[0]))
        if wrong is not None:
            return f"batch {i + 1}: {wrong}"
    return None


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found = Results(cases)
    limit = None if options.quick else "<= 2"
    figures = []
    for case, directions in ((TRAINING, ("forward", "backward")), (INFERENCE, ("inference",))):
        graphs = found.extra(case, COMPILED, "graphs") or {}
        for direction in directions:
            figures.append(Figure(f"{case}: {direction} graphs", graphs.get(direction), "graphs", limit))
        total = found.extra(case, COMPILED, "total_seconds")
        figures.append(Figure(f"{case}: all batches, compiling included", total, "s"))
        figures.append(Figure(f"{case}: all batches, eager", found.extra(case, EAGER, "total_seconds"), "s"))
        usual = ratio(found.seconds(case, EAGER), found.seconds(case, COMPILED))
        figures.append(Figure(f"{case}: time of eager / compiled, median batch", usual, "x"))
    return figures


@suite(
    "compile",
    "50 random batches, planning included, through a two-layer model under torch.compile(fullgraph=True).",
    _figures,
)
def cases(options: Options) -> list[Trial]:
    """Training by the backend that auto takes while tracing, and inference by flex. A quick run generates no code."""
    count, layers = (QUICK_BATCHES, QUICK_LAYERS) if options.quick else (BATCHES, LAYERS)
    lengths = batch_lengths(count, options.seed)
    facts = {"batches": count, "layers": layers, "heads": HEADS, "dim": DIM, "seed": options.seed}
    facts |= {"fewest_tokens": min(map(sum, lengths)), "most_tokens": max(map(sum, lengths))}
    return [
        Trial(name, facts, _trial(count, layers, training, options))
        for name, training in ((TRAINING, True), (INFERENCE, False))
    ]
