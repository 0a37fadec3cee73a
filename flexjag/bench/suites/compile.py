"""Suite ``compile``: graphs and seconds of a compiled model over batches of varying sizes. One graph should suffice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexjag.algebra.masks import Causal, Prefix, Window
from flexjag.algebra.scores import Alibi
from flexjag.api.attention import attention
from flexjag.api.plan import Plan, plan
from flexjag.bench.measuring.measure import Results, describe_error, disagreement, ratio
from flexjag.bench.suites.registry import ArmResult, CaseResult, Figure, Options, SelfTimedCase, Tell, suite
from flexjag.jagged import Jagged

HEADS, DIM = 4, 32
BATCHES, QUICK_BATCHES = {"cpu": 100, "cuda": 50}, 4
LAYERS, QUICK_LAYERS = 2, 1
MOST_SEGMENTS, LONGEST = 16, 256
MASK = Causal() & (Window(64, 0) | Prefix(4))
SHORT = {"fw": "forward", "bw": "backward", "inference": "inference"}
EDGES = {20: [1], 21: [0, 0], 22: [0, 1], 23: [7]}
"""Lengths of the batches with sizes 0 or 1, by batch index: compilers specialize on these values."""

COMPILED, EAGER = "compiled", "eager"
TRAINING, INFERENCE = "training, auto", "inference, flex"


class Model(nn.Module):
    """Attention layers with residual connections and learned ALiBi slopes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(HEADS * DIM, 3 * HEADS * DIM) for _ in range(layers)])
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, x: Jagged, p: Plan, backend: str) -> Jagged:
        """Output ``[T, H·D]`` for ``x [T, H·D]``, by a plan that all layers share."""
        for layer in self.layers:
            parts = layer(x.values).chunk(3, -1)
            q, k, v = (x.with_values(t.reshape(-1, HEADS, DIM)) for t in parts)
            out = attention(q, k, v, plan=p, backend=backend)
            assert isinstance(out, Jagged)
            x = x + out.with_values(out.values.flatten(1))
        return x


