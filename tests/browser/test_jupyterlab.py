"""The course in a real browser: JupyterLab opens a notebook, runs it, and its widget follows the keyboard.

Screenshots before and after stay in build/browser/.
"""

from __future__ import annotations

import time

import pytest
from jupyterlab_page import SCREENSHOTS, find_chromium, open_notebook, open_page, run_all, tab_to
from playwright.sync_api import Locator, Page

from llmcourse.errors import MissingPackageError

# A picture that is replaced while it is decoded fails to decode: the next try meets the new one.
PICTURE = """async image => {
    for (let tries = 1; ; tries++) {
        try { await image.decode(); break; }
        catch (error) { if (tries == 50) throw error; }
        await new Promise(resolve => setTimeout(resolve, 100));
    }
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


@pytest.mark.parametrize("name", ["00_start_here", "01_backprop", "04_memory_hierarchy"])
def test_a_notebook_runs_in_jupyterlab_and_its_widget_follows_the_keyboard(name, lab, browser):
    page, faults = open_page(browser)
    try:
        open_notebook(page, lab, name)
        assert_stored_picture_shows(page)
        run_all(page)
        move_a_slider(page, name)
    finally:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-after.png")
        page.close()
    assert not faults


def test_a_missing_browser_is_an_error_in_three_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCOURSE_CHROMIUM", str(tmp_path / "none"))
    with pytest.raises(MissingPackageError, match="LLMCOURSE_CHROMIUM names") as error:
        find_chromium("")
    monkeypatch.delenv("LLMCOURSE_CHROMIUM")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match="no Chromium or Chrome") as error:
        find_chromium(str(tmp_path / "none"))
    assert len(str(error.value).splitlines()) == 3


# ── what a reader does ───────────────────────────────────────────────────────────────────────────────


def assert_stored_picture_shows(page: Page) -> None:
    """Before anything runs, the explorable is the stored picture, without a word about a missing model."""
    stored = page.locator(".jp-OutputArea-output img")
    stored.first.wait_for(state="attached", timeout=20_000)
    assert page.locator(".jp-OutputArea").get_by_text("not found").count() == 0
    assert page.locator(".widget-slider").count() == 0


def move_a_slider(page: Page, name: str) -> None:
    """Press an arrow key on the first explorable's slider; its readout and its picture must change."""
    box = (
        page.locator(".widget-vbox")
        .filter(has=page.locator("img"))
        .filter(has=page.locator(".noUi-handle"))
        .first
    )
    box.wait_for(timeout=30_000)
    box.scroll_into_view_if_needed()
    slider, readout = box.locator(".widget-slider").first, box.locator(".widget-readout").first
    handle, image = slider.locator(".noUi-handle"), box.locator("img").first
    before = readout.inner_text(), picture(image)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-before.png")
    tab_to(page, handle)
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    end = time.monotonic() + 30
    while readout.inner_text() == before[0] or picture(image) == before[1]:
        assert time.monotonic() < end, (
            f"the key changed nothing: readout {before[0]} → {readout.inner_text()}"
        )
        page.wait_for_timeout(100)


def picture(image: Locator) -> str:
    return image.evaluate(PICTURE)
