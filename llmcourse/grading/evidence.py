"""What a statistical test found: a p-value beside the false-alarm rate that was agreed before, and where."""

from __future__ import annotations

from dataclasses import dataclass

from llmcourse.errors import CourseError


class DistributionError(CourseError, ValueError):
    """A test of randomness that cannot be made: no draws, too few, or probabilities that are none."""


@dataclass(frozen=True)
class Deviation:
    """Where draws and expectation differ the most.

    where      `value 3`, `values 4, 7, 9 together`, `up to 0.25`, `the mean`, `draw 17`
    expected   how often, or which part or mean, it should be;  observed: what it was
    """

    where: str
    expected: float
    observed: float

    def __str__(self) -> str:
        return f"{self.where}: {_figure(self.observed)}, expected {_figure(self.expected)}"


@dataclass(frozen=True)
class Evidence:
    """The outcome of one test.

    ok            p_value > false_alarm: nothing speaks against the distribution
    p_value       at least the probability that a right sampler deviates as much or more; 0: it cannot
    false_alarm   a right sampler is rejected at most this often
    statistic     the test's own measure of deviation (0 is none), as its docstring says
    draws         how many were judged
    worst         the largest single deviation, also where all is well
    """

    p_value: float
    false_alarm: float
    statistic: float
    draws: int
    worst: Deviation

    @property
    def ok(self) -> bool:
        return self.p_value > self.false_alarm

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.draws:,} draws agree with the distribution (p = {self.p_value:.2g})"
        chance = "a right one cannot do this" if self.p_value == 0 else f"p = {self.p_value:.1g}"
        return f"{self.draws:,} draws do not have the distribution: {self.worst} ({chance})"


@dataclass(frozen=True)
class Budget:
    """A false-alarm rate for several tests together, shared out among them (Bonferroni).

        budget = Budget(1e-6)
        chi_square(first, p, budget.share(2)), chi_square(second, p, budget.share(2))

    However the tests depend on each other, all of them together reject right draws at most `total` often.
    """

    total: float

    def __post_init__(self) -> None:
        rate(self.total, "a budget")

    def share(self, tests: int) -> float:
        """The rate of each of `tests` tests."""
        if tests < 1:
            raise DistributionError(
                f"{tests} tests.", "A rate is shared among one test or more.", "share(1)."
            )
        return self.total / tests


def rate(value: float, what: str = "a false-alarm rate") -> float:
    """`value`, if it is a probability that leaves something to decide."""
    if not 0 < value < 1:
        raise DistributionError(f"{what} of {value}.", "It is a probability above 0 and below 1.", "1e-6.")
    return value


def _figure(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) and abs(x) >= 1 else f"{x:.4g}"
