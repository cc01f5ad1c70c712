"""`llmcourse lab list | start | check | hint | status`: a lab from the terminal.

`check` runs the cells of the learner's own notebook in a process of its own and judges its functions
from here, with the checks that `check(fn)` in the notebook uses.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llmcourse
from llmcourse.errors import DiskError, NotebookError, UnknownNameError
from llmcourse.labs.catalog import LABS, Lab, find_lab
from llmcourse.notebook import Table

FOLDER = Path("mylabs")


def command(
    action: str,
    names: Sequence[str],
    *,
    folder: Path = FOLDER,
    file: Path | None = None,
    seed: int | None = None,
    hint: int | None = None,
) -> int:
    """Do `action`; returns the exit status. Raises UnknownNameError for a lab or exercise that is none."""
    if action == "list":
        return list_labs()
    if action == "status":
        return status(names)
    lab = _the_lab(names, file)
    if action == "start":
        return start(lab, folder)
    if action == "hint":
        return hint_for(lab, names[1:], hint)
    return check(lab, names[1:], file or find_file(lab, folder), seed)


# ── list, status ─────────────────────────────────────────────────────────────────────────────────


def list_labs() -> int:
    from llmcourse.labs import progress

    rows = []
    for lab in LABS:
        passed = sum(row.passed for row in progress.lab_status(lab))
        rows.append([lab.name, lab.title, len(lab.exercises), passed, lab.points, lab.minutes])
    print(Table(["lab", "title", "exercises", "passed", "points", "minutes"], rows))
    print("\nllmcourse lab start LAB makes a copy of a lab for you to work in.")
    return 0


def status(names: Sequence[str]) -> int:
    from llmcourse.labs import progress

    for lab in [find_lab(name) for name in names] or list(LABS):
        print(progress.table(lab), end="\n\n")
    return 0


# ── start ────────────────────────────────────────────────────────────────────────────────────────


def labs_folder() -> Path:
    """`labs/` of the current directory, else the one beside the package."""
    candidates = [Path.cwd() / "labs", Path(llmcourse.__file__).resolve().parents[1] / "labs"]
    for folder in candidates:
        if any(folder.glob("lab*/lab*.ipynb")):
            return folder
    raise UnknownNameError(
        f"there is no folder of labs at {candidates[0]}.",
        "Labs are looked for in labs/ of the current directory.",
        "the command again from the course's folder.",
    )


def start(lab: Lab, folder: Path = FOLDER) -> int:
    """Copy the lab's notebook to `folder`/NAME/NAME.ipynb. What is there already is never overwritten."""
    source = labs_folder() / lab.name / f"{lab.name}.ipynb"
    target = folder / lab.name / source.name
    if target.exists():
        print(f"Yours is kept as it is: {target}")
    else:
        try:
            _copy_new(source, target)
        except OSError as error:
            raise DiskError(
                f"{target} could not be written: {error.strerror or error}.",
                "The lab is copied to a folder of yours before you work on it.",
                "--folder with a place that you may write to.",
            ) from error
        print(f"A new copy for you: {target}")
    print(f"{len(lab.exercises)} exercises, {lab.points} points, {lab.minutes} minutes")
    print(f"Open it:  jupyter lab {target}\nCheck it: llmcourse lab check {lab.number}")
    return 0


def _copy_new(source: Path, target: Path) -> None:
    """Copy to a name that does not exist, whole or not at all, also if two do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        scratch.write_bytes(source.read_bytes())
        try:
            os.link(scratch, target)  # fails if the name is taken
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            with open(target, "xb") as out:
                out.write(scratch.read_bytes())
    finally:
        scratch.unlink(missing_ok=True)


# ── hint ─────────────────────────────────────────────────────────────────────────────────────────


def hint_for(lab: Lab, exercises: Sequence[str], layer: int | None) -> int:
    """Print the next hint for an exercise: the one named, else the first that has not passed."""
    from llmcourse.labs import hints, progress

    still_open = [row.exercise for row in progress.lab_status(lab) if not row.passed]
    name = exercises[0] if exercises else (still_open or [lab.exercises[-1].name])[0]
    print(hints.show(lab, lab.exercise(name), layer))
    return 0


# ── check ────────────────────────────────────────────────────────────────────────────────────────


def find_file(lab: Lab, folder: Path = FOLDER) -> Path:
    """The learner's copy of a lab: in `folder`, or in the current directory."""
    name = f"{lab.name}.ipynb"
    for path in (folder / lab.name / name, folder / name, Path(name), Path(lab.name) / name):
        if path.is_file():
            return path
    raise UnknownNameError(
        f"there is no {name} in {folder}/{lab.name} or in the current directory.",
        "`check` looks at your copy of the lab.",
        f"llmcourse lab start {lab.number} to make one, or --file with its path.",
    )


def check(lab: Lab, exercises: Sequence[str], file: Path, seed: int | None = None) -> int:
    """Judge the functions that `file` defines; prints each verdict. Status 1 unless all asked for pass."""
    from llmcourse.grading.limits import Limits
    from llmcourse.grading.session import RemoteSubject, Session
    from llmcourse.grading.verdict import judge
    from llmcourse.labs import progress

    chosen = [lab.exercise(name) for name in exercises] or list(lab.exercises)
    passed = 0
    with Session(read_cells(file), limits=Limits(), sandbox=False) as session:
        for result in session.run():
            if result.error or result.note:
                error = result.error
                said = result.note or (f"{error.kind}: {error.message}" if error else "")
                print(f"✗ cell {result.id}: {said}")
        for exercise in chosen:
            verdict = judge(exercise, RemoteSubject(session, exercise.name), seed)
            verdict.lab = lab.name
            progress.record(verdict)
            passed += verdict.ok
            print(verdict)
    print(f"\n{passed} of {len(chosen)} pass: {file}")
    return 0 if passed == len(chosen) else 1


def read_cells(file: Path) -> list[Any]:
    """The code cells of a lab's notebook that define things: not its checks, not its demonstrations."""
    from llmcourse.grading.session import Cell
    from llmcourse.grading.stage import is_run

    try:
        nb = json.loads(file.read_text(encoding="utf-8"))
        return [
            Cell(str(cell.get("id", number)), "".join(cell["source"]))
            for number, cell in enumerate(nb["cells"], start=1)
            if is_run(cell)
        ]
    except FileNotFoundError:
        raise UnknownNameError(
            f"there is no file {file}.", "--file names your notebook.", "the path of an .ipynb file."
        ) from None
    except OSError as error:
        raise UnknownNameError(
            f"{file} cannot be read: {error.strerror or error}.",
            "--file names your notebook.",
            "the path of an .ipynb file that you may read.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotebookError(
            f"{file} cannot be read as a notebook: {type(error).__name__}: {error}.",
            "A notebook is a JSON file with a list of cells.",
            "opening it in JupyterLab and saving it again; an earlier state is under .ipynb_checkpoints.",
        ) from None


def _the_lab(names: Sequence[str], file: Path | None) -> Lab:
    if names:
        return find_lab(names[0])
    if file is not None and any(file.stem == lab.name for lab in LABS):
        return find_lab(file.stem)
    for cell in read_cells(file) if file is not None else []:
        if opened := re.search(r"open_lab\([\"'](\w+)[\"']\)", cell.source):
            return find_lab(opened[1])
    raise UnknownNameError(
        "no lab was named.", "There are several.", f"one of {', '.join(lab.name for lab in LABS)}."
    )
