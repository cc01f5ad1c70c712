"""Which work comes before which: the order that streams, events and synchronisations establish.

A program becomes a list of tasks in host order. A task names the tasks that must have ended before it
starts; the rules are CUDA's (CUDA C++ Programming Guide, "Asynchronous Concurrent Execution"; CUDA Runtime
API, "API synchronization behavior" and "Stream synchronization behavior"):

- a stream does its work in order;
- the legacy default stream starts when all work given to blocking streams before it has ended, and
  blocking streams start nothing given after it until it has ended; non-blocking streams ignore it;
- a wait holds its stream until the event's latest record has been reached; an event never recorded
  holds nothing;
- the host goes on at once, but for synchronisations and for copies that make it wait:
  a pageable copy to the device waits for its stream and returns when its last piece is staged (a small one
  is staged at once, and waits for nothing); a pageable copy to the host returns when it has ended.

The order says nothing about time (that is `simulate`), but it decides whether a program is right: two
calls that touch one buffer, one of them writing, need an order between them (`races`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcourse.streams.calls import (
    KB,
    Call,
    Copy,
    Event,
    Graph,
    Host,
    Kernel,
    Launch,
    Record,
    Stream,
    Synchronize,
    Wait,
)
from llmcourse.streams.faults import ProgramError, StreamRace

if TYPE_CHECKING:
    from llmcourse.streams.program import Program

STAGED_AT_ONCE = 64 * KB  # promised by CUDA; drivers take more (see `Costs.staged`)


@dataclass(frozen=True)
class Task:
    """One piece of work, of the device or of the host.

    call     what asked for it
    after    tasks that must have ended before it starts, by index
    before   tasks that the host waits for before it makes the call
    holds    the host waits for this task after the call
    graph    the launch it belongs to (its index among the calls), or None
    first    the first task of its call: the call's cost on the host is paid with it
    """

    index: int
    call: Call
    stream: Stream | None
    after: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    holds: bool = False
    graph: int | None = None
    first: bool = True

    @property
    def on_device(self) -> bool:
        return self.stream is not None


def lower(program: Program, staged: int = STAGED_AT_ONCE) -> list[Task]:
    """The program's tasks, in host order. `staged`: pageable bytes that the driver takes over at once."""
    return _Lowering(staged).run(program.ended())


class _Lowering:
    """Walks the calls once, keeping the last task of every stream and of every event."""

    def __init__(self, staged: int = STAGED_AT_ONCE) -> None:
        self.staged = staged
        self.tasks: list[Task] = []
        self.last: dict[Stream, int] = {}
        self.events: dict[Event, int] = {}

    def run(self, calls: list[Call]) -> list[Task]:
        for number, call in enumerate(calls):
            match call:
                case Host():
                    self.add(call, None)
                case Synchronize():
                    self.add(call, None, before=self.waited_for(call))
                case Launch():
                    self.launch(call, number)
                case _:
                    self.device(call, call.stream)
        return self.tasks

    def add(self, call: Call, stream: Stream | None, **fields: object) -> int:
        self.tasks.append(Task(len(self.tasks), call, stream, **fields))  # type: ignore[arg-type]
        return len(self.tasks) - 1

    def device(self, call: Copy | Kernel | Record | Wait, stream: Stream) -> None:
        after = self.order_with(stream)
        if isinstance(call, Wait) and call.event in self.events:
            after = (*after, self.events[call.event])
        before: tuple[int, ...] = ()
        holds = False
        if isinstance(call, Copy):
            staged = not call.pinned and call.direction == "h2d" and call.nbytes > self.staged
            before = after if staged else ()
            holds = call.wait or staged or (not call.pinned and call.direction == "d2h")
        self.last[stream] = index = self.add(call, stream, after=after, before=before, holds=holds)
        if isinstance(call, Record):
            self.events[call.event] = index

    def order_with(self, stream: Stream) -> tuple[int, ...]:
        """The last tasks that work put in `stream` now must come after."""
        found = [self.last[stream]] if stream in self.last else []
        for other, task in self.last.items():
            legacy = "legacy" in (stream.kind, other.kind)
            if other != stream and legacy and "non-blocking" not in (stream.kind, other.kind):
                found.append(task)
        return tuple(found)

    def waited_for(self, call: Synchronize) -> tuple[int, ...]:
        if call.target is None:
            return tuple(self.last.values())
        if isinstance(call.target, Stream):
            return (self.last[call.target],) if call.target in self.last else ()
        return (self.events[call.target],) if call.target in self.events else ()

    def launch(self, call: Launch, number: int) -> None:
        """A graph's tasks come after what its stream holds, and the stream goes on after the last of them."""
        outer, streams, events = self.order_with(call.stream), self.last, self.events
        self.last, self.events = {}, {}
        first = len(self.tasks)
        for inner in call.graph.calls:
            after = tuple(self.last[s] for s in (inner.stream,) if s in self.last)
            if isinstance(inner, Wait):
                after = (*after, self.events[inner.event])
            after = after or outer
            self.last[inner.stream] = index = self.add(
                inner, inner.stream, after=after, graph=number, first=len(self.tasks) == first
            )
            if isinstance(inner, Record):
                self.events[inner.event] = index
        end = self.last.get(call.graph.origin)
        self.last, self.events = streams, events
        if end is not None:
            self.last[call.stream] = end


