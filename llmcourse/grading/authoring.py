"""`llmcourse labs build | check | report`: one source for each lab, and what learners get made from it.

`solutions/NAME/NAME.ipynb` is written by hand and holds the reference solutions and the hidden tests.
`labs/NAME/` is made from it by nbgrader: each solution region becomes a line that raises "not implemented
yet", hidden tests go, locked cells become read-only. Nobody edits `labs/`; a test fails when it is not
what the source makes now.

build   put the source in canonical form, with this version's set-up cell, and write labs/NAME
check   make it afresh, show the first difference, and run the gates (see `gates`)
report  print the matrix exercise × mistake (see `report`)
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from difflib import unified_diff
from itertools import islice
from pathlib import Path

import nbformat
from nbformat import NotebookNode

import llmcourse
from llmcourse.errors import UnknownNameError
from llmcourse.files import write_whole
from llmcourse.grading import converting
from llmcourse.runner import canonical, maintain
from llmcourse.runner.gates import Problem

KEPT = ("nbgrader", "deletable", "editable")
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.pyc")


def command(action: str, names: Sequence[str]) -> int:
    """Do `action` to the labs called `names` (all when there are none); returns the exit status.

    Raises UnknownNameError for a name that means nothing, NotebookError for a source that cannot be used.
    """
    if action == "report":
        from llmcourse.grading import report

        return report.command(names)
    converting.require()
    root = course_root()
    found = find_sources(root, names)
    return build(root, found) if action == "build" else check(root, found)


def course_root() -> Path:
    """The folder with the labs' `solutions/`: the current directory, else the one beside the package.

    Raises UnknownNameError where there is neither: an installed course has no solutions.
    """
    for folder in (Path.cwd(), Path(llmcourse.__file__).resolve().parents[1]):
        if any((folder / converting.SOURCE).glob("lab*/lab*.ipynb")):
            return folder
    raise UnknownNameError(
        f"there is no lab in {Path.cwd() / converting.SOURCE}.",
        "Labs are made from solutions/NAME/NAME.ipynb.",
        "the command again from a clone of the course.",
    )


def find_sources(root: Path, names: Sequence[str]) -> list[str]:
    """The labs called `names`, by number, `labNN` or folder; all that have a source when there are none."""
    there = sorted(
        p.parent.name for p in (root / converting.SOURCE).glob("*/*.ipynb") if p.stem == p.parent.name
    )
    if not names:
        return there
    return list(dict.fromkeys(_find(name, there) for name in names))


def build(root: Path, labs: Sequence[str]) -> int:
    for lab in labs:
        source = source_path(root, lab)
        canonical_source(source)
        changed = _put(made(root, lab), root / converting.RELEASE / lab)
        print(f"{converting.RELEASE}/{lab}: {', '.join(changed) if changed else 'nothing to build'}")
    return 0


def check(root: Path, labs: Sequence[str]) -> int:
    total = 0
    for lab in labs:
        problems = problems_of(root, lab)
        total += len(problems)
        for problem in problems:
            print(problem.render(Path(converting.RELEASE) / lab), end="\n\n")
    print(f"{len(labs)} labs, {total} problems")
    return 1 if total else 0


def problems_of(root: Path, lab: str) -> list[Problem]:
    """What keeps a lab from being shipped: a difference from its source, or what the gates find."""
    from llmcourse.grading import gates
    from llmcourse.labs import find_lab

    folder = root / converting.RELEASE / lab
    problems = differences(made(root, lab), folder)
    page = folder / f"{lab}.ipynb"
    if not page.is_file():
        return problems
    exercises = find_lab(lab).exercises
    source, released = canonical.read(source_path(root, lab)), canonical.read(page)
    return problems + gates.check(lab, source, released, exercises, folder)


def source_path(root: Path, lab: str) -> Path:
    return root / converting.SOURCE / lab / f"{lab}.ipynb"


def canonical_source(path: Path) -> bool:
    """Rewrite a source: canonical form, no outputs, this version's set-up cell. Tells whether it changed."""
    nb = clean(maintain.with_head(canonical.read(path), path.stem, folder_of(path.stem)))
    return write_whole(path, canonical.dumps(nb).encode())


