"""An emulated slow link: what is sent takes at least as long as it would on a network of that speed.

Worker processes of one machine exchange bytes through its memory, at gigabytes a second. To see when
compression pays, their transfers are made to last: `with link.carrying(wire)` notes how many bytes the wire
counts inside the block and, at its end, sleeps for what is left of `link.seconds(bytes)`. Nothing else is
changed, so the real bytes of the real exchange decide. It is an emulation and says so (`str(link)`): no
congestion, no packet loss, no other traffic, the same speed in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from llmcourse.errors import ShapeError


class Counting(Protocol):
    """Anything that counts what it sends: `collectives.Wire`, or a stand-in of a test."""

    @property
    def bytes_sent(self) -> Mapping[str, int] | int: ...


@dataclass(frozen=True)
class Link:
    """A worker's connection: megabits a second, and milliseconds until the first bit arrives."""

    mbit_per_s: float
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.mbit_per_s <= 0 or self.latency_ms < 0:
            raise ShapeError(
                f"a link of {self.mbit_per_s} Mbit/s and {self.latency_ms} ms.",
                "A link carries something, and nothing arrives before it was sent.",
                "Link(mbit_per_s=500, latency_ms=1).",
            )

    def seconds(self, nbytes: float, messages: int = 1) -> float:
        """How long `nbytes` take, sent as that many messages of which each waits for the one before."""
        return messages * self.latency_ms / 1e3 + nbytes * 8 / (self.mbit_per_s * 1e6)

    @contextmanager
    def carrying(self, wire: Counting, messages: int = 1) -> Iterator[None]:
        """What `wire` sends inside the block takes at least as long as on this link; the rest is slept."""
        before, began = sent(wire), time.perf_counter()
        yield
        left = began + self.seconds(sent(wire) - before, messages) - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def __str__(self) -> str:
        speed = (
            f"{self.mbit_per_s / 1e3:g} Gbit/s" if self.mbit_per_s >= 1e3 else f"{self.mbit_per_s:g} Mbit/s"
        )
        return f"emulated link of {speed}" + (f", {self.latency_ms:g} ms" if self.latency_ms else "")


@dataclass(frozen=True)
class StepTime:
    """A step's time on a link, in seconds: computing, sending, and both together."""

    compute: float
    send: float
    overlapped: bool

    @property
    def step(self) -> float:
        return max(self.compute, self.send) if self.overlapped else self.compute + self.send


def sent(wire: Counting) -> int:
    """Bytes that a wire has sent so far, whatever the call."""
    count = wire.bytes_sent
    return sum(count.values()) if isinstance(count, Mapping) else count
