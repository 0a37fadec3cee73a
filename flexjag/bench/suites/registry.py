"""The data model of benchmarks, and the registry of suites.

A suite contains cases. A case is one set of inputs with several arms: implementations of the same computation. Suites
register themselves with :func:`suite` when their module is imported; :func:`load` imports them all.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexjag.errors import FlexjagError

MODULES = (
    "mask",
    "attention",
    "ops",
    "normalizers",
    "cpp",
    "compile",
    "train",
    "energy",
    "paper",
    "step",
    "data",
    "decode",
)

Tell = Callable[[str], None]
"""Progress callback; its argument is a line of text on the present measurement."""


NOT_BEGUN = "not begun"  # how the description of a case without measurements starts
ALL, NEEDED, PLAIN = "all", "needed", "plain"
"""Parts of a suite: everything, the arms that its key figures need, and of those the cases that compile nothing."""


class BenchError(FlexjagError, ValueError):
    """An unknown benchmark, invalid arguments, or an invalid results file."""


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        quick: Small sizes and few samples, to test that suites work; timings mean nothing.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: Maximum number of samples per arm.
        seconds_per_arm: Time in seconds after which an arm that has three samples is timed no more.
        memory: Whether to measure peak memory.
        seed: Random seed of lengths and values.
        budget: Maximum duration of all suites in seconds; None for no limit.
        deadline: End of the budget by ``time.monotonic()``, set when the first suite begins.
        part: What is measured, :data:`ALL`, :data:`NEEDED` or :data:`PLAIN`.
    """

    quick: bool = False
    device: str = "cpu"
    rounds: int = 31
    seconds_per_arm: float = 4.0
    memory: bool = True
    seed: int = 0
    budget: float | None = None
    deadline: float | None = None
    part: str = "all"

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Arm:
    """One implementation of a case's computation.

    Attributes:
        name: Name in the tables.
        make: Prepares whatever is made once per batch (a plan, a padding mask) and returns the call to be timed.
        check: Returns a description of the error in a result of that call, or None if it is right.
        needs: Empirical bound on the bytes it allocates; over 60 % of free memory the arm is skipped.
        absent: Reason for which it cannot run here, or None.
        memory: Whether to measure its peak memory; False where another arm has the same.
        steps: Number of equal steps in one call. A sample is the time of one step.
        tokens: Tokens per step, for a rate in tokens per second; 0 for none.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any], str | None]
    needs: int = 0
    absent: str | None = None
    memory: bool = True
    steps: int = 1
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """One set of inputs and the arms that run on it.

    Attributes:
        name: Name in the tables, unique in its suite.
        facts: Sizes and seeds, for the record.
        arms: Builds the inputs, from fixed seeds, and the arms over them.
        small: The same over small inputs; run once before memory is measured, to load code.
        needed: Names of the arms that acceptance limits compare; with a budget they come first. Empty: all arms.
        compiles: Whether those arms compile kernels on a GPU.
        late: Whether, with a budget, it comes after the cases of all suites: no limit needs it.
    """

    name: str
    facts: Mapping[str, Any]
    arms: Callable[[], Sequence[Arm]]
    small: Callable[[], Sequence[Arm]]
    needed: Sequence[str] = ()
    compiles: bool = True
    late: bool = False


@dataclass(frozen=True)
class SelfTimedCase:
    """A case that measures its arms itself, because they cannot be interleaved: compile time, or an energy counter.

    Attributes:
        name: Name in the tables, unique in its suite.
        facts: Sizes and seeds, for the record.
        run: Measures every arm and returns the results.
    """

    name: str
    facts: Mapping[str, Any]
    run: Callable[[Tell], list[ArmResult]]


@dataclass(frozen=True)
class ArmResult:
    """The measurements of one arm.

    Attributes:
        name: Name of the arm.
        status: ``"ok"``, ``"wrong"``, ``"skipped"`` or ``"failed"``. Only ``"ok"`` has samples.
        reason: Explanation of a status other than ``"ok"``.
        seconds: Raw samples in seconds, in the order they were taken.
        first_seconds: Duration of the first call, including loading and compilation.
        memory_bytes: Peak memory above the inputs, that of `make` included; None if not measured.
        memory_method: Method by which the memory was measured.
        extra: Further measurements by name.
    """

    name: str
    status: str
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    memory_bytes: int | None = None
    memory_method: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseResult:
    """The measurements of one case.

    Attributes:
        name: Name of the case.
        facts: Sizes and seeds of the case.
        arms: Results of its arms.
        cut: Reason for which arms or samples are missing, or None if the case is complete.
    """

    name: str
    facts: dict[str, Any]
    arms: list[ArmResult]
    cut: str | None = None

    @property
    def begun(self) -> bool:
        """Whether anything of it was measured, or failed."""
        return self.cut is None or not self.cut.startswith(NOT_BEGUN)

    @staticmethod
    def read(entry: Mapping[str, Any]) -> CaseResult:
        """The case of an entry in a results file."""
        return CaseResult(**{**entry, "arms": [ArmResult(**arm) for arm in entry["arms"]]})


@dataclass(frozen=True)
class Figure:
    """A key figure of a suite, with its acceptance limit.

    Attributes:
        text: Description of the figure.
        value: The value; None if an arm that it needs has no samples.
        unit: Unit, written behind the value: ``"x"``, ``"s"``, ``"MB"``, ``"graphs"`` or another.
        limit: The acceptance limit, ``"<= 1.1"`` or ``">= 6"``; None without one.
    """

    text: str
    value: float | None
    unit: str
    limit: str | None = None

    @property
    def met(self) -> bool | None:
        """Whether the limit is met; None without a limit or a value.

        >>> Figure("time ratio", 1.0, "x", "<= 1.1").met, Figure("time ratio", 1.0, "x").met
        (True, None)
        """
        if self.limit is None or self.value is None:
            return None
        relation, bound = self.limit.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


@dataclass(frozen=True)
class Suite:
    """A registered suite.

    Attributes:
        name: Name on the command line.
        about: Description in one sentence.
        cases: Function of the options that returns the cases.
        figures: Function of options and results that returns the key figures.
    """

    name: str
    about: str
    cases: Callable[[Options], Sequence[Case | SelfTimedCase]]
    figures: Callable[[Options, list[CaseResult]], list[Figure]]


SUITES: dict[str, Suite] = {}


def suite(
    name: str, about: str, figures: Callable[[Options, list[CaseResult]], list[Figure]]
) -> Callable[
    [Callable[[Options], Sequence[Case | SelfTimedCase]]], Callable[[Options], Sequence[Case | SelfTimedCase]]
]:
    """Decorator that registers a suite. The decorated function returns the suite's cases.

    Args:
        name: Name on the command line.
        about: Description in one sentence.
        figures: Function of options and results that returns the key figures.
    """

    def decorate(
        cases: Callable[[Options], Sequence[Case | SelfTimedCase]],
    ) -> Callable[[Options], Sequence[Case | SelfTimedCase]]:
        SUITES[name] = Suite(name, about, cases, figures)
        return cases

    return decorate


def load() -> dict[str, Suite]:
    """Import every suite's module and return the suites by name."""
    for module in MODULES:
        importlib.import_module(f"flexjag.bench.suites.{module}")
    return SUITES


def find(name: str) -> Suite:
    """The suite of this name.

    Raises:
        BenchError: If no suite has it.
    """
    suites = load()
    if name not in suites:
        raise BenchError(f"suite: must be one of {', '.join(suites)}; got suite={name!r}")
    return suites[name]
