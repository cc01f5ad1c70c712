"""The calls of a stream program: what the host says, in order.

Sizes are bytes and times are microseconds. `reads` and `writes` name the buffers that a call touches; two
calls that touch one buffer, one of them writing, must be ordered by a stream, an event or a
synchronisation, or the program has a race (see `order`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

KB, MB = 1 << 10, 1 << 20

Direction = Literal["h2d", "d2h", "d2d"]
StreamKind = Literal["legacy", "blocking", "non-blocking"]


@dataclass(frozen=True)
class Stream:
    """A queue of device work, done in the order in which the host put it there.

    kind   legacy        the default stream: it and every blocking stream wait for each other
           blocking      what cudaStreamCreate makes
           non-blocking  what torch.cuda.Stream makes: it knows nothing of the default stream
    """

    name: str
    kind: StreamKind = "non-blocking"


@dataclass(frozen=True)
class Event:
    """A point in a stream, which other streams and the host can wait for."""

    name: str


@dataclass(frozen=True)
class Copy:
    """A transfer. From or to pageable memory it goes through the driver's pinned staging buffer.

    wait   the host waits for the copy (torch's `non_blocking=False`)
    """

    name: str
    nbytes: int
    direction: Direction
    stream: Stream
    pinned: bool = True
    wait: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel whose blocks each run for `us`.

    share   block slots it needs, as a fraction of those that the GPU has: 0.25 leaves room for three
            others, 1 fills the GPU, 2.5 runs in three waves
    """

    name: str
    us: float
    stream: Stream
    share: float = 1.0
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The event happens when the stream has done what it was given before this call."""

    event: Event
    stream: Stream

    @property
    def name(self) -> str:
        return f"record {self.event.name}"


@dataclass(frozen=True)
class Wait:
    """What the stream is given after this call waits for the event. The host does not wait."""

    event: Event
    stream: Stream

    @property
    def name(self) -> str:
        return f"wait {self.event.name}"


@dataclass(frozen=True)
class Synchronize:
    """The host waits for a stream, for an event, or (None) for the whole device."""

    target: Stream | Event | None = None

    @property
    def name(self) -> str:
        return f"synchronize {self.target.name if self.target else 'device'}"


@dataclass(frozen=True)
class Host:
    """Work of the host's own: the launching thread can launch nothing meanwhile."""

    name: str
    us: float
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(eq=False)
class Graph:
    """Calls recorded once, to be launched together. `origin` is the stream that was captured."""

    name: str
    origin: Stream
    calls: list[Copy | Kernel | Record | Wait] = field(default_factory=list, repr=False)

    @property
    def nodes(self) -> int:
        """Copies and kernels: events become edges of the graph and cost nothing to launch."""
        return sum(isinstance(c, Copy | Kernel) for c in self.calls)


@dataclass(frozen=True)
class Launch:
    """One call that starts all work of a graph, in order with its stream's other work."""

    graph: Graph
    stream: Stream

    @property
    def name(self) -> str:
        return self.graph.name


Call = Copy | Kernel | Record | Wait | Synchronize | Host | Launch
