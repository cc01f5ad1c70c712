"""`llmcourse run --cluster`: on a Ray cluster of two nodes on this machine, each with one core."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from notebook_maker import printed, write_notebook

from llmcourse.cli import main
from llmcourse.errors import NetworkError
from llmcourse.runner.connect import connect, why_no_cluster
from llmcourse.runner.discover import check
from llmcourse.runner.outcome import Event

WAIT_FOR = (
    "import time\nfrom pathlib import Path\nend = time.time() + 60\n"
    "while not Path({0!r}).exists():\n    assert time.time() < end\n    time.sleep(0.1)"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
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
def test_both_nodes_execute_and_results_come_back(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = "from pathlib import Path\nPath({0!r}).touch()"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    say = "import llmcourse\nprint(scale, llmcourse.__file__)"
    write_notebook(tmp_path / "first.ipynb", here.format(one), WAIT_FOR.format(two), say)  # they meet, so
    write_notebook(tmp_path / "second.ipynb", here.format(two), WAIT_FOR.format(one), "1 / 0")  # run at once
    assert main(["run", "first.ipynb", "second.ipynb", "--out", "out", "--cluster", cluster.address]) == 1
    said = capsys.readouterr()
    assert "first: ok in" in said.out
    assert "NotebookError: 1 of 2 notebooks failed." in said.err
    assert "second: cell 5 (`1 / 0`): ZeroDivisionError" in said.err

    report = json.loads(Path("out/report.json").read_text())
    nodes = {notebook["node"] for notebook in report["notebooks"]}
    assert len(nodes) == 2
    assert all(socket.gethostname() in node for node in nodes)
    scale, package = printed(Path("out/first.ipynb")).split()
    assert scale == "ci"
    assert "py_modules_files" in package  # the code that was sent, not what the node happens to have
    assert Path("out/second.ipynb").is_file()


@pytest.mark.slow
def test_a_notebook_whose_node_dies_runs_once_more_on_another(cluster: Any, tmp_path: Path) -> None:
    from llmcourse.runner.cluster import run_on_cluster

    doomed = cluster.list_all_nodes()[-1]
    go, events = tmp_path / "go", list[Event]()

    def on_event(event: Event) -> None:
        events.append(event)
        started = [e for e in events if e.kind == "started"]
        if len(started) == 2 and not go.exists():
            go.touch()
            threading.Thread(target=cluster.remove_node, args=(doomed, False)).start()

    wait = f"{WAIT_FOR.format(str(go))}\ntime.sleep(3)"
    notebooks = check([write_notebook(tmp_path / f"{name}.ipynb", wait) for name in "ab"])
    began = time.monotonic()
    with connect(cluster.address):
        outcomes = run_on_cluster(notebooks, parameters={}, out=tmp_path, on_event=on_event)
    assert [o.error for o in outcomes] == [None, None]
    assert sorted(o.attempts for o in outcomes) == [1, 2]
    assert all(doomed.node_id[:8] not in o.node for o in outcomes)
    assert any(e.kind == "note" and "once more" in e.message for e in events)
    assert time.monotonic() - began < 60


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
