"""A judged submission as a notebook: the clean cells, and what was found, in the notebook's own metadata.

nbgrader reads marks from outputs: a graded cell whose output is an error gets no points, one without
an error gets all. It would run the notebook to have outputs. Ours have been made already, in a sandbox,
and the marks decided outside it, so the results travel with the notebook and `replay` puts them in:

    judged/STUDENT/LAB/LAB.ipynb          the clean notebook, results in its metadata
        │  nbgrader's autograde, with `replay` where it would execute
    autograded/STUDENT/LAB/LAB.ipynb      outputs in the cells, marks in the gradebook

Only text and whole PNG pictures are put in. A page that shows these notebooks can run nothing of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nbformat import NotebookNode

from llmcourse.grading.inert import checked_png
from llmcourse.grading.intake import Intake
from llmcourse.grading.outputs import clean_text

if TYPE_CHECKING:
    from llmcourse.grading.stage import Judged

KEY, RESULTS = "llmcourse", "results"
MAX_TEXT = 50_000  # characters of a cell's outputs
MAX_OUTPUTS = 200
NOT_JUDGED = {"ok": False, "state": "failed", "text": "✗ not judged"}


def judged_notebook(intake: Intake, judged: Judged) -> NotebookNode:
    """The clean notebook with the results in its metadata, ready for `replay`."""
    nb = copy.deepcopy(intake.notebook)
    marks = {
        name: {
            "ok": mark.get("ok") is True,
            "state": str(mark.get("state", "")),
            "text": text(mark.get("text")),
        }
        for name, mark in judged.marks.items()
    }
    results = {
        "learner": intake.digest,
        "found": intake.found,
        "marks": marks,
        "remarks": [text(remark)[:500] for remark in (*intake.remarks, *judged.remarks)],
        "outputs": {cell: outputs(found) for cell, found in judged.outputs.items()},
    }
    results["record"] = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    nb.metadata[KEY] = {**nb.metadata.get(KEY, {}), RESULTS: results}
    return nb


def results_of(nb: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `judged_notebook` put into a notebook (given as plain JSON or as a node); None if it did not."""
    found = nb.get("metadata", {}).get(KEY, {}).get(RESULTS)
    return found if isinstance(found, dict) and "record" in found else None


def outputs(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A cell's outputs in nbformat's form, reduced to text and PNG pictures, and not too many.

    NOTE: a result becomes a display: nbgrader reads a number that a graded cell returns as its points.
    """
    kept: list[dict[str, Any]] = []
    left = MAX_TEXT
    for output in found:
        if len(kept) == MAX_OUTPUTS or left <= 0:
            kept.append({"output_type": "stream", "name": "stdout", "text": "… (more was not kept)\n"})
            break
        entry = _output(output, left)
        if entry is not None:
            left -= _length(entry)
            kept.append(entry)
    return kept


def verdict_output(mark: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict as the output of its graded cell: text if all properties hold, else an error."""
    lines = str(mark["text"]).splitlines() or ["✗"]
    if mark["ok"] is True:
        return {"output_type": "stream", "name": "stdout", "text": "\n".join(lines) + "\n"}
    return {"output_type": "error", "ename": "CheckFailed", "evalue": lines[0], "traceback": lines}


def text(value: object) -> str:
    """`value` as text that every page and database can hold (see `clean_text`); "" for None."""
    return clean_text("" if value is None else str(value))


def _output(output: Mapping[str, Any], left: int) -> dict[str, Any] | None:
    kind = output.get("output_type")
    if kind == "stream":
        name = "stderr" if output.get("name") == "stderr" else "stdout"
        return {"output_type": "stream", "name": name, "text": _joined(output.get("text"))[:left]}
    if kind == "error":
        lines = [text(line)[:left] for line in _lines(output.get("traceback"))[:50]]
        return {
            "output_type": "error",
            "ename": text(output.get("ename"))[:200],
            "evalue": text(output.get("evalue"))[:2000],
            "traceback": lines,
        }
    if kind not in ("display_data", "execute_result"):
        return None
    given = output.get("data")
    bundle: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    data: dict[str, str] = {}
    if "text/plain" in bundle:
        data["text/plain"] = _joined(bundle["text/plain"])[:left]
    if picture := checked_png(_picture(bundle.get("image/png"))):
        data["image/png"] = picture
    return {"output_type": "display_data", "data": data, "metadata": {}} if data else None


def _length(entry: Mapping[str, Any]) -> int:
    if entry["output_type"] == "error":
        return sum(map(len, entry["traceback"])) + len(entry["evalue"])
    return len(entry.get("text") or entry.get("data", {}).get("text/plain", ""))


def _lines(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []


def _joined(value: Any) -> str:
    return text("".join(str(line) for line in _lines(value)))


def _picture(value: Any) -> str:
    return "".join(line for line in _lines(value) if isinstance(line, str))
