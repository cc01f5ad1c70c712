"""The papermill engine that the course executes notebooks with.

It is papermill's own engine with four differences.

**It does not stall on widgets.** nbclient 0.11 answers an `Output` widget by *sending* on the shell
channel while it *waits* for the cell's reply on the same channel. ZeroMQ signals a socket's readiness
once, on the edge; the send consumes the signal, and a wait that began before it never wakes, until the
cell's timeout (jupyter/nbclient#312). `SlicedShellChannel` waits in slices of 0.1 s, and each new
slice looks at the socket afresh.

**Kernels do not race for ports.** A TCP port is chosen free and bound later, by the kernel; two kernels
that start together can choose the same. Ours talk through sockets in a private folder (`ipc`), and a
kernel that does not come up is started once more.

**It says which cell it is in**, through a `Recorder`, so that a cell that never ends, or ends its own
process, can be named.

**It bounds what a cell prints**, so that a runaway loop costs seconds and not a disk.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import Any, ClassVar, Protocol

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from traitlets import Type

ENGINE = "llmcourse"
SLICE = 0.1
OUTPUT_LIMIT = 16_000_000
UNIX_SOCKET_PATH_LIMIT = 100


class KernelStartError(RuntimeError):
    """No kernel came up."""


class KernelExitError(RuntimeError):
    """A cell ended its own kernel (`exit()`)."""


class Recorder(Protocol):
    """Who is told what happens. Indices are positions among the executed notebook's cells."""

    def opened(self, nb: NotebookNode) -> None: ...
    def kernel_started(self, pid: int) -> None: ...
    def cell_began(self, index: int) -> None: ...
    def cell_ended(self, index: int, ok: bool) -> None: ...
    def output_cut(self, index: int, limit: int) -> None: ...
    def kernel_lost(self, exit_code: int | None) -> None: ...
    def closed(self) -> None: ...


