"""One form on disk for every notebook, so that a change in git is a change that somebody made.

Jupyter stores more than the page: who ran it and when, which of several Pythons, random cell names,
the state of every widget. The canonical form keeps what a reader sees and drops the rest:

    layout      nbformat 4.5, keys sorted, one space of indent, a newline at the end
    notebook    kernel `python3`, language `python`, and the `llmcourse` block (`memory_mb`), no more
    cells       ids that can be read and stay; the tags; no timings; no empty cells, and not the cell
                that papermill adds for its parameters
    outputs     text, tables and pictures; runs counted 1, 2, 3 …

**Widgets.** A widget's output names a model in the memory of a kernel that is long gone: JupyterLab
would prefer it over every other form of the same output and print "model not found". The reference is
dropped, and the PNG beside it (`Explorable` always stores one) is what JupyterLab, GitHub and a static
site show. The live widget takes its place as soon as the cell runs.

**Order.** Runs are renumbered only when the cells ran from top to bottom, so that a notebook which was
run in another order keeps its numbers and is caught by the gate.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterable
from copy import deepcopy
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from llmcourse.errors import NotebookError
from llmcourse.files import write_whole

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
INJECTED = "injected-parameters"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_VALID_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})?")
_OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)


def canonicalise(nb: NotebookNode, keep: Iterable[str] = ()) -> NotebookNode:
    """A copy of `nb` in canonical form, with the cells' metadata `keep` besides their tags.

    Doing it twice changes nothing more.
    """
    pages = [cell for cell in nb.cells if not _is_chaff(cell)]
    cells = [_cell(cell) | {"id": name} for cell, name in zip(pages, _names(pages), strict=True)]
    for cell, page in zip(cells, pages, strict=True):
        cell["metadata"] |= {key: deepcopy(page.metadata[key]) for key in keep if key in page.metadata}
    _renumber([cell for cell in cells if cell["cell_type"] == "code"])
    metadata: dict[str, Any] = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    memory = nb.metadata.get("llmcourse", {}).get("memory_mb")
    if isinstance(memory, int):
        metadata["llmcourse"] = {"memory_mb": memory}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def dumps(nb: NotebookNode) -> str:
    """The text of a notebook, laid out as it lies on disk."""
    return nbformat.writes(nb, version=4).rstrip("\n") + "\n"


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, as nbformat 4. Raises NotebookError when the file cannot be read as one."""
    invalid: dict[str, Exception] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # absent and repeated ids, which the canonical form replaces
            nb = nbformat.read(path, as_version=4, capture_validation_error=invalid)
        if invalid:
            raise invalid["ValidationError"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise NotebookError(
            f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}",
            "A notebook is a JSON file of the nbformat standard, version 4.",
            "restoring the file from git, or opening it in Jupyter and saving it again.",
        ) from error
    return nb


def write(path: Path, nb: NotebookNode) -> bool:
    """Put `nb` in canonical form at `path`, whole or not at all. Returns whether the file changed."""
    mode = path.stat().st_mode if path.exists() else 0o644
    return write_whole(path, dumps(canonicalise(nb)), mode)


def _is_chaff(cell: NotebookNode) -> bool:
    return not cell.source.strip() or INJECTED in cell.metadata.get("tags", [])


def _cell(cell: NotebookNode) -> dict[str, Any]:
    source = cell.source.replace("\r\n", "\n").strip("\n")
    out: dict[str, Any] = {"cell_type": cell.cell_type, "metadata": _metadata(cell), "source": source}
    if cell.cell_type == "code":
        out["execution_count"] = cell.execution_count
        out["outputs"] = _outputs(cell.outputs)
    elif cell.get("attachments"):
        out["attachments"] = deepcopy(cell.attachments)
    return out


def _metadata(cell: NotebookNode) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if tags := sorted(set(cell.metadata.get("tags", []))):
        out["tags"] = tags
    folded = {
        key: True
        for key in ("outputs_hidden", "source_hidden")
        if cell.metadata.get("jupyter", {}).get(key) is True
    }
    if folded and cell.cell_type == "code":
        out["jupyter"] = folded
    return out


def _outputs(outputs: Iterable[NotebookNode]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output.output_type == "stream":
            if kept and kept[-1].get("name") == output.name:
                kept[-1]["text"] += output.text
            else:
                kept.append({"output_type": "stream", "name": output.name, "text": output.text})
        elif output.output_type == "error":
            kept.append(
                {key: deepcopy(output[key]) for key in ("output_type", "ename", "evalue", "traceback")}
            )
        elif data := {mime: deepcopy(value) for mime, value in output.data.items() if mime != WIDGET_VIEW}:
            about = {mime: deepcopy(value) for mime, value in output.metadata.items() if mime in data}
            entry = {"output_type": output.output_type, "data": data, "metadata": about}
            if output.output_type == "execute_result":
                entry["execution_count"] = output.execution_count
            kept.append(entry)
    for entry in kept:
        if entry["output_type"] == "stream":
            entry["text"] = _OVERWRITTEN.sub("", entry["text"])  # a progress bar's earlier states
    return kept


def _renumber(code: list[dict[str, Any]]) -> None:
    ran = [cell for cell in code if isinstance(cell["execution_count"], int)]
    counts = [cell["execution_count"] for cell in ran]
    in_order = all(a < b for a, b in pairwise(counts))
    for number, cell in enumerate(ran, start=1):
        if in_order:
            cell["execution_count"] = number
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = cell["execution_count"]


def _names(cells: list[NotebookNode]) -> list[str]:
    """An id for each cell: its own if a person could have chosen it, else one made of its first words."""
    own = [str(cell.get("id", "")) for cell in cells]
    # A random id is replaced; of two equal ones the first stays.
    kept = [
        name if _VALID_ID.fullmatch(name) and not _RANDOM_ID.fullmatch(name) and name not in own[:i] else ""
        for i, name in enumerate(own)
    ]
    taken = set(kept)
    for i, cell in enumerate(cells):
        if not kept[i]:
            kept[i] = _fresh(_words(cell), taken)
            taken.add(kept[i])
    return kept


def _words(cell: NotebookNode) -> str:
    lines = [line for line in cell.source.splitlines() if line.strip()]
    heading = next((line for line in lines if line.startswith("#")), lines[0])
    ascii_text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text)[:5]
    return "-".join(words)[:40].strip("-") or cell.cell_type


def _fresh(stem: str, taken: set[str]) -> str:
    if _RANDOM_ID.fullmatch(stem):
        stem = f"cell-{stem}"
    if stem not in taken:
        return stem
    return next(name for n in count(2) if (name := f"{stem}-{n}") not in taken)
