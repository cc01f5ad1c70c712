"""IPython's shell without a kernel: runs cells, and keeps what they show as data.

Magics, `display`, a cell's last value, `await` and the inline figures of Matplotlib work as in a
notebook. Nothing is drawn for a terminal: no prompts, no colours, no printed tracebacks, no history.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from contextlib import nullcontext
from typing import Any, NoReturn

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import StdinNotImplementedError
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

from llmcourse.grading.outputs import KINDS, Shown, Stream
from llmcourse.grading.perform import Failure

MESSAGE_KEPT, FRAMES_KEPT, TRACE_KEPT = 2_000, 8, 6_000


class Publisher(DisplayPublisher):
    """`display(…)`."""

    shell: Any

    def publish(self, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.shell.show(data, result=False)

    def clear_output(self, wait: bool = False) -> None:
        pass


class Hook(DisplayHook):
    """A cell's last value."""

    shell: Any

    def quiet(self) -> bool:
        return bool(self.semicolon_at_end_of_expression(self.shell.source))

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict[str, Any], md_dict: Any = None) -> None:
        self.shell.show(format_dict, result=True)

    def log_output(self, format_dict: dict[str, Any]) -> None:
        pass

    def finish_displayhook(self) -> None:
        self._is_active = False


class Shell(InteractiveShell):
    """One notebook's shell. Make it with `Shell.start()`."""

    displayhook_class = Type(Hook)
    display_pub_class = Type(Publisher)
    sinks: dict[str, Stream]
    cell = source = ""

    @classmethod
    def start(cls) -> Shell:
        config = Config()
        config.HistoryManager.enabled = False
        config.InteractiveShell.colors = "nocolor"
        config.InteractiveShell.display_page = True
        shell = cls.instance(config=config)
        shell.sinks = {"stdout": Stream("stdout"), "stderr": Stream("stderr")}
        if shell.display_formatter is not None:
            shell.display_formatter.active_types = list(KINDS)
        vars(shell.compile)["get_code_name"] = lambda *source: f"<cell {shell.cell}>"
        builtins.input = _no_input
        return shell

    def run(self, cell: str, source: str, text_kept: int) -> tuple[Shown, BaseException | None]:
        """Run a cell. Returns what it showed, and what it raised."""
        self.cell, self.source = cell, source
        shown = self.show_in(Shown(text_kept))
        error: BaseException | None
        try:
            result = self.run_cell(source)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as raised:  # from what a cell left behind in the shell's events
            error = raised
        self.execution_count += 1
        self.show_in(Shown(0))
        return shown, error

    def show_in(self, shown: Shown) -> Shown:
        """From here on `shown` takes what is printed. Streams that a cell replaced come back."""
        for name, stream in self.sinks.items():
            stream.shown = shown
            setattr(sys, name, stream)
        return shown

    def show(self, data: dict[str, Any], result: bool) -> None:
        self.sinks["stdout"].shown.data(data, result)

    def enable_gui(self, gui: str | None = None) -> None:
        """Figures are inline."""

    def enable_matplotlib(self, gui: str | None = None) -> Any:
        """Inline, whatever was asked for: `%matplotlib widget` must not end the cell that holds it."""
        return super().enable_matplotlib("inline")

    # IPython 9 keeps all that is printed for its history, and that may be gigabytes.
    def _tee(self, channel: str) -> Any:
        return nullcontext()

    # Errors are told by whoever asked for the cell.
    def showtraceback(self, *args: Any, **kwargs: Any) -> None:
        pass

    def showsyntaxerror(self, *args: Any, **kwargs: Any) -> None:
        pass

    def showindentationerror(self) -> None:
        pass


def _no_input(prompt: object = "", /) -> NoReturn:
    raise StdinNotImplementedError("input() has nobody to ask while a notebook is graded")


def cell_failure(error: BaseException) -> Failure:
    """What a cell raised: name, message, and a traceback through the notebook's own lines."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith("<cell ")]
    lines = []
    for frame in frames[-FRAMES_KEPT:]:
        inside = "" if frame.name == "<module>" else f", in {frame.name}"
        lines.append(f"{frame.filename[1:-1]}, line {frame.lineno}{inside}\n    {frame.line}\n")
    kind = type(error).__name__
    try:
        message, said = str(error), "".join(traceback.format_exception_only(error))
    except BaseException:  # an exception of the learner's own can raise here too
        message, said = "", kind
    line, source = (frames[-1].lineno or 0, frames[-1].line or "") if frames else (0, "")
    trace = ("".join(lines) + said)[-TRACE_KEPT:].rstrip()
    return Failure(kind, message[:MESSAGE_KEPT], line, source[:300], trace)
