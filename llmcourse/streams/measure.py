"""The constants of a real GPU and its host, each measured by a program made for it.

None of the programs that are predicted is used here: a prediction is then a prediction. Wherever the
device's own time is wanted, the work stands behind a kernel that is long enough for the host to have
launched everything meanwhile; two lengths of work, subtracted, then leave the time of the difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from llmcourse.streams.calls import KB, MB, Copy, Direction, Stream
from llmcourse.streams.costs import BEHIND_US
from llmcourse.streams.native import Native, spin
from llmcourse.streams.program import Program
from llmcourse.streams.timeline import Timeline

Row = dict[str, Any]
TINY = 0.001  # of the GPU: one block
SIZES = [4 * KB, 16 * KB, 64 * KB, 128 * KB, 256 * KB, 1 * MB, 4 * MB, 8 * MB, 16 * MB, 64 * MB]


def timed(build: Callable[..., object], repeats: int = 20, **chosen: Any) -> Timeline:
    """Run the program that `build(program, **chosen)` fills."""
    p = Program()
    build(p, **chosen)
    return Native(p).times(repeats)


def makespan(build: Callable[..., object], repeats: int = 20, **chosen: Any) -> float:
    """Median makespan of that program, µs."""
    return timed(build, repeats, **chosen).makespan_us


def one_kernel(p: Program, us: float, share: float = TINY) -> None:
    p.kernel("k", us, stream=p.stream(), share=share)


def one_copy(p: Program, direction: Direction) -> None:
    p.copy("c", 4 * KB, direction, stream=p.stream())


def host_calls() -> list[Row]:
    """What each call costs the host when nothing makes it wait: 60 of each behind a long kernel."""
    p = Program()
    s, other = p.stream(), p.stream()
    with p.capture(stream=other) as graph:
        p.kernel("node", 0, stream=other, share=TINY)
    p.kernel("long", 30_000, stream=s, share=TINY)
    first = p.record(s)
    for i in range(60):
        p.kernel(f"k{i}", 0, stream=s, share=TINY)
        p.copy(f"in {i}", 4 * KB, "h2d", stream=s)
        p.copy(f"out {i}", 4 * KB, "d2h", stream=s)
        p.copy(f"on {i}", 4 * KB, "d2d", stream=s)
        p.record(s)
        p.wait(first, other)
        p.launch(graph, stream=other)
    p.synchronize()
    calls, host_us = p.ended(), Native(p).times().host_us
    by_kind: dict[str, list[float]] = {}
    for call, us in list(zip(calls, host_us, strict=True))[2:-1]:
        kind = f"copy {call.direction}" if isinstance(call, Copy) else type(call).__name__.lower()
        by_kind.setdefault(kind, []).append(us)
    rows = [
        {"name": f"host: {kind}", "us": statistics.median(values), "kind": "constant"}
        for kind, values in by_kind.items()
    ]
    for target in ("device", "stream"):
        p = Program()
        s = p.stream()
        for _ in range(50):
            p.synchronize(s if target == "stream" else None)
        row = {"name": f"host: synchronize idle {target}", "kind": "constant"}
        rows.append(row | {"us": statistics.median(Native(p).times().host_us[5:])})
    for us in (0, 20):
        alone = makespan(one_kernel, 100, us=us)
        rows.append({"name": f"one kernel of {us} µs, and synchronize", "us": alone, "kind": "constant"})
    alone = makespan(one_kernel, 100, us=0, share=1.0)
    rows.append({"name": "one whole kernel of 0 µs, and synchronize", "us": alone, "kind": "constant"})
    for direction in ("h2d", "d2h"):
        alone = makespan(one_copy, 100, direction=direction)
        rows.append({"name": f"one copy {direction}, and synchronize", "us": alone, "kind": "constant"})
    return rows


def device_gaps() -> list[Row]:
    """What the device adds between one piece of work and the next: in a stream, between engines, by event."""

    def behind(fill: Callable[[Program, Stream, Stream, int], object], count: int) -> float:
        def build(p: Program) -> None:
            a, b = p.stream(), p.stream()
            p.kernel("long", 6000, stream=a, share=TINY)
            p.wait(p.record(a), b)
            for i in range(count):
                fill(p, a, b, i)

        return makespan(build)

    def per_unit(name: str, fill: Callable[[Program, Stream, Stream, int], object], **more: Any) -> Row:
        us = (behind(fill, 150) - behind(fill, 10)) / 140
        return {"name": name, "us": us, "kind": "constant", **more}

    def kernel(p: Program, s: Stream, us: float = 0, share: float = TINY) -> None:
        p.kernel("k", us, stream=s, share=share)

    def hop(p: Program, a: Stream, b: Stream, i: int) -> None:
        s, t = (a, b) if i % 2 == 0 else (b, a)
        kernel(p, s)
        p.wait(p.record(s), t)

    def copy_then_kernel(p: Program, a: Stream, b: Stream, i: int) -> None:
        p.copy("c", 4 * KB, "h2d", stream=a)
        kernel(p, a)

    def marked(p: Program, a: Stream, b: Stream, i: int) -> None:
        kernel(p, a)
        p.record(a)

    return [
        per_unit("device: kernel of 0 µs after kernel", lambda p, a, b, i: kernel(p, a)),
        per_unit("device: kernel of 20 µs after kernel", lambda p, a, b, i: kernel(p, a, 20)),
        per_unit("device: kernel on the whole GPU after kernel", lambda p, a, b, i: kernel(p, a, 0, 1.0)),
        per_unit("device: kernel, record", marked),
        per_unit("device: kernel, event, kernel in another stream", hop),
        per_unit("device: copy of 4 KB, kernel", copy_then_kernel),
        {"name": "device: block slots", "value": spin().slots, "kind": "constant"},
    ]


def kernel_spans() -> list[Row]:
    """How long kernels of 0 µs (one block, or every slot) and of 20 µs last by the profiler's clock."""
    rows = []
    for name, us, share in (("0 µs", 0, TINY), ("0 µs on the whole GPU", 0, 1.0), ("20 µs", 20, TINY)):
        p = Program()
        s = p.stream()
        for _ in range(40):
            p.kernel("k", us, stream=s, share=share)
        spans = [x.us for x in Native(p).trace().spans if x.engine == "sm"]
        row = {"name": f"device: span of a kernel of {name}", "kind": "constant"}
        rows.append(row | {"us": statistics.median(spans[5:])})
    return rows


