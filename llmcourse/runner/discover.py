"""Which notebooks a run means: by number, by name, by path, or all.

A notebook of the course, one that lies in the notebooks folder, must declare the parameters `device`
and `scale` in a cell tagged `parameters`; papermill would only warn, and the notebook would then run
at the wrong scale. Any other file, given by its path, is run with those parameters that it declares.

What a notebook is expected to need is its metadata's `llmcourse.memory_mb`, 1,500 if it does not say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmcourse
from llmcourse.course import chapter
from llmcourse.errors import MissingPackageError, NotebookError, UnknownNameError

PARAMETERS = ("device", "scale")
DEFAULT_MEMORY_MB = 1500.0


@dataclass(frozen=True)
class Notebook:
    """A notebook to run: where it lies, the name it is reported under, the memory it may need (MB)."""

    path: Path
    name: str
    memory_mb: float = DEFAULT_MEMORY_MB


def notebooks_folder() -> Path:
    """`notebooks/` of the current directory, else the one beside the package."""
    candidates = [Path.cwd() / "notebooks", Path(llmcourse.__file__).resolve().parents[1] / "notebooks"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UnknownNameError(
        f"there is no folder {candidates[0]}.",
        "Notebooks are looked for in notebooks/ of the current directory.",
        "the command again from the course's folder, or give the path of an .ipynb file.",
    )


def find(names: Sequence[str]) -> list[Path]:
    """The paths of the notebooks called `names` (all when there are none), each once, in the order given.

    Raises UnknownNameError for a name that means nothing, and when there is no notebook at all.
    """
    paths = [_find(name) for name in names] if names else sorted(notebooks_folder().glob("*.ipynb"))
    if not paths:
        raise UnknownNameError(
            f"there is no notebook in {notebooks_folder()}.",
            "Without names, every .ipynb file of that folder is meant.",
            "the path of an .ipynb file.",
        )
    return list(dict.fromkeys(path.resolve() for path in paths))


def discover(names: Sequence[str]) -> list[Notebook]:
    """The notebooks called `names`, ready to run.

    Raises UnknownNameError as `find` does, NotebookError for files that cannot run.
    """
    return check(find(names))


def check(paths: Sequence[Path]) -> list[Notebook]:
    """Read every notebook's head before any of them runs; name all that cannot run, with reasons."""
    found, wrong = [], []
    for path, name in zip(paths, unique_names(paths), strict=True):
        try:
            nb = read(path)
            missing = [p for p in PARAMETERS if p not in inspect(nb)] if _of_the_course(path) else []
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        if missing:
            wrong.append(
                f"{path.name}: no parameter {' and no '.join(missing)} in a cell tagged `parameters`"
            )
        own = nb.metadata.get("llmcourse")
        memory = own.get("memory_mb") if isinstance(own, dict) else None
        found.append(Notebook(path, name, float(memory or DEFAULT_MEMORY_MB)))
    if wrong:
        raise NotebookError(
            f"{len(wrong)} of {len(paths)} notebooks cannot be run as they are; nothing was run.",
            "\n  ".join(wrong),
            "a valid notebook (nbformat 4) whose cell tagged `parameters` sets device and scale.",
        )
    return found


def read(path: Path) -> Any:
    """A notebook as nbformat's node; one that names no kernel gets `python3`."""
    nbformat = _notebook_packages()
    nb = nbformat.read(path, as_version=4)
    spec = nb.metadata.setdefault("kernelspec", {})
    spec.setdefault("name", "python3")
    if "language" not in spec and "name" not in nb.metadata.get("language_info", {}):
        spec["language"] = "python"
    return nb


def inspect(nb: Any) -> set[str]:
    """The names of the parameters that a notebook declares."""
    import papermill

    return set(papermill.inspect_notebook(nb))


def unique_names(paths: Iterable[Path]) -> list[str]:
    """A name for each path: its stem, numbered where files of two folders share one."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        seen[path.stem] = count = seen.get(path.stem, 0) + 1
        names.append(path.stem if count == 1 else f"{path.stem}_{count}")
    return names


def refuse_to_overwrite(paths: Iterable[Path], out: Path) -> None:
    """Executed copies never replace their sources: raise NotebookError when `out` is a source's folder."""
    for path in paths:
        if path.resolve().parent == Path(out).resolve():
            raise NotebookError(
                f"the executed copy of {path.name} would lie where {path.name} itself lies.",
                f"{out} is the folder of the notebook that is to be executed.",
                "--out with another folder, such as build/run.",
            )


def notebook_argument(notebook: Notebook) -> str:
    """What to type to mean this notebook: its name, or its path when it is not one of the course's."""
    return notebook.name if _of_the_course(notebook.path) else os.path.relpath(notebook.path)


def _find(name: str) -> Path:
    given = Path(name)
    if given.suffix == ".ipynb" and given.is_file():
        return given
    if os.sep in name:
        raise UnknownNameError(
            f"there is no notebook at {name}.",
            "A name that holds a folder is the path of an .ipynb file.",
            _existing(),
        )
    folder = notebooks_folder()
    stem = name.removesuffix(".ipynb")
    if (path := folder / f"{stem}.ipynb").is_file():
        return path
    try:
        known = chapter(name)
    except UnknownNameError:
        raise UnknownNameError(
            f"there is no notebook called {name!r}.",
            "A notebook is named by its chapter's number or name, or by the path of an .ipynb file.",
            _existing(),
        ) from None
    if not (path := folder / f"{known.name}.ipynb").is_file():
        raise UnknownNameError(
            f"chapter {known.name} has no notebook yet.",
            f"{folder} holds no {known.name}.ipynb.",
            _existing(),
        )
    return path


def _existing() -> str:
    stems = [path.stem for path in sorted(notebooks_folder().glob("*.ipynb"))]
    return f"one of {', '.join(stems)}." if stems else "the path of an .ipynb file."


def _of_the_course(path: Path) -> bool:
    try:
        return path.resolve().parent == notebooks_folder().resolve()
    except UnknownNameError:
        return False


def _notebook_packages() -> Any:
    try:
        import nbformat
        import papermill  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"notebooks cannot be executed here: {error}.",
            "Executing them needs papermill, which is installed with the course's `notebook` extra.",
            "pip install 'llmcourse[notebook]'",
        ) from error
    return nbformat
