"""Small notebooks for tests of the runner."""

from __future__ import annotations

from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = 'device = "cpu"\nscale = "full"'


def write_notebook(
    path: Path,
    *cells: str | nbformat.NotebookNode,
    parameters: str | None = PARAMETERS,
    kernel: str = "python3",
    memory_mb: float | None = None,
) -> Path:
    """A title (cell 1), the parameters (cell 2, unless None), then `cells`: source, or made by nbformat."""
    nb = new_notebook()
    nb.metadata.kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    if memory_mb is not None:
        nb.metadata.llmcourse = {"memory_mb": memory_mb}
    nb.cells.append(new_markdown_cell("# A title"))
    if parameters is not None:
        nb.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def printed(path: Path) -> str:
    """All that an executed notebook printed."""
    nb = nbformat.read(path, as_version=4)
    outputs = [out for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def alive(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