def graphs() -> list[Row]:
    """A graph's launch on the host, and its nodes on the device, by the number of nodes."""
    rows = []
    for nodes in (1, 10, 100, 400):

        def build(p: Program, nodes: int = nodes, replays: int = 8) -> None:
            s = p.stream()
            with p.capture(stream=s) as graph:
                for _ in range(nodes):
                    p.kernel("k", 0, stream=s, share=TINY)
            p.kernel("long", 4000, stream=s, share=TINY)
            for _ in range(replays):
                p.launch(graph, stream=s)

        many = timed(build)
        few = timed(build, replays=2)
        alone = timed(build, replays=1)
        rows.append(
            {
                "name": f"graph of {nodes}",
                "kind": "graph",
                "nodes": nodes,
                "host_us": statistics.median(many.host_us[1:-1]),
                "first_host_us": alone.host_us[1],
                "device_us": (many.makespan_us - few.makespan_us) / 6,
            }
        )
    return rows


def copies() -> list[Row]:
    """Microseconds of one copy among many of its size in one stream, every direction and kind of memory."""
    rows = []
    for direction in ("h2d", "d2h", "d2d"):
        for pinned in (True, False) if direction != "d2d" else (True,):
            for nbytes in SIZES:
                many = 42 if nbytes <= MB else 6

                def build(
                    p: Program, count: int, n: int = nbytes, d: Any = direction, k: bool = pinned
                ) -> None:
                    s = p.stream()
                    if k:
                        p.kernel("long", 1500, stream=s, share=TINY)
                    for i in range(count):
                        p.copy(f"c{i}", n, d, stream=s, pinned=k)

                long = timed(build, count=many)
                short = timed(build, count=2)
                us = (long.makespan_us - short.makespan_us) / (many - 2)
                rows.append(
                    {
                        "name": f"copy {direction} {'pinned' if pinned else 'pageable'} {nbytes}",
                        "kind": "copy",
                        "direction": direction,
                        "pinned": pinned,
                        "nbytes": nbytes,
                        "us": us,
                        "host_us": statistics.median(long.host_us[1:-1]),
                        "bytes_per_s": nbytes / us * 1e6,
                    }
                )
    return rows


