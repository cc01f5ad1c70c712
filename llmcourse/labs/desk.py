"""What a lab's notebook works with: `check(fn)`, `hint(fn)`, `progress()`.

`check` raises when a property does not hold, so that "Run all" stops at the exercise that is next.
What has passed is kept on disk (see `progress`): a restarted kernel knows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from llmcourse.errors import CourseError
from llmcourse.grading.exercise import Exercise
from llmcourse.labs.catalog import Lab, find_lab

JUDGED_ELSEWHERE = "LLMCOURSE_JUDGED_ELSEWHERE"


class NoFunctionError(CourseError, TypeError):
    """`check` or `hint` of something that is no exercise's function."""


class Desk:
    """One lab, opened in a notebook."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def check(self, fn: Callable[..., Any], *, seed: int | None = None) -> Any:
        """Judge `fn`, the function of one of the lab's exercises, on fresh random inputs.

        seed   repeats the inputs of an earlier check, whose message names it

        Returns the verdict if every property holds; raises CheckFailed, with the reason, if not.
        """
        from llmcourse.grading.trial import LocalSubject
        from llmcourse.grading.verdict import CheckFailed, NotImplementedYet, judge
        from llmcourse.labs import progress

        exercise = self._exercise(fn)
        verdict = judge(exercise, LocalSubject(fn), seed)
        verdict.lab = self.lab.name
        progress.record(verdict)
        if verdict.not_yet:
            raise NotImplementedYet(verdict)
        if not verdict.ok:
            raise CheckFailed(verdict)
        return verdict

    def hint(self, fn: Callable[..., Any] | str, layer: int | None = None) -> Any:
        """The next hint for an exercise, or its `layer` (1 is the first). Each says more than the last."""
        from llmcourse.labs import hints

        return hints.show(self.lab, self._exercise(fn), layer)

    def progress(self) -> Any:
        """What has passed so far, as a widget that follows `check`."""
        from llmcourse.widgets.lab_progress import lab_progress

        return lab_progress(self.lab)

    def _exercise(self, fn: Callable[..., Any] | str) -> Exercise:
        name = fn if isinstance(fn, str) else getattr(fn, "__name__", None)
        if name is None or not (isinstance(fn, str) or callable(fn)):
            names = ", ".join(e.name for e in self.lab.exercises)
            raise NoFunctionError(
                f"check() got a {type(fn).__name__}, not a function.",
                "An exercise is checked by calling the function you wrote.",
                f"check({self.lab.exercises[0].name}); the exercises are {names}.",
            )
        return self.lab.exercise(name)


class JudgedElsewhere:
    """The lab of a notebook that is being graded, and all that it gives: whatever a cell does with
    them, such as `assert check(sum_to).ok`, does nothing and ends nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what front ends ask for, to show an object
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __repr__(self) -> str:
        return "(judged when all cells have run)"

    def _ipython_display_(self) -> None:
        """Nothing is shown below a cell that ends with a check."""


def open_lab(name: str) -> Any:
    """The lab called `name` (see `find_lab`), for its notebook."""
    if os.environ.get(JUDGED_ELSEWHERE):
        return JudgedElsewhere()
    return Desk(find_lab(name))