def folder_of(lab: str) -> str:
    """Where learners find the lab, relative to the repository."""
    return f"{converting.RELEASE}/{lab}"


def clean(nb: NotebookNode) -> NotebookNode:
    """`nb` in canonical form, with nbgrader's metadata and without outputs; its checksums fit the cells."""
    from nbgrader.utils import compute_checksum

    nb = canonical.canonicalise(nb, keep=KEPT)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "checksum" in cell.metadata.get("nbgrader", {}):
            cell.metadata.nbgrader.checksum = compute_checksum(cell)
    return nb


def made(root: Path, lab: str) -> dict[str, bytes]:
    """What `labs/LAB` must hold, file by file, made afresh from the source. Nothing is written there.

    Raises NotebookError for a source that nbgrader cannot use.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        shutil.copytree(root / converting.SOURCE / lab, folder / converting.SOURCE / lab, ignore=IGNORED)
        source = source_path(folder, lab)
        source.write_text(canonical.dumps(clean(canonical.read(source))), encoding="utf-8")
        converting.generate(converting.configuration(folder), lab)
        out = folder / converting.RELEASE / lab
        files = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    for name in files:
        if name.endswith(".ipynb"):
            nb = nbformat.reads(files[name].decode(), as_version=4)
            files[name] = canonical.dumps(clean(nb)).encode()
    return files


def differences(wanted: dict[str, bytes], folder: Path) -> list[Problem]:
    """How a folder differs from what it must hold: files missing, left over, or changed, and where."""
    there = _files(folder)
    problems = []
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) == there.get(name):
            continue
        if name not in there:
            what = f"{name} is missing"
        elif name not in wanted:
            what = f"{name} is not in the source"
        else:
            what = f"{name} is not what the source makes now\n{_first_change(there[name], wanted[name])}"
        why = "This folder is made from solutions/, never edited by hand."
        problems.append(Problem(what, why, "llmcourse labs build, after any change in solutions/."))
    return problems


def _put(wanted: dict[str, bytes], folder: Path) -> list[str]:
    """Make `folder` hold these files and no others, each written whole; returns the names that changed."""
    changed = []
    for name in sorted(_files(folder).keys() - wanted.keys()):
        (folder / name).unlink()
        changed.append(f"removed {name}")
    for name, data in wanted.items():
        if write_whole(folder / name, data):
            changed.append(name)
    for below in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        if not any(below.iterdir()):
            below.rmdir()
    return changed


def _files(folder: Path) -> dict[str, bytes]:
    """What lies in a lab's folder, but for Jupyter's and Python's own leavings."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder): p for p in paths}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in names.items()
        if not any(part == "__pycache__" or part == ".ipynb_checkpoints" for part in name.parts)
    }


def _first_change(old: bytes, new: bytes) -> str:
    lines = unified_diff(
        old.decode(errors="replace").splitlines(),
        new.decode(errors="replace").splitlines(),
        "as it lies there",
        "as the source makes it",
        lineterm="",
        n=2,
    )
    hunk = list(islice(lines, 12))
    end = next((i for i, line in enumerate(hunk) if i > 2 and line.startswith("@@")), len(hunk))
    return "\n".join(f"    {line[:110]}" for line in hunk[:end])


def _find(name: str, there: Sequence[str]) -> str:
    wanted = name.removesuffix(".ipynb").rstrip("/")
    number = wanted.removeprefix("lab")
    for lab in there:
        found = re.match(r"lab(\d+)_(.*)", lab)
        if wanted == lab or (found and (wanted == found[2] or number.zfill(2) == found[1])):
            return lab
    raise UnknownNameError(
        f"there is no lab called {name!r} in {converting.SOURCE}/.",
        "A lab is named by its number or by its folder.",
        f"one of {', '.join(there)}." if there else "the command again from a clone of the course.",
    )
