"""Submissions judged side by side, in worker processes of this machine.

A worker holds one sandbox at a time. A worker that dies (the machine ran out of memory, say) takes down
the pool of `concurrent.futures`: it is built anew, and the submissions that were under way are judged
once more, one at a time. What fails again is reported as not judged, never as zero.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import psutil

from llmcourse.grading.limits import end_with_parent
from llmcourse.grading.stage import Job, Judged, judge_submission

ATTEMPTS = 2

_slot = 0


def judge_here(jobs: Sequence[Job], workers: int) -> Iterator[Judged]:
    """Judge `jobs` with that many worker processes; yields each when it is done."""
    waiting = deque((job, 1) for job in jobs)
    alone: deque[tuple[Job, int]] = deque()  # were under way when a worker died
    while waiting or alone:
        queue, width = (alone, 1) if alone else (waiting, workers)
        try:
            yield from _run(queue, width, alone)
        except BrokenProcessPool:
            continue


def _run(queue: deque[tuple[Job, int]], workers: int, alone: deque[tuple[Job, int]]) -> Iterator[Judged]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_prepare, initargs=(counter, os.getpid())
    )
    running: dict[Future[Judged], tuple[Job, int]] = {}
    try:
        while queue or running:
            while queue and len(running) < workers:
                job, attempt = queue.popleft()
                running[pool.submit(_judge, job)] = job, attempt
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    judged = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    job, _ = running.pop(future)
                    yield not_judged(job, f"{type(error).__name__}: {error}")
                else:
                    running.pop(future)
                    yield judged
    except BrokenProcessPool:
        for job, attempt in running.values():
            if attempt < ATTEMPTS:
                alone.append((job, attempt + 1))
            else:
                yield not_judged(job, f"its judge's process died {attempt} times")
        raise
    finally:
        _end(pool, now=bool(running))


def not_judged(job: Job, reason: str) -> Judged:
    """A submission that could not be judged: no marks at all, and why."""
    return Judged(job.student, job.lab, error=reason)


def _judge(job: Job) -> Judged:
    return judge_submission(job, slot=_slot)


def _prepare(counter: Any, parent: int) -> None:
    """In a worker: a sandbox slot of its own; leave Ctrl-C to the parent; die with it."""
    global _slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # it was gone before
        os._exit(1)
    with counter.get_lock():
        _slot = counter.value
        counter.value += 1


def _end(pool: ProcessPoolExecutor, now: bool) -> None:
    """Stop the workers; `now` ends what is under way, too."""
    for pid in list(pool._processes or {}) if now else []:
        try:
            process = psutil.Process(pid)
            for member in [*process.children(recursive=True), process]:
                member.kill()
        except psutil.NoSuchProcess:
            continue
    pool.shutdown(wait=True, cancel_futures=True)
