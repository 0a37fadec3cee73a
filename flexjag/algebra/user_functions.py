"""Users' functions of scalars: recording of their calls, freezing of their closures, casts of their tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flexjag.algebra import masks as m
from flexjag.algebra import scores as s
from flexjag.algebra.node import Node, NodeKind
from flexjag.algebra.tree import held_tensors, replaced, walk
from flexjag.errors import MaskError, ScoreError, explain_values

Place = tuple[Tensor, Tensor, Tensor, Tensor]
"""Sample arguments for users' functions: segment, head, query and key position of an existing pair, 0-d int32 each."""


class _Watch(TorchFunctionMode):
    """Record the tensors that torch functions read, except the function's own arguments and intermediate results."""

    def __init__(self, args: Sequence[Tensor]) -> None:
        super().__init__()
        self.args = {id(x) for x in args}
        self.used: set[int] = set()
        self.made: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}  # the values keep the ids from being reused

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        looks = getattr(func, "__name__", "") == "__get__" and not isinstance(out, Tensor)  # at ndim, dtype, ...
        for x in tree_leaves((args, kwargs or {})):
            if id(x) not in self.args:
                if isinstance(x, Tensor) and id(x) not in self.made:
                    self.given[id(x)] = x
            elif not looks:
                self.used.add(id(x))
        self.made.update({id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)})
        return out


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a user's function, with the tensors it read.

    Attributes:
        fn: The function.
        dtype: Dtype of the score it was called on; None for a mask's function.
        place: Segment, head and positions it was called on.
        given: Tensors it read, other than its arguments.
        used: Ids of the arguments whose values it read.
        out: Its return value.
    """

    fn: Callable[..., Any]
    dtype: torch.dtype | None
    place: Place
    given: list[Tensor]
    used: set[int]
    out: Any

    @staticmethod
    def of(fn: Callable[..., Any], dtype: torch.dtype | None, place: Place) -> RecordedCall:
        """Call a function and record the call."""
        score = () if dtype is None else (torch.full((), 0.75, dtype=dtype, device=place[0].device),)
        with _Watch((*score, *place)) as watch:
            out = fn(*score, *place)
        return RecordedCall(fn, dtype, place, list(watch.given.values()), watch.used, out)

    def has_changed(self) -> bool:
        """True if the function reads other tensors than at first, or computes other values from them."""
        known = {id(x) for x in self.given}
        with torch.no_grad():
            now = RecordedCall.of(self.fn, self.dtype, self.place)
            others = [x for x in now.given if id(x) not in known]
            # What it makes at each call without torch seeing it, as by from_numpy, is another tensor each time.
            again = {id(x) for x in RecordedCall.of(self.fn, self.dtype, self.place).given} if others else set()
        if any(id(x) in again for x in others):
            return True
        outs = now.out, self.out
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in outs):  # a GPU would have to be waited for
            return False
        return not torch.equal(*(x.detach().nan_to_num(nan=0.5) for x in outs))


def trials(node: Node | None, dtype: torch.dtype, place: Callable[[], Place | None]) -> list[RecordedCall]:
    """Call each of a node's functions once, and return the recorded calls.

    Args:
        node: A mask, a score, or None.
        dtype: Dtype that scores are computed in.
        place: Returns the sample arguments, or None if there are none; called only if there are functions.
    """
    found: list[RecordedCall] = []
    for one in walk(node):
        if isinstance(one, (m.MaskMod, s.ScoreMod)) and (at := place()) is not None:
            found.append(RecordedCall.of(one.fn, dtype if isinstance(one, s.ScoreMod) else None, at))
    return found


class Substitute(TorchFunctionMode):
    """Mode that replaces each of the tensors `old` by its counterpart in `new` in the arguments of torch functions."""

    def __init__(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        super().__init__()
        self.new = {id(x): y for x, y in zip(old, new, strict=True)}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = tree_map(lambda x: self.new.get(id(x), x), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _ReadWide(TorchFunctionMode):
    """Mode that casts floating-point arguments of torch functions to at least `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = tree_map(lambda x: widened(x, self.dtype) if isinstance(x, Tensor) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor to at least `dtype`; other tensors are returned unchanged."""
    return x.to(torch.promote_types(x.dtype, dtype)) if x.dtype.is_floating_point else x


class _Wide:
    """A function whose captured tensors are replaced by copies in another dtype."""

    def __init__(self, func: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.func, self.dtype = func, dtype
        self.__name__ = getattr(func, "__name__", type(func).__name__)

    def __call__(self, *args: Tensor) -> Tensor:
        with _ReadWide(self.dtype):
            return self.func(*args)


def learning_in(node: NodeKind, dtype: torch.dtype, place: Callable[[], Place | None]) -> NodeKind:
    """Return the node with its trainable tensors cast to at least `dtype`: gradients accumulate in it and round once.

    All tensors that functions close over are cast, trainable or not, so that results do not depend on that.

    Args:
        node: A score or a normalizer.
        dtype: Dtype that scores are computed in.
        place: Returns sample arguments for its functions, or None if there are none, as in a graph; called only if it
            has functions.
    """

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return widened(x, dtype) if x.requires_grad and torch.is_grad_enabled() else x
        at = place()
        known = at is not None and all(widened(t, dtype) is t for t in RecordedCall.of(x, dtype, at).given)
        return x if known else _Wide(x, dtype)

    return replaced(node, leaf)


def learning_once(
    score: s.Score | None, dtype: torch.dtype, place: Callable[[], Place | None]
) -> AbstractContextManager[Any]:
    """Cast the trainable tensors of a score's functions to `dtype` once, and pass the same copies to every call.

    Their gradients are then rounded once, not once for each call.
    """
    learned = learned_tensors(score, dtype, place)
    narrow = [(x, wide) for x in learned if (wide := widened(x, dtype)) is not x]
    return Substitute(*zip(*narrow, strict=True)) if narrow else nullcontext()


def frozen(node: NodeKind, tensors: Callable[[Tensor], Tensor] = lambda x: x, with_globals: bool = False) -> NodeKind:
    """Return the node with the closures, defaults and globals of its functions bound to their present values.

    Otherwise a backward, which evaluates them again, would see later values, as in a loop that makes
    ``lambda s, b, h, i, j: s * c`` for one c after the other. Attributes of objects are not bound.

    Args:
        node: A mask or a score.
        tensors: Function applied to each tensor in its fields, closures and defaults.
        with_globals: Bind global names, too. TorchDynamo cannot trace such functions.
    """
    memo: dict[int, Any] = {}

    def leaf(x: Any) -> Any:
        if id(x) not in memo:
            memo[id(x)] = x  # what a function that calls itself finds
            memo[id(x)] = tensors(x) if isinstance(x, Tensor) else _rebound(x, leaf, with_globals)
        return memo[id(x)]

    twin = replaced(node, leaf)
    memo.clear()  # `leaf` refers to itself: what it holds would wait for the garbage collector
    return twin


def _names(code: types.CodeType) -> Iterator[str]:
    """Names in a function's code, and in the code of nested functions."""
    yield from code.co_names
    for x in code.co_consts:
        if isinstance(x, types.CodeType):
            yield from _names(x)


def _rebound(x: Any, leaf: Callable[[Any], Any], with_globals: bool) -> Any:
    """Rebuild a function, partial or container with `leaf` of all that it is bound to; keep anything else."""
    if type(x) in (list, tuple):
        return type(x)(leaf(y) for y in x)
    if type(x) is dict:
        return {key: leaf(y) for key, y in x.items()}
    if isinstance(x, functools.partial):
        keywords = {name: leaf(y) for name, y in x.keywords.items()}
        return functools.partial(leaf(x.func), *(leaf(y) for y in x.args), **keywords)
    if not isinstance(x, types.FunctionType):
        return x
    space = x.__globals__
    if with_globals:
        read = {name: space[name] for name in _names(x.__code__) if isinstance(space.get(name), types.FunctionType)}
        space = dict(space)
        space |= {name: leaf(y) for name, y in read.items() if y.__module__ == x.__module__}
    elif not x.__closure__ and not x.__defaults__ and not x.__kwdefaults__:
        return x
    cells = tuple(_rebound_cell(c, leaf) for c in x.__closure__ or ())
    defaults = None if x.__defaults__ is None else tuple(leaf(y) for y in x.__defaults__)
    twin = types.FunctionType(x.__code__, space, x.__name__, defaults, cells)
    twin.__dict__.update(x.__dict__)
    twin.__doc__, twin.__module__, twin.__qualname__ = x.__doc__, x.__module__, x.__qualname__
    twin.__kwdefaults__ = None if x.__kwdefaults__ is None else {n: leaf(y) for n, y in x.__kwdefaults__.items()}
    return twin


def _rebound_cell(cell: types.CellType, leaf: Callable[[Any], Any]) -> types.CellType:
    try:
        return types.CellType(leaf(cell.cell_contents))
    except ValueError:  # a name without a value yet
        return cell


def captured(node: Node | None, dtype: torch.dtype, place: Callable[[], Place | None]) -> list[Tensor]:
    """Tensors that a mask or a score reads, including those its functions read when called once."""
    if node is None:
        return []
    read = [x for trial in trials(node, dtype, place) for x in trial.given]
    if not read:  # as in a graph, which must not look at the tensors' identities
        return held_tensors(node)
    return list({id(x): x for x in (*held_tensors(node), *read)}.values())


def learned_tensors(score: s.Score | None, dtype: torch.dtype, place: Callable[[], Place | None]) -> list[Tensor]:
    """Tensors of a score that need gradients, including those of its functions. Empty when gradients are off."""
    if not torch.is_grad_enabled():
        return []
    return [x for x in captured(score, dtype, place) if x.requires_grad]


@dataclass(frozen=True, eq=False)
class Reading:
    """Snapshot of the tensors that a mask's functions read at planning. Not copied or pickled: copies take a new one.

    Attributes:
        trials: One recorded call of each function.
        counts: The tensors they read, each with its number of in-place writes (its version).
    """

    trials: list[RecordedCall]
    counts: list[tuple[Tensor, int]]

    @staticmethod
    def of(mask: m.Mask, place: Callable[[], Place | None]) -> Reading:
        """Take the snapshot. Inference tensors are left out: torch does not count their writes."""
        found = trials(mask, torch.float32, place)
        read = [x for trial in found for x in trial.given]
        return Reading(found, [(x, x._version) for x in read if not x.is_inference()])

    def change(self) -> str | None:
        """Return the name of a tensor that was written to or rebound since, or None."""
        for x, count in self.counts:
            if x._version != count:
                return f"a tensor {list(x.shape)} was written to"
        if any(trial.has_changed() for trial in self.trials):
            return "something was bound anew"
        return None

    def __reduce__(self) -> tuple[type[Reading], tuple[list[RecordedCall], list[tuple[Tensor, int]]]]:
        return Reading, ([], [])


def check_functions(node: m.Mask | s.Score, place: Place | None) -> None:
    """Call every user's function in a mask or score once, as a backend will, to report its mistakes by name.

    Args:
        node: The mask or the score.
        place: Sample arguments; without them nothing is called.

    Raises:
        MaskError: If a mask's function fails or does not return one bool.
        ScoreError: If a score's function fails or does not return one float.
    """
    if place is None:
        return
    at = tuple(x.reshape(1) for x in place)
    for one in walk(node):
        if isinstance(one, m.MaskMod):
            _check(MaskError, one.fn, at, "(b, h, q_pos, kv_pos) -> bool")
        elif isinstance(one, s.ScoreMod):
            score = torch.zeros(1, device=at[0].device)
            _check(ScoreError, one.fn, (score, *at), "(score, b, h, q_pos, kv_pos) -> float")


def _check(error: type[ValueError], fn: Callable[..., Any], args: tuple[Tensor, ...], signature: str) -> None:
    name = getattr(fn, "__name__", type(fn).__name__)
    rule = f"{name} must be {signature} in tensor operations: & | ~ and torch.where, not and, or, not, if"
    try:
        out = torch.vmap(fn)(*args)
    except (RuntimeError, ValueError, TypeError, IndexError) as reason:
        raise error(explain_values("fn", rule, error=str(reason).split("\n")[0])) from reason
    if not isinstance(out, Tensor):
        raise error(explain_values("fn", rule, type=type(out).__name__))
    if (out.dtype == torch.bool) != (error is MaskError) or out.shape != (1,):
        raise error(explain_values("fn", rule, dtype=out.dtype, shape=tuple(out.shape[1:])))
