"""A training loop written by hand, call by call: what a prefetching loader tells the GPU.

    loop = Loop(batches=6, buffers=2)
    loop.prepare(0, 0)              # the host fills its buffer 0 with batch 0
    loop.copy(0, 0)                 # its buffer 0 to the device's buffer 0, in the stream "copies"
    arrived = loop.record("copies")
    loop.wait("compute", arrived)
    loop.step(0, 0)                 # the kernel reads the device's buffer 0, in the stream "compute"
    loop.program.simulate("H100")

The calls become a `Program`, which can be searched for races, simulated and run.
"""

from __future__ import annotations

from collections.abc import Callable

from llmcourse.streams.calls import MB, Event
from llmcourse.streams.faults import ProgramError
from llmcourse.streams.program import Program

Line = tuple[str | int | tuple[str, int], ...]


class Loop:
    """The calls of one loop over `batches` batches, with `buffers` on the host and as many on the device.

    lines   the calls made so far, in a form that does not depend on how events were called: an event is
            the stream it was recorded in, and how many copies or steps that stream then held
    """

    def __init__(
        self,
        batches: int,
        buffers: int,
        *,
        prepare_us: float = 100,
        nbytes: int = 8 * MB,
        step_us: float = 250,
        pinned: bool = True,
    ) -> None:
        self.batches, self.buffers = batches, buffers
        self.prepare_us, self.nbytes, self.step_us, self.pinned = prepare_us, nbytes, step_us, pinned
        self.program = Program(f"{batches} batches through {buffers} buffers")
        self.streams = {name: self.program.stream(name) for name in ("copies", "compute")}
        self.events: list[Event] = []
        self.marks: list[tuple[str, int]] = []  # what each event marks
        self.held = dict.fromkeys(self.streams, 0)
        self.lines: list[Line] = []

    def prepare(self, batch: int, buffer: int) -> None:
        """The host fills its buffer with a batch; it does nothing else meanwhile."""
        self._check("prepare", batch, buffer)
        self.program.host(f"prepare {batch}", self.prepare_us, writes=f"host {buffer}")
        self.lines.append(("prepare", batch, buffer))

    def copy(self, batch: int, buffer: int) -> None:
        """The host's buffer goes to the device's buffer of that number, in the stream "copies"."""
        self._check("copy", batch, buffer)
        self.program.copy(
            f"copy {batch}",
            self.nbytes,
            "h2d",
            stream=self.streams["copies"],
            pinned=self.pinned,
            reads=f"host {buffer}",
            writes=f"device {buffer}",
        )
        self.held["copies"] += 1
        self.lines.append(("copy", batch, buffer))

    def step(self, batch: int, buffer: int) -> None:
        """A kernel works on the device's buffer, in the stream "compute"."""
        self._check("step", batch, buffer)
        self.program.kernel(
            f"step {batch}", self.step_us, stream=self.streams["compute"], reads=f"device {buffer}"
        )
        self.held["compute"] += 1
        self.lines.append(("step", batch, buffer))

    def record(self, stream: str) -> int:
        """An event that happens when the stream has done all it holds now; returns the event's number."""
        name = self._stream(stream)
        self.events.append(self.program.record(self.streams[name], f"event {len(self.events)}"))
        self.marks.append((name, self.held[name]))
        return len(self.events) - 1

    def wait(self, stream: str, event: int) -> None:
        """What the stream is given after this call waits for the event. The host does not wait."""
        name, number = self._stream(stream), self._event(event)
        self.program.wait(self.events[number], self.streams[name])
        self.lines.append(("wait", name, self.marks[number]))

    def synchronize(self, event: int) -> None:
        """The host waits for the event."""
        number = self._event(event)
        self.program.synchronize(self.events[number])
        self.lines.append(("synchronize", self.marks[number]))

    @property
    def calls(self) -> tuple[Callable[..., int | None], ...]:
        """The functions that a loop is given, in the order of its arguments."""
        return self.prepare, self.copy, self.step, self.record, self.wait, self.synchronize

    def _check(self, call: str, batch: int, buffer: int) -> None:
        for what, number, count in (("batch", batch, self.batches), ("buffer", buffer, self.buffers)):
            if type(number) is not int or not 0 <= number < count:
                raise ProgramError(
                    f"{call}({batch!r}, {buffer!r}): there is no {what} {number!r}.",
                    f"There are {self.batches} batches and {self.buffers} buffers, counted from 0.",
                    "batch i in buffer i % buffers.",
                )

    def _stream(self, stream: str) -> str:
        if stream not in self.streams:
            raise ProgramError(
                f"there is no stream {stream!r}.",
                "Batches are copied in one stream and worked on in another.",
                f"one of {', '.join(map(repr, self.streams))}.",
            )
        return stream

    def _event(self, event: int) -> int:
        if type(event) is not int or not 0 <= event < len(self.events):
            raise ProgramError(
                f"there is no event {event!r}.",
                "An event exists from the call of record that returned its number.",
                "keeping what record(stream) returns.",
            )
        return event
