"""The step of nbgrader's autograde that takes the place of execution. Needs nbgrader.

`nbgrader_config.py` of a course folder names these classes too, so that Formgrader's "autograde" button
enters the same marks once more and runs nothing of a submission's.
"""

from __future__ import annotations

from typing import Any

from nbformat import NotebookNode, from_dict
from nbgrader.preprocessors import NbGraderPreprocessor

from llmcourse.errors import NotebookError
from llmcourse.grading.gates import nbgrader
from llmcourse.grading.record import KEY, NOT_JUDGED, RESULTS, outputs, results_of, verdict_output

SANITIZE = ("nbgrader.preprocessors.OverwriteCells",)
AUTOGRADE = (
    "llmcourse.grading.replay.Replay",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.CheckCellMetadata",
)


class Replay(NbGraderPreprocessor):
    """Put a judged notebook's results into its cells, as their outputs."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        results = results_of(nb)
        if results is None:
            raise NotebookError(
                "this submission has not been judged.",
                "Marks are decided in a sandbox, by llmcourse grade; nbgrader itself executes nothing here.",
                "llmcourse grade FOLDER --course and this folder.",
            )
        shown, marks = results["outputs"], results["marks"]
        for cell in nb.cells:
            if cell.cell_type != "code":
                continue
            own = nbgrader(cell)
            if own.get("grade") and not own.get("solution"):
                found = [verdict_output(marks.get(own["grade_id"], NOT_JUDGED))]
            else:
                found = outputs(shown.get(cell.id, ()))
            cell.outputs, cell.execution_count = [from_dict(output) for output in found], None
        kept = {k: v for k, v in results.items() if k != "outputs"}
        nb.metadata[KEY] = {**nb.metadata[KEY], RESULTS: kept}
        return nb, resources


class NoFeedback(NbGraderPreprocessor):
    """Refuse nbgrader's own feedback pages, which show hidden tests and a submission's HTML."""

    def preprocess(self, nb: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        raise NotebookError(
            "nbgrader's feedback pages are not made in this course.",
            "They show the hidden tests; llmcourse grade has written a page for each student, in feedback/.",
            "the same llmcourse grade command again, which adds marks given by hand to those pages.",
        )
