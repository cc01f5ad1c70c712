"""What a cell shows, bounded where it is written and cleaned where it is read.

In the learner's process `Shown` takes all that a cell prints and displays. It keeps the beginning and
counts the rest, so that gigabytes cost nothing but the time to produce them. In the judge's process
`cleaned` rebuilds the list, in the notebook format's own form, from text and PNG pictures alone:
HTML, SVG, scripts and widgets of a submission never reach a page that an instructor opens.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

from llmcourse.grading.inert import checked_png

TEXT_KEPT = 20_000  # characters that a cell may show
PICTURES_KEPT = 12
PICTURE_BYTES = 2_000_000

TEXT_KIND, PICTURE_KIND = "text/plain", "image/png"
KINDS = (TEXT_KIND, PICTURE_KIND)

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Shown:
    """One cell's outputs as they come. `cut` counts the characters that were not kept."""

    def __init__(self, text_kept: int = TEXT_KEPT) -> None:
        self.outputs: list[dict[str, Any]] = []
        self.left, self.cut, self.pictures = text_kept, 0, 0

    def stream(self, name: str, text: str) -> None:
        kept = self._keep(text)
        if not kept:
            return
        if self.outputs and self.outputs[-1].get("name") == name:
            self.outputs[-1]["text"].append(kept)
        else:
            self.outputs.append({"name": name, "text": [kept]})

    def data(self, data: dict[str, Any], result: bool = False) -> None:
        """A displayed object; `result` if it is the cell's last value."""
        kept: dict[str, Any] = {}
        if isinstance(text := data.get(TEXT_KIND), str) and (text := self._keep(text)):
            kept[TEXT_KIND] = text
        picture = data.get(PICTURE_KIND)
        if isinstance(picture, str):  # some objects give base64 already
            picture = picture.encode("ascii", "replace")
        elif isinstance(picture, bytes):
            picture = base64.b64encode(picture)
        if isinstance(picture, bytes) and len(picture) <= PICTURE_BYTES and self.pictures < PICTURES_KEPT:
            self.pictures += 1
            kept[PICTURE_KIND] = picture
        if kept:
            self.outputs.append({"data": kept, "result": result})

    def _keep(self, text: str) -> str:
        kept = text[: self.left]
        self.left -= len(kept)
        self.cut += len(text) - len(kept)
        return kept

    def as_plain(self) -> dict[str, Any]:
        outputs = [o | {"text": "".join(o["text"])} if "text" in o else o for o in self.outputs]
        return {"outputs": outputs, "cut": self.cut}


class Stream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr` of a learner's process. `shown` is the cell that is being run."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = Shown(0)
        self.buffer = _Bytes(self)

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self.shown.stream(self.name, text)
        return len(text)

    def writable(self) -> bool:
        return True


class _Bytes(io.RawIOBase):
    """What `sys.stdout.buffer` is for: bytes, here UTF-8."""

    def __init__(self, text: Stream) -> None:
        self.text = text

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self.text.write(str(view, "utf-8", "replace"))
        return len(view)

    def writable(self) -> bool:
        return True


# ── at the judge ─────────────────────────────────────────────────────────────────────────────────


def cleaned(found: dict[str, Any], count: int, text_kept: int = TEXT_KEPT) -> list[dict[str, Any]]:
    """The outputs of nbformat 4 that `found`, which `Shown.as_plain` should have made, stands for.

    count   the cell's execution count
    Raises  TypeError, KeyError, ValueError or AttributeError where it is of another form.
    """
    again = Shown(text_kept)  # counts and cuts as the sender should have
    for output in found["outputs"]:
        if "data" in output:
            data = output["data"]
            text, png = clean_text(data.get(TEXT_KIND, "")), checked_png(data.get(PICTURE_KIND))
            again.data({TEXT_KIND: text, PICTURE_KIND: png}, output["result"] is True)
        else:
            name = "stderr" if output["name"] == "stderr" else "stdout"
            again.stream(name, clean_text(output["text"]))
    if (cut := int(found["cut"]) + again.cut) > 0:
        again.left, more = 100, f"\n… and {cut:,} more characters, not kept\n"
        again.stream("stdout", more)
    return [_in_notebook_form(output, count) for output in again.as_plain()["outputs"]]


def clean_text(text: str) -> str:
    """`text` without colours, control characters and halves of surrogate pairs; lines end with \\n.

    Raises TypeError if it is none.
    """
    return _CONTROL.sub("", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def _in_notebook_form(output: dict[str, Any], count: int) -> dict[str, Any]:
    if "text" in output:
        return {"output_type": "stream", "name": output["name"], "text": output["text"]}
    data = {k: v.decode() if isinstance(v, bytes) else v for k, v in output["data"].items()}
    shown = {"data": data, "metadata": {}}
    if output["result"]:
        return {"output_type": "execute_result", "execution_count": count, **shown}
    return {"output_type": "display_data", **shown}
