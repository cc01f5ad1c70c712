"""`llmcourse grade --cluster`: the same marks from a Ray cluster of two nodes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from test_grade import a_class, command, environment, marks, right_marks

from llmcourse import cli
from llmcourse.grading.cluster import judge_on
from llmcourse.grading.stage import Job


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # calls have a time limit, and other tests run beside them
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            yield cluster.address
        finally:
            cluster.shutdown()


def test_a_ray_cluster_judges_the_same(tmp_path, ray_address):
    folder, course = tmp_path / "submissions", tmp_path / "course"
    a_class(folder, 3)
    options = ("--cluster", ray_address)
    done = subprocess.run(
        command(folder, course, *options), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert marks(course) == right_marks(3)


def test_a_job_that_cannot_be_judged_there_is_not_a_zero(ray_address):
    job = Job("ada", "lab99_none", (), (), seed=1)
    (judged,) = judge_on(ray_address, [job])
    assert "lab99_none" in judged.error
    assert judged.marks == {}


def test_a_cluster_that_does_not_answer_is_said_within_seconds(tmp_path, capsys):
    a_class(tmp_path / "submissions", 1)
    began = time.monotonic()
    options = ["--course", str(tmp_path / "course"), "--cluster", "127.0.0.1:9"]
    assert cli.main(["grade", str(tmp_path / "submissions"), *options]) == 1
    assert time.monotonic() - began < 20
    assert "no Ray cluster answers" in capsys.readouterr().err
