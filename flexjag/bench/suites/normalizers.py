"""Suite ``normalizers``: attention with weights other than softmax, against its definition on padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from flexjag.algebra.masks import Causal
from flexjag.algebra.normalizers import Normalizer, Sigmoid, SiLU, StickBreaking
from flexjag.algebra.scores import RelativeBias
from flexjag.api.attention import attention
from flexjag.api.plan import Plan, plan
from flexjag.bench.arms.weights import Dense
from flexjag.bench.measuring.lengths import constant_lengths, meta_lengths
from flexjag.bench.measuring.measure import Results, ratio
from flexjag.bench.measuring.padded import Expected, Padding, Tensors
from flexjag.bench.suites.registry import Arm, Case, CaseResult, Figure, Options, suite
from flexjag.jagged import Jagged
from flexjag.variants import HSTUBias, HSTULayer, next_times

HSTU, BIASED, LAYER = "HSTU attention", "HSTU attention, learned bias", "HSTU layer"
SIGMOID, STICK = "sigmoid attention", "stick-breaking attention"
DIRECTIONS = ("forward", "forward + backward")
PADDED, AUTO = "padded dense", "flexjag auto"
PLANNED = f"{AUTO}, planning included"
MATRICES = {HSTU: (5, 6), BIASED: (5, 7), LAYER: (8, 11), SIGMOID: (5, 8), STICK: (8, 16)}
"""Score matrices that a padded arm holds at peak, forward and with backward (measured); those of STICK are float32."""

TIME_BUCKETS = 64


@dataclass(frozen=True)
class NormalizerSizes:
    """Sizes of a case, and the part of its results that is checked.

    Attributes:
        segments: Number of segments S.
        longest: Upper bound N of the lengths, exclusive; with `sparsity` None the length of all.
        heads: Number of heads H.
        dim: Head dimension D.
        sparsity: Parameter s of Meta's length generator; None for N tokens in every segment.
        checked: Numbers of leading segments and heads compared with float64; None for all. Requires that no input is
            shared by all segments or heads.
    """

    segments: int
    longest: int
    heads: int = 4
    dim: int = 64
    sparsity: float | None = 0.5
    checked: tuple[int, int] | None = None

    def lengths(self, seed: int) -> list[int]:
        """Segment lengths by the seed."""
        if self.sparsity is None:
            return constant_lengths(self.segments, self.longest)
        return meta_lengths(self.segments, self.longest, self.sparsity, seed)


FULL_SIZES = {name: NormalizerSizes(32, 256) for name in (HSTU, BIASED, LAYER)} | {
    name: NormalizerSizes(16, 256) for name in (SIGMOID, STICK)
}
QUICK_SIZES = NormalizerSizes(4, 24, heads=2, dim=16)
GRID = {
    HSTU: [NormalizerSizes(512, n, 4, 128, 0.95, checked=(1, 4)) for n in (256, 1024, 4096)],
    STICK: [NormalizerSizes(4, n, 12, 128, None, checked=(1, 1)) for n in (2048, 4096, 16384)],
}
"""Further sizes on a GPU, from the benchmark grids of generative-recommenders and of stick-breaking attention."""


class Job:
    """The inputs of a case, and its arms. Subclasses define the computation.

    Args:
        kind: Kind of attention, such as :data:`HSTU`.
        sizes: Sizes of the inputs.
        backward: Time forward and backward; False for the forward alone.
        options: Device and seed.
    """

    backends: Sequence[str] = ("auto",)
    leaves: list[Tensor]
    grad: Tensor
    names: Sequence[str]

    def __init__(self, kind: str, sizes: NormalizerSizes, backward: bool, options: Options) -> None:
        self.kind, self.sizes, self.backward, self.device = kind, sizes, backward, options.device
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.n = sizes.lengths(options.seed)
        self.tokens, self.longest = sum(self.n), sizes.longest
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.scale = 1 / sizes.dim if kind in (HSTU, BIASED) else sizes.dim**-0.5

    def arms(self) -> list[Arm]:
        """Arms: the padded definition, flexjag with each backend, and flexjag with planning included in the time."""
        item = 4 if self.kind == STICK else self.dtype.itemsize
        matrix = self.sizes.segments * self.sizes.heads * self.longest**2 * item
        arms = [self._arm(PADDED, self.padded, MATRICES[self.kind][self.backward] * matrix)]
        arms += [
            self._arm(f"flexjag {backend}", partial(self.flexjag, backend, ready=True)) for backend in self.backends
        ]
        return [*arms, self._arm(PLANNED, partial(self.flexjag, "auto", ready=False), memory=False)]

    def padded(self) -> Callable[[], Tensor]:
        """Prepare the padded definition; return its forward."""
        raise NotImplementedError

    def flexjag(self, backend: str, ready: bool) -> Callable[[], Tensor]:
        """Prepare flexjag; return its forward. With `ready` the plan is made here, else in the forward."""
        raise NotImplementedError

    def compute(self, dtype: torch.dtype) -> Tensors:
        """Expected values of the checked part of the results, computed in `dtype`."""
        raise NotImplementedError

    def checked(self, got: Tensors) -> Tensors:
        """The part of an arm's results that is checked."""
        return got

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _arm(self, name: str, forward: Callable[[], Callable[[], Tensor]], needs: int = 0, memory: bool = True) -> Arm:
        def make() -> Callable[[], Tensors]:
            call = forward()
            return lambda: self.results(call, self.leaves, self.grad)

        return Arm(name, make, lambda got: self._expected.check(self.checked(got)), needs, memory=memory)

    def results(self, call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Tensors:
        """Run a forward: its output and, with `backward`, the gradients of `leaves`."""
        if not self.backward:
            with torch.no_grad():
                return (call(),)
        out = call()
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    @cached_property
    def _expected(self) -> Expected:
        names = self.names if self.backward else self.names[:1]
        # A token's output sums over its segment in any order; a parameter's gradient sums over all tokens. In half
        # precision the terms are rounded, while sums are accumulated in float32.
        few, many = (1, self.longest) if self.dtype == torch.bfloat16 else (self.longest, self.tokens)
        terms = [few if name in ("output", "dq", "dk", "dv", "dx") else many for name in names]
        return Expected(self.compute, self.dtype, names, terms)


class AttentionJob(Job):
    """Attention of random q, k and v ``[T, H, D]``."""

    def __init__(self, kind: str, sizes: NormalizerSizes, backward: bool, options: Options) -> None:
        super().__init__(kind, sizes, backward, options)
        # At the large sizes tiled would take minutes per call.
        self.backends = ("auto",) if sizes.checked else ("auto", "tiled")
        shape = self.tokens, sizes.heads, sizes.dim
        self.leaves = [self._random(*shape) for _ in range(3)]
        self.leaves += [self._random(sizes.heads, 2 * self.longest - 1)] if kind == BIASED else []
        self.names = ("output", "dq", "dk", "dv", "dtable")[: len(self.leaves) + 1]
        self.grad = self._random(*shape)
        for x in self.leaves:
            x.requires_grad_(backward)

    @property
    def normalizer(self) -> Normalizer:
        """The normalizer of this kind of attention."""
        return {SIGMOID: Sigmoid(), STICK: StickBreaking()}.get(self.kind, SiLU(1 / self.longest))

    def padded(self) -> Callable[[], Tensor]:
        """Prepare the padded definition: pad, compute on all pairs of positions, pack the result."""
        padding = Padding(self.n, self.device, self.longest)
        dense = Dense(padding, torch.tensor(self.n, device=self.device), self.scale)
        attend = {SIGMOID: dense.sigmoid, STICK: dense.stick_breaking}.get(self.kind, dense.silu)

        def forward() -> Tensor:
            q, k, v = (padding.pad(x).transpose(1, 2) for x in self.leaves[:3])
            return padding.unpad(attend(q, k, v, *self.leaves[3:]).transpose(1, 2))

        return forward

    def flexjag(self, backend: str, ready: bool) -> Callable[[], Tensor]:
        """Prepare one call of ``attention``; with `ready` it is given a plan."""
        x = Jagged.from_lengths(self.leaves[0], self.n)
        y, z = x.with_values(self.leaves[1]), x.with_values(self.leaves[2])
        if not ready:
            return lambda: _values(attention(x, y, z, **self.asked, scale=self.scale, backend=backend))
        made = self.plan()
        return lambda: _values(attention(x, y, z, plan=made, scale=self.scale, backend=backend))

    @property
    def asked(self) -> dict[str, Any]:
        """Mask, score and normalizer, as arguments of ``plan``."""
        return {"mask": Causal(), "score": _score(self.leaves[3:]), "normalizer": self.normalizer}

    def plan(self) -> Plan:
        """The plan of the batch."""
        return plan(Jagged.from_lengths(self.leaves[0], self.n), **self.asked)

    def compute(self, dtype: torch.dtype) -> Tensors:
        """Results of the ``reference`` backend for the checked segments and heads, in `dtype`."""
        segments, heads = self.sizes.checked or (len(self.n), self.sizes.heads)
        rows = sum(self.n[:segments])
        share = [x.detach()[:rows, :heads] for x in self.leaves[:3]] + [x.detach() for x in self.leaves[3:]]
        q, k, v, *table = leaves = [x.to(dtype).requires_grad_(self.backward) for x in share]

        def reference() -> Tensor:
            x = Jagged.from_lengths(q, self.n[:segments])
            options = {"mask": Causal(), "score": _score(table), "normalizer": self.normalizer}
            y, z = x.with_values(k), x.with_values(v)
            return _values(attention(x, y, z, **options, scale=self.scale, backend="reference"))

        return self.results(reference, leaves, self.grad[:rows, :heads].to(dtype))

    def checked(self, got: Tensors) -> Tensors:
        """The results of the checked segments and heads."""
        if self.sizes.checked is None:
            return got
        segments, heads = self.sizes.checked
        return tuple(x[: sum(self.n[:segments]), :heads] for x in got)


class LayerJob(Job):
    """An HSTU layer on tokens ``[T, width]``, with biases by position and time; all parameters are trained."""

    def __init__(self, kind: str, sizes: NormalizerSizes, backward: bool, options: Options) -> None:
        super().__init__(kind, sizes, backward, options)
        width = sizes.heads * sizes.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            bias = HSTUBias(sizes.heads, max_distance=self.longest - 1, time_buckets=TIME_BUCKETS)
            layer = HSTULayer(width, sizes.heads, sizes.dim, bias=bias)
        self.layer = layer.to(self.device, self.dtype)
        steps = torch.randint(0, 900, (self.tokens,), generator=self.generator, device=self.device)
        self.times = steps.cumsum(0)
        parameters = dict(self.layer.named_parameters())
        self.leaves = [self._random(self.tokens, width).requires_grad_(backward), *parameters.values()]
        self.names = ("output", "dx", *(f"gradient of {name}" for name in parameters))
        self.grad = self._random(self.tokens, width)

    def padded(self) -> Callable[[], Tensor]:
        """Prepare the layer's definition on padded tokens, with the parameters of our layer."""
        return self._dense(self.layer, self.leaves[0])

    def _dense(self, layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        assert isinstance(layer, HSTULayer)
        padding = Padding(self.n, self.device, self.longest)
        dense = Dense(padding, torch.tensor(self.n, device=self.device), self.scale)
        times = padding.pad(self.times)
        return lambda: padding.unpad(dense.layer(layer, padding.pad(x), times))

    def flexjag(self, backend: str, ready: bool) -> Callable[[], Tensor]:
        """Prepare our layer, in which ``attention`` chooses the backend."""
        x = Jagged.from_lengths(self.leaves[0], self.n)
        times = x.with_values(self.times)
        make = partial(plan, x, mask=Causal(), normalizer=SiLU(1 / self.longest))
        if not ready:
            return lambda: self.layer(x, make(), times=next_times(times), kv_times=times).values
        made, after = make(), next_times(times)
        return lambda: self.layer(x, made, times=after, kv_times=times).values

    def compute(self, dtype: torch.dtype) -> Tensors:
        """Results of the padded definition, which shares no code with our layer's forward, in `dtype`."""
        layer = deepcopy(self.layer).to(dtype)
        x = self.leaves[0].detach().to(dtype).requires_grad_(self.backward)
        return self.results(self._dense(layer, x), [x, *layer.parameters()], self.grad.to(dtype))


def _score(table: Sequence[Tensor]) -> RelativeBias | None:
    return RelativeBias(table[0]) if table else None


def _values(out: Jagged | tuple[Jagged, Jagged]) -> Tensor:
    assert isinstance(out, Jagged)
    return out.values


def _figures(options: Options, cases: list[CaseResult]) -> list[Figure]:
    found, figures = Results(cases), []
    promised = not options.quick and options.device == "cpu"
    main = f"{HSTU}, {DIRECTIONS[1]}"
    for case in [main, *(c.name for c in cases if c.name != main)]:
        is_main = promised and case == main
        time = ratio(found.seconds(case, PADDED), found.seconds(case, AUTO))
        memory = ratio(found.memory(case, AUTO), found.memory(case, PADDED))
        figures.append(Figure(f"{case}: time of {PADDED} / {AUTO}", time, "x", ">= 2.5" if is_main else None))
        figures.append(Figure(f"{case}: memory of {AUTO} / {PADDED}", memory, "x", "<= 0.334" if is_main else None))
    return figures


@suite("normalizers", "Causal attention with weights that are no softmax: HSTU's, sigmoid, stick-breaking.", _figures)
def cases(options: Options) -> list[Case]:
    """All kinds of attention, forward and with backward; on a GPU, in bfloat16, also larger sizes."""
    wanted = [(kind, kind, QUICK_SIZES if options.quick else sizes) for kind, sizes in FULL_SIZES.items()]
    if options.device == "cuda" and not options.quick:
        wanted += [(f"{kind}, N = {sizes.longest}", kind, sizes) for kind, grid in GRID.items() for sizes in grid]
    cases = [
        _case(f"{name}, {direction}", kind, sizes, direction == DIRECTIONS[1], options)
        for name, kind, sizes in wanted
        for direction in DIRECTIONS
    ]
    # Where time may run out, training before inference, and the kernels of GRID first.
    late = [(direction == DIRECTIONS[0], kind not in GRID) for _, kind, _ in wanted for direction in DIRECTIONS]
    order = sorted(range(len(cases)), key=late.__getitem__) if options.budget is not None else range(len(cases))
    return [cases[i] for i in order]


def _case(name: str, kind: str, sizes: NormalizerSizes, backward: bool, options: Options) -> Case:
    tokens = sum(sizes.lengths(options.seed))
    facts = {"segments": sizes.segments, "tokens": tokens, "longest": sizes.longest, "sparsity": sizes.sparsity}
    facts |= {"fill": tokens / (sizes.segments * sizes.longest), "heads": sizes.heads, "dim": sizes.dim}
    facts |= {"dtype": "bfloat16" if options.device == "cuda" else "float32", "seed": options.seed}
    full, small = (partial(_arms, kind, x, backward, options) for x in (sizes, QUICK_SIZES))
    return Case(name, facts, full, small, (PADDED, AUTO))


def _arms(kind: str, sizes: NormalizerSizes, backward: bool, options: Options) -> list[Arm]:
    return (LayerJob if kind == LAYER else AttentionJob)(kind, sizes, backward, options).arms()
