"""Where a learner is with a lab: a row for each exercise that follows `check`, and its hints on a button.

The widget is told of changes by `labs.progress`, in the kernel in which the check ran. Where no kernel
runs, the stored output is the same table as text and HTML.
"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as W

from llmcourse.labs import hints, progress
from llmcourse.labs.catalog import Lab
from llmcourse.labs.progress import SYMBOLS, Row

# Okabe & Ito's blue, green and vermilion: seen on light and dark pages, whose own colour the words have.
BAR, COLORS = "#0072B2", {"passed": "#009E73", "tried": "#D55E00", "open": "#808080"}
COLUMNS = "1.4em minmax(8em, 1fr) 4.7em 3.9em 3.2em 3.4em"
GRID = f"display:grid;grid-template-columns:{COLUMNS};column-gap:.5em;line-height:1.35;align-items:center"
LINE, BUTTON = "360px", "128px"  # on a page too narrow for both, the button goes below its line


class LabProgress:
    """A lab's exercises with their state, and a button each for the next hint.

    Tab reaches the buttons, Enter or Space presses them. The first presses show one hint more each;
    after the last one they hide and show the hints.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.total = W.HTML()
        self.rows = {row.exercise: _RowView(lab, row) for row in progress.lab_status(lab)}
        self.refresh()
        head = _beside(W.HTML(_head()), W.HTML(layout=W.Layout(height="0")))
        self.box = W.VBox([self.total, head, *(row.box for row in self.rows.values())])
        self.box.layout.max_width = "62rem"
        progress.watch(self)

    def refresh(self) -> None:
        """Show what is kept now."""
        rows = progress.lab_status(self.lab)
        self.total.value = _total(self.lab, rows)
        for row in rows:
            self.rows[row.exercise].show(row)

    def __repr__(self) -> str:
        return repr(progress.table(self.lab))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        table = progress.table(self.lab)
        bundle = dict(self.box._repr_mimebundle_(**kwargs) or {})
        return bundle | {"text/plain": repr(table), "text/html": table._repr_html_()}


def lab_progress(lab: Lab) -> LabProgress:
    """The live table of a lab's exercises."""
    return LabProgress(lab)


class _RowView:
    """One exercise: its line, its button, and below them the hints that were asked for here."""

    def __init__(self, lab: Lab, row: Row) -> None:
        self.lab, self.exercise, self.given = lab, row.about, row.hints  # given: hints shown so far
        self.line = W.HTML()
        self.button = W.Button()
        self.button.on_click(self._press)
        self.hints = W.HTML(layout=W.Layout(display="none", margin="0 0 0 26px"))
        self.box = W.VBox([_beside(self.line, self.button), self.hints])

    def show(self, row: Row) -> None:
        self.given = max(self.given, row.hints)
        self.line.value = _line(row)
        self._label()

    def _press(self, _: W.Button) -> None:
        if self.given < len(self.exercise.hints):
            self.given += 1
            hints.show(self.lab, self.exercise, self.given)
            self._open(self.given)
        else:
            self._open(0 if self._is_open else self.given)
        self._label()

    @property
    def _is_open(self) -> bool:
        return self.hints.layout.display != "none"

    def _open(self, layers: int) -> None:
        shown = "".join(hints.Hint(self.exercise, n + 1)._repr_html_() for n in range(layers))
        self.hints.value = f'<div role="status" style="line-height:1.45">{shown}</div>' if shown else ""
        self.hints.layout.display = "" if shown else "none"

    def _label(self) -> None:
        """What the button does next, in words that are also read aloud."""
        name, given, of = self.exercise.name, self.given, len(self.exercise.hints)
        if given < of:
            self.button.description = f"hint {given + 1} of {of}"
            self.button.tooltip = f"Show hint {given + 1} of {of} for {name}"
        else:
            self.button.description = "hide hints" if self._is_open else "show hints"
            self.button.tooltip = f"{self.button.description.capitalize()} for {name}"


# ── pieces of HTML ───────────────────────────────────────────────────────────────────────────────────


def _beside(line: W.HTML, button: W.DOMWidget) -> W.HBox:
    line.layout.flex, line.layout.min_width = f"1 1 {LINE}", "0"
    button.layout.flex, button.layout.width = f"0 0 {BUTTON}", BUTTON
    return W.HBox([line, button], layout=W.Layout(flex_flow="row wrap", align_items="center"))


def _head() -> str:
    names = ("", "exercise", "difficulty", "minutes", "points", "hints")
    return f'<div style="{GRID};opacity:.75">{"".join(_cell(n, i > 1) for i, n in enumerate(names))}</div>'


def _line(row: Row) -> str:
    about = row.about
    symbol = f'<b aria-hidden="true" style="color:{COLORS[row.state]}">{SYMBOLS[row.state]}</b>'
    title = (
        f"<span><code>{escape(about.name)}</code> {escape(about.title)}<br>"
        f'<small style="opacity:.75">{escape(row.note)}</small></span>'
    )
    numbers = (f"{about.difficulty} of 5", about.minutes, about.points, f"{row.hints} of {len(about.hints)}")
    return f'<div style="{GRID}">{symbol}{title}{"".join(_cell(n, True) for n in numbers)}</div>'


def _cell(value: Any, number: bool) -> str:
    return f'<span style="text-align:{"right" if number else "left"}">{escape(str(value))}</span>'


def _total(lab: Lab, rows: list[Row]) -> str:
    points, of = sum(r.points for r in rows), sum(r.about.points for r in rows)
    words = progress.summary(rows)
    bar = (
        f'<div role="progressbar" aria-label="points" aria-valuemin="0" aria-valuemax="{of}" '
        f'aria-valuenow="{points}" aria-valuetext="{words}" '
        'style="height:.6rem;border-radius:.3rem;background:rgba(128,128,128,.3);overflow:hidden">'
        f'<div style="height:100%;width:{100 * points / max(of, 1):.1f}%;background:{BAR}"></div></div>'
    )
    return f'<div style="line-height:1.6"><b>{escape(lab.title)}</b> · {words}{bar}</div>'
