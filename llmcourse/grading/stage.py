"""The judging of one submission: a clean notebook in, a verdict for each graded cell out.

    learner's process (sandboxed)          this process
    ─────────────────────────────          ────────────────────────────────────────────────
    the notebook's cells                   the graded cells' own source, hidden tests included
    sum_to(…)                    ◀──────▶  check(sum_to); assert sum_to(…) == …

A graded cell is run here, from the instructor's copy, in a namespace where the learner's functions are
proxies: calling one sends the arguments over and gets plain data back. So nothing that a submission
does to `assert` or to the checker can change what is decided of its values, nor how often it asked the
judge's own functions. What is counted beside the function (costs, arguments written to) is that
process's word.

The stage is a function of its `Job` alone, and a job is plain data: a worker process or another machine
can run it, and running it again gives the same marks.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter
from types import CodeType
from typing import Any

import numpy as np

from llmcourse.grading.handed_in import shown
from llmcourse.grading.limits import Limits
from llmcourse.grading.session import Cell, CellResult, LearnerError, RemoteSubject, Session
from llmcourse.grading.verdict import CheckFailed, Verdict, judge
from llmcourse.labs.catalog import Lab, find_lab

DEMO = "demo"  # a cell with this tag shows something and is not run when it is judged
MAX_REMARKS = 20  # on cells
MAX_VERDICT = 20_000  # characters: an assertion's message may hold whatever a function returned


@dataclass(frozen=True)
class Job:
    """What is needed to judge one submission.

    cells    the code cells that run in the learner's process, in order: {"id", "source"}
    graded   the graded cells, in order: {"id", "source"}, from the instructor's copy
    seed     of the random inputs; not known to the learner
    hide     folders that must be out of its sight, wherever they lie
    """

    student: str
    lab: str
    cells: tuple[Mapping[str, str], ...]
    graded: tuple[Mapping[str, str], ...]
    seed: int
    sandbox: bool = True
    limits: Mapping[str, float] = field(default_factory=dict)
    hide: tuple[str, ...] = ()


@dataclass
class Judged:
    """What the stage found, as plain data.

    outputs   cell id → that cell's outputs (see `session`)
    marks     graded cell's id → {"ok", "state", "text", "mistake"}
    remarks   what the grader wants to be known about the run as a whole
    """

    student: str
    lab: str
    outputs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""  # why it could not be judged; there are no marks then

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


def is_run(cell: Mapping[str, Any]) -> bool:
    """Whether a notebook's cell is run in the learner's process: code that defines, not checks or demos."""
    if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
        return False
    metadata = cell["metadata"]
    return not metadata.get("nbgrader", {}).get("grade") and DEMO not in metadata.get("tags", [])


def judge_submission(job: Job, slot: int = 0) -> Judged:
    """Run a submission's cells in a process of their own and judge its functions from this one.

    slot   which of several sandboxes at once this is
    """
    began = perf_counter()
    lab = find_lab(job.lab)
    judged = Judged(job.student, job.lab)
    cells = [Cell(c["id"], c["source"]) for c in job.cells]
    with Session(
        cells,
        limits=Limits(**job.limits),  # type: ignore[arg-type]
        sandbox=job.sandbox,
        hide=[Path(folder) for folder in job.hide],
        forbidden=lab.forbidden,
        slot=slot,
    ) as session:
        for result in session.run():
            judged.outputs[result.id] = result.outputs
            if note := _remark(result):
                judged.remarks.append(note)
        if (more := len(judged.remarks) - MAX_REMARKS) > 0:
            judged.remarks[MAX_REMARKS:] = [f"and {more} more cells with errors"]
        for cell in job.graded:
            judged.marks[cell["id"]] = _mark(cell["source"], session, lab, job.seed)
    judged.seconds = perf_counter() - began
    return judged


class GradedCell:
    """`check` and `hint` as a graded cell finds them here."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.seed = lab, seed
        self.verdicts: list[Verdict] = []

    def check(self, fn: Any, **ignored: Any) -> Verdict:
        exercise = self.lab.exercise(fn.name if isinstance(fn, RemoteSubject) else fn.__name__)
        verdict = judge(exercise, fn, self.seed)
        verdict.lab, verdict.show_seed = self.lab.name, False
        self.verdicts.append(verdict)
        if not verdict.ok:
            raise CheckFailed(verdict)
        return verdict

    def hint(self, *args: Any, **ignored: Any) -> None:
        """Does nothing: nobody reads hints here."""


def _mark(source: str, session: Session, lab: Lab, seed: int) -> dict[str, Any]:
    """Run a graded cell's source; what it raises decides."""
    cell = GradedCell(lab, seed)
    text, state = "", "passed"
    try:
        code = compile(source, "graded cell", "exec")
        exec(code, _namespace(code, session, cell))
    except CheckFailed as failed:
        text, state = str(failed.verdict), failed.verdict.state
    except LearnerError as error:
        state = "open" if error.kind == "NotImplementedError" else "failed"
        text = f"✗ {error}"
    except AssertionError as error:
        text, state = f"✗ {error}", "failed"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text, state = (
            f"✗ {type(error).__name__}: {error} (in the check: {where.line or where.name})",
            "failed",
        )
    if not text:
        text = "\n".join(map(str, cell.verdicts)) or "✓ every assertion holds"
    mistake = next((v.mistake.name for v in cell.verdicts if v.mistake), "")
    return {"ok": state == "passed", "state": state, "text": text[:MAX_VERDICT], "mistake": mistake}


def _namespace(code: CodeType, session: Session, cell: GradedCell) -> dict[str, Any]:
    """What a graded cell can name: NumPy, torch, `check`, and the learner's functions for all other names."""
    known: dict[str, Any] = {"np": np, "numpy": np, "check": cell.check, "hint": cell.hint}
    if "torch" in (named := _names(code)):
        known["torch"] = import_module("torch")
    names = named - known.keys() - set(dir(builtins))
    return {**known, **{name: RemoteSubject(session, name) for name in sorted(names)}}


def _names(code: CodeType) -> set[str]:
    """Every global name that `code` and the functions in it mention."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _remark(result: CellResult) -> str:
    if result.note:
        return f"cell {result.id}: {result.note}"
    if result.error:
        line = f" (line {result.error.line})" if result.error.line else ""
        said = " ".join(f"{result.error.kind}: {result.error.message}".split())
        return f"cell {result.id}: {shown(said, 300)}{line}"  # one line, that can't pass for one of ours
    return ""
