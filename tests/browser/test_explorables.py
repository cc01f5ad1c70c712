"""Explorables of chapters 02, 03, 07 to 12 and 14 to 16 in JupyterLab: every control, by keyboard and mouse.

Beside the page, the test holds an explorable of its own. What a control says on the page is given to that
one, and the two pictures must then be the same, byte for byte: a control that is stuck, a picture that lags
behind or numbers of another setting would all be seen. Screenshots stay in build/browser/.
"""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Iterator
from functools import partial

import ipywidgets as W
import nbformat
import pytest
from jupyterlab_page import SCREENSHOTS, jupyterlab, open_notebook, open_page, run_all, tab_to
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page

from llmcourse.widgets.explorable import Explorable

SHOWN = {
    "roofline": """
from llmcourse.widgets.gpu_limits import roofline_explorer
shown = roofline_explorer({"saxpy": (2e6, 12e6), "product": (2e9, 1e6)})""",
    "kv_cache": """
from llmcourse.widgets.kv_cache import kv_cache_explorer
shown = kv_cache_explorer("Llama-3-8B", "A100 80GB", context=4096)""",
    "optimizer_path": """
from llmcourse.widgets.optimizer_path import optimizer_path
shown = optimizer_path(optimizer="momentum")""",
    "modal_filter": """
from llmcourse.widgets.modal_filter import pole_explorer
shown = pole_explorer()""",
    "sequence_state": """
from llmcourse.models import ModelConfig
from llmcourse.widgets.sequence_state import state_explorer
sizes = dict(vocab_size=64, d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=64)
shown = state_explorer(ModelConfig(**sizes, max_len=64), every=3)""",
    "flash_tiles": """
from llmcourse.widgets.flash_tiles import flash_tiles
shown = flash_tiles(mask="causal, window", length=256)""",
    "number_format": """
from llmcourse.widgets.number_format import number_format
shown = number_format("bf16", 0.3)""",
    "perplexity_size": """
from llmcourse.widgets.perplexity_size import Stored, explore
points = [Stored("bf16", "bf16", 269e6, 20.1), Stored("INT8", "RTN", 163e6, 20.2)]
shown = explore([*points, Stored("INT4", "RTN", 115e6, 24.1), Stored("INT3", "RTN", 101e6, 90.0)])""",
    "training_ledger": """
from llmcourse.widgets.training_ledger import explore
shown = explore()""",
    "lora_rank": """
from llmcourse.widgets.lora_rank import explore
shown = explore()""",
    "temperature": """
from llmcourse.widgets.temperature import temperature_explorer
shown = temperature_explorer()""",
    "attention_patterns": """
from types import SimpleNamespace
import torch
from llmcourse.models import ModelConfig, random_model
from llmcourse.widgets.attention_patterns import attention_patterns
torch.manual_seed(0)
sizes = dict(vocab_size=31, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40)
model = random_model(ModelConfig(**sizes, max_len=64), dtype="float32")
letters = SimpleNamespace(encode=lambda text: [ord(c) % 31 for c in text], decode=lambda i: chr(97 + i[0]))
shown = attention_patterns(model, letters, "abcabc")""",
}

PNG = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(""));
}"""


@pytest.mark.parametrize("name", SHOWN)
def test_every_control_follows_keyboard_and_mouse_and_the_picture_follows_the_controls(
    name: str, shelf: tuple[Page, list[str]]
) -> None:
    page, faults = shelf
    cell = page.locator(".jp-CodeCell").nth(list(SHOWN).index(name))
    cell.scroll_into_view_if_needed()
    box = cell.locator(".widget-vbox").filter(has=page.locator("img")).first
    mine = explorable(name)
    rows = box.locator(":scope > .lm-Widget")
    image = box.locator("img")
    same(page, image, mine)
    for i, control in enumerate(mine.controls.values()):
        assert not control.disabled
        if isinstance(control, W.Text):
            field = rows.nth(i).locator("input")
            tab_to(page, field)
            page.keyboard.press("ControlOrMeta+A")
            page.keyboard.insert_text("the red, the")
            page.keyboard.press("Enter")
            control.value = "the red, the"
            same(page, image, mine)
            continue
        two = isinstance(control, W.SelectionSlider) and len(control.options) == 2
        for move in (press, partial(drag, share=0.6 if two else 1 / 3)):
            before = image.evaluate(PNG)
            set_to(control, move(page, rows.nth(i)))
            same(page, image, mine)
            assert image.evaluate(PNG) != before, f"{control.description}: {move} changed no pixel"
    page.screenshot(path=SCREENSHOTS / f"explorable-{name}.png")
    assert page.locator(".jp-CodeCell").count() == len(SHOWN)  # no key went to the notebook's commands
    assert not faults


# ── what a reader does ───────────────────────────────────────────────────────────────────────────────


def press(page: Page, slider: Locator) -> str:
    """Move a slider by an arrow key; what it says then."""
    handle = slider.locator(".noUi-handle")
    tab_to(page, handle)
    before = readout(slider)
    page.keyboard.press("ArrowRight")
    if readout(slider) == before:  # it is at its end
        page.keyboard.press("ArrowLeft")
    return changed(page, slider, before)


def drag(page: Page, slider: Locator, share: float) -> str:
    """Drag a slider's handle along a share of its track; what it says then."""
    before = readout(slider)
    track, handle = (slider.locator(part).bounding_box() for part in (".noUi-target", ".noUi-handle"))
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    far = track["width"] * share
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + far if x + far < track["x"] + track["width"] else x - far, y, steps=4)
    page.mouse.up()
    return changed(page, slider, before)


def changed(page: Page, slider: Locator, before: str) -> str:
    wait_until(page, lambda: readout(slider) != before, f"the slider still says {before}")
    return readout(slider)


def readout(slider: Locator) -> str:
    return slider.locator(".widget-readout").inner_text().replace("\xa0", " ")


# ── the same, without a browser ──────────────────────────────────────────────────────────────────────


def explorable(name: str) -> Explorable:
    names: dict = {}
    exec(SHOWN[name], names)
    return names["shown"]


def set_to(control: W.Widget, text: str) -> None:
    """Give a slider the value that its twin on the page shows."""
    if isinstance(control, W.SelectionSlider):
        control.label = text
    else:
        control.value = type(control.value)(text)


def same(page: Page, image: Locator, mine: Explorable) -> None:
    """Wait until the page shows the picture that `mine` has."""
    wait_until(
        page,
        lambda: b64decode(image.evaluate(PNG)) == bytes(mine.image.value),
        f"the page's picture is not that of { {name: c.value for name, c in mine.controls.items()} }",
    )


def wait_until(page: Page, condition, otherwise: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, otherwise
        page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def shelf(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, list[str]]]:
    """A notebook with a cell for each explorable, run; and the list that the page's faults go to."""
    home = tmp_path_factory.mktemp("explorables")
    folder = home / "notebooks"
    folder.mkdir()
    nb = new_notebook(cells=[new_code_cell(f"{source.strip()}\nshown") for source in SHOWN.values()])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, folder / "shelf.ipynb")
    with jupyterlab(home, folder) as address:
        page, faults = open_page(browser)
        open_notebook(page, address, "shelf")
        run_all(page)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        yield page, faults
        page.close()
