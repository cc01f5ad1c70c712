"""The same judging on an existing Ray cluster: `llmcourse grade FOLDER --cluster ADDRESS`.

A task is one submission, and what travels is its `Job`: the clean notebook's cells, the graded cells
and the seed. Each node needs bubblewrap. The gradebook stays here; nodes send verdicts back.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from llmcourse.grading.pool import ATTEMPTS, not_judged
from llmcourse.grading.stage import Job, Judged, judge_submission
from llmcourse.runner.connect import connect, node_lost_errors

SLOTS = 4096


def judge_on(address: str, jobs: Sequence[Job], at_once: int | None = None) -> Iterator[Judged]:
    """Judge `jobs` on the Ray cluster at `address`; yields each when it is done.

    at_once   submissions under way at one time (default: one for each core of the cluster)

    Raises NetworkError when no cluster answers, MissingPackageError without Ray.
    """
    with connect(address):
        yield from _drive(jobs, at_once)


def run_job(plain: dict[str, Any]) -> dict[str, Any]:
    """Run in a task on a node: judge one submission there. Nothing is raised: not every error travels."""
    from llmcourse.grading import sandbox

    job = Job(**plain)
    if job.sandbox and (why := sandbox.available()):
        return not_judged(job, f"a node of the cluster cannot sandbox it: {why}").as_plain()
    try:
        return judge_submission(job, slot=os.getpid() % SLOTS).as_plain()
    except Exception as error:
        return not_judged(job, f"{type(error).__name__}: {error}").as_plain()


def _drive(jobs: Sequence[Job], at_once: int | None) -> Iterator[Judged]:
    import ray

    task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(run_job)
    limit = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque((job, 1) for job in jobs)
    running: dict[Any, tuple[Job, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                job, attempt = waiting.popleft()
                running[task.remote(vars(job))] = job, attempt
            done, _ = ray.wait(list(running), num_returns=1, timeout=5)
            for ref in done:
                job, attempt = running.pop(ref)
                try:
                    yield Judged(**ray.get(ref))
                except node_lost_errors() as error:
                    if attempt < ATTEMPTS:
                        waiting.append((job, attempt + 1))
                    else:
                        yield not_judged(job, f"its node was lost {attempt} times ({type(error).__name__})")
                except ray.exceptions.RayError as error:
                    yield not_judged(job, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