def ancestors(tasks: list[Task]) -> list[int]:
    """For each task, a bit set of the tasks that are certain to have ended before it starts.

    What the host does is a chain: every call comes after the calls before it, and after what they waited
    for. Work put in a stream comes after all that the host had waited for by then.
    """
    known = [0] * len(tasks)
    host = 0  # what the host knows to have ended
    for task in tasks:
        for i in task.before:
            host |= known[i] | 1 << i
        known[task.index] = host
        for i in task.after:
            known[task.index] |= known[i] | 1 << i
        if not task.on_device:
            host |= 1 << task.index
        if task.holds and not _staged(task.call):
            host |= known[task.index] | 1 << task.index
    return known


def _staged(call: Call) -> bool:
    """A pageable copy to the device: CUDA promises that the source has been read, not that it has arrived."""
    return isinstance(call, Copy) and not call.pinned and not call.wait and call.direction == "h2d"


def races(program: Program) -> list[StreamRace]:
    """Pairs of calls that touch one buffer in no certain order, one of them writing it."""
    tasks = lower(program)
    known = ancestors(tasks)
    users: dict[str, list[tuple[int, bool]]] = {}
    found = []
    for task in tasks:
        call = task.call
        if not isinstance(call, Copy | Kernel | Host):
            continue
        for name in dict.fromkeys((*call.reads, *call.writes)):
            writes = name in call.writes
            for other, wrote in users.get(name, ()):
                if _staged(tasks[other].call) and not wrote:
                    continue  # read before the call returned
                if (writes or wrote) and not known[task.index] >> other & 1:
                    found.append(_race(tasks[other], task, name, wrote, writes))
            users.setdefault(name, []).append((task.index, writes))
    return found


def _race(first: Task, second: Task, name: str, wrote: bool, writes: bool) -> StreamRace:
    sides = [
        f"{t.call.name!r} ({t.stream.name if t.stream else 'host'}) {'writes' if w else 'reads'}"
        for t, w in ((first, wrote), (second, writes))
    ]
    return StreamRace(
        f"{sides[0]} {name!r}, and {sides[1]} it.",
        "Neither a stream, nor an event, nor a synchronisation says which comes first.",
        f"an event recorded after {first.call.name!r}, waited for before {second.call.name!r}.",
    )


def check_capture(graph: Graph) -> None:
    """Captured streams are forked from the origin by an event, and joined to it before the capture ends.

    Raises ProgramError.
    """
    lowering = _Lowering()
    joined = {graph.origin}
    for call in graph.calls:
        if isinstance(call, Wait):
            if call.event not in lowering.events:
                raise ProgramError(
                    f"{call.name!r} stands in the capture of {graph.name!r}, and the event outside it.",
                    "A graph's work depends on nothing but its own nodes and the stream it is launched in.",
                    f"recording the event inside, or p.wait before the launch of {graph.name!r}.",
                )
            joined.add(call.stream)
        elif call.stream not in joined:
            raise ProgramError(
                f"{call.name!r} in stream {call.stream.name!r} is no part of the graph {graph.name!r}.",
                f"Only {graph.origin.name!r} is captured, and streams that wait for an event of it.",
                f"e = p.record({graph.origin.name}); p.wait(e, {call.stream.name}) before it.",
            )
        lowering.device(call, call.stream)
    tasks = lowering.tasks
    if not tasks:
        return
    known = ancestors(tasks)
    end = lowering.last.get(graph.origin, 0)
    done = known[end] | 1 << end
    for task in tasks:
        if isinstance(task.call, Copy | Kernel) and not done >> task.index & 1:
            assert task.stream is not None
            raise ProgramError(
                f"the capture of {graph.name!r} ends with {task.call.name!r} that nothing waits for.",
                "Whoever waits for the graph waits for its first stream, and must find all its work done.",
                f"e = p.record({task.stream.name}); p.wait(e, {graph.origin.name}) at the capture's end.",
            )
