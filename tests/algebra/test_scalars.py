"""Users' functions of scalars: what they may close over, eager and in graphs, and what is said when they fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo  # before batches are made, which then mark their sizes as varying
from cases import jagged, make_qkv
from torch import Tensor

import flexjag as fj
from flexjag import MaskMod, ScoreMod, SiLU, Softmax
from flexjag.algebra import scalars
from flexjag.errors import MaskError, ScoreError

LENGTHS = [3, 3, 4]
TABLE = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

INDICES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "number": lambda i, j, t: TABLE[i, 0, t, j],
    "one after the other": lambda i, j, t: TABLE[i][1][t][j],
    "number alone": lambda i, j, t: TABLE[t, 0, 3, 1] + i * j,
    "integers": lambda i, j, t: TABLE[i, 1, -1, t],
    "slice behind": lambda i, j, t: TABLE[i, 0, t, :].sum() * j,
    "slice before": lambda i, j, t: TABLE[:, t, j].sum() * i,
    "slice between": lambda i, j, t: (TABLE[t, :, i] * j).sum(),
    "dots": lambda i, j, t: (TABLE[..., t, j] * i).sum(),
    "new dimension": lambda i, j, t: (TABLE[None, 0, t, i] * j).sum(),
    "row, then entry": lambda i, j, t: (TABLE[i, 1, t] * 2)[j],
}


@pytest.mark.parametrize("fn", INDICES.values(), ids=INDICES)
def test_functions_in_graphs_index_as_outside(fn: Callable[..., Tensor]) -> None:
    """The words that a graph is given must mean what the user's mean; here they run on numbers."""
    i, j, t = torch.arange(3)[:, None], torch.arange(4)[None], torch.tensor(1)
    wanted = torch.vmap(torch.vmap(fn, (None, 0, None)), (0, None, None))(i[:, 0], j[0], t)
    for given in (fn, scalars._as_in_a_graph(fn)):
        # sums of up to five, maybe in another order
        torch.testing.assert_close(scalars._elementwise(given, i, j, t), wanted, rtol=1e-15, atol=1e-15)


def every_word(x: fj.Jagged, number: Tensor, normalizer: fj.Normalizer, backend: str) -> Tensor:
    """Attention whose functions index by a captured number and compute with sizes."""
    q, tokens, segments = x.values, x.values.shape[0], x.num_segments

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s + TABLE[b % 3, h, number, j % 4] + TABLE[b % 3][h][number][j % 4]
        s = (s + tokens - q.shape[0]) / q.shape[0] * tokens
        return s + (tokens / (s.abs() + 1)) * segments + TABLE[0, 0, 0, (i + tokens) % 4] + (tokens - i) * 0.5

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((TABLE[0, 1, number, j % 4] > 0) & (i + tokens > j)) | (j == i)

    out = fj.attention(x, x, x, mask=MaskMod(mask), score=ScoreMod(score), normalizer=normalizer, backend=backend)
    assert isinstance(out, fj.Jagged)
    return out.values


@pytest.mark.parametrize("normalizer", [Softmax(), SiLU()], ids=lambda n: type(n).__name__)
def test_functions_close_over_numbers_and_sizes(normalizer: fj.Normalizer) -> None:
    batches = [jagged(n, 2, 16) for n in (LENGTHS, [2, 7], [4, 0, 1, 6, 2])]
    torch._dynamo.reset()  # graphs are kept by function, and the other normalizer has one
    compiled = torch.compile(every_word, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, x in enumerate(batches):
            at = torch.tensor(number)
            wanted = every_word(x, at, normalizer, "reference")
            got = {
                b: every_word(x, at, normalizer, b) for b in ("tiled", "segments")[: 1 + isinstance(normalizer, SiLU)]
            }
            got["compiled"] = compiled(x, at, normalizer, "tiled")
            for name, values in got.items():  # float64; scores of up to 1e2 lose two digits
                torch.testing.assert_close(
                    values, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
                )


class Scaled(torch.nn.Module):
    """Attention with a ScoreMod that reads a parameter, as FlexAttention's export tests have it."""

    def __init__(self) -> None:
        super().__init__()
        self.b = torch.nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        x = fj.Jagged(values, offsets)
        score = ScoreMod(lambda z, b, h, i, j: z * self.b[h] + i / values.shape[0])
        out = fj.attention(x, x, x, mask=fj.Causal(), score=score)
        assert isinstance(out, fj.Jagged)
        return out.values


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of a strict export, always
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_a_score_that_reads_a_parameter_is_exported(strict: bool) -> None:
    module = Scaled()
    first, other = jagged([4, 5], 2, 8), jagged([3, 9, 2], 2, 8)
    shapes = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    program = torch.export.export(module, (first.values, first.offsets), dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    for x in (first, other):
        torch.testing.assert_close(exported(x.values, x.offsets), module(x.values, x.offsets), rtol=1e-12, atol=1e-12)


def short_lookup(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + TABLE[0, 0, 0, :3][j]


def short_mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return TABLE[0, 0, 0, :3][j] > 0


SEEN = r"with every lookup inside its table; got error='index 3 is out of bounds.*q_pos='0\.\.3', kv_pos='0\.\.3'"


@pytest.mark.parametrize("backend", ["reference", "tiled", "segments"])
@pytest.mark.parametrize("normalizer", [Softmax(), SiLU()], ids=lambda n: type(n).__name__)
def test_a_lookup_out_of_range_names_the_function_and_the_positions(normalizer: fj.Normalizer, backend: str) -> None:
    q, k, v = make_qkv(LENGTHS)
    if backend != "segments" or isinstance(normalizer, SiLU):
        with pytest.raises(ScoreError, match=f"fn: short_lookup must work for all positions.*{SEEN}"):
            fj.attention(q, k, v, score=ScoreMod(short_lookup), normalizer=normalizer, backend=backend)
    with pytest.raises(MaskError, match=f"fn: short_mask must work for all positions.*{SEEN}"):
        fj.attention(q, k, v, mask=MaskMod(short_mask), normalizer=normalizer, backend=backend)
