"""A student's feedback: one HTML page with marks, verdicts, their own code and what a person wrote.

The page needs no other file and runs nothing. Its policy lets no script, frame, form or request
through; every text is escaped by the template; Markdown is rendered with HTML switched off; pictures
are PNGs that were checked and rebuilt (see `inert`). Hidden tests are not on it: a graded cell shows its
verdict, never its source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from llmcourse import __version__
from llmcourse.grading.database import Mark, Score
from llmcourse.grading.feedback_page import TEMPLATE
from llmcourse.grading.gates import CHECK_PREFIX
from llmcourse.grading.record import results_of
from llmcourse.labs.catalog import Lab

MAX_RENDERED = 20_000  # characters; longer code or a longer answer is shown as it was typed
MAX_PAGE = 100_000  # characters of code and answers; what follows them too

IN_WORDS = "In your own words"
LABELS = {
    "passed": "passed",
    "failed": "not yet right",
    "open": "not done",
    "waits": "to be marked",
    "marked": "marked",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass
class Part:
    """A piece of a section: the learner's code, an answer, text that a cell printed, or a picture."""

    kind: str  # code, answer, plain (either, as typed), text, error, picture
    content: Any


@dataclass
class Section:
    """One exercise or answer, with what the learner wrote for it and around it."""

    name: str
    title: str
    mark: Mark | None
    state: str = ""
    verdict: str = ""
    parts: list[Part] = field(default_factory=list)


def stamp(lab: Lab, score: Score, record: str) -> str:
    """A digest of all that decides a page's content; `record` stands for the notebook's."""
    parts = [__version__, TEMPLATE, *_titles(lab).values(), lab.title, repr(score), record]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:32]


def page(lab: Lab, score: Score, nb: Mapping[str, Any], stamp: str = "") -> str:
    """The page of one student.

    nb      the recorded notebook as plain JSON, or {} where there is none
    stamp   stands at the page's head, so that it need not be made again
    """
    results = results_of(nb) or {}
    sections = _sections(lab, score, nb, results.get("marks", {}))
    waits = any(mark.needs_review for mark in score.marks.values())
    return _template().render(
        policy=POLICY,
        stamp=stamp,
        code_style=_code_style(),
        lab=lab.name,
        title=lab.title,
        score=score,
        share=round(100 * score.points / score.max) if score.max else 0,
        waits=waits,
        remarks=results.get("remarks", []),
        sections=sections,
        labels=LABELS,
        number=lambda value: f"{value:g}",
    )


def _titles(lab: Lab) -> dict[str, str]:
    return {e.name: e.title for e in lab.exercises}


def _sections(lab: Lab, score: Score, nb: Mapping[str, Any], marks: Mapping[str, Any]) -> list[Section]:
    titles = _titles(lab)
    sections = {
        name: Section(name, titles.get(name, IN_WORDS if mark.by_hand else name), mark)
        for name, mark in score.marks.items()
    }
    place, left = next(iter(sections), ""), MAX_PAGE
    for cell in nb.get("cells", []):
        own = cell.get("metadata", {}).get("nbgrader", {})
        name = str(own.get("grade_id", ""))
        if own.get("grade") and not own.get("solution"):
            place = name.removeprefix(CHECK_PREFIX)
            if place in sections:
                found = marks.get(name, {})
                sections[place].verdict = str(found.get("text", ""))
                sections[place].state = "passed" if found.get("ok") else str(found.get("state") or "failed")
            continue
        if own.get("solution"):
            place = name
        if place in sections and (own.get("solution") or not own) and not _is_the_labs(cell):
            size = len(_joined(cell.get("source")))
            left -= size
            sections[place].parts += _parts(cell, plain=size > MAX_RENDERED or left < 0)
    for section in sections.values():
        if section.mark and section.mark.by_hand:
            section.state = "waits" if section.mark.needs_review else "marked"
    return list(sections.values())


def _is_the_labs(cell: Mapping[str, Any]) -> bool:
    """Whether a cell is neither a solution nor the learner's own: intake names those `own-1`, `own-2`, …"""
    solution = cell.get("metadata", {}).get("nbgrader", {}).get("solution")
    return not solution and not str(cell.get("id", "")).startswith("own-")


def _parts(cell: Mapping[str, Any], plain: bool) -> list[Part]:
    source = _joined(cell.get("source"))
    if cell.get("cell_type") == "markdown":
        pictures = [_joined(bundle.get("image/png")) for bundle in cell.get("attachments", {}).values()]
        return [
            Part("plain" if plain else "answer", source if plain else _rendered(source)),
            *(Part("picture", data) for data in pictures),
        ]
    parts = (
        [Part("plain" if plain else "code", source if plain else _highlighted(source))]
        if source.strip()
        else []
    )
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream":
            parts.append(Part("text", _joined(output["text"])))
        elif output["output_type"] == "error":
            parts.append(Part("error", _joined(output["traceback"], "\n") or output["evalue"]))
        elif "image/png" in output["data"]:
            parts.append(Part("picture", _joined(output["data"]["image/png"]).strip()))
        elif "text/plain" in output["data"]:
            parts.append(Part("text", _joined(output["data"]["text/plain"])))
    return parts


def _joined(value: Any, between: str = "") -> str:
    return between.join(value) if isinstance(value, list) else str(value or "")


def _rendered(markdown: str) -> Any:
    """An answer as HTML, without HTML of its own, pictures or links."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])
    return Markup(reader.render(markdown))


def _highlighted(code: str) -> Any:
    from markupsafe import Markup
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    # In a long run of lines that hold blanks alone, the lexer looks at all that follow from each of them.
    code = "\n".join(line.rstrip() for line in code.split("\n"))
    return Markup(highlight(code, PythonLexer(stripnl=False), HtmlFormatter(cssclass="code")))


@cache
def _code_style() -> Any:
    from markupsafe import Markup
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    return Markup(
        f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.code {{ background: none }}"
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE)
