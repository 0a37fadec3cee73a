"""One graph for all batches: planning, attention and its backward under ``torch.compile(fullgraph=True)``."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from cases import mostly_slow
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import flexjag as fj
from flexjag.testing import Graphs, assert_compiles, assert_no_leak

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM
MASK = fj.Causal() & (fj.Window(20, 0) | fj.Prefix(2))
NUM_BATCHES = 50
AT_MOST = 2  # one for all sizes but 1, one for T = 1, which PyTorch always specialises
EPS = torch.finfo(torch.float32).eps


def fifty_batches() -> list[fj.Jagged]:
    """S from 1 to 8, with empty segments, S = 1, T = 1 and T a multiple of the tile among them."""
    g = torch.Generator().manual_seed(1)
    found = [
        torch.randint(0, 90, (int(torch.randint(2, 9, (), generator=g)),), generator=g).tolist()
        for _ in range(NUM_BATCHES)
    ]
    found[10], found[20], found[30], found[40] = [57], [1], [0, 1, 0], [32, 32]
    # Inductor's C++ adds up a Linear's bias gradient in another way from 4096 terms on, and guards on it.
    assert max(map(sum, found)) < 4096
    return [fj.Jagged.from_lengths(torch.randn(sum(n), WIDTH, generator=g), n) for n in found]


class Layer(nn.Module):
    """Attention with a residual; plans for itself if it is given no plan."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.backend = backend

    def forward(self, x: fj.Jagged, plan: fj.Plan | None) -> fj.Jagged:
        q, k, v = (x.with_values(t) for t in self.project(x.values).unflatten(1, (3, HEADS, DIM)).unbind(1))
        if plan is None:
            out = fj.attention(q, k, v, mask=MASK, score=fj.Alibi(self.slopes), backend=self.backend)
        else:
            out = fj.attention(q, k, v, plan=plan, backend=self.backend)
        return x + out.with_values(out.values.flatten(1))


class Model(nn.Module):
    """Two layers."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.first, self.second = Layer(backend), Layer(backend)
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, x: fj.Jagged, plan: fj.Plan | None = None) -> Tensor:
        return self.second(self.first(x, plan), plan).values

    def arguments(self, x: fj.Jagged, with_plan: bool) -> tuple:
        """What to call the model with."""
        return (x, fj.plan(x, mask=MASK, score=fj.Alibi(self.slopes), block_size=32)) if with_plan else (x,)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients, which are then cleared."""
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.named_parameters()}
        self.zero_grad()
        return found


def eagerly(model: Model, x: fj.Jagged, with_plan: bool, backward: bool) -> dict[str, Tensor]:
    """Output and gradients without a compiler, by the tiled backend."""
    for layer in (model.first, model.second):
        layer.backend = "tiled"
    with torch.set_grad_enabled(backward):
        out = model(*model.arguments(x, with_plan))
    if backward:
        out.sum().backward()
    return {"out": out.detach(), **(model.gradients() if backward else {})}


def checker(model: Model, given: list[fj.Jagged], with_plan: bool, backward: bool) -> Callable[[int, Tensor], None]:
    """Compares each compiled result with eager float64, allowing twice eager float32's own error and rounding."""
    single, double = deepcopy(model), deepcopy(model).double()

    def check(index: int, out: Tensor) -> None:
        x = given[index]
        found = {"out": out.detach(), **(model.gradients() if backward else {})}
        same = eagerly(single, x, with_plan, backward)
        exact = eagerly(double, x.with_values(x.values.double()), with_plan, backward)
        terms = x.values.shape[0] + WIDTH  # the longest sum: over tokens, or over features
        largest = max(float(t.abs().max()) for t in exact.values())
        for name, wanted in exact.items():
            error, noise = ((t.double() - wanted).abs().max() for t in (found[name], same[name]))
            assert error <= 2 * (noise + terms * EPS * largest), (
                f"batch {index}, {name}: {error:.3g}, eager {noise:.3g}"
            )

    return check