@dataclass
class Counter:
    """Counter of compiled graphs and of the time spent in Inductor.

    Attributes:
        generate: Whether Inductor generates code; if not, graphs are traced, counted and run as they are.
        graphs: Number of graphs by direction.
        seconds: Seconds spent in Inductor.
    """

    generate: bool
    graphs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHORT.values(), 0))
    seconds: float = 0.0

    def backend(self, graph: Any, inputs: Any) -> Any:
        """``torch.compile`` backend that counts the graphs it compiles."""
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
    """Seeded segment lengths of `count` batches, those of :data:`EDGES` at their indices."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        segments = int(torch.randint(2, MOST_SEGMENTS + 1, (), generator=generator))
        drawn = torch.randint(0, LONGEST, (segments,), generator=generator).tolist()
        out.append(EDGES.get(i, drawn))
    return out


@dataclass
class _Step:
    """One run of the model on one batch, with a compiled or the eager `call`."""

    model: Model
    call: Callable[..., Jagged]
    x: Jagged
    training: bool
    backend: str

    def run(self) -> tuple[Tensor, ...]:
        """Run it: the output and, in training, the gradients of the parameters."""
        slopes = self.model.slopes if self.training else self.model.slopes.detach()
        p = plan(self.x, mask=MASK, score=Alibi(slopes))
        if not self.training:
            with torch.no_grad():
                return (self.call(self.x, p, self.backend).values,)
        out = self.call(self.x, p, self.backend).values
        parameters = list(self.model.parameters())
        grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(parameters, grads, strict=True))


def _self_timed(count: int, layers: int, training: bool, options: Options) -> Callable[[Tell], list[ArmResult]]:
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
                counter = Counter(generate=not options.quick)
                return _measure(model, batches, training, counter, tell, lambda: options.over)
        finally:
            torch._dynamo.reset()

    return run


@dataclass
class _Record:
    """Measurements of one arm so far."""

    call: Callable[..., Jagged]
    backend: str
    counter: Counter | None = None
    seconds: list[float] = field(default_factory=list)
    results: list[tuple[Tensor, ...]] = field(default_factory=list)
    compiling: float = 0.0
    usual: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SHORT.values(), 0))
    failed: str | None = None

    def step(self, model: Model, x: Jagged, training: bool) -> None:
        """Run and time one batch; keep its result."""
        before = {} if self.counter is None else dict(self.counter.graphs)
        start = time.perf_counter()
        try:
            self.results.append(_Step(model, self.call, x, training, self.backend).run())
            if x.values.is_cuda:
                torch.cuda.synchronize()
        except Exception as e:  # any exception of a compiler is a result here
            self.failed = f"batch {len(self.seconds) + 1}: {describe_error(e)}"
            return
        self.seconds.append(time.perf_counter() - start)
        if self.counter is None or self.counter.graphs == before:
            return
        self.compiling += self.seconds[-1]
        if x.values.shape[0] > 1:
            self.usual = {k: n + self.counter.graphs[k] - before[k] for k, n in self.usual.items()}

    def extra(self) -> dict[str, Any]:
        """Figures for the tables: total time, and for the compiled arm its graphs and compile times."""
        found: dict[str, Any] = {"total_seconds": sum(self.seconds)}
        if self.counter is not None:
            found["graphs"] = {k: n for k, n in self.counter.graphs.items() if n}
            found["graphs_but_for_0_or_1_tokens"] = {k: n for k, n in self.usual.items() if n}
            found["seconds_of_batches_that_compiled"] = self.compiling
            found["seconds_in_inductor"] = self.counter.seconds
        return found


def _measure(
    model: Model, batches: list[Jagged], training: bool, counter: Counter, tell: Tell, over: Callable[[], bool]
) -> list[ArmResult]:
    """Measure both arms batch by batch, in alternating order. Results are kept and checked afterwards.

    The first batch always runs; before each later one the loop ends if `over` returns True (the time is used up).
    """
    compiled = torch.compile(model, fullgraph=True, backend=counter.backend)
    records = {
        COMPILED: _Record(compiled, "auto" if training else "flex", counter),
        EAGER: _Record(model, "auto"),
    }
    done = 0
    for i, x in enumerate(batches):
        if i and over():
            break
        done += 1
        tell(f"batch {i + 1} of {len(batches)}")
        for name in sorted(records, reverse=i % 2 == 0):
            if records[name].failed is None:
                records[name].step(model, x, training)
    tell("checking")
    out = []
    for name, record in records.items():
        wrong = None if record.failed else _first_wrong(model, batches[:done], training, record.results)
        if record.failed or wrong:
            out.append(ArmResult(name, "failed" if record.failed else "wrong", record.failed or wrong))
        else:
            first, extra = record.seconds[0], record.extra()
            if done < len(batches):
                extra["batches_for_which_there_was_time"] = done
            out.append(ArmResult(name, "ok", seconds=record.seconds, first_seconds=first, extra=extra))
    return out


def _first_wrong(model: Model, batches: list[Jagged], training: bool, results: list[tuple[Tensor, ...]]) -> str | None:
    """Description of the first batch whose result is off by more than rounding from the reference; None without one."""
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
        every, usual = (found.extra(case, COMPILED, k) for k in ("graphs", "graphs_but_for_0_or_1_tokens"))
        for direction in directions:
            for text, graphs in (("", every), (", but for batches of 0 or 1 tokens", usual)):
                count = None if graphs is None else graphs.get(direction, 0)
                figures.append(Figure(f"{case}: {direction} graphs{text}", count, "graphs", limit))
        total = found.extra(case, COMPILED, "total_seconds")
        figures.append(Figure(f"{case}: all batches, compiling included", total, "s"))
        figures.append(Figure(f"{case}: all batches, eager", found.extra(case, EAGER, "total_seconds"), "s"))
        faster = ratio(found.seconds(case, EAGER), found.seconds(case, COMPILED))
        figures.append(Figure(f"{case}: time of eager / compiled, median batch", faster, "x"))
    return figures


@suite(
    "compile",
    "Random batches, planning included, through a two-layer model under torch.compile(fullgraph=True).",
    _figures,
)
def cases(options: Options) -> list[SelfTimedCase]:
    """Training by the backend that auto chooses while tracing, inference by flex. A quick run generates no code."""
    count, layers = (QUICK_BATCHES, QUICK_LAYERS) if options.quick else (BATCHES[options.device], LAYERS)
    lengths = batch_lengths(count, options.seed)
    facts = {"batches": count, "layers": layers, "heads": HEADS, "dim": DIM, "seed": options.seed}
    facts |= {"fewest_tokens": min(map(sum, lengths)), "most_tokens": max(map(sum, lengths))}
    half = options
    if options.deadline is not None:
        half = replace(options, deadline=(time.monotonic() + options.deadline) / 2)
    return [
        SelfTimedCase(TRAINING, facts, _self_timed(count, layers, True, half)),
        SelfTimedCase(INFERENCE, facts, _self_timed(count, layers, False, options)),
    ]