def duplex() -> list[Row]:
    """Both directions at once against one alone, and two streams in one direction against one."""

    def fill(p: Program, directions: tuple[str, ...]) -> None:
        streams = [p.stream() for _ in directions]
        for _ in range(4):
            for s, d in zip(streams, directions, strict=True):
                p.copy("c", 32 * MB, d, stream=s)  # type: ignore[arg-type]

    rows = []
    for directions in (("h2d",), ("d2h",), ("h2d", "d2h"), ("h2d", "h2d"), ("d2h", "d2h"), ("d2d",)):
        us = makespan(fill, directions=directions)
        rows.append({"name": f"4 × 32 MB {' and '.join(directions)}", "kind": "duplex", "us": us})
    return rows


def blocking_calls() -> list[Row]:
    """Does a copy's call return while a kernel of 5 ms runs before it, in its own stream or in another?"""
    rows = []
    for direction in ("h2d", "d2h"):
        for pinned in (True, False):
            for nbytes in (1 * KB, 32 * KB, 64 * KB, 65 * KB, 128 * KB, 1 * MB, 8 * MB):
                took = {}
                for where in ("its stream", "another stream"):
                    p = Program()
                    a, b = p.stream(), p.stream()
                    p.kernel("long", BEHIND_US, stream=a if where == "its stream" else b, share=TINY)
                    p.copy("c", nbytes, direction, stream=a, pinned=pinned)  # type: ignore[arg-type]
                    took[where] = Native(p).times().host_us[1]
                rows.append(
                    {
                        "name": f"call {direction} {'pinned' if pinned else 'pageable'} {nbytes}",
                        "kind": "call",
                        "direction": direction,
                        "pinned": pinned,
                        "nbytes": nbytes,
                        "behind_own_us": took["its stream"],
                        "behind_other_us": took["another stream"],
                    }
                )
    return rows


def queue() -> list[Row]:
    """How many launches wait in a stream before the host has to, and how many kernels run at once."""
    p = Program()
    s = p.stream()
    p.kernel("long", 40_000, stream=s, share=TINY)
    for _ in range(3000):
        p.kernel("k", 0, stream=s, share=TINY)
    host_us = Native(p).times(20, warmup=1).host_us
    depth = next((i for i, us in enumerate(host_us[1:-1]) if us > 1000), None)
    rows: list[Row] = [{"name": "launches before the host waits", "value": depth, "kind": "constant"}]
    for streams, each in ((8, 1), (16, 1), (32, 1), (32, 4)):

        def build(p: Program, streams: int = streams, each: int = each) -> None:
            queues = [p.stream() for _ in range(streams)]
            for s in queues:
                for i in range(each):
                    p.kernel(f"{s.name} {i}", 400, stream=s, share=TINY)

        us = makespan(build)
        rows.append({"name": f"{streams} streams of {each} × 400 µs", "us": us, "kind": "constant"})
    return rows


PARTS = (host_calls, device_gaps, kernel_spans, graphs, copies, duplex, blocking_calls, queue)
