"""`Program`: what a host thread tells a GPU, written once, then simulated or run for real.

    p = Program("two chunks")
    a, b = p.stream("a"), p.stream("b")
    for i, s in enumerate((a, b)):
        p.copy(f"in {i}", 8 * MB, "h2d", stream=s)
        p.kernel(f"work {i}", us=300, stream=s)
    p.synchronize()

    p.simulate()      # a Timeline, predicted from the constants of a device
    p.run()           # the same calls through torch.cuda: a Timeline, measured

Calls are kept in the order in which the host makes them. Every name of CUDA has its counterpart here:
`copy` is cudaMemcpyAsync, `kernel` a launch, `record` and `wait` are cudaEventRecord and
cudaStreamWaitEvent, `capture` and `launch` are stream capture and cudaGraphLaunch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmcourse.streams.calls import (
    Call,
    Copy,
    Direction,
    Event,
    Graph,
    Host,
    Kernel,
    Launch,
    Record,
    Stream,
    StreamKind,
    Synchronize,
    Wait,
)
from llmcourse.streams.faults import ProgramError
from llmcourse.streams.order import check_capture

if TYPE_CHECKING:
    from llmcourse.streams.costs import Costs
    from llmcourse.streams.timeline import Timeline

Names = tuple[str, ...] | list[str] | str


class Program:
    """Calls in host order. Every stream and event belongs to the program that made it."""

    def __init__(self, name: str = "program") -> None:
        self.name = name
        self.default = Stream("default", "legacy")
        self.streams: list[Stream] = [self.default]
        self.calls: list[Call] = []
        self._events = 0
        self._capturing: Stream | None = None

    # ------------------------------------------------------------ streams and events

    def stream(self, name: str | None = None, kind: StreamKind = "non-blocking") -> Stream:
        """A new stream. `kind` non-blocking is torch.cuda.Stream, blocking is cudaStreamCreate."""
        stream = Stream(name or f"stream {len(self.streams)}", kind)
        if any(s.name == stream.name for s in self.streams):
            raise ProgramError(
                f"there is a stream {stream.name!r} already.",
                "A timeline has one row a stream, found by its name.",
                "another name.",
            )
        self.streams.append(stream)
        return stream

    def record(self, stream: Stream | None = None, name: str | None = None) -> Event:
        """An event that happens when `stream` (None: the default) has done all it was given so far."""
        event = Event(name or f"event {self._events}")
        self._events += 1
        self._add(Record(event, self._own(stream)))
        return event

    def wait(self, event: Event, stream: Stream | None = None) -> None:
        """`stream` starts nothing that comes after this call before `event`. The host goes on."""
        self._add(Wait(event, self._own(stream)))

    def synchronize(self, target: Stream | Event | None = None) -> None:
        """The host waits for a stream, an event, or the whole device."""
        if self._capturing:
            raise ProgramError(
                "synchronize was called during a capture.",
                "Nothing runs while a graph is captured, so there is nothing that the host could wait for.",
                "synchronize after launch, or p.wait, which orders streams without the host.",
            )
        self.calls.append(Synchronize(target))

    # ------------------------------------------------------------ work

    def copy(
        self,
        name: str,
        nbytes: int,
        direction: Direction,
        *,
        stream: Stream | None = None,
        pinned: bool = True,
        wait: bool = False,
        reads: Names = (),
        writes: Names = (),
    ) -> None:
        """Transfer `nbytes`: h2d (host to device), d2h or d2d. `pinned` speaks of the host's memory."""
        if nbytes < 1 or direction not in ("h2d", "d2h", "d2d"):
            raise ProgramError(
                f"{name!r} copies {nbytes} bytes {direction!r}.",
                "A copy moves one byte or more between host and device, or within the device.",
                "nbytes >= 1 and direction 'h2d', 'd2h' or 'd2d'.",
            )
        if self._capturing and (wait or not pinned):
            raise ProgramError(
                f"{name!r} makes the host wait, during a capture.",
                "A pageable copy goes through the host, and a graph runs without it.",
                "pinned=True and wait=False.",
            )
        self._add(
            Copy(name, int(nbytes), direction, self._own(stream), pinned, wait, _names(reads), _names(writes))
        )

    def kernel(
        self,
        name: str,
        us: float,
        *,
        stream: Stream | None = None,
        share: float = 1.0,
        reads: Names = (),
        writes: Names = (),
    ) -> None:
        """Launch a kernel whose blocks each run `us` microseconds on `share` of the GPU's block slots."""
        if us < 0 or share <= 0:
            raise ProgramError(
                f"{name!r} runs {us} µs on {share:g} of the GPU.",
                "A kernel takes no negative time, and has at least one block.",
                "us >= 0 and share > 0.",
            )
        self._add(Kernel(name, us, self._own(stream), share, _names(reads), _names(writes)))

    def host(self, name: str, us: float, *, reads: Names = (), writes: Names = ()) -> None:
        """The host works for `us` microseconds before it makes its next call."""
        if self._capturing:
            raise ProgramError(
                f"host work {name!r} stands in a capture.",
                "It would run once, while the graph is captured, and in no replay.",
                "doing it before launch, into memory that the graph reads.",
            )
        self.calls.append(Host(name, us, _names(reads), _names(writes)))

    # ------------------------------------------------------------ graphs

    @contextmanager
    def capture(self, name: str = "graph", *, stream: Stream | None = None) -> Iterator[Graph]:
        """Record what is put in `stream`, and in streams forked from it by events, without running it.

        with p.capture("step", stream=s) as step:
            p.kernel("a", us=2, stream=s)
        p.launch(step, stream=s)
        """
        if self._capturing:
            raise ProgramError(
                f"{name!r} is captured inside another capture.",
                "A stream records one graph at a time.",
                "ending the first capture before.",
            )
        origin = self._own(stream)
        if origin.kind == "legacy":
            raise ProgramError(
                "the default stream cannot be captured.",
                "Every blocking stream waits for it, and a graph has no order with streams outside.",
                "stream=p.stream().",
            )
        outside, self.calls, self._capturing = self.calls, [], origin
        graph = Graph(name, origin)
        try:
            yield graph
            graph.calls = [c for c in self.calls if isinstance(c, Copy | Kernel | Record | Wait)]
        finally:
            self.calls, self._capturing = outside, None
        check_capture(graph)

    def launch(self, graph: Graph, *, stream: Stream | None = None) -> None:
        """Start all of `graph`'s work by one call, in order with the rest of `stream`."""
        if self._capturing:
            raise ProgramError(
                f"{graph.name!r} is launched during a capture.",
                "Graphs in graphs are left out here.",
                "launching it after the capture.",
            )
        self.calls.append(Launch(graph, self._own(stream)))

    # ------------------------------------------------------------ results

    def ended(self) -> list[Call]:
        """The calls, ending with a device synchronisation: a makespan needs an end that the host sees."""
        last = self.calls[-1] if self.calls else None
        closed = isinstance(last, Synchronize) and last.target is None
        return self.calls if closed else [*self.calls, Synchronize()]

    def simulate(self, costs: Costs | str | None = None) -> Timeline:
        """The timeline by the rules of streams and the constants of a device (None: a recorded H100)."""
        from llmcourse.streams.simulate import simulate

        return simulate(self, costs)

    def run(self, *, repeats: int = 20) -> Timeline:
        """Run the calls on this machine's GPU and measure. Raises DeviceError where there is none."""
        from llmcourse.streams.native import run

        return run(self, repeats=repeats)

    def text(self) -> str:
        """The calls, one a line: what a reader compares, and what a record is checked against."""
        return "\n".join(_lines(self.ended()))

    def _own(self, stream: Stream | None) -> Stream:
        if stream is None:
            stream = self._capturing or self.default
        if stream not in self.streams:
            raise ProgramError(
                f"stream {stream.name!r} was made by another program.",
                "Streams order calls within one program.",
                "stream=p.stream(...) of this one.",
            )
        return stream

    def _add(self, call: Call) -> None:
        self.calls.append(call)


def _lines(calls: Sequence[Call], indent: str = "") -> Iterator[str]:
    shown: set[Graph] = set()
    for call in calls:
        where = f" [{call.stream.name}]" if hasattr(call, "stream") else ""
        match call:
            case Copy():
                memory = "" if call.direction == "d2d" else " pinned" if call.pinned else " pageable"
                yield f"{indent}copy {call.name}: {call.nbytes} B {call.direction}{memory}" + (
                    " and wait" * call.wait + where
                )
            case Kernel():
                yield f"{indent}kernel {call.name}: {call.us:g} µs × {call.share:g}{where}"
            case Host():
                yield f"{indent}host {call.name}: {call.us:g} µs"
            case Launch():
                yield f"{indent}launch {call.name}: {call.graph.nodes} nodes{where}"
                if call.graph not in shown:
                    shown.add(call.graph)
                    yield from _lines(call.graph.calls, indent + "  ")
            case _:
                yield f"{indent}{call.name}{where}"


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
