"""The same run on an existing Ray cluster: `llmcourse run --cluster ADDRESS`.

The driver, this process, sends a notebook's text to whichever node has a core free; a task there runs
the same `execute` as a local run, and sends back what happens, and then the executed copy.

**What travels** is the package (see `connect`) and the notebook's text. Its kernel works in a fresh
folder of its node: files that lie beside the notebook stay behind.

**What can die.** A task whose node or process is lost is run once more, on another node if it was the
node that died. A notebook that fails by itself is not repeated: it would fail again.
"""

from __future__ import annotations

import importlib
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from llmcourse.errors import DeviceError
from llmcourse.files import write_whole
from llmcourse.runner.connect import node_lost_errors
from llmcourse.runner.discover import Notebook, refuse_to_overwrite
from llmcourse.runner.outcome import CellError, Event, Outcome
from llmcourse.runner.pool import Stopped, not_run
from llmcourse.runner.supervise import execute

ATTEMPTS = 2
POLL = 0.3
LOOK_AT_NODES_EVERY = 5.0


# ── on a node ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """What a task needs to run one notebook. It must be sent, so it holds no paths of the driver."""

    name: str
    text: str
    parameters: Mapping[str, Any]
    cell_timeout: float
    attempt: int


def run_job(job: Job, log: Any) -> tuple[dict[str, Any], str | None]:
    """Run in a task: execute a notebook here, tell `log` what happens, return outcome and executed copy."""
    import ray

    node = f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"

    def tell(event: Event) -> None:
        if event.kind == "started":
            event = replace(event, message=node)
        if event.kind != "finished":  # the driver says so, when it has the executed copy
            log.add.remote(asdict(event))

    with tempfile.TemporaryDirectory(prefix="llmcourse-") as folder:
        source = Path(folder) / f"{job.name}.ipynb"
        source.write_text(job.text, encoding="utf-8")
        outcome = execute(
            source,
            Path(folder) / "out",
            parameters=job.parameters,
            cell_timeout=job.cell_timeout,
            on_event=tell,
        )
        executed = outcome.executed_path.read_text(encoding="utf-8") if outcome.executed_path else None
    return replace(outcome, executed_path=None, node=node, attempts=job.attempt).as_dict(), executed


