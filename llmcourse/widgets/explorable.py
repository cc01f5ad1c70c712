"""A picture that follows controls, and stays a picture where no kernel runs.

The picture is redrawn into an image widget. (`interact` and `Output` are avoided: they need a
round trip through the kernel's output stream, on which notebook executors can stall.) The saved
notebook also holds the first picture as PNG, so that a page that runs no kernel shows it.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as W

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """A matplotlib figure as PNG bytes, without the date and version that would make every file differ."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def choice(options: Sequence[Any], value: Any, description: str, **look: Any) -> W.SelectionSlider:
    """A slider over a few options (values, or pairs of a label and a value).

    Not a drop-down list: JupyterLab takes the keys of a focused list for its own commands, so that an arrow
    moves on to the next cell and a letter may insert or cut one. A slider's handle sees its keys first.
    """
    return W.SelectionSlider(options=list(options), value=value, description=description, **look)


class Explorable:
    """Controls above a picture: `draw(**values)` returns a matplotlib figure for the controls' values.

    controls   ipywidgets by the name of draw's argument; each must have `.value`. Sliders (and `choice`) take
               the arrow keys, page up/down, Home and End once focused (Tab).
    caption    one sentence: what to move and what to look for; it is also the picture's alternative text.
    """

    def __init__(self, draw: Callable[..., Figure], caption: str, **controls: W.Widget) -> None:
        self.draw, self.caption, self.controls = draw, caption, controls
        self.image = W.Image(value=self.picture(), format="png")
        self.image.layout.max_width = "100%"
        for control in controls.values():
            control.observe(self._redraw, "value")
        self.image.layout.align_self = "flex-start"  # the box would stretch it
        # HTML rather than Label, which cuts a long line; a caption may quote data, hence the escape.
        self.box = W.VBox([*controls.values(), self.image, W.HTML(escape(caption))])

    def picture(self) -> bytes:
        return png(self.draw(**{name: control.value for name, control in self.controls.items()}))

    def _redraw(self, change: dict[str, Any]) -> None:
        self.image.value = self.picture()

    def __repr__(self) -> str:
        return f"[explorable: {self.caption}]"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = dict(self.box._repr_mimebundle_(**kwargs) or {})
        return bundle | {"text/plain": repr(self), "image/png": b64encode(self.image.value).decode()}
