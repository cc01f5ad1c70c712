"""JupyterLab and a browser, as the tests here use them.

`LLMCOURSE_CHROMIUM` names the browser's executable; without it, a Chromium or Chrome on the PATH is
used, then playwright's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from llmcourse.errors import MissingPackageError, NotebookError

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "browser"
TOKEN = "only-for-this-test"

NOT_VIRTUALISED = {"windowingMode": "none"}  # every cell is in the page, also the ones out of sight

# Cells that are run before the kernel is there are only cleared, so its indicator on the page is not enough.
KERNEL_IS_IDLE = """() => {
    const kernel = window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === "connected" && kernel.status === "idle";
}"""

CELLS = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
    return Array.from({length: cells.length}, (_, i) => cells.get(i).toJSON());
}"""


# ── what a reader does ───────────────────────────────────────────────────────────────────────────────


def open_page(browser: Browser) -> tuple[Page, list[str]]:
    """A new window, and the list that its faults go to: errors on the console, requests to other hosts."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    faults: list[str] = []
    page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"page: {error}"))
    page.on("request", lambda r: None if is_local(r.url) else faults.append(f"request to {r.url}"))
    return page, faults


def open_notebook(page: Page, lab: str, name: str) -> None:
    page.goto(f"{lab}/lab/tree/{name}.ipynb?token={TOKEN}&reset", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function(KERNEL_IS_IDLE, timeout=60_000)


def run_all(page: Page) -> None:
    execute(page, "notebook:clear-all-cell-outputs")
    assert all(cell["execution_count"] is None for cell in code_cells(page))
    execute(page, "notebook:run-all-cells")
    end = time.monotonic() + 120
    while any(cell["execution_count"] is None for cell in code_cells(page)):
        assert_no_error(page)
        assert time.monotonic() < end, f"still running: {waiting(page)}"
        page.wait_for_timeout(250)
    page.wait_for_function(KERNEL_IS_IDLE, timeout=60_000)
    assert_no_error(page)


def execute(page: Page, command: str) -> None:
    """Give JupyterLab a command of its menus, without waiting for its end."""
    page.evaluate("command => { window.jupyterapp.commands.execute(command); }", command)


def code_cells(page: Page) -> list[dict[str, Any]]:
    return [cell for cell in page.evaluate(CELLS) if cell["cell_type"] == "code"]


def waiting(page: Page) -> str:
    return next((cell["id"] for cell in code_cells(page) if cell["execution_count"] is None), "no cell")


def assert_no_error(page: Page) -> None:
    for cell in code_cells(page):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(output["traceback"]))
                pytest.fail(f"cell {cell['id']} raised {output['ename']}: {output['evalue']}\n{trace}")


def tab_to(page: Page, control: Locator) -> None:
    """Reach a control as a reader without a mouse does: from the cell's code, by Tab."""
    cell = control.locator("xpath=ancestor::div[contains(concat(@class, ' '), 'jp-CodeCell ')]")
    cell.locator(".jp-InputPrompt").click()
    for _ in range(40):
        if control.evaluate("control => control === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail("forty presses of Tab from the cell do not reach its control")


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:"))


# ── what the reader needs ────────────────────────────────────────────────────────────────────────────


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of our own."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=find_chromium(playwright.chromium.executable_path),
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        yield running
        running.close()


def find_chromium(playwrights_own: str) -> str:
    given = os.environ.get("LLMCOURSE_CHROMIUM")
    if given and not shutil.which(given):
        raise MissingPackageError(
            f"LLMCOURSE_CHROMIUM names {given}, which cannot be executed.",
            "The browser test drives a real browser.",
            "the path of a Chromium or Chrome, or unset the variable to use the one on the PATH.",
        )
    names = (given, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", playwrights_own)
    if found := next((path for name in names if name and (path := shutil.which(name))), None):
        return found
    raise MissingPackageError(
        "there is no Chromium or Chrome on this machine.",
        "The browser test opens the notebooks as a reader does.",
        "apt-get install chromium, or python -m playwright install chromium, or set LLMCOURSE_CHROMIUM.",
    )


@contextmanager
def jupyterlab(home: Path, folder: Path) -> Iterator[str]:
    """The address of a JupyterLab on `folder`, with settings and folders of its own in `home`."""
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(NOT_VIRTUALISED))
    (home / "config" / "labconfig").mkdir(parents=True)
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "config" / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "LLMCOURSE_PROGRESS": "progress.json",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}"),
        *(f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"),
        "--LabApp.extension_manager=readonly",
    ]
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    log = home / "lab.log"
    with log.open("w") as file:
        server = psutil.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        end(server)


def wait_until_it_answers(address: str, server: psutil.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.25)
    raise NotebookError(
        f"JupyterLab does not answer at {address.partition('?')[0]}.",
        "Its last words: " + log.read_text()[-1500:],
        f"{sys.executable} -m jupyterlab by hand.",
    )


def end(server: psutil.Popen) -> None:
    """End the server, which ends its kernels, and whatever of them is left."""
    started = server.children(recursive=True)
    server.terminate()
    _, left = psutil.wait_procs([server, *started], timeout=15)
    for process in left:
        process.kill()
