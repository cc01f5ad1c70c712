"""The event-driven simulator: a program's timeline by the rules of streams and the costs of a device.

The host makes its calls one after the other, each taking its time; what a call puts in a stream can start
once the call has returned, what comes before it has ended (`order`), and the engine it needs has room
(`engines`). The host stops only where the rules say that it waits.

Every start has one last reason: a task that ended, an engine that became free, or the host's call. Followed
backwards from the end, these reasons are the critical path: shortening anything else changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmcourse.streams.calls import Call, Copy, Host, Kernel, Record, Synchronize, Wait
from llmcourse.streams.costs import Costs
from llmcourse.streams.engines import Device, Reason
from llmcourse.streams.order import Task, lower
from llmcourse.streams.program import Program
from llmcourse.streams.timeline import HOST, Span, Timeline


def simulate(
    program: Program, costs: Costs | str | None = None, *, host_us: Sequence[float] | None = None
) -> Timeline:
    """The program's timeline. `costs`: constants, or the name of a recorded device (None: H100).

    host_us   what each call took on a real host, to be used where the costs would say; a call that waited
              (`waits`) is simulated still
    """
    if not isinstance(costs, Costs):
        costs = Costs.of(costs or "H100")
    return _Simulation(program, costs, host_us).run()


def waits(call: Call) -> bool:
    """Whether the call's time on the host depends on what the device does."""
    return isinstance(call, Synchronize) or (
        isinstance(call, Copy) and call.direction != "d2d" and (call.wait or not call.pinned)
    )


class _Simulation:
    def __init__(self, program: Program, costs: Costs, host_us: Sequence[float] | None = None) -> None:
        self.program, self.costs = program, costs
        self.calls, self.tasks = program.ended(), lower(program, costs.staged)
        self.device = Device(costs, program.streams)
        self.time = 0.0
        self.host_us = host_us
        self.spans: list[Span] = []
        self.call = -1
        self.calls_of: list[int] = []  # the call's number of each task
        self.entered_after: dict[int, int] = {}  # the task that a call waited for before it did its work
        self.returned_after: dict[int, int] = {}  # the task that it waited for afterwards

    def run(self) -> Timeline:
        for task in self.tasks:
            self.host(task) if not task.on_device else self.submit(task)
        self.device.advance(float("inf"))
        device_spans = [
            Span(
                task.call.name,
                task.stream.name if task.stream else HOST,
                task.call.direction if isinstance(task.call, Copy) else "sm",
                *self.device.spans[task.index],
                self.calls_of[task.index],
                min(1.0, task.call.share) if isinstance(task.call, Kernel) else 1.0,
            )
            for task in self.tasks
            if isinstance(task.call, Copy | Kernel)
        ]
        return Timeline(
            self.program.name,
            sorted(self.spans + device_spans, key=lambda s: (s.call, s.start)),
            self.time,
            source=f"simulated: {self.costs.name}, {self.costs.source}",
            critical=self.critical_path(),
        )

    def host(self, task: Task) -> None:
        """A call that puts nothing on the device: work of the host, or a synchronisation."""
        start = self.begin(task)
        if isinstance(task.call, Host):
            self.time += self.call_us()
            self.finish(task, start, 0.0)
            return
        idle = self.call_us()
        self.time = start + idle
        self.wait_for(task.before, self.returned_after)
        self.finish(task, start, self.time - start - idle)

    def submit(self, task: Task) -> None:
        """A call that puts work on the device."""
        if task.first:
            start = self.begin(task)
            if task.before:
                self.wait_for(task.before, self.entered_after)
            room = self.device.room(task.stream)
            if room > self.time:
                self.time = room
            waits = self.time - start
            self.time += self.call_us() + self.staging(task, "h2d")
        else:
            start, waits = self.time, 0.0
            self.calls_of.append(self.call)
        self.device.advance(self.time)
        self.device.add(task, self.time + self.costs.launch, self.call)
        if task.holds:
            returned = self.time
            self.wait_for((task.index,), self.returned_after)
            waits += self.time - returned
            self.time += self.staging(task, "d2h")
        if task.first:
            self.finish(task, start, waits)

    def staging(self, task: Task, direction: str) -> float:
        """What the host itself copies: before the device's part going there, after it coming back."""
        call = task.call
        return (
            self.costs.host_copy_us(call) if isinstance(call, Copy) and call.direction == direction else 0.0
        )

    def begin(self, task: Task) -> float:
        self.call += 1
        self.calls_of.append(self.call)
        return self.time

    def call_us(self) -> float:
        """What the call that is being made takes the host, waiting left out."""
        call = self.calls[self.call]
        if self.host_us is not None and not waits(call):
            return self.host_us[self.call]
        return self.costs.call_us(call)

    def wait_for(self, tasks: tuple[int, ...], reasons: dict[int, int]) -> None:
        """The host's time goes on to the end of `tasks`, and the last of them is the reason."""
        if not tasks:
            return
        end = self.device.until(tasks) + self.costs.sync
        if end > self.time:
            self.time = end
            reasons[self.call] = max(tasks, key=lambda i: self.device.ended[i])

    def finish(self, task: Task, start: float, waits: float) -> None:
        call = self.calls[self.call]
        self.spans.append(Span(call.name, HOST, "host", start, self.time, self.call, 1.0, waits))

    def critical_path(self) -> list[tuple[int, str]]:
        """The calls whose work decides the makespan, first to last, and where: on the host or the device."""
        path: list[tuple[int, str]] = []
        at: Reason | None = ("return", self.call)
        while at is not None:
            kind, index = at
            call = self.calls_of[index] if kind == "task" else index
            step = (call, "device" if kind == "task" else HOST)
            if not path or path[-1] != step:
                path.append(step)
            if kind == "task":
                at = self.device.reasons[index]
            elif kind == "return" and call in self.returned_after:
                at = ("task", self.returned_after[call])
            elif call in self.entered_after:
                at = ("task", self.entered_after[call])
            else:
                at = ("return", call - 1) if call else None
        silent = {HOST: Synchronize, "device": Record | Wait}  # they take no time of their own
        return [
            (call, where) for call, where in reversed(path) if not isinstance(self.calls[call], silent[where])
        ]
