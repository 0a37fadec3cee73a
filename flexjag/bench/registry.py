"""The words of a benchmark, and the list of suites.

A suite holds cases; a case is one set of inputs with several arms, the ways to do the same job. Suites register
themselves with :func:`suite` when their module is imported; :func:`load` imports them all.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexjag.errors import FlexjagError

MODULES = (
    "suites_mask",
    "suites_attention",
    "suites_ops",
    "suites_normalizers",
    "suites_compile",
    "suites_train",
    "suites_energy",
    "suites_paper",
    "suites_step",
)

Tell = Callable[[str], None]
"""Called with a line that says what is being measured now."""


class BenchError(FlexjagError, ValueError):
    """A benchmark asked for that does not exist, or a results file that is not one."""


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Attributes:
        quick: Small sizes and few samples: shows that a suite works, not how fast anything is.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: How often each arm is timed at most.
        seconds_per_arm: An arm that has used this much time is timed no more, once it has three samples.
        memory: Whether peak memory is measured.
        seed: What lengths and values are drawn from.
        budget: Seconds that a suite may take; None for as long as it needs.
        deadline: When that budget is used up, by ``time.monotonic()``; set where a suite or a case begins.
    """

    quick: bool = False
    device: str = "cpu"
    rounds: int = 31
    seconds_per_arm: float = 4.0
    memory: bool = True
    seed: int = 0
    budget: float | None = None
    deadline: float | None = None

    @property
    def over(self) -> bool:
        """Whether the budget is used up."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True)
class Arm:
    """One way to do a case's job.

    Attributes:
        name: What the tables call it.
        make: Prepares what is made once per batch (a plan, a padding mask) and returns the call to be timed.
        check: What is wrong with a result of that call, or None.
        needs: A bound from experience on the bytes it takes; over 60 % of free memory it is skipped.
        absent: Why it cannot run here at all, or None.
        memory: Whether to measure its peak memory; False where another arm's figure says the same.
        steps: How many equal steps one call is. Samples are the time of one step.
        tokens: Tokens of a step, where a rate in tokens per second means something; else 0.
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
        name: What the tables call it; unique in its suite.
        facts: Sizes and seeds, for the record.
        arms: Builds the inputs, from fixed seeds, and the arms over them.
        small: The same arms over small inputs: run once before memory is measured, to load code.
    """

    name: str
    facts: Mapping[str, Any]
    arms: Callable[[], Sequence[Arm]]
    small: Callable[[], Sequence[Arm]]


@dataclass(frozen=True)
class Trial:
    """A case that cannot be interleaved and measures itself, such as a run whose point is compile time.

    Attributes:
        name: What the tables call it; unique in its suite.
        facts: Sizes and seeds, for the record.
        run: Measures every arm.
    """

    name: str
    facts: Mapping[str, Any]
    run: Callable[[Tell], list[ArmResult]]


@dataclass(frozen=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        name: The arm's.
        status: ``"ok"``, ``"wrong"``, ``"skipped"`` or ``"failed"``. Only ``"ok"`` has samples.
        reason: Why the status is not ``"ok"``.
        seconds: Raw samples, in the order they were taken.
        first_seconds: The first call, with whatever it loads or compiles.
        memory_bytes: Peak memory above the inputs, with what `make` prepares; None if not measured.
        memory_method: How that was read.
        extra: Anything else, by name.
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
    """What came of one case.

    Attributes:
        name: The case's.
        facts: The case's.
        arms: The results of its arms.
        cut: Why there are fewer arms or samples than there should be, or None.
    """

    name: str
    facts: dict[str, Any]
    arms: list[ArmResult]
    cut: str | None = None


@dataclass(frozen=True)
class Figure:
    """One number that a suite is run for.

    Attributes:
        text: What it is.
        value: None if an arm it needs has no samples.
        unit: ``"x"``, ``"s"``, ``"MB"``, ``"graphs"`` or another, written behind the number.
        limit: The acceptance limit, ``"<= 1.1"`` or ``">= 6"``, or None where nothing was promised.
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
        name: What the command line calls it.
        about: One sentence.
        cases: Options to what is to be measured.
        figures: Options and results to the numbers that matter.
    """

    name: str
    about: str
    cases: Callable[[Options], Sequence[Case | Trial]]
    figures: Callable[[Options, list[CaseResult]], list[Figure]]


SUITES: dict[str, Suite] = {}


def suite(
    name: str, about: str, figures: Callable[[Options, list[CaseResult]], list[Figure]]
) -> Callable[[Callable[[Options], Sequence[Case | Trial]]], Callable[[Options], Sequence[Case | Trial]]]:
    """Register the decorated function, which lists a suite's cases.

    Args:
        name: What the command line calls it.
        about: One sentence.
        figures: What the results amount to.
    """

    def decorate(cases: Callable[[Options], Sequence[Case | Trial]]) -> Callable[[Options], Sequence[Case | Trial]]:
        SUITES[name] = Suite(name, about, cases, figures)
        return cases

    return decorate


def load() -> dict[str, Suite]:
    """Import every suite's module and return the suites by name."""
    for module in MODULES:
        importlib.import_module(f"flexjag.bench.{module}")
    return SUITES


def find(name: str) -> Suite:
    """The suite of this name.

    Raises:
        BenchError: If there is none.
    """
    suites = load()
    if name not in suites:
        raise BenchError(f"suite: must be one of {', '.join(suites)}; got suite={name!r}")
    return suites[name]
