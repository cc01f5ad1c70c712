"""What `llmcourse grade` shows: a line for each submission, then what to look at."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmcourse.grading import converting
from llmcourse.grading.gates import CHECK_PREFIX
from llmcourse.notebook import Table

if TYPE_CHECKING:
    from llmcourse.grading.grade import Event, Row, Run
    from llmcourse.grading.gradebook import Course

MISTAKES_SHOWN = 10


def command(
    folder: Path,
    *,
    lab: str | None,
    course: Path,
    db: str | None,
    jobs: int | None,
    cluster: str | None,
    unsafe: bool,
    again: bool,
) -> int:
    """Grade the submissions in `folder`; status 1 if one of them could not be judged.

    Raises CourseError, with what to do, where grading cannot begin.
    """
    converting.require()
    from llmcourse.grading.grade import grade, which_lab
    from llmcourse.grading.gradebook import Course

    chosen = which_lab(lab, folder)
    try:
        with Course(course, db) as book, _Lines() as lines:
            run = grade(
                folder,
                chosen,
                book,
                workers=jobs,
                cluster=cluster,
                unsafe=unsafe,
                again=again,
                tell=lines.tell,
            )
    except KeyboardInterrupt:
        print("\nStopped. Verdicts so far are kept: the same command goes on from here.", file=sys.stderr)
        return 130
    _summarise(run, book)
    return 1 if run.failed else 0


def _summarise(run: Run, book: Course) -> None:
    if common := mistakes(run.rows):
        print("", Table(["exercise", "named mistake", "students"], common), sep="\n", end="\n\n")
    kept = sum(row.kept for row in run.rows)
    print(
        f"{len(run.rows)} submissions of {run.lab.name}, {run.lab.points} points each, in {run.seconds:.1f} s"
        + (f" ({kept} were judged before)" if kept else "")
    )
    print(f"marks     {book.marks_path(run.lab)}\nfeedback  {book.feedback_folder(run.lab)}")
    print(f"by hand   cd {book.folder} && jupyter lab, then nbgrader's Formgrader")
    for row in run.failed:
        print(f"NOT JUDGED {row.student}: {row.judged.error if row.judged else ''}", file=sys.stderr)


def mistakes(rows: Iterable[Row]) -> list[tuple[str, str, int]]:
    """The named mistakes of a class that occur most often: exercise, mistake, number of students."""
    found = Counter(
        (name.removeprefix(CHECK_PREFIX), mark["mistake"])
        for row in rows
        if row.judged
        for name, mark in row.judged.marks.items()
        if mark["mistake"]
    )
    return [(*which, count) for which, count in found.most_common(MISTAKES_SHOWN)]


class _Lines:
    """A line for each student, and on a terminal a bar below them."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("judging"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("judging", total=None)

    def __enter__(self) -> _Lines:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def tell(self, event: Event, row: Row, total: int) -> None:
        self.bar.update(self.task, advance=event != "taken in", total=total)
        if row.judged is None or event == "kept":
            return
        remarks = [*row.intake.remarks, *row.judged.remarks]
        lines = [f"{row.student}  {row.judged.error or f'{row.points:g} points'}"]
        lines += [f"    {remark}" for remark in remarks]
        self.console.print(escape("\n".join(lines)))
