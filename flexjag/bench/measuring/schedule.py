"""Which cases and arms of a suite are measured, and in which order, when time may run out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from flexjag.bench.measuring.measure import LATE, LATER, describe_error, run_case
from flexjag.bench.suites.registry import (
    ALL,
    NEEDED,
    NOT_BEGUN,
    PLAIN,
    ArmResult,
    Case,
    CaseResult,
    Options,
    SelfTimedCase,
    Suite,
    Tell,
)

REST = "rest"
"""Part of a suite: what :data:`NEEDED` left out."""
CASE_SECONDS, ARM_SECONDS = 2.0, 2.0  # that a case takes on a GPU, and each of its arms, once kernels are compiled
QUICK = 0.05  # of that, for small inputs
USUAL_ARMS = 4  # of a case that names no arms
LOST = "the process ended while it was measured"


@dataclass
class Pace:
    """Prediction of the duration of cases, from the cases before them.

    Attributes:
        factor: Duration of the last cases relative to :data:`CASE_SECONDS` and :data:`ARM_SECONDS`.
    """

    factor: float = 1.0

    @staticmethod
    def of(options: Options) -> Pace:
        """The prediction before the first case."""
        return Pace(QUICK if options.quick else 1.0)

    def expected(self, arms: int) -> float:
        """Seconds of a case with this number of arms."""
        return self.factor * (CASE_SECONDS + arms * ARM_SECONDS)

    def record(self, arms: int, seconds: float) -> None:
        """Learn from a case's duration: the factor moves half of the way to it."""
        seen = seconds / (CASE_SECONDS + arms * ARM_SECONDS)
        self.factor = min(10.0, (self.factor + seen) / 2)


@dataclass(frozen=True)
class Job:
    """A measurement to be made: the name of its case, and the function that makes it."""

    name: str
    run: Callable[[], CaseResult]


def passes(options: Options) -> list[Options]:
    """The options of the passes over all suites: with a budget, first what limits need, then the rest."""
    if options.budget is None or options.part != ALL:
        return [options]
    return [replace(options, part=part) for part in (NEEDED, REST)]


def with_deadline(options: Options) -> Options:
    """The options with the end of their budget, which begins now."""
    return replace(options, deadline=None if options.budget is None else time.monotonic() + options.budget)


def run_suite(suite: Suite, options: Options, tell: Tell) -> list[CaseResult]:
    """Measure every case of a suite; with a budget, as much of it as fits.

    Args:
        suite: The suite.
        options: Options of the run.
        tell: Called with a description of each measurement as it begins.
    """
    found: dict[str, CaseResult] = {}
    pace = Pace.of(options)
    for part in passes(with_deadline(options)):
        for job in jobs(suite, part, tell, found, pace):
            found[job.name] = job.run()
    return list(found.values())


def jobs(
    suite: Suite,
    options: Options,
    tell: Tell,
    known: Mapping[str, CaseResult],
    pace: Pace,
    lost: str | None = None,
) -> Iterator[Job]:
    """The measurements of one pass over a suite, in the order of its cases.

    With a deadline a case is begun only if it will probably be complete in time: it then has all arms that it needs.

    Args:
        suite: The suite.
        options: Options of the pass, with the deadline.
        tell: Called with a description of each measurement as it begins.
        known: Results by case; those that are complete are not measured again.
        pace: Prediction of the suite's durations, updated by each case.
        lost: Case during which an earlier process ended. It is not tried again.
    """
    for case in suite.cases(options):
        before = known.get(case.name)
        if case.name == lost:
            yield Job(case.name, lambda case=case, before=before: _lost(case, before))
        elif before is not None and before.begun:
            reasons = {NEEDED: (LATE,), REST: (LATE, LATER)}.get(options.part, ())
            later = [arm.name for arm in before.arms if arm.reason in reasons]
            if later and isinstance(case, Case):
                yield Job(case.name, lambda c=case, b=before, n=later: _rest(suite, c, options, tell, b, n, pace))
        elif _belongs(case, options.part):
            yield Job(case.name, lambda case=case: _whole(suite, case, options, tell, pace))


def _belongs(case: Case | SelfTimedCase, part: str) -> bool:
    """Whether a case that has not been measured is measured in a pass over this part."""
    late, compiles = (case.late, case.compiles) if isinstance(case, Case) else (False, True)
    return part in (ALL, REST) or not (late or (part == PLAIN and compiles))


def _whole(suite: Suite, case: Case | SelfTimedCase, options: Options, tell: Tell, pace: Pace) -> CaseResult:
    """Measure a case: with a deadline the arms that it needs, else all arms."""
    needed = case.needed if isinstance(case, Case) and options.deadline is not None else ()
    count = len(needed) or USUAL_ARMS
    short = _too_short(options, pace.expected(count))
    if short is not None:
        return CaseResult(case.name, dict(case.facts), [], f"{NOT_BEGUN}: {short}")
    began = time.monotonic()
    try:
        if isinstance(case, SelfTimedCase):
            arms = case.run(lambda text: tell(f"{suite.name}: {case.name}: {text}"))
        else:
            arms = run_case(suite.name, case, options, tell, needed or None)
    except Exception as e:  # its inputs may not fit; the other cases are not to be lost by that
        if options.deadline is None:
            raise
        return CaseResult(case.name, dict(case.facts), [], f"failed: {describe_error(e)}")
    gc.collect()
    pace.record(count, time.monotonic() - began)
    cut = f"ended early: the {options.budget:.0f} s were used up" if options.over else None
    return CaseResult(case.name, dict(case.facts), arms, cut)


def _rest(
    suite: Suite, case: Case, options: Options, tell: Tell, before: CaseResult, names: Collection[str], pace: Pace
) -> CaseResult:
    """Measure the arms of a case that an earlier pass left out, or had no time for."""
    if _too_short(options, pace.expected(len(names))) is not None:
        return before
    began = time.monotonic()
    found = {arm.name: arm for arm in run_case(suite.name, case, options, tell, names) if arm.name in names}
    pace.record(len(names), time.monotonic() - began)
    gc.collect()
    arms = [found.get(arm.name, arm) for arm in before.arms]
    return replace(before, arms=arms, cut=before.cut if any(arm.reason == LATE for arm in arms) else None)


def _too_short(options: Options, expected: float) -> str | None:
    """Why there is no time for a case; None if there is."""
    if options.deadline is None:
        return None
    left = max(0.0, options.deadline - time.monotonic())
    if left >= expected:
        return None
    return f"it takes about {expected:.0f} s, and {left:.0f} s of the {options.budget:.0f} s were left"


def _lost(case: Case | SelfTimedCase, before: CaseResult | None) -> CaseResult:
    if before is None or not before.begun:
        return CaseResult(case.name, dict(case.facts), [], f"ended early: {LOST}")
    arms = [ArmResult(arm.name, "failed", LOST) if arm.reason in (LATER, LATE) else arm for arm in before.arms]
    return replace(before, arms=arms)
