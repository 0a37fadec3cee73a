"""Every node has a case of every interpretation and declares every fact: one that is forgotten fails here."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

import flexjag as fj
from flexjag.algebra import masks as m
from flexjag.algebra import normalizers, scores
from flexjag.algebra.dispatch import Interpretation
from flexjag.algebra.dropping import Dropped
from flexjag.algebra.node import Node
from flexjag.lowering import mods, pairs, spans
from flexjag.lowering.dropping import DroppedRows
from flexjag.lowering.layout import build_layout

MODULES = [
    importlib.import_module(name)
    for _, name, _ in pkgutil.walk_packages(fj.__path__, "flexjag.")
    if not any(part in name for part in ("__main__", "codegen", "demo"))  # they start something, or have no nodes
]

IDS = torch.tensor([0, 1, 0, 1, 1])
EXAMPLES: dict[type[Node], Node] = {
    type(x): x
    for x in (
        fj.Full(), fj.Causal(), fj.Window(2, 1), fj.Prefix(1), fj.Chunked(2), fj.GlobalTokens(1), fj.Rows(IDS, IDS + 1),
        fj.SameGroup(IDS), fj.Dense(torch.ones(5, 5, dtype=torch.bool)), fj.MaskMod(lambda b, h, q, kv: q == kv),
        fj.PerHead([fj.Full()]), fj.Full() & fj.Causal(), fj.Full() | fj.Causal(), ~fj.Causal(),
        fj.Keys(IDS > 0), fj.Queries(IDS > 0),
    )
}  # fmt: skip


def nodes(kind: type[Node]) -> list[type[Node]]:
    """flexjag's own nodes of a kind that can be made."""
    found = {x for module in MODULES for x in vars(module).values() if inspect.isclass(x) and issubclass(x, kind)}
    return sorted((cls for cls in found if getattr(cls, "_of", None) is cls), key=lambda cls: cls.__name__)


INTERPRETATIONS = sorted(
    {x for module in MODULES for x in vars(module).values() if isinstance(x, Interpretation)}, key=lambda x: x.name
)
PAIRS = [(x, cls) for x in INTERPRETATIONS for cls in nodes(x.of)]


def id_of(value: object) -> str:
    return value.name if isinstance(value, Interpretation) else getattr(value, "__name__", str(value))


def test_there_are_nodes_and_interpretations() -> None:
    assert {x.name for x in INTERPRETATIONS} >= {
        "sandwich",
        "dense mask",
        "mask_mod",
        "score_mod",
        "dense score",
        "window",
    }
    assert {m.Causal, m.And, m.Dense} <= set(nodes(m.Mask))
    assert len(nodes(scores.Score)) >= 7
    assert len(nodes(normalizers.Normalizer)) >= 6


def is_folded(cls: type[Node]) -> bool:
    """Whether a mask leaves nothing of itself to test in a kernel: its spans are exact, or hand others on."""
    x = fj.Jagged.from_lengths(torch.zeros(5, 1, 4), [5])
    rest = spans.sandwich(EXAMPLES[cls], build_layout(x, x)).rest
    return not isinstance(rest, cls)


@pytest.mark.parametrize(("interpretation", "cls"), PAIRS, ids=id_of)
def test_every_node_has_every_case(interpretation: Interpretation, cls: type[Node]) -> None:
    if interpretation.otherwise is not None or cls in interpretation.cases:
        return
    if cls is m.PerHead and interpretation in (spans.sandwich, mods.mask_case):  # taken apart before, by at_head
        return
    if cls is Dropped and interpretation is mods.score_case:  # by_row has made it DroppedRows before
        return
    lowered = issubclass(cls, (spans.InSpans, spans.DenseRows, pairs.BiasRows, DroppedRows))  # made while lowering
    if interpretation is mods.mask_case:
        assert is_folded(cls)
    else:
        assert lowered or any(base in interpretation.cases for base in cls.__mro__[1:]), f"no {interpretation.name}"


@pytest.mark.parametrize("cls", [*nodes(m.Mask), *nodes(scores.Score)], ids=id_of)
def test_every_node_says_whether_kernels_can_print_it(cls: type[Node]) -> None:
    takes_functions = cls in (m.MaskMod, scores.ScoreMod)
    assert ("printable" in vars(cls)) != takes_functions, f"{cls.__name__}: say if it is printable"


@pytest.mark.parametrize("cls", [*nodes(m.Mask), *nodes(scores.Score), *nodes(normalizers.Normalizer)], ids=id_of)
def test_every_field_for_a_tensor_says_its_axis(cls: type[Node]) -> None:
    named = {name for name, *_ in cls._axes}  # type: ignore[attr-defined]
    for name, kind in inspect.get_annotations(cls).items():
        if "Tensor" in str(kind) or "Bound" in str(kind):
            assert name in named, f"{cls.__name__}.{name} holds a tensor: say what it has an entry for by along()"


def test_a_forgotten_case_would_be_seen() -> None:
    toy = Interpretation("toy", m.Mask)
    toy.register(m.Full)(lambda mask: 1)
    with pytest.raises(AssertionError, match="no toy"):
        test_every_node_has_every_case(toy, m.Causal)


def test_examples_are_of_every_mask() -> None:
    assert set(EXAMPLES) == {cls for cls in nodes(m.Mask) if not issubclass(cls, (spans.InSpans, spans.DenseRows))}
