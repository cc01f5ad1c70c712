"""What `llmcourse grade` shows: a line for each submission, then what to look at."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmcourse.errors import MissingPackageError
from llmcourse.notebook import Table


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
    """Grade the submissions in `folder`; status 1 if one of them could not be judged."""
    try:
        import nbgrader  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"grading needs nbgrader, which is not installed ({error}).",
            "The gradebook, manual marks and the release of labs are nbgrader's.",
            "pip install -c constraints.txt -e '.[grade]' in the course's folder.",
        ) from error
    from llmcourse.grading.grade import Row, Run, grade, which_lab
    from llmcourse.grading.gradebook import Course

    chosen = which_lab(lab, folder)
    book = Course(course, db)
    show = _Lines()
    try:
        with show:
            run: Run = grade(
                folder,
                chosen,
                book,
                workers=jobs,
                cluster=cluster,
                unsafe=unsafe,
                again=again,
                tell=show.tell,
            )
    except KeyboardInterrupt:
        print("\nStopped. Verdicts so far are kept: the same command goes on from here.", file=sys.stderr)
        return 130
    states: Counter[str] = Counter()
    for row in run.rows:
        for mark in row.judged.marks.values() if row.judged else ():
            states[mark["mistake"] or mark["state"]] += 1
    common = [
        (name, count) for name, count in states.most_common() if name not in ("passed", "open", "failed")
    ]
    if common:
        print(Table(["named mistake", "how often"], common[:10]), end="\n\n")
    kept = sum(row.kept for row in run.rows)
    print(
        f"{len(run.rows)} submissions of {chosen.name}, {chosen.points} points each, in {run.seconds:.1f} s"
        + (f" ({kept} were judged before)" if kept else "")
    )
    print(f"marks     {book.marks_path(chosen)}\nfeedback  {book.feedback_folder(chosen)}")
    print(f"by hand   cd {book.folder} && jupyter lab, then nbgrader's Formgrader")
    for row in run.failed:
        assert isinstance(row, Row)
        print(f"NOT JUDGED {row.student}: {row.judged.error if row.judged else 'stopped'}", file=sys.stderr)
    return 1 if run.failed else 0


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

    def tell(self, what: str, row: object, total: int = 0) -> None:
        from llmcourse.grading.grade import Row

        assert isinstance(row, Row)
        self.bar.update(self.task, advance=1, total=total or None)
        if what == "kept":
            return
        remarks = [*row.intake.remarks, *(row.judged.remarks if row.judged else [])]
        text = row.judged.error if row.judged and row.judged.error else f"{row.points:g} points"
        lines = [f"{escape(row.student)}  {escape(text)}", *(f"    {escape(r)}" for r in remarks)]
        self.console.print("\n".join(lines))
