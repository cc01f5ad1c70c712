"""What one submission may use, and what of it the kernel can enforce by itself.

The kernel limits each process (`limit_this_process`); a tree of processes together is watched from
outside (`watch`). Both are needed: a process can outgrow any watcher between two looks, and many small
processes can outgrow what each may use.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

MB = 1_000_000
CHANNEL_LOST = 70  # exit code of a learner's process that can no longer be reached
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What one submission may use. The whole tree of its processes counts together.

    cell_seconds, call_seconds   for one cell; for one call of a learner's function
    wall_seconds                 of waiting for it, over all cells, calls and restarts
    cpu_seconds                  of processor time, until it is started again
    memory_mb                    resident memory
    processes                    processes and threads at one time
    file_mb, scratch_mb, files   one file; all files; their number
    output_chars                 of text kept from one cell
    message_mb                   one result, with its arrays
    start_seconds                until its Python is up
    """

    cell_seconds: float = 20.0
    call_seconds: float = 10.0
    wall_seconds: float = 120.0
    cpu_seconds: float = 60.0
    memory_mb: int = 2048
    processes: int = 64
    file_mb: int = 64
    scratch_mb: int = 256
    files: int = 20_000
    output_chars: int = 20_000
    message_mb: int = 64
    start_seconds: float = 60.0

    @property
    def address_mb(self) -> int:
        """Address space of one process: Python and its libraries reserve more than they use."""
        return self.memory_mb + 2048


def limit_this_process(limits: Limits, *, sandboxed: bool, own_user: bool) -> None:
    """Limit this process and all that it will start, for good.

    sandboxed   nothing else depends on its open files and locked memory
    own_user    its user runs nothing else, so that the kernel can count the user's processes
    """
    import resource

    def limit(name: str, most: int, hard: int | None = None) -> None:
        kind = getattr(resource, name, None)
        if kind is None:  # not on this system
            return
        already = resource.getrlimit(kind)[1]
        top = sys.maxsize if already == resource.RLIM_INFINITY else already
        resource.setrlimit(kind, (min(most, top), min(most if hard is None else hard, top)))

    cpu = max(1, round(limits.cpu_seconds))
    limit("RLIMIT_CPU", cpu, cpu + 1)  # a signal that says so, then the kill
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_FSIZE", limits.file_mb * MB)
    if sys.platform == "linux":
        limit("RLIMIT_AS", limits.address_mb * MB)
    if sandboxed:
        limit("RLIMIT_NOFILE", 256)
        limit("RLIMIT_MSGQUEUE", 0)
        limit("RLIMIT_MEMLOCK", 0)
    if own_user:
        limit("RLIMIT_NPROC", limits.processes + 16)  # so that `watch` sees who wants more, and says so


def end_with_parent() -> None:
    """Let this process be killed when the one that started it is gone, also by kill -9. Linux only."""
    import ctypes
    import signal

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
