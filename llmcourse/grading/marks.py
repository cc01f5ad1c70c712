"""The marks of a lab as CSV, a row for each student.

    student, lab, one column for each exercise, manual, total, max, remarks

`manual` is what a person gave for answers in words, empty while one of them waits. A text that a
spreadsheet would take for a formula gets an apostrophe in front: student ids and remarks hold what
students chose. (Semicolons go too: where they separate columns, one would start a new cell.)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from llmcourse.grading.database import Mark, Score

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
WAITS = "an answer waits to be marked by hand"
ABSENT = "nothing was handed in"


def table(lab: str, scores: Sequence[Score], remarks: Mapping[str, Sequence[str]]) -> str:
    """The CSV text. `remarks` are those on each student's submission."""
    names = list(dict.fromkeys(m.name for s in scores for m in s.marks.values() if not m.by_hand))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["student", "lab", *map(harmless, names), "manual", "total", "max", "remarks"])
    for score in scores:
        by_hand = [mark for mark in score.marks.values() if mark.by_hand]
        waits = any(mark.needs_review for mark in score.marks.values())
        said = [
            *([] if score.handed_in else [ABSENT]),
            *remarks.get(score.student, ()),
            *([WAITS] if waits else []),
        ]
        cells = [_points(score.marks[name]) if name in score.marks else "" for name in names]
        manual = (
            "" if not by_hand or any(map(_unmarked, by_hand)) else f"{sum(mark.points for mark in by_hand):g}"
        )
        writer.writerow(
            [
                harmless(score.student),
                harmless(lab),
                *cells,
                manual,
                f"{score.points:g}",
                f"{score.max:g}",
                harmless(" · ".join(said).replace(";", ",")),
            ]
        )
    return out.getvalue()


def harmless(text: str) -> str:
    """`text`, with an apostrophe before what a spreadsheet would run as a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _unmarked(mark: Mark) -> bool:
    return mark.manual is None and mark.auto is None


def _points(mark: Mark) -> str:
    return f"{mark.points:g}"
