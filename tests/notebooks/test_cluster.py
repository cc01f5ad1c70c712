"""`llmcourse run --cluster`: on a Ray cluster of two nodes on this machine, each with one core."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from notebook_maker import alive, printed, write_notebook

from llmcourse.cli import main
from llmcourse.errors import NetworkError
from llmcourse.runner.connect import connect, why_no_cluster

WRITE_DOWN_WHERE = """import os, time
from pathlib import Path
import llmcourse
with open({name!r}, "a") as file:
    file.write(os.environ["RAY_RAYLET_PID"] + "\\n")
print(scale, llmcourse.__file__)"""
WAIT = """end = time.time() + 90
while not Path({go!r}).exists():
    assert time.time() < end
    time.sleep(0.1)"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, each with one core to give."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": health},
        )
        try:
            cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.mark.slow
def test_both_nodes_execute_and_what_ran_on_a_node_that_dies_runs_once_more(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    doomed = cluster.list_all_nodes()[-1]
    places = {name: tmp_path / f"{name}.places" for name in ("first", "second")}
    for name, place in places.items():
        cells = (
            WRITE_DOWN_WHERE.format(name=str(place)),
            WAIT.format(go=str(place.with_suffix(".go"))),
            "1 / 0",
        )
        write_notebook(tmp_path / f"{name}.ipynb", *(cells if name == "second" else cells[:2]))

    def wait_until(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 90
        while not ready() and time.monotonic() < end:
            time.sleep(0.1)

    def nodes_of(name: str) -> list[str]:
        return places[name].read_text().split() if places[name].exists() else []

    def kill_a_node_once_both_run() -> None:
        wait_until(lambda: all(map(nodes_of, places)))
        cluster.remove_node(doomed, allow_graceful=False)
        lost = next((name for name in places if not alive(int(nodes_of(name)[0]))), "first")
        # A task may outlive its node by seconds. So the lost notebook goes on only in its second run,
        # for which the other must first end, and free the one core that is left.
        for name in places:
            if name != lost:
                (tmp_path / f"{name}.go").touch()
        wait_until(lambda: len(nodes_of(lost)) == 2)
        (tmp_path / f"{lost}.go").touch()

    killer = threading.Thread(target=kill_a_node_once_both_run)
    killer.start()
    status = main(["run", "first.ipynb", "second.ipynb", "--out", "out", "--cluster", cluster.address])
    killer.join()

    said = capsys.readouterr()
    assert status == 1
    assert "running it once more" in said.out
    assert "first: ok in" in said.out
    assert "NotebookError: 1 of 2 notebooks failed." in said.err
    assert "second: cell 5 (`1 / 0`): ZeroDivisionError" in said.err

    ran = {name: place.read_text().split() for name, place in places.items()}
    assert ran["first"][0] != ran["second"][0]  # both nodes executed something
    assert sorted(len(nodes) for nodes in ran.values()) == [1, 2]
    assert ran["first"][-1] == ran["second"][-1]  # in the end, on the node that lived

    first, second = json.loads(Path("out/report.json").read_text())["notebooks"]
    assert sorted([first["attempts"], second["attempts"]]) == [1, 2]
    assert first["node"] == second["node"]
    assert doomed.node_id[:8] not in first["node"]
    scale, package = printed(Path("out/first.ipynb")).split()
    assert scale == "ci"
    assert "py_modules_files" in package  # the code that was sent, not what the node happens to have
    assert Path("out/second.ipynb").is_file()


# ── addresses ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def port() -> Iterator[int]:
    """A port where something listens that answers, but is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                client.recv(100)
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.close()

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_another_service_is_told_from_a_cluster(port: int) -> None:
    assert why_no_cluster(f"127.0.0.1:{port}") == "another service listens there"


def test_a_silent_service_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "within 0.2 s" in why_no_cluster(f"127.0.0.1:{server.getsockname()[1]}", timeout=0.2)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port", "local", "nowhere"]
)
def test_an_address_without_a_cluster_is_said_so_quickly(address: str) -> None:
    pytest.importorskip("ray")
    began = time.monotonic()
    with pytest.raises(NetworkError, match="no Ray cluster answers at") as caught, connect(address):
        pass
    assert time.monotonic() - began < 10
    assert address in caught.value.what
    assert "ray start --head" in caught.value.fix


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = write_notebook(tmp_path / "a.ipynb")
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--cluster", "auto"]) == 1
    said = capsys.readouterr().err
    assert "MissingPackageError" in said
    assert "pip install 'llmcourse[cluster]'" in said
