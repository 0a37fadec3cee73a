"""plan() compiles a layout, a mask, a score and a normalizer into a Plan: immutable and reusable between layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.normalizers import Normalizer
from flexjag.api import picture as viz
from flexjag.api.explain import explain
from flexjag.backends.base import Case
from flexjag.backends.choose import BACKENDS, choose, pick
from flexjag.errors import BackendError, explain_values
from flexjag.jagged import Jagged
from flexjag.lowering.moving import moved
from flexjag.lowering.outline import Bounds, mark_sizes, outline, with_tiles
from flexjag.lowering.recipe import Recipe
from flexjag.moving import Change, Movable
from flexjag.offsets import as_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flexjag.lowering.tiles import Tiles

__all__ = ["Plan", "plan"]


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Recipe, Movable):
    """A recipe that can explain and draw itself. Made by :func:`plan`; its attributes are :class:`Recipe`'s."""

    @property
    def tiles(self) -> Tiles:
        """Tile lists and tables, made when they are first read if no kernel of the plan's needs them."""
        return with_tiles(self).made_tiles or super().tiles

    @property
    def backend(self) -> str:
        """Name of the backend that ``backend="auto"`` chooses for the q that was planned for."""
        return choose(self.case())[0]

    def case(self, **known: object) -> Case:
        """The plan as input of the backends' rules. `known` adds facts about the call: dtype, gradients, scale, ..."""
        return Case.of(self, **known)

    def explain(self) -> str:
        """Explain the plan's decisions as text: backend, tiles, FLOPs, bytes."""
        return explain(self)

    def source(self, backend: str) -> str:
        """The code that a backend prints for the plan's mask, score and normalizer: for float32, to be read.

        Args:
            backend: Name of a backend that prints code: ``"cpp"`` or ``"triton"``.

        Raises:
            BackendError: If the backend prints none, or cannot run the plan.

        >>> import torch
        >>> x = Jagged.from_lengths(torch.zeros(6, 2, 16), [2, 4])
        >>> "return spread<float>(s);" in plan(x, mask=m.Causal()).source("cpp")
        True
        """
        pick(backend, self.case())
        printer = None if backend == "auto" else BACKENDS[backend].source
        if printer is None:
            able = ", ".join([name for name, x in BACKENDS.items() if x.source is not None])
            raise BackendError(explain_values("backend", f"must be one that prints code: {able}", backend=backend))
        return printer(self)

    def show(self, head: int = 0) -> Figure:
        """Draw the tiles and segments as a matplotlib Figure.

        Its cost is bounded: a large plan is drawn down-sampled, and the title says so.

        Args:
            head: Index of the head to draw, if the mask depends on the head.

        Raises:
            PlanError: If the plan has no such head.
        """
        return viz.draw_plan(self, head)

    def changed(self, change: Change) -> Self:
        """The plan with `change` of every tensor, as its methods ``to``, ``cpu``, ``cuda`` and ``pin_memory`` make it.

        >>> import torch
        >>> p = plan(Jagged.from_lengths(torch.zeros(6, 2, 16), [2, 4]), mask=m.Causal())
        >>> p.to("meta").layout.device
        device(type='meta')
        """
        return moved(self, change)

    def _repr_html_(self) -> str:
        return viz.to_html(self)


def plan(
    q: Jagged,
    k: Jagged | None = None,
    *,
    mask: m.Mask | None = None,
    score: s.Score | None = None,
    normalizer: Normalizer | None = None,
    block_size: int = 128,
    max_tokens: int | None = None,
    max_length: int | None = None,
    refine_tiles: bool | None = None,
    validate: bool = False,
) -> Plan:
    """Compile a layout, a mask and a score into a recipe that every layer of a model can reuse.

    Time and memory are O(K·T log T + tiles): nothing of size T×T is made. Works inside ``torch.compile``.

    Args:
        q: The query batch. Only its layout is used, so values may be ``[T]`` token ids as well as ``[T, H, D]``.
        k: The key/value batch, if its offsets differ from q's (cross- and target attention).
        mask: Default :class:`~flexjag.algebra.masks.Full`. Isolation between segments is always on.
            A plan holds the mask as it was made: tensors in it and in its functions' closures are copied, and if one
            that a function reads elsewhere is written to later, using the plan is an error.
        score: Default none. Its tables are kept, not copied: a plan made once sees a parameter's later values. What it
            holds per token or segment is copied, as the mask is.
        normalizer: Default :class:`~flexjag.algebra.normalizers.Softmax`.
        block_size: Tile size, a power of two of at least 16; 128 is what GPU kernels like.
        max_tokens: The fixed number of rows of ``q.values``, of which the first ``offsets[-1]`` are used;
            the others get zeros.
        max_length: A bound on every segment's length. With it the plan has fixed capacity and planning never
            waits for the device, so it fits in a CUDA graph. A batch that breaks it is an error; on a GPU, in a
            traced graph and with `max_tokens` an assertion, which a later call reports.
        refine_tiles: Evaluate an opaque mask on its PARTIAL tiles to prove more of them EMPTY or FULL.
            Default: if it takes at most 2**26 evaluations, and never in a traced graph or with `max_length`.
        validate: Check the contents of the offsets and the bounds (one device sync; in a traced graph an assertion).
            Outside of graphs, those on a CPU are always checked, but with `max_tokens`.

    Returns:
        The plan. Pass it to :func:`flexjag.attention` with any q, k, v of the same layout.

    Raises:
        LayoutError: If q and k do not fit together, or, under `validate`, offsets are not offsets.
        MaskError: If the mask does not fit the layout.
        PlanError: If a bound does not hold or `block_size` is no power of two.

    >>> import torch
    >>> x = Jagged.from_lengths(torch.zeros(1000, 2, 16), [400, 0, 600])
    >>> p = plan(x, mask=m.Causal() & m.Window(256, 0))
    >>> p.num_tiles, p.num_full, p.grid
    (20, 4, (8, 8))
    """
    bounds = Bounds(as_int(block_size), as_int(max_tokens), as_int(max_length), validate)
    made = outline(Plan, q, k, mask, score, normalizer, bounds)
    if refine_tiles is not None or _needs_tiles(made):
        return with_tiles(made, refine_tiles)
    mark_sizes(made)
    return made


def _needs_tiles(made: Plan) -> bool:
    """True if tiles are better made at once: a GPU reads them, or what ``auto`` takes in a traced graph.

    Layers of a graph would each make their own.
    """
    return made.layout.on_gpu or BACKENDS[choose(replace(made.case(), tracing=True))[0]].needs_tiles