class EventLog:
    """An actor that tasks tell what happens, and that the driver asks."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


# ── on the driver ────────────────────────────────────────────────────────────────────────────────


def run_on_cluster(
    notebooks: Sequence[Notebook],
    *,
    parameters: Mapping[str, Any],
    jobs: int | None = None,
    cell_timeout: float = 120.0,
    out: Path,
    on_event: Callable[[Event], None] | None = None,
) -> list[Outcome]:
    """Like `pool.run_here`, on the cluster that `connect` has joined.

    `jobs` bounds how many notebooks are under way at once (default: as many as the cluster takes).
    Each asks for one core and the memory it expects; with device="cuda", for one GPU.
    """
    return _Driver(
        notebooks, dict(parameters), jobs, cell_timeout, out, on_event or (lambda event: None)
    ).run()


class _Driver:
    def __init__(
        self,
        notebooks: Sequence[Notebook],
        parameters: dict[str, Any],
        jobs: int | None,
        cell_timeout: float,
        out: Path,
        on_event: Callable[[Event], None],
    ) -> None:
        ray: Any = importlib.import_module("ray")
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.ray = ray
        self.notebooks, self.parameters, self.cell_timeout = notebooks, parameters, cell_timeout
        self.out, self.on_event = out.resolve(), on_event
        self.out.mkdir(parents=True, exist_ok=True)
        refuse_to_overwrite((notebook.path for notebook in notebooks), out)
        for notebook in notebooks:  # a copy of an earlier run must not speak for this one
            (self.out / f"{notebook.name}.ipynb").unlink(missing_ok=True)
        self.limit = jobs or len(notebooks)
        self.gpus = 1 if parameters.get("device") == "cuda" else 0
        self.outcomes: dict[int, Outcome] = {}
        self.waiting = deque((index, 1) for index in range(len(notebooks)))
        self.running: dict[Any, tuple[int, int]] = {}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.log = ray.remote(num_cpus=0, scheduling_strategy=here)(EventLog).remote()
        self.task = ray.remote(max_retries=0, scheduling_strategy="SPREAD", num_gpus=self.gpus)(run_job)

    def run(self) -> list[Outcome]:
        if not self._nodes():
            needed = "a core and a GPU" if self.gpus else "a core"
            raise DeviceError(
                f"no node of the cluster has {needed} to give.",
                f"Each notebook takes {needed}.",
                "`ray status` to see what the nodes offer" + (", or --device cpu." if self.gpus else "."),
            )
        looked = monotonic()
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.limit:
                    self._submit(*self.waiting.popleft())
                done, _ = self.ray.wait(list(self.running), timeout=POLL)
                self._tell_events()
                for ref in done:
                    self._collect(ref, *self.running.pop(ref))
                if monotonic() - looked > LOOK_AT_NODES_EVERY:
                    looked = monotonic()
                    if not self._nodes():
                        self._give_up()
        except KeyboardInterrupt:
            for ref in self.running:
                self.ray.cancel(ref)
            raise Stopped(
                [self.outcomes.get(i) or not_run(notebook) for i, notebook in enumerate(self.notebooks)]
            ) from None
        return [self.outcomes[i] for i in range(len(self.notebooks))]

    def _nodes(self) -> list[dict[str, float]]:
        """What each living node that could take a notebook offers."""
        offers = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [o for o in offers if o.get("CPU", 0) >= 1 and o.get("GPU", 0) >= self.gpus]

    def _submit(self, index: int, attempt: int) -> None:
        notebook = self.notebooks[index]
        text = notebook.path.read_text(encoding="utf-8")
        job = Job(notebook.name, text, self.parameters, self.cell_timeout, attempt)
        # A demand that no node can ever meet would wait for ever: ask for no more than the largest has.
        largest = max((offer.get("memory", 0) for offer in self._nodes()), default=0)
        memory = int(min(notebook.memory_mb * 1e6, largest))
        self.running[self.task.options(memory=memory).remote(job, self.log)] = index, attempt

    def _collect(self, ref: Any, index: int, attempt: int) -> None:
        notebook = self.notebooks[index]
        try:
            plain, text = self.ray.get(ref)
        except node_lost_errors() as error:
            reason = f"its node was lost ({type(error).__name__})"
            if attempt < ATTEMPTS and self._nodes():
                self.on_event(Event("note", notebook.name, message=f"{reason}; running it once more"))
                self.waiting.appendleft((index, attempt + 1))
            else:
                times = f" {attempt} times" if attempt > 1 else ""
                self._finish(index, _failed(notebook, f"{reason}{times}", attempt))
            return
        except self.ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()
            self._finish(
                index, _failed(notebook, f"{type(error).__name__}: {said[-1] if said else ''}", attempt)
            )
            return
        outcome = Outcome.from_dict(plain)
        if text is not None:
            try:
                outcome = replace(outcome, executed_path=self._keep(notebook.name, text))
            except OSError as error:
                outcome = _failed(notebook, f"its executed copy could not be written: {error}", attempt)
        self._finish(index, outcome)

    def _keep(self, name: str, text: str) -> Path:
        path = self.out / f"{name}.ipynb"
        write_whole(path, text)
        return path

    def _finish(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self._tell_events()
        message = str(outcome.error or "")
        self.on_event(
            Event("finished", outcome.name, ok=outcome.ok, seconds=outcome.seconds, message=message)
        )

    def _tell_events(self) -> None:
        try:
            events = self.ray.get(self.log.drain.remote(), timeout=5)
        except self.ray.exceptions.RayError:
            return  # progress is lost, results are not
        for event in events:
            self.on_event(Event(**event))

    def _give_up(self) -> None:
        for ref, (index, attempt) in list(self.running.items()):
            self.ray.cancel(ref)
            del self.running[ref]
            self._finish(index, _failed(self.notebooks[index], "no node is left that could run it", attempt))
        while self.waiting:
            index, attempt = self.waiting.popleft()
            self._finish(index, _failed(self.notebooks[index], "no node is left that could run it", attempt))


def _failed(notebook: Notebook, message: str, attempts: int) -> Outcome:
    return Outcome(notebook.name, False, 0.0, error=CellError("worker", message), attempts=attempts)