class SlicedShellChannel(AsyncZMQSocketChannel):
    """A channel on which a message that arrives during a send is seen within `SLICE` seconds."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        end = None if timeout is None else monotonic() + timeout
        while True:
            left = SLICE if end is None else min(SLICE, max(0.0, end - monotonic()))
            try:
                return await super().get_msg(timeout=left)
            except Empty:
                if end is not None and monotonic() >= end:
                    raise


class SlicedKernelClient(AsyncKernelClient):
    shell_channel_class = Type(SlicedShellChannel)


class PrivateKernelManager(AsyncKernelManager):
    """Starts kernels whose sockets lie in a private folder, `CourseClient.scratch`."""

    client_class = f"{__name__}.SlicedKernelClient"
    client_factory = Type(SlicedKernelClient, klass=AsyncKernelClient)


class CourseClient(PapermillNotebookClient):
    """papermill's notebook client, with private sockets, a second start and bounded output."""

    kernel_manager_class = Type(PrivateKernelManager)

    def __init__(
        self, nb_man: NotebookExecutionManager, *, recorder: Recorder, scratch: Path, **options: Any
    ) -> None:
        super().__init__(nb_man, **options)
        self.recorder = recorder
        self.scratch = scratch
        self.starts = 0
        self.printed: dict[int, int] = {}
        self.on_cell_execute = self._began
        self.on_cell_executed = self._ended

    # ── the kernel ───────────────────────────────────────────────────────────────────────────────

    def create_kernel_manager(self) -> AsyncKernelManager:
        km = super().create_kernel_manager()
        self.starts += 1
        stem = self.scratch / f"kernel{self.starts}"
        if hasattr(signal, "SIGKILL") and len(f"{stem}-ipc-5") < UNIX_SOCKET_PATH_LIMIT:
            km.transport = "ipc"
            km.ip = f"{stem}-ipc"
        km.connection_file = f"{stem}.json"
        return km

    @contextmanager
    def setup_kernel(self, **kwargs: Any) -> Generator[None, None, None]:
        with ExitStack() as running:
            try:
                running.enter_context(super().setup_kernel(**kwargs))
            except NoSuchKernel as error:
                raise KernelStartError(_no_such_kernel(error.name)) from error
            except (RuntimeError, OSError) as first:
                self.km = None
                try:
                    running.enter_context(super().setup_kernel(**kwargs))
                except (RuntimeError, OSError) as second:
                    raise KernelStartError(f"its kernel did not start, twice: {second}") from first
            self.recorder.kernel_started(self._kernel_process().pid)
            try:
                yield
            except BaseException:
                self.recorder.kernel_lost(self._kernel_process().poll())
                self.shutdown_kernel = "immediate"  # what failed need not be asked politely to end
                raise

    def _kernel_process(self) -> Any:
        assert self.km is not None
        assert self.km.provisioner is not None
        return self.km.provisioner.process  # type: ignore[attr-defined]

    # ── the cells ────────────────────────────────────────────────────────────────────────────────

    def _began(self, cell: NotebookNode, cell_index: int) -> None:
        self.recorder.cell_began(cell_index)

    def _ended(self, cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        reply = execute_reply["content"]
        expected = "raises-exception" in cell.metadata.get("tags", [])
        left = any(part.get("source") == "ask_exit" for part in reply.get("payload") or [])
        self.recorder.cell_ended(cell_index, ok=not left and (reply["status"] == "ok" or expected))
        if left:
            raise KernelExitError("it called exit(), which ends the kernel; later cells cannot run")

    def output(
        self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> NotebookNode | None:
        """Keep an output, joined to the one before when both are pieces of the same stream."""
        content = msg["content"]
        room = OUTPUT_LIMIT - self.printed.get(cell_index, 0)
        size = _size(content)
        self.printed[cell_index] = self.printed.get(cell_index, 0) + size
        if size > room:
            if room >= 0:  # the first output too many; what is on its way when the interrupt lands has none
                self.recorder.output_cut(cell_index, OUTPUT_LIMIT)
                os.kill(self._kernel_process().pid, signal.SIGINT)
            if room <= 0 or msg["msg_type"] != "stream":
                return None
            content["text"] = content["text"][:room]
        out = super().output(outs, msg, display_id, cell_index)
        if out is not None and len(outs) > 1 and out["output_type"] == "stream":
            last = outs[-2]
            if last["output_type"] == "stream" and last["name"] == out["name"]:
                last["text"] += outs.pop()["text"]
                return last
        return out


class CourseEngine(NBClientEngine):
    """`papermill.execute_notebook(…, engine_name=ENGINE, recorder=…, scratch=…)`."""

    client: ClassVar[type[CourseClient]] = CourseClient

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: NotebookExecutionManager,
        kernel_name: str,
        *,
        recorder: Recorder,
        scratch: Path,
        start_timeout: float = 60,
        **unused: Any,
    ) -> NotebookNode:
        recorder.opened(nb_man.nb)
        client = cls.client(
            nb_man,
            recorder=recorder,
            scratch=scratch,
            kernel_name=kernel_name,
            startup_timeout=int(start_timeout),
            iopub_timeout=30,  # on a busy machine the last output can lag seconds behind the reply
            record_timing=False,
        )
        try:
            return client.execute()
        finally:
            recorder.closed()


def register() -> None:
    """Make the engine known to papermill in this process."""
    papermill_engines.register(ENGINE, CourseEngine)


def _size(content: dict[str, Any]) -> int:
    """Characters in an output message, near enough."""
    return sum(
        len(value) if isinstance(value, str) else _size(value) if isinstance(value, dict) else 0
        for value in content.values()
    )


def _no_such_kernel(name: str) -> str:
    from jupyter_client.kernelspec import KernelSpecManager

    known = ", ".join(sorted(KernelSpecManager().find_kernel_specs())) or "none"
    return f"there is no kernel called {name!r} on this machine (there is: {known})"


ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def plain(text: str) -> str:
    """Text without terminal colours."""
    return ANSI.sub("", text)