def compile_all(model: Model, with_plan: bool, backward: bool) -> Graphs:
    given = fifty_batches()
    return assert_compiles(
        model,
        [model.arguments(x, with_plan) for x in given],
        max_graphs=AT_MOST,
        backward=backward,
        after_each=checker(model, given, with_plan, backward),
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_plan", [True, False], ids=["plan outside", "plan inside"])
def test_fifty_batches_share_a_graph_forward_and_backward(with_plan: bool) -> None:
    graphs = compile_all(Model(), with_plan, backward=True)
    assert graphs.forward == graphs.backward == [0, 20]
    assert not graphs.inference


@pytest.mark.slow
def test_fifty_batches_share_an_inference_graph_of_flex() -> None:
    graphs = compile_all(Model("flex"), with_plan=True, backward=False)
    assert graphs.inference == [0, 20]


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [None, 100], ids=["any length", "bounded"])
@pytest.mark.parametrize("is_self", [True, False], ids=["self", "cross"])
def test_a_graph_from_inductors_cache_serves_as_many_batches(is_self: bool, max_length: int | None) -> None:
    """The cache brings guards as text, whose ``max`` and ``min`` would compare sizes and so guard on the outcome."""
    g = torch.Generator().manual_seed(2)
    # More queries than keys and fewer, one tile and many, and 13 to 16 rows of tiles: the bound's width is 15.
    sizes = [(100, 40), (40, 100), (10, 20), (20, 10), (200, 190), (190, 200), (60, 60), (12, 12)]
    sizes += [(n, 33) for n in (215, 231, 247)] + [(33, n) for n in (215, 231, 247)]
    batches = []
    for n, m in sizes:
        q, k = (
            fj.Jagged(torch.randn(t, HEADS, DIM, generator=g), torch.tensor([0, t // 3, 2 * t // 3, t])) for t in (n, m)
        )
        kv = q if is_self else k
        batches.append((q, kv, fj.plan(q, kv, mask=fj.Window(5, 5), block_size=16, max_length=max_length)))

    def fn(q: fj.Jagged, kv: fj.Jagged, plan: fj.Plan) -> Tensor:
        return fj.attention(q, kv, kv, plan=plan, backend="flex").values

    # A row of 15 tiles in a table 15 wide would be contiguous: that one number of tiles takes a graph of its own.
    wanted = [0, 8] if is_self and max_length else [0]
    with fresh_cache():
        for _ in ("compiled", "from the cache"):
            assert assert_compiles(fn, batches, max_graphs=2, backward=False).inference == wanted


@pytest.mark.slow
def test_no_tokens_and_one_token_take_a_graph_each() -> None:
    """T = 0 launches nothing and T = 1 is specialised by PyTorch, so these are all the graphs there can be."""
    model = Model()
    sizes = [[5, 9], [0, 0], [1], [0, 1], [0], [3, 2, 30], [0, 0, 0], [40]]
    given = [fj.Jagged.from_lengths(torch.randn(sum(n), WIDTH), n) for n in sizes]
    graphs = assert_compiles(model, [model.arguments(x, False) for x in given], max_graphs=3, backend="aot_eager")
    assert graphs.forward == [0, 1, 2]


def varying(tensor: Tensor, dim: int = 0) -> Tensor:
    """An input whose size changes from batch to batch."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def ids(lengths: list[int]) -> Tensor:
    return varying(torch.randint(0, 3, (sum(lengths),)))


def rows(lengths: list[int]) -> Tensor:
    return varying(torch.randint(0, 9, (3, sum(lengths))), 1)


def per_segment(lengths: list[int]) -> Tensor:
    return varying(torch.arange(1, len(lengths) + 1))


def matrices(lengths: list[int]) -> Tensor:
    return varying(torch.cat([torch.rand(n * n) < 0.5 for n in lengths]))


def shared_matrix(lengths: list[int]) -> Tensor:
    return torch.rand(20, 30, generator=torch.Generator().manual_seed(3)) < 0.5


def nothing(lengths: list[int]) -> Tensor:
    return torch.zeros(2)


def dilated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return ((q - kv).abs() % 2 == 0) & (h + b >= 0)


MASKS: dict[str, tuple[Callable[[list[int]], Tensor], Callable[[Tensor], fj.Mask]]] = {
    "full": (nothing, lambda data: fj.Full()),
    "causal, end": (nothing, lambda data: fj.Causal("end")),
    "window": (nothing, lambda data: fj.Window(5, 2)),
    "window per segment": (per_segment, lambda data: fj.Window(data, None)),
    "prefix per segment": (per_segment, lambda data: fj.Causal() | fj.Prefix(data)),
    "chunked": (nothing, lambda data: fj.Chunked(7)),
    "chunked per segment": (per_segment, lambda data: fj.Chunked(data)),
    "global tokens": (nothing, lambda data: fj.GlobalTokens(2)),
    "rows": (rows, lambda data: fj.Rows(data, data + 4)),
    "same group": (ids, lambda data: fj.SameGroup(data)),
    "dense, shared": (shared_matrix, lambda data: fj.Dense(data)),
    "dense, packed": (matrices, lambda data: fj.Dense(data)),
    "mask mod": (nothing, lambda data: fj.MaskMod(dilated)),
    "per head": (nothing, lambda data: fj.PerHead([fj.Causal(), fj.Window(3, 3) & fj.MaskMod(dilated)])),
    "nested": (ids, lambda data: ~(fj.Window(2, 2) & fj.Causal()) & (fj.SameGroup(data) | ~fj.MaskMod(dilated))),
}


def equal_to_eager(fn: Callable[..., Tensor], given: list[tuple]) -> Callable[[int, Tensor], None]:
    """Float64, so that only a wrong result can differ by more than 1e-12 of standard-normal values."""

    def check(index: int, out: Tensor) -> None:
        torch.testing.assert_close(out, fn(*given[index]), rtol=0, atol=1e-12)

    return check


def three_batches(make: Callable[[list[int]], Tensor]) -> list[tuple[fj.Jagged, Tensor]]:
    found = []
    for n in ([9, 0, 23], [40, 3, 5, 8, 0], [17, 50]):
        values = torch.randn(sum(n), HEADS, DIM, dtype=torch.float64, requires_grad=True)
        found.append((fj.Jagged.from_lengths(values, n), make(n)))
    return found


@pytest.mark.parametrize("family", mostly_slow(MASKS, "prefix per segment"))
def test_every_mask_is_planned_and_attended_in_one_graph(family: str) -> None:
    make, mask = MASKS[family]

    def attend(x: fj.Jagged, data: Tensor) -> Tensor:
        return fj.attention(x, x, x, mask=mask(data)).values

    given = three_batches(make)
    assert_compiles(attend, given, backend="aot_eager", after_each=equal_to_eager(attend, given))


@pytest.mark.parametrize("family", mostly_slow({k: v for k, v in MASKS.items() if v[0] is not nothing}, "same group"))
def test_masks_made_outside_share_one_graph(family: str) -> None:
    """Sizes are marked by the nodes themselves, whoever made the tensors in them."""
    make, mask = MASKS[family]

    def attend(x: fj.Jagged, mask: fj.Mask) -> Tensor:
        return fj.attention(x, x, x, mask=mask).values

    given = [(x, mask(data.clone())) for x, data in three_batches(make)]  # a clone is not marked
    assert_compiles(attend, given, backend="aot_eager", after_each=equal_to_eager(attend, given))


TABLE = torch.rand(HEADS, 5, dtype=torch.float64, requires_grad=True)
SCORES: dict[str, Callable[[], fj.Score]] = {
    "alibi": lambda: fj.Alibi(TABLE[:, 0]),
    "soft cap": lambda: fj.SoftCap(2.0),
    "relative bias": lambda: fj.RelativeBias(TABLE),
    "score mod": lambda: fj.ScoreMod(lambda s, b, h, q, kv: s * TABLE[h, 1] + b * TABLE[h, (q + kv) % 5]),
    "chain": lambda: fj.RelativeBias(TABLE) >> fj.SoftCap(3.0) >> fj.ScoreMod(lambda s, b, h, q, kv: s * TABLE[h, 2]),
}


@pytest.mark.parametrize("name", mostly_slow(SCORES, "chain"))
def test_every_score_is_traced_with_its_gradients(name: str) -> None:
    def attend(x: fj.Jagged, data: Tensor) -> Tensor:
        return fj.attention(x, x, x, mask=fj.Causal(), score=SCORES[name]()).values

    given = three_batches(nothing)
    same = equal_to_eager(attend, given)

    def check(index: int, out: Tensor) -> None:
        same(index, out)
        leaves = [given[index][0].values, TABLE]
        found = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        attend(*given[index]).sum().backward()
        for got, leaf in zip(found, leaves, strict=True):
            torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-11)  # sums of up to 67 * 67 float64 terms
            leaf.grad = None

    assert_compiles(attend, given, backend="aot_eager", after_each=check)


@pytest.mark.slow
def test_no_segment_leaks_through_flex() -> None:
    q, k, v = (fj.Jagged.from_lengths(torch.randn(61, HEADS, DIM), [9, 0, 31, 1, 20]) for _ in range(3))
    plan = fj.plan(q, mask=MASK, score=fj.Alibi(torch.rand(HEADS)), block_size=32)
    with torch.no_grad():
        assert_no_leak("flex", q, k, v, plan=plan, return_lse=False)


@pytest.mark.slow
def test_no_segment_leaks_through_a_traced_graph() -> None:
    q, k, v = (fj.Jagged.from_lengths(torch.randn(61, HEADS, DIM), [9, 0, 31, 1, 20]) for _ in range(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q: fj.Jagged, k: fj.Jagged, v: fj.Jagged) -> tuple[fj.Jagged, ...]:
        return fj.attention(q, k, v, mask=MASK | fj.MaskMod(dilated), return_lse=True)

    assert_no_leak(attend, q, k, v)


@pytest.mark.slow
def test_tilde_is_traced() -> None:
    def attend(x: fj.Jagged, data: Tensor) -> Tensor:
        return fj.attention(x, x, x, mask=~fj.Causal()).values

    assert_compiles(attend, three_batches(nothing), backend="aot_eager")


@pytest.mark.slow
def test_offsets_are_looked_at_inside_a_graph_if_asked() -> None:
    """By an assertion, which asks for no graph of its own."""

    def attend(x: fj.Jagged) -> torch.Tensor:
        out = fj.attention(x, x, x, mask=fj.Causal(), validate=True)
        assert isinstance(out, fj.Jagged)
        return out.values

    batches = [[5, 7], [3, 1, 9], [8], [2, 0, 0, 4]]
    given = [(fj.Jagged.from_lengths(torch.randn(sum(n), 2, 16, dtype=torch.float64), n),) for n in batches]
    assert_compiles(attend, given, backward=False, after_each=equal_to_eager(attend, given))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for wrong in ([0, 5, 20], [0, 7, 5, 12], [0, -3, 12], [1, 5, 12], [0, 5, 11]):
        with pytest.raises(RuntimeError, match=r"q\.offsets: must start at 0, not decrease"):
            compiled(fj.Jagged(torch.randn(12, 2, 16), torch.tensor(wrong)))


@pytest.mark.slow
def test_nodes_first_met_in_a_graph() -> None:
    """In a process of its own: here other tests have met them before."""
    script = """
        import torch, flexjag as fj
        x = fj.Jagged.from_lengths(torch.randn(29, 2, 8), [9, 0, 20])
        table = torch.zeros(2, 5, requires_grad=True)

        def attend(x, plan):
            mask, score = fj.Causal() & fj.Window(4, 0), fj.SoftCap(3.0) >> fj.Alibi.from_heads(2)
            first = fj.attention(x, x, x, mask=mask, score=score)
            return fj.attention(first, x, x, plan=plan.with_score(fj.RelativeBias(table))).values

        plan = fj.plan(x, mask=fj.Prefix(3))
        out = torch.compile(attend, fullgraph=True, backend="eager")(x, plan)
        torch.testing.assert_close(out, attend(x, plan))
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
