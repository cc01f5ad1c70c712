"""What students handed in: which files there are, and the cells in them. Nothing in them is trusted.

Three layouts are accepted, also mixed:

    FOLDER/STUDENT/LAB/LAB.ipynb     nbgrader's
    FOLDER/STUDENT/anything.ipynb    a folder for each student
    FOLDER/STUDENT.ipynb             a file for each student

A file is opened without following links and without waiting for a pipe, and read only if it is a
regular file of ordinary size. Its JSON is taken apart by hand: nbformat would convert and validate what
an attacker wrote. Whatever cannot be read is a sentence for the student, never an exception.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmcourse.grading.inert import checked_png

MAX_FILE_MB = 20
MAX_BRACKETS = 500_000  # lists and dictionaries; a notebook with big pictures has a few thousand
MAX_CELLS = 1_000
MAX_SOURCE = 50_000  # characters of one cell
MAX_ENTRIES = 10_000  # of a folder
MAX_ID, MAX_ID_BYTES = 80, 200  # it becomes a file's name, and 255 bytes are what one may have
MARKER = "nbgrader_config.py"  # a folder that holds this and no notebook is a gradebook

_UNSAFE = re.compile(r"[^\w.@+ -]")
_LAB_NUMBER = re.compile(r"lab(\d+)", re.IGNORECASE)


class RefusedError(Exception):
    """A submission that cannot be read; the message is for the student."""


@dataclass(frozen=True)
class Submission:
    """One student's entry. `student` is safe as a file name and unique in its class."""

    student: str
    path: Path
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawCell:
    """A cell as it came, reduced to texts. `kind` is code, markdown or raw."""

    kind: str
    source: str
    id: str = ""
    grade_id: str = ""
    pictures: dict[str, str] = field(default_factory=dict)  # file name → base64 of a checked PNG


@dataclass
class RawNotebook:
    """The cells of a submission, and what is to be said about the file."""

    cells: list[RawCell] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    kernel: str = ""


# ── which submissions there are ──────────────────────────────────────────────────────────────────


def find_submissions(folder: Path, name: str) -> list[Submission]:
    """The submissions of lab `name` in `folder`, in the order of the students' ids.

    An entry that is a link stays in the list, so that its student is told and not forgotten.
    """
    found: dict[str, Submission] = {}
    for entry in sorted(_entries(folder), key=lambda e: (e.name.endswith(".ipynb"), os.fsencode(e.name))):
        if (given := _student(entry, name)) is None:
            continue
        path = Path(entry.path)
        if name and not entry.is_symlink() and os.path.lexists(path / name):
            path /= name
        student = safe_id(given)
        remarks = [f"graded as {student}: the name {shown(given)} has unusual characters"] * (
            student != given
        )
        if student.casefold() in found:
            student = _with_hash(student, entry.name)
            remarks = [f"graded as {student}: another submission has the name {shown(given)}"]
        found[student.casefold()] = Submission(student, path, tuple(remarks))
    return sorted(found.values(), key=lambda s: s.student)


def safe_id(name: str) -> str:
    """A student id without path tricks, wildcards or characters that only some systems can store."""
    plain = unicodedata.normalize("NFC", name)
    safe = _cut(_UNSAFE.sub("_", plain).strip(" ").lstrip(".-"))
    return safe if safe in (name, plain) else _with_hash(safe or "student", name)


def shown(text: str, length: int = 60) -> str:
    """`text` as it may stand in a remark: printable, and not long."""
    kept = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return f"{kept[:length]}…" if len(kept) > length else kept


def _student(entry: os.DirEntry[str], lab: str) -> str | None:
    """The student whom an entry of the folder belongs to, if it is a submission at all."""
    name = entry.name
    if name.startswith(".") or name == "__MACOSX":
        return None
    if name.endswith(".ipynb"):
        return name.removesuffix(".ipynb")
    if entry.is_symlink():  # os.path: of a link to itself, an entry cannot say what it is
        return name if os.path.isdir(entry.path) or not os.path.exists(entry.path) else None
    return name if entry.is_dir() and not _is_gradebook(Path(entry.path), lab) else None


