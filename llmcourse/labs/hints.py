"""Hints in layers: a question, then the idea, then nearly the code. One at a time, and counted."""

from __future__ import annotations

from html import escape

from llmcourse.grading.exercise import Exercise
from llmcourse.labs.catalog import Lab


class Hint:
    """One layer of an exercise's hints."""

    def __init__(self, exercise: Exercise, layer: int) -> None:
        self.exercise, self.layer = exercise, layer
        self.text = exercise.hints[layer - 1]

    @property
    def title(self) -> str:
        return f"{self.exercise.name} · hint {self.layer} of {len(self.exercise.hints)}"

    def __repr__(self) -> str:
        return f"{self.title}\n{self.text}"

    def _repr_html_(self) -> str:
        return (
            '<div style="border-left:3px solid #0072B2;padding:.2rem .8rem;margin:.3rem 0">'
            f"<small>{escape(self.title)}</small><br>"
            f'<span style="white-space:pre-wrap">{escape(self.text)}</span></div>'
        )


def show(lab: Lab, exercise: Exercise, layer: int | None = None) -> Hint:
    """Hint number `layer`, or the one after the last that was shown; the last one again after that."""
    from llmcourse.labs import progress

    if layer is None:
        layer = progress.hints_shown(lab.name, exercise.name) + 1
    layer = max(1, min(layer, len(exercise.hints)))
    progress.hint_shown(lab.name, exercise.name, layer)
    return Hint(exercise, layer)
