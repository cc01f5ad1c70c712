"""Lab 01 as a learner does it: a copy from `llmcourse lab start`, in JupyterLab, exercise by exercise.

Screenshots stay in build/browser/.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyterlab_page import (
    KERNEL_IS_IDLE,
    ROOT,
    SCREENSHOTS,
    code_cells,
    execute,
    jupyterlab,
    open_notebook,
    open_page,
)
from playwright.sync_api import Page

from llmcourse.labs import command
from llmcourse.labs.catalog import find_lab

LAB = find_lab("01")
ANSI = re.compile(r"\x1b\[[\d;]*m")

AVERAGED = """\
def sum_to(grad, shape):
    added = grad.ndim - len(shape)
    axes = [i for i in range(grad.ndim) if i < added or (shape[i - added] == 1 and grad.shape[i] != 1)]
    return grad.mean(axis=tuple(axes), keepdims=True).reshape(shape) if axes else grad"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab on a learner's folder, and the learner's copy of the lab."""
    home = tmp_path_factory.mktemp("learner")
    mine = home / "mylabs"
    assert command.start(LAB, mine) == 0
    with jupyterlab(home, mine) as address:
        yield address, mine / LAB.name / f"{LAB.name}.ipynb"


def test_the_lab_is_done_in_jupyterlab_from_the_learners_own_file(desk, browser):
    address, file = desk
    page, faults = open_page(browser)
    try:
        open_notebook(page, address, f"{LAB.name}/{LAB.name}")
        run_until_it_stops(page)
        assert last_error(page) == ("check-topological_order", "○ topological_order is not implemented yet.")
        shot(page, "fresh")
        solve(page, "topological_order")
        solve(page, "backward_pass")
        layers = ask_for_hints(page, "sum_to")
        assert layers == [1, 2, 3]
        write(page, "sum_to", AVERAGED)
        run_cell(page, "sum_to")
        run_cell(page, "check-sum_to")
        wrong = output_text(cell(page, "check-sum_to"))
        assert "This is what you get when the copies' gradients are averaged, not summed." in wrong
        assert "Try: sum instead of mean" in wrong
        shot(page, "mistake")
        for name in ("sum_to", "matmul_backward", "cross_entropy", "numeric_gradient"):
            solve(page, name)
        run_cell(page, "plug-run", seconds=90)
        plugged = output_text(cell(page, "plug-run"))
        assert re.search(r"digits it had not seen, read right: 9\d\.\d%", plugged), plugged
        shot(page, "plugged")
        restart(page)
        for name in ("setup", "start"):
            run_cell(page, name)
        page.locator(".widget-vbox").filter(has_text="6 of 6 passed").first.wait_for(timeout=20_000)
        shot(page, "after-restart", top=True)
        execute(page, "docmanager:save")
        page.wait_for_timeout(500)
    finally:
        shot(page, "end")
        page.close()
    # JupyterLab logs a failing cell's error to the console; nothing else may be there.
    assert not [fault for fault in faults if "Error" not in fault]
    sources = {c["id"]: "".join(c["source"]) for c in json.loads(file.read_text())["cells"]}
    assert "raise NotImplementedError" not in "\n".join(sources[e.name] for e in LAB.exercises)


# ── what a learner does ──────────────────────────────────────────────────────────────────────────────


def solution(name: str) -> str:
    """The course's own solution of an exercise, as somebody would type it."""
    nb = json.loads((ROOT / "solutions" / LAB.name / f"{LAB.name}.ipynb").read_text())
    source = next("".join(c["source"]) for c in nb["cells"] if c["id"] == name)
    return "\n".join(line for line in source.splitlines() if "### " not in line)


def solve(page: Page, name: str) -> None:
    write(page, name, solution(name))
    run_cell(page, name)
    run_cell(page, f"check-{name}")
    text = output_text(cell(page, f"check-{name}"))
    assert text.startswith(f"✓ {name} · "), text


def ask_for_hints(page: Page, name: str) -> list[int]:
    """Press the exercise's hint button in the progress widget, once for each layer; the layers shown."""
    count = len(LAB.exercise(name).hints)
    seen = []
    for layer in range(1, count + 1):
        page.locator(".widget-vbox button").filter(has_text="hint").nth(_row(name)).click()
        shown = page.get_by_text(f"{name} · hint {layer} of {count}").first
        shown.wait_for(timeout=20_000)
        seen.append(layer)
    shot(page, "hints", top=True)
    return seen


def _row(name: str) -> int:
    return [e.name for e in LAB.exercises].index(name)


def write(page: Page, name: str, source: str) -> None:
    """Replace a cell's source by typing over it."""
    node = page.locator(".jp-Cell").nth(index(page, name))
    node.scroll_into_view_if_needed()
    node.locator(".cm-content").first.click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text(source)
    assert "".join(cell(page, name)["source"]) == source


def run_cell(page: Page, name: str, seconds: float = 40) -> None:
    before = cell(page, name)["execution_count"]
    page.evaluate(
        "i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i; }", index(page, name)
    )
    execute(page, "notebook:run-cell")
    end = time.monotonic() + seconds
    while cell(page, name)["execution_count"] in (None, before) or not page.evaluate(KERNEL_IS_IDLE):
        assert time.monotonic() < end, f"cell {name} still runs"
        page.wait_for_timeout(100)
    page.wait_for_timeout(150)


def run_until_it_stops(page: Page) -> None:
    execute(page, "notebook:run-all-cells")
    end = time.monotonic() + 60
    while last_error(page) is None:
        assert time.monotonic() < end, "no check has stopped the run"
        page.wait_for_timeout(200)


def restart(page: Page) -> None:
    execute(page, "kernelmenu:restart")
    button = page.locator(".jp-Dialog button").filter(has_text="Restart")
    button.wait_for(timeout=20_000)
    button.click()
    page.wait_for_function(KERNEL_IS_IDLE, timeout=60_000)
    page.wait_for_timeout(1000)
    page.wait_for_function(KERNEL_IS_IDLE, timeout=60_000)
    execute(page, "notebook:clear-all-cell-outputs")  # and the counts, which begin again


# ── what is on the page ──────────────────────────────────────────────────────────────────────────────


def cell(page: Page, name: str) -> dict[str, Any]:
    return next(c for c in code_cells(page) if c["id"] == name)


def index(page: Page, name: str) -> int:
    ids = page.evaluate(
        "() => { const c = window.jupyterapp.shell.currentWidget.content.model.cells;"
        " return Array.from({length: c.length}, (_, i) => c.get(i).id); }"
    )
    return ids.index(name)


def output_text(found: dict[str, Any]) -> str:
    parts = []
    for output in found["outputs"]:
        text = output.get("text") or output.get("traceback") or output.get("data", {}).get("text/plain", "")
        parts.append(text if isinstance(text, str) else "\n".join(text))
    return ANSI.sub("", "\n".join(parts))


def last_error(page: Page) -> tuple[str, str] | None:
    for found in code_cells(page):
        if any(output["output_type"] == "error" for output in found["outputs"]):
            return found["id"], output_text(found)
    return None


def shot(page: Page, name: str, top: bool = False) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    if top:
        page.locator(".jp-Cell").nth(2).scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / f"lab01-{name}.png")
