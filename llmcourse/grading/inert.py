"""A learner's Markdown and pictures, made harmless for whatever page an instructor opens them in.

Formgrader renders a submission's Markdown in the instructor's browser and lets HTML through. What is
HTML and what is code depends on the parser, and parsers disagree about the odd cases that an attacker
looks for. So nothing is parsed here. A space goes where none of them can do without the missing one:

    <img src=x onerror=…>        →  < img src=x onerror=…>        “<” before a space never opens a tag
    [here](javascript:…)         →  [here] (javascript:…)         a link's target follows its text at once
    \\href{javascript:…}{here}   →  \\ href{javascript:…}{here}   a command follows its backslash at once

Mathematics and code read as before: `a<b` and `a< b` are the same formula and the same expression.
A picture is kept if it is a PNG whose parts are whole, and only the parts that make the picture are.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zlib

MAX_SIDE = 4096  # pixels; a picture is a square of four bytes each once it is shown
MAX_PNG_BYTES = 2_000_000

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_SAFE_TARGET = r"(?i:https?://|#|mailto:|attachment:)"
_LINK = re.compile(rf"\](?=\((?!{_SAFE_TARGET})|:(?!\s*{_SAFE_TARGET}))")
_MATH_COMMAND = re.compile(r"\\(?=(?:href|url|require|style|class|cssId|html\w*|data)\b)")

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PARTS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def inert(markdown: str) -> str:
    """`markdown` without HTML, and with no links but to the web, to headings and to its own pictures."""
    text = _TAG.sub("< ", markdown)
    text = _LINK.sub("] ", text)
    return _MATH_COMMAND.sub(r"\\ ", text)


def checked_png(encoded: object) -> str | None:
    """The PNG of a base64 text, rebuilt from the parts that make the picture; None if it is not whole."""
    if not isinstance(encoded, str | bytes) or len(encoded) > 2 * MAX_PNG_BYTES:
        return None
    try:
        data = base64.b64decode(encoded, validate=False)
    except (binascii.Error, ValueError):
        return None
    picture = _rebuilt(data) if len(data) <= MAX_PNG_BYTES else None
    return None if picture is None else base64.b64encode(picture).decode("ascii")


def _rebuilt(data: bytes) -> bytes | None:
    if not data.startswith(_SIGNATURE):
        return None
    kept, at, last = [_SIGNATURE], len(_SIGNATURE), b""
    while at + 12 <= len(data) and last != b"IEND":
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 12 + length
        kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
        if end > len(data) or struct.pack(">I", zlib.crc32(kind + body)) != data[end - 4 : end]:
            return None
        if (kind == b"IHDR") != (not last) or (kind == b"IHDR" and not _fits(body)):
            return None
        if kind in _PARTS:
            kept.append(data[at:end])
        at, last = end, kind
    whole = last == b"IEND" and any(part[4:8] == b"IDAT" for part in kept)
    return b"".join(kept) if whole else None


def _fits(header: bytes) -> bool:
    if len(header) != 13:
        return False
    width, height = struct.unpack(">II", header[:8])
    return 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE
