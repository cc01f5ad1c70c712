"""Small helpers that notebooks import: the source that is tested, and the reader's prediction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Source:
    """Source code that displays highlighted in Jupyter and as plain text elsewhere."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        # Long lines scroll: JupyterLab would break them within a word.
        look = HtmlFormatter(noclasses=True, style="friendly", prestyles="white-space: pre; overflow-x: auto")
        return highlight(self.text, PythonLexer(), look)


def show_source(*objects: Callable[..., Any] | type) -> Source:
    """The source of functions or classes of the package: what the reader sees is what is tested."""
    return Source("\n".join(inspect.cleandoc("\n" + inspect.getsource(o)) + "\n" for o in objects).rstrip())


def judge(predicted: float, measured: float, unit: str = "", word: str = "measured") -> str:
    """Hold a prediction against the measurement: `you said 10 tok/s, measured 24.1 tok/s: 2.4× more`.

    word   how the number came about, where it was not measured: "simulated", "recorded", "counted"
    """

    def number(x: float) -> str:
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:,.4g}"

    unit = f" {unit}" if unit else ""
    head = f"you said {number(predicted)}{unit}, {word} {number(measured)}{unit}"
    if predicted <= 0 or measured <= 0:
        return f"{head}: off by {measured - predicted:+.4g}{unit}"
    ratio = measured / predicted
    if 0.8 <= ratio <= 1.25:
        return f"{head}: close"
    return f"{head}: {ratio:.1f}× more" if ratio > 1 else f"{head}: {1 / ratio:.1f}× less"


class Table:
    """A small table: HTML in Jupyter, aligned text elsewhere (and for nbval, which compares the text).

    `columns` are headings; a cell that is not a string is printed with `format(cell, ',.4g')`.
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> None:
        self.columns = list(columns)
        self.rows = [[_cell(value) for value in row] for row in rows]
        self.note = note

    def __repr__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        numeric = [all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]
        text = [
            "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True))
            for line in lines
        ]
        text.insert(1, "  ".join("─" * w for w in widths))
        return "\n".join(line.rstrip() for line in text) + (f"\n{self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        from html import escape

        def line(tag: str, cells: list[str]) -> str:
            return (
                "<tr>"
                + "".join(
                    f'<{tag} style="text-align:{"right" if _is_number(c) else "left"}">{escape(c)}</{tag}>'
                    for c in cells
                )
                + "</tr>"
            )

        body = "".join(line("td", row) for row in self.rows)
        note = f"<p><small>{escape(self.note)}</small></p>" if self.note else ""
        return f"<table><thead>{line('th', self.columns)}</thead><tbody>{body}</tbody></table>{note}"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "–+-−.$")
