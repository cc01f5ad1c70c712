"""`llmcourse start`: from a fresh set-up to a model that speaks and an open notebook.

Model and text are fetched, the machine is checked, one question is answered in the terminal by the
course's own engine, and JupyterLab takes over on notebook 00. JupyterLab listens on this machine only
(127.0.0.1) and asks for a token that is made anew at each start.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from llmcourse import assets, doctor
from llmcourse.errors import MissingPackageError, NotebookError, PortError

HOST = "127.0.0.1"
FIRST_PORT = 8888
FIRST_NOTEBOOK = "notebooks/00_start_here.ipynb"
PROMPT = "In two sentences, why does the sky look blue?"


def start(*, jupyter: bool, browser: bool, port: int | None) -> int:
    """Fetch, check, speak, and open JupyterLab unless `jupyter` is False. Returns the exit code.

    Raises   PortError for a `port` that is taken or impossible, before anything else is done.
    """
    if jupyter and port is not None:
        require_port(port)
    root = project_root() if jupyter else Path.cwd()
    for asset in assets.ASSETS:
        assets.fetch(asset)
    print("\nThis machine\n", flush=True)
    if code := doctor.report(as_json=False):
        return code
    if code := speak():
        return code
    if not jupyter:
        print("Next: make start (or llmcourse start) opens the notebooks in JupyterLab.")
        return 0
    return open_lab(root, browser=browser, port=first_free_port() if port is None else port)


def speak() -> int:
    """One real answer of the real model, with its time to first token and its speed."""
    from llmcourse.chat import chat

    print(f"\nThe model answers, through the course's own engine\n\n  {PROMPT}\n", flush=True)
    code = chat(model=None, prompt=PROMPT, device="auto", dtype="auto", max_tokens=60, temperature=0, seed=0)
    print(flush=True)
    return code


def project_root() -> Path:
    """The folder that holds `notebooks/`: the clone that this package comes from, or the current folder."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (folder / FIRST_NOTEBOOK).is_file():
            return folder
    raise NotebookError(
        f"there is no {FIRST_NOTEBOOK} in {Path.cwd()}.",
        "JupyterLab opens the notebooks of a clone; the installed package alone has none.",
        "llmcourse start in the folder of the clone, or --no-jupyter.",
    )


def port_problem(port: int) -> OSError | None:
    """Why a server could not listen on this port of 127.0.0.1, or None if it could."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # as servers do: a port that only waits out its last connection is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None


def require_port(port: int) -> None:
    """Raise PortError unless a server can listen on this port."""
    if not 1 <= port <= 65535:
        raise PortError(
            f"{port} is not a port.",
            "Ports are numbered 1 to 65535.",
            f"--port {FIRST_PORT}, or leave it out.",
        )
    if problem := port_problem(port):
        raise PortError(
            f"port {port} of {HOST} is taken{_holder(port)}."
            if not isinstance(problem, PermissionError)
            else f"port {port} needs more rights than you have.",
            f"JupyterLab can't listen there ({problem.strerror}).",
            f"--port {(free := first_free_port())} (make start PORT={free}), or leave the port out.",
        )


def first_free_port() -> int:
    """The first port from 8888 on that a server can listen on."""
    for port in range(FIRST_PORT, FIRST_PORT + 1000):
        if port_problem(port) is None:
            return port
    raise PortError(
        f"no port from {FIRST_PORT} to {FIRST_PORT + 999} is free.",
        "JupyterLab needs one to listen on.",
        "--port with a number that you know to be free.",
    )


def _holder(port: int) -> str:
    """` by python (process 123)` where the system says who listens, else nothing."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return ""


def has_display() -> bool:
    """Whether a browser window can be shown: always on a desktop system, on Linux if a display is set."""
    if "SSH_CONNECTION" in os.environ and not os.environ.get("DISPLAY"):
        return False
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def lab_command(root: Path, *, browser: bool, port: int) -> list[str]:
    """JupyterLab's command line. The token is not on it, since other users can read command lines."""
    command = [sys.executable, "-m", "jupyterlab", str(root / FIRST_NOTEBOOK)]
    command += [
        f"--ip={HOST}",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}",
    ]
    command += ["--ServerApp.answer_yes=True", "--Application.log_level=WARN"]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command


def open_lab(root: Path, *, browser: bool, port: int) -> int:
    """Run JupyterLab until Ctrl-C, printing its address. On POSIX this process becomes JupyterLab."""
    if find_spec("jupyterlab") is None:
        raise MissingPackageError(
            "JupyterLab is not installed.",
            "The notebooks are opened with it; the commands work without.",
            f"{doctor.INSTALL}.",
        )
    browser = browser and has_display()
    token = secrets.token_hex(24)
    environment = {**os.environ, "JUPYTER_TOKEN": token}
    address = f"http://{HOST}:{port}/lab/tree/{quote(FIRST_NOTEBOOK)}?token={token}"
    print(
        f"JupyterLab (Ctrl-C stops it){'' if browser else ': open this address'}\n\n  {address}\n", flush=True
    )
    command = lab_command(root, browser=browser, port=port)
    if os.name == "posix":
        os.chdir(root)
        os.execve(command[0], command, environment)
    return subprocess.call(command, cwd=root, env=environment)