def _is_gradebook(folder: Path, lab: str) -> bool:
    """Whether a folder holds a course's gradebook. A student may have handed in its settings, too."""
    if not os.path.lexists(folder / MARKER):
        return False
    return not os.path.lexists(folder / lab) and not any(e.name.endswith(".ipynb") for e in _entries(folder))


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def read_submission(path: Path, name: str) -> RawNotebook:
    """The cells of the submission of lab `name` at `path`. Raises RefusedError where there are none."""
    remarks: list[str] = []
    file = _choose(path, name, remarks)
    raw = parse(read_bytes(file))
    raw.remarks = remarks + raw.remarks
    return raw


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of ordinary size. Raises RefusedError for anything else."""
    try:
        _refuse_odd(path, path.lstat())
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
        try:
            _refuse_odd(path, os.fstat(handle))  # what was opened, whatever lay there before
            with open(handle, "rb", closefd=False) as file:
                return file.read(MAX_FILE_MB * 1_000_000)
        finally:
            os.close(handle)
    except OSError as error:
        raise RefusedError(f"{shown(path.name)} cannot be read ({error.strerror})") from None


def _refuse_odd(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise RefusedError(f"{shown(path.name)} is a link, and links are not followed")
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError(f"{shown(path.name)} is {_kind(found.st_mode)}, not a file")
    if found.st_size > MAX_FILE_MB * 1_000_000:
        size = f"{found.st_size / 1e6:,.0f} MB"
        raise RefusedError(f"{shown(path.name)} has {size}; a notebook may have {MAX_FILE_MB} MB")


def _choose(path: Path, name: str, remarks: list[str]) -> Path:
    """The notebook that a submission means: itself, or one of the files in its folder."""
    if not os.path.lexists(path):
        raise RefusedError("nothing was handed in")
    if path.is_symlink() or not path.is_dir():
        return path  # a link is refused where it is read
    if not os.access(path, os.R_OK | os.X_OK):
        raise RefusedError("the folder cannot be read: its permissions do not let the grader in")
    other = ""
    for level in _levels(path, depth=3):
        there = [p for p in level if not _of_another_lab(p.stem, name)]
        other = next((shown(p.name) for p in level if p not in there), other)
        regular = [p for p in there if stat.S_ISREG(p.lstat().st_mode)]
        odd = [p for p in there if p not in regular]
        remarks += [
            f"{shown(p.name)} is {_kind(p.lstat().st_mode)}, not a file: it was not read" for p in odd[:5]
        ]
        if regular:
            return _pick(regular, path, name, remarks)
    none = f"the folder holds {other}, of another lab" if other else "the folder holds no .ipynb file"
    raise RefusedError("; ".join(remarks) or f"no notebook was handed in: {none}")


def _pick(regular: list[Path], folder: Path, name: str, remarks: list[str]) -> Path:
    exact = next((p for p in regular if p.name == f"{name}.ipynb"), None)
    newest = max(regular, key=lambda p: (p.lstat().st_mtime_ns, os.fsencode(p)))
    taken = exact or newest
    where = shown(str(taken.relative_to(folder)))
    if len(regular) > 1:
        why = "the one named as the lab" if exact else "the newest"
        remarks.append(f"{len(regular)} notebooks were handed in; {where}, {why}, was graded")
    elif exact is None or taken.parent != folder:
        remarks.append(f"the notebook is {where}, not {name}.ipynb; it was graded all the same")
    return taken


def _levels(folder: Path, depth: int) -> Iterator[list[Path]]:
    """The .ipynb entries of a folder, then those of the folders in it, and so on; through no link."""
    folders = [folder]
    for _ in range(depth):
        entries = [
            e for f in folders for e in islice(_entries(f), MAX_ENTRIES) if not e.name.startswith((".", "__"))
        ]
        yield sorted(Path(e.path) for e in entries if e.name.lower().endswith(".ipynb"))
        folders = [Path(e.path) for e in entries[:MAX_ENTRIES] if e.is_dir(follow_symlinks=False)]


def _of_another_lab(stem: str, name: str) -> bool:
    theirs, ours = _LAB_NUMBER.match(stem), _LAB_NUMBER.match(name)
    return bool(theirs and ours and int(theirs[1]) != int(ours[1]))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(PermissionError), os.scandir(folder) as entries:
        yield from entries


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something unknown")


def _with_hash(student: str, name: str) -> str:
    """`student`, told from others that became the same by a few digits made from the `name` as it came."""
    digits = hashlib.sha256(os.fsencode(name)).hexdigest()[:4]
    return f"{_cut(student, spare=len(digits) + 1)}-{digits}"


def _cut(student: str, spare: int = 0) -> str:
    """As much of `student` as an id may have, less `spare` characters."""
    cut = student[: MAX_ID - spare].encode()[: MAX_ID_BYTES - spare].decode(errors="ignore")
    return cut.rstrip(" ")


# ── the cells ────────────────────────────────────────────────────────────────────────────────────


def parse(data: bytes) -> RawNotebook:
    """The cells of a notebook's bytes, of format 4 or older. Raises RefusedError where it is none."""
    raw = RawNotebook()
    page = _json(data, raw.remarks)
    cells = page.get("cells") if isinstance(page, dict) else None
    if isinstance(page, dict) and cells is None and isinstance(page.get("worksheets"), list):
        raw.remarks.append("the notebook is of an old format (before 4); it was read all the same")
        sheets = [sheet.get("cells") for sheet in page["worksheets"] if isinstance(sheet, dict)]
        cells = [cell for sheet in sheets if isinstance(sheet, list) for cell in sheet]
    if not isinstance(cells, list):
        raise RefusedError("the file is JSON, but not a notebook: it has no list of cells")
    spec = _dict(_dict(page.get("metadata")).get("kernelspec"))
    raw.kernel = _text(spec.get("name"))[:100]
    faults = _Faults()
    for cell in cells[:MAX_CELLS]:
        if (read := _cell(cell, faults)) is not None:
            raw.cells.append(read)
    if len(cells) > MAX_CELLS:
        raw.remarks.append(
            f"the notebook has {len(cells):,} cells; those after the first {MAX_CELLS:,} were left out"
        )
    raw.remarks += faults.remarks()
    return raw


def _json(data: bytes, remarks: list[str]) -> Any:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, errors="replace")
    if not text.strip("\0 \t\r\n"):
        raise RefusedError("the file is empty")
    if "\ufffd" in text and not _decodes(data, encoding):
        remarks.append("the file holds bytes that are not text (UTF-8); they were replaced")
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise RefusedError("the file is JSON of a size and nesting that no notebook has")
    try:
        return json.loads(text, strict=False)
    except RecursionError:
        raise RefusedError("the file is not a notebook: its JSON is nested too deeply") from None
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise RefusedError(f"the file is not a notebook: it is not whole JSON{where}") from None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class _Faults:
    """What was wrong with cells, counted."""

    unreadable: int = 0
    long: int = 0
    characters: int = 0
    pictures: int = 0

    def remarks(self) -> list[str]:
        told = {
            "left out: no cell of a notebook": self.unreadable,
            f"left out: more than {MAX_SOURCE:,} characters": self.long,
            "mended: characters that are no text (NUL and broken pairs)": self.characters,
            "without attachments that are not whole PNG pictures": self.pictures,
        }
        return [f"{count} of its cells {what}" for what, count in told.items() if count]


def _cell(cell: Any, faults: _Faults) -> RawCell | None:
    if not isinstance(cell, dict):
        faults.unreadable += 1
        return None
    source = cell.get("source", cell.get("input", ""))
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    kind = {"heading": "markdown", "html": "markdown"}.get(
        _text(cell.get("cell_type")), _text(cell.get("cell_type"))
    )
    if not isinstance(source, str) or kind not in ("code", "markdown", "raw"):
        faults.unreadable += 1
        return None
    if len(source) > MAX_SOURCE:
        faults.long += 1
        return None
    clean = _text(source)
    faults.characters += clean != source
    own = _dict(_dict(cell.get("metadata")).get("nbgrader"))
    return RawCell(
        kind,
        clean.replace("\r\n", "\n").replace("\r", "\n").strip("\n"),
        _text(cell.get("id"))[:200],
        _text(own.get("grade_id"))[:200],
        _pictures(cell, faults) if kind == "markdown" else {},
    )


def _pictures(cell: dict[str, Any], faults: _Faults) -> dict[str, str]:
    kept = {}
    attached = _dict(cell.get("attachments"))
    for name, bundle in islice(attached.items(), 10):
        data = _dict(bundle).get("image/png")
        lines = data if isinstance(data, list) else [data]
        picture = checked_png("".join(line for line in lines if isinstance(line, str)))
        if picture and re.fullmatch(r"[\w.-]{1,100}", name):
            kept[name] = picture
    faults.pictures += len(kept) < len(attached)
    return kept


def _text(value: Any) -> str:
    """A text that every encoding and database can store: no NUL, no half of a surrogate pair."""
    if not isinstance(value, str):
        return ""
    return value.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
