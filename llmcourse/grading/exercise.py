"""An exercise: what is asked, how it is checked, how people get it wrong, how else it can be right.

    sum_to = Exercise("sum_to", title="The backward of broadcasting", …)

    @sum_to.check("each element is the sum of its copies' gradients")
    def values(t: Trial) -> None:
        grad = t.normal(5, 3)
        t.close(t.call(grad, (5, 1)), grad.sum(axis=1, keepdims=True))

    @sum_to.mistake(says="the copies' gradients were averaged, not summed",
                    tries="grad.sum(axis=…) where you have grad.mean(axis=…).", caught_by="values")
    def averaged(grad, shape): …

    @sum_to.alternative("einsum over the axes that stay")
    def einsum(grad, shape): …

A mistake serves twice: the bank (see `bank`) proves with it that the check rejects it, and a learner
whose function does the same on the same inputs is told which mistake it is. An alternative proves that
the check asks for the property and not for one way to get it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcourse.grading.trial import Trial

Function = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """A property, by name. `run` raises Mismatch where it does not hold."""

    name: str
    says: str
    run: Callable[[Trial], None]


@dataclass(frozen=True)
class Mistake:
    """A wrong solution that people write. `caught_by` names the check that must reject it."""

    name: str
    says: str
    tries: str
    caught_by: str
    fn: Function


@dataclass(frozen=True)
class Alternative:
    """A right solution that is written differently."""

    name: str
    says: str
    fn: Function


@dataclass
class Exercise:
    """One graded function of a lab.

    name         the function's name in the notebook
    arguments    its arguments' names, for messages
    shapes       the shape block that the notebook shows, one line each
    formula      the reference formula, one line
    difficulty   1 (a line or two) to 5; importance 1 to 5, for what follows in the course
    minutes      what a learner should expect to need
    hints        in layers: a question, then the idea, then nearly the code
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    shapes: tuple[str, ...]
    formula: str
    difficulty: int
    importance: int
    minutes: int
    points: int
    hints: tuple[str, ...]
    checks: list[Check] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)

    def header(self) -> str:
        """The line under the exercise's title in the notebook."""
        return (
            f"difficulty {_dots(self.difficulty)} · importance {_dots(self.importance)} · "
            f"{self.minutes} minutes · {self.points} points"
        )

    def check(self, says: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
        """Register a check; `says` is the property that holds for every right solution."""

        def add(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
            self.checks.append(Check(_name(run), says, run))
            return run

        return add

    def mistake(self, *, says: str, tries: str, caught_by: str) -> Callable[[Function], Function]:
        """Register a wrong solution; `says` completes "This is what you get when …", `tries` "Try: …"."""

        def add(fn: Function) -> Function:
            self.mistakes.append(Mistake(_name(fn), says, tries, caught_by, fn))
            return fn

        return add

    def alternative(self, says: str) -> Callable[[Function], Function]:
        """Register a right solution; `says` is how it differs."""

        def add(fn: Function) -> Function:
            self.alternatives.append(Alternative(_name(fn), says, fn))
            return fn

        return add

    def check_names(self) -> Sequence[str]:
        return [c.name for c in self.checks]


def _name(fn: Any) -> str:
    return str(fn.__name__).strip("_")


def _dots(n: int) -> str:
    return "●" * n + "○" * (5 - n)
