"""Watching a submission's processes from outside: memory, processor time and number, all together.

A tree of processes is looked at ten times a second, and ended when it is over a limit. `Family` is the
tree: also those whose parent has ended, as far as they were seen or can be recognised by a mark in
their environment. When `Family.end` returns, none of them is alive.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import psutil

from llmcourse.grading.limits import MB, Limits

EVERY = 0.1  # seconds
PATIENCE = 10.0  # seconds for killed processes to disappear


class Family:
    """A process and all that it started.

    mark       `NAME=value` of the environment that it was started with, which its descendants inherit.
               Not needed in a sandbox, whose processes all end with its first.
    guarded    the first process only waits for the others, and ends with them (bubblewrap's outer one)
    """

    def __init__(self, pid: int, mark: str = "", guarded: bool = False) -> None:
        self.mark, self.guard = mark, pid if guarded else None
        self.known: dict[int, psutil.Process] = {}
        with suppress(psutil.Error):
            self.known[pid] = psutil.Process(pid)

    def look(self) -> list[psutil.Process]:
        """Those alive now, parents before children."""
        alive: dict[int, psutil.Process] = {}
        waiting = [p for p in self.known.values() if p.is_running()]
        while waiting:
            process = waiting.pop(0)
            if process.pid in alive:
                continue
            alive[process.pid] = process
            waiting += [p for pid in children(process) if (p := self._meet(pid)) and pid not in alive]
        self.known = alive
        return list(alive.values())

    def _meet(self, pid: int) -> psutil.Process | None:
        if pid in self.known:
            return self.known[pid]
        try:
            return psutil.Process(pid)
        except psutil.Error:
            return None

    def end(self) -> bool:
        """Kill all of them. True when none is left."""
        until = monotonic() + PATIENCE
        while monotonic() < until:
            family = self.look()
            alive = [p for p in family if not _is_zombie(p)]
            if not alive:
                if not self.mark or not (alive := self._marked()):
                    return True
                self.known |= {p.pid: p for p in alive}
            if len(family) > 1:  # killed too soon, the guard would leave its child to nobody
                alive = [p for p in alive if p.pid != self.guard]
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
            sleep(0.01)  # waiting for them would take the exit code from whoever started them
        return False

    def _marked(self) -> list[psutil.Process]:
        """Who carries the mark: those that left the tree before they were seen in it."""
        name, _, value = self.mark.partition("=")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(name) == value and not _is_zombie(process):
                    found.append(process)
        return found


def children(process: psutil.Process) -> list[int]:
    """The process ids of the children. Linux lists them by thread, which is far cheaper than looking at
    every process of the machine, as other systems need."""
    threads = Path(f"/proc/{process.pid}/task")
    try:
        return [
            int(pid) for thread in os.listdir(threads) for pid in _read(threads / thread / "children").split()
        ]
    except OSError:  # it has ended, or this system has no such list
        pass
    try:
        return [p.pid for p in process.children()]
    except psutil.Error:
        return []


def _read(path: Path) -> str:
    with open(path) as file:
        return file.read()


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


class Watch(threading.Thread):
    """Looks at a family until it is over a limit, which `breach` then names, or until `stop`.

    overhead   how many of the family are the sandbox's own; the learner's process is the next
    folders    in the sandbox, where files can be written: counted too
    """

    def __init__(
        self, family: Family, limits: Limits, overhead: int = 0, folders: tuple[str, ...] = ()
    ) -> None:
        super().__init__(name="watch a submission", daemon=True)
        self.family, self.limits, self.overhead, self.folders = family, limits, overhead, folders
        self.breach: tuple[str, str] | None = None  # kind, and what was done
        self.peak_mb = 0.0
        self._cpu: dict[tuple[int, float], float] = {}  # also of processes that are gone
        self._cpu_alive = 0.0
        self._looking = threading.Lock()
        self._stopped = threading.Event()

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the family has used. Of processes that lived less than a look apart, what
        their parents were charged for."""
        return max(sum(self._cpu.values()), self._cpu_alive)

    def run(self) -> None:
        while not self._stopped.wait(EVERY):
            self.breach = self.measure()
            if self.breach:
                self.family.end()
                return

    def stop(self) -> None:
        """Look no more. Returns when the last look is over."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    def measure(self) -> tuple[str, str] | None:
        """One look. Returns the limit that is exceeded, if any."""
        with self._looking:
            return self._measure()

    def _measure(self) -> tuple[str, str] | None:
        limits, processes = self.limits, self.family.look()
        resident, tasks, cpu_alive = 0, 0, 0.0
        for process in processes:
            with suppress(psutil.Error), process.oneshot():
                times = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = times.user + times.system
                cpu_alive += sum(times[:4])
                resident += process.memory_info().rss
                tasks += process.num_threads()
        self._cpu_alive = max(self._cpu_alive, cpu_alive)
        self.peak_mb = max(self.peak_mb, resident / MB)
        if tasks - self.overhead > limits.processes:
            return "ProcessLimit", f"started more than {limits.processes} processes"
        if resident > limits.memory_mb * MB and _unshared(processes) > limits.memory_mb * MB:
            return "MemoryLimit", f"used more than {limits.memory_mb:,} MB"
        if self.cpu_seconds > limits.cpu_seconds:
            return "CpuLimit", f"used up its {limits.cpu_seconds:g} s of processor time"
        if self.folders and self._files(processes) > limits.files:
            return "FileLimit", f"made more than {limits.files:,} files"
        return None

    def _files(self, processes: list[psutil.Process]) -> int:
        """Files in the sandbox's writable folders, seen through the root of the learner's process."""
        if len(processes) <= self.overhead:
            return 0
        inside, count = processes[self.overhead].pid, 0
        for folder in self.folders:
            with suppress(OSError):
                found = os.statvfs(f"/proc/{inside}/root{folder}")
                count += found.f_files - found.f_ffree
        return count


def _unshared(processes: list[psutil.Process]) -> int:
    """Resident bytes, where what n processes share counts 1/n for each."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            full = process.memory_full_info() if psutil.LINUX else process.memory_info()
            total += getattr(full, "pss", full.rss)
    return total
