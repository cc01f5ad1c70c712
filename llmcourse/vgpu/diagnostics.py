"""What the CUDA C++ compiler has to say, read line by line and shown against the reader's own source.

NVRTC writes its findings into one text, the log:

    cell.cu(4): error: identifier "total" is undefined
        y[i] = total;
               ^

`read` turns the log into `Diagnostic` values, once, and `show` sets one against the reader's line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

WIDTH = 100
"""Characters of a source line that are shown."""

_HEAD = re.compile(
    r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?P<kind>catastrophic error|error|warning|note|remark)"
    r"(?: #(?P<code>\d+)(?:-D)?)?: (?P<message>.*)$"
)
_END = re.compile(r"^At end of source: (?P<kind>error|warning)(?: #(?P<code>\d+)(?:-D)?)?: (?P<message>.*)$")
_OPENED = re.compile(r"^.*\((\d+)\): note[^:]*: to match this")
_BARE = re.compile(
    r"^\s*(?:nvrtc|ptxas|nvvm)[^:]*?\s*:?\s*(?P<kind>fatal error|fatal|error|warning)\s*:\s*(?P<message>.*)$"
)
_FRAME = re.compile(r"at line (\d+)(?: of \"?([^\"\s]+)\"?)?")
_CLOSING = re.compile(r"^(\d+ (catastrophic )?errors?|Compilation terminated|Remark:| and \d+)")


@dataclass(frozen=True)
class Diagnostic:
    """One finding of the compiler.

    kind     "error" or "warning"
    line     in `file`, from 1; None if the finding is about the whole program. `column` from 1, likewise
    detail   what the compiler adds: the argument types it saw, the template it was in
    """

    kind: str
    message: str
    file: str = ""
    line: int | None = None
    column: int | None = None
    code: int | None = None
    detail: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.message}"


def read(log: str, name: str, source: str) -> list[Diagnostic]:
    """The errors and warnings of a compiler's log, in its order.

    name     what the source was called when it was compiled; findings in headers are moved to the line of
             the source that brought them, where the log says which
    """
    lines = log.replace("\0", "").splitlines()
    found: list[Diagnostic] = []
    at = 0
    while at < len(lines):
        head = _HEAD.match(lines[at])
        bare = None if head else _BARE.match(lines[at])
        end = None if head else _END.match(lines[at])
        at += 1
        if bare:
            kind = "warning" if bare["kind"] == "warning" else "error"
            found.append(Diagnostic(kind, bare["message"]))
        if end:
            opened = _OPENED.match(lines[at]) if at < len(lines) else None
            message = f"{end['message']} at the end of the source"
            if opened:  # the note shows which bracket is open, with its line and a caret
                column = lines[at + 2].index("^") - 1 if "^" in "".join(lines[at + 2 : at + 3]) else None
                message += ", to match this one"
                found.append(Diagnostic(end["kind"], message, name, int(opened[1]), column))
            else:
                found.append(Diagnostic(end["kind"], message, name))
        if not head:
            continue
        body: list[str] = []
        while at < len(lines) and lines[at].strip() and not _HEAD.match(lines[at]):
            if _CLOSING.match(lines[at]):
                break
            body.append(lines[at])
            at += 1
        if head["kind"] in ("note", "remark"):
            continue
        found.append(_located(_diagnostic(head, body), name, source))
    return found


def _diagnostic(head: re.Match[str], body: list[str]) -> Diagnostic:
    caret = next((i for i, text in enumerate(body) if text.strip() == "^"), None)
    column = None
    detail = [text.strip() for text in body if not text.startswith("Note #")]
    if caret is not None:
        column = body[caret].index("^") - 1  # the log indents the source by two columns
        detail = [t.strip() for i, t in enumerate(body) if i not in (caret - 1, caret)]
        detail = [t for t in detail if not t.startswith("Note #")]
    return Diagnostic(
        "warning" if head["kind"] == "warning" else "error",
        _plain(head["message"]),
        head["file"],
        int(head["line"]),
        column,
        int(head["code"]) if head["code"] else None,
        tuple(detail),
    )


def _plain(message: str) -> str:
    """Without the advice to pass options that a reader of a notebook cannot pass."""
    message = re.sub(r"\. Consider using .*$", "", message)
    message = re.sub(r", and host (functions|variables) are not allowed in JIT mode", "", message)
    return re.sub(r' \(aka "[^"]*"\)', "", message)


def _located(found: Diagnostic, name: str, source: str) -> Diagnostic:
    """The same finding at the place of the reader's source where something can be done about it."""
    if found.file != name:
        frames = [_FRAME.search(text) for text in found.detail]
        mine = [f for f in frames if f and (f[2] or name) == name]
        if not mine:
            return found
        where = f"in {re.split(r'[/]', found.file)[-1]}, line {found.line}"
        return replace(found, file=name, line=int(mine[-1][1]), column=None, detail=(where, *found.detail))
    if found.message == 'expected a ";"' and found.line is not None:
        text = source.splitlines()
        here = text[found.line - 1] if found.line <= len(text) else ""
        before = here[: (found.column or 1) - 1]
        if not before.strip():  # noticed at the next word: the semicolon is missing where the last one ends
            for line in range(found.line - 1, 0, -1):
                code = re.sub(r"//.*", "", text[line - 1]).rstrip()
                if code.strip():
                    return replace(found, line=line, column=len(code) + 1)
    return found


def show(found: Diagnostic, source: str) -> str:
    """A finding with the line it is about, and a caret below the column."""
    text = source.splitlines()
    if found.line is None or found.line > len(text) or "/" in found.file:
        where = f"{re.split(r'[/]', found.file)[-1]}, " if found.file and found.line is not None else ""
        return f"  {where}{found}"
    line, number = text[found.line - 1].expandtabs(4).rstrip(), str(found.line)
    caret = None
    if found.column is not None:
        caret = len(text[found.line - 1][: found.column - 1].expandtabs(4))
        line, caret = _window(line, caret)
    cut = len(line) - len(line.lstrip())
    out = [f"  {found}", f"    {number} │ {line[cut:][:WIDTH]}"]
    if caret is not None:
        out.append(f"    {' ' * len(number)} │ {' ' * max(caret - cut, 0)}^")
    out += [f"      {detail[:WIDTH]}" for detail in found.detail[:3]]
    return "\n".join(out)


def _window(line: str, caret: int) -> tuple[str, int]:
    """A long line without what lies far before the caret."""
    if caret < WIDTH - 20:
        return line, caret
    start = caret - WIDTH // 2
    return f"…{line[start:]}", caret - start + 1
