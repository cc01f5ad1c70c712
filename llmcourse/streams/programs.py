"""Programs of this chapter, each showing one rule of streams; the same ones are recorded on an H100.

`PROGRAMS` holds a function for each. Sizes are chosen so that on an H100 a chunk's copy and its kernel
take about as long as each other: overlap is then worth most, and is easiest to see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from llmcourse.streams.calls import KB, MB, Event
from llmcourse.streams.program import Program


def pipeline(
    name: str,
    *,
    chunks: int = 8,
    streams: int = 1,
    nbytes: int = 8 * MB,
    us: float = 150,
    pinned: bool = True,
) -> Program:
    """Chunks that are copied in, worked on, and copied out, dealt to `streams` streams in turn."""
    p = Program(name)
    queues = [p.stream() for _ in range(streams)]
    for i in range(chunks):
        s = queues[i % streams]
        p.copy(f"in {i}", nbytes, "h2d", stream=s, pinned=pinned, writes=f"x{i}")
        p.kernel(f"work {i}", us, stream=s, reads=f"x{i}", writes=f"y{i}")
        p.copy(f"out {i}", nbytes, "d2h", stream=s, pinned=pinned, reads=f"y{i}")
    p.synchronize()
    return p


def with_default_stream(name: str, kind: str, *, chunks: int = 4) -> Program:
    """Two streams, and after each chunk a small kernel in the default stream, as stray code would put."""
    p = Program(name)
    queues = [p.stream(kind=kind) for _ in range(2)]  # type: ignore[arg-type]
    for i in range(chunks):
        p.copy(f"in {i}", 8 * MB, "h2d", stream=queues[i % 2])
        p.kernel(f"work {i}", 150, stream=queues[i % 2])
        p.kernel(f"stray {i}", 5, share=0.01)
    p.synchronize()
    return p


def diamond() -> Program:
    """a, then b and c side by side, then d: two events fork, one joins. b and c fit the GPU together."""
    p = Program("diamond")
    left, right = p.stream("left"), p.stream("right")
    p.kernel("a", 100, stream=left, share=0.5)
    forked = p.record(left, "a done")
    p.wait(forked, right)
    p.kernel("b", 200, stream=left, share=0.5)
    p.kernel("c", 150, stream=right, share=0.5)
    joined = p.record(right, "c done")
    p.wait(joined, left)
    p.kernel("d", 100, stream=left, share=0.5)
    p.synchronize()
    return p


def concurrent(name: str, *, kernels: int, share: float, us: float = 200) -> Program:
    """Independent kernels, one a stream: how many run at once is a question of room."""
    p = Program(name)
    for i in range(kernels):
        p.kernel(f"k{i}", us, stream=p.stream(), share=share)
    p.synchronize()
    return p


def jobs(
    pairs: Sequence[tuple[float, float]], order: Sequence[int], *, bytes_per_us: int = 50_000
) -> Program:
    """Jobs of (copy µs, kernel µs), each in a stream of its own, launched in `order`.

    A copy of 1 µs is `bytes_per_us` bytes; a kernel fills the GPU.
    """
    p = Program(f"{len(order)} jobs")
    for i in order:
        copy, kernel = pairs[i]
        s = p.stream()
        p.copy(f"in {i}", max(1, round(copy * bytes_per_us)), "h2d", stream=s, writes=f"x{i}")
        p.kernel(f"work {i}", kernel, stream=s, reads=f"x{i}")
    p.synchronize()
    return p


def crowd(
    *, streams: int, each: int, in_turn: bool = False, us: float = 400, share: float = 0.001
) -> Program:
    """`each` tiny kernels in every one of `streams` streams, given stream by stream, or to all in turn."""
    p = Program(f"{streams} streams of {each} kernels")
    queues = [p.stream() for _ in range(streams)]
    order = [(s, i) for s in queues for i in range(each)]
    for s, i in sorted(order, key=lambda pair: pair[1]) if in_turn else order:
        p.kernel(f"{s.name}, {i}", us, stream=s, share=share)
    p.synchronize()
    return p


def both_directions(name: str, directions: tuple[str, str]) -> Program:
    """Two streams, each copying 4 × 16 MB."""
    p = Program(name)
    queues = [p.stream() for _ in directions]
    for i in range(4):
        for s, direction in zip(queues, directions, strict=True):
            p.copy(f"{direction} {i}", 16 * MB, direction, stream=s)  # type: ignore[arg-type]
    p.synchronize()
    return p


def loader(name: str, *, batches: int = 6, prefetch: bool, pinned: bool = True) -> Program:
    """A training loop: the host prepares a batch, copies it, and the GPU works on it.

    Without prefetching, in one stream. With it, batch i+1 is prepared and copied in a second stream while
    the GPU works on batch i, through two buffers: `filled` and `used` events hand them back and forth.
    """
    p = Program(name)
    compute = p.stream("compute")
    if not prefetch:
        for i in range(batches):
            p.host(f"prepare {i}", 100, writes="host 0")
            p.copy(f"in {i}", 8 * MB, "h2d", stream=compute, pinned=pinned, reads="host 0", writes="x0")
            p.kernel(f"step {i}", 250, stream=compute, reads="x0")
            p.synchronize(compute)
        return p
    copies = p.stream("copies")
    filled: dict[int, Event] = {}
    used: dict[int, Event] = {}
    for i in range(batches + 1):
        if i < batches:
            if i >= 2:
                p.synchronize(filled[i - 2])  # the host's buffer is free again
                p.wait(used[i - 2], copies)
            p.host(f"prepare {i}", 100, writes=f"host {i % 2}")
            p.copy(
                f"in {i}",
                8 * MB,
                "h2d",
                stream=copies,
                pinned=pinned,
                reads=f"host {i % 2}",
                writes=f"x{i % 2}",
            )
            filled[i] = p.record(copies, f"filled {i}")
        if i >= 1:
            p.wait(filled[i - 1], compute)
            p.kernel(f"step {i - 1}", 250, stream=compute, reads=f"x{(i - 1) % 2}")
            used[i - 1] = p.record(compute, f"used {i - 1}")
    p.synchronize()
    return p


def small_kernels(name: str, *, graph: bool, kernels: int = 200, us: float = 2.0) -> Program:
    """Many short kernels in a row, as a decode step is, launched one by one or as one graph."""
    p = Program(name)
    s = p.stream()
    if graph:
        with p.capture("step", stream=s) as step:
            for i in range(kernels):
                p.kernel(f"k{i}", us, stream=s, share=0.1)
        p.launch(step, stream=s)
    else:
        for i in range(kernels):
            p.kernel(f"k{i}", us, stream=s, share=0.1)
    p.synchronize()
    return p


def forked_graph() -> Program:
    """A graph with a fork and a join, launched four times: its branches overlap, its launches don't."""
    p = Program("graph with a fork")
    a, b = p.stream("a"), p.stream("b")
    with p.capture("step", stream=a) as step:
        p.kernel("first", 20, stream=a, share=0.25)
        p.wait(p.record(a), b)
        p.kernel("left", 60, stream=a, share=0.25)
        p.kernel("right", 60, stream=b, share=0.25)
        p.wait(p.record(b), a)
        p.kernel("last", 20, stream=a, share=0.25)
    for _ in range(4):
        p.launch(step, stream=a)
    p.synchronize()
    return p


def long_queue() -> Program:
    """A long kernel with 2000 short ones behind it: the launch queue fills, and the host waits for room."""
    p = Program("full launch queue")
    s = p.stream()
    p.kernel("long", 20_000, stream=s)
    for i in range(2000):
        p.kernel(f"k{i}", 0, stream=s, share=0.01)
    p.synchronize()
    return p


def drawn(seed: int, *, calls: int = 40) -> Program:
    """A program drawn at random: nobody chose it because the simulator likes it."""
    rng = random.Random(seed)
    p = Program(f"random {seed}")
    streams = [p.stream(kind=rng.choice(["non-blocking", "blocking"])) for _ in range(rng.randint(2, 4))]
    pageable = rng.random() < 0.3
    events = []
    for i in range(calls):
        s = rng.choice([*streams, p.default] if rng.random() < 0.2 else streams)
        kind = rng.choices(["copy", "kernel", "record", "wait", "host", "sync"], [5, 7, 2, 2, 1, 0.4])[0]
        if kind == "copy":
            nbytes = round(2 ** rng.uniform(12, 24.5))
            direction = rng.choices(["h2d", "d2h", "d2d"], [3, 2, 1])[0]
            pinned = not pageable or rng.random() < 0.5
            p.copy(f"copy {i}", nbytes, direction, stream=s, pinned=pinned)  # type: ignore[arg-type]
        elif kind == "kernel":
            us, share = round(rng.uniform(0, 300), 1), rng.choice([0.05, 0.2, 0.5, 0.7, 1.0, 1.5])
            p.kernel(f"kernel {i}", us, stream=s, share=share)
        elif kind == "record":
            events.append(p.record(s))
        elif kind == "wait" and events:
            p.wait(rng.choice(events), s)
        elif kind == "host":
            p.host(f"host {i}", round(rng.uniform(5, 150), 1))
        elif kind == "sync":
            p.synchronize(rng.choice([None, s]))
    p.synchronize()
    return p


PROGRAMS: dict[str, Callable[[], Program]] = {
    "one stream": partial(pipeline, "one stream", streams=1),
    "two streams": partial(pipeline, "two streams", streams=2),
    "four streams": partial(pipeline, "four streams", streams=4),
    "four streams, small chunks": partial(
        pipeline, "four streams, small chunks", streams=4, chunks=64, nbytes=1 * MB, us=18.75
    ),
    "four streams, tiny chunks": partial(
        pipeline, "four streams, tiny chunks", streams=4, chunks=256, nbytes=256 * KB, us=4.7
    ),
    "four streams, pageable": partial(pipeline, "four streams, pageable", streams=4, pinned=False),
    "one stream, pageable": partial(pipeline, "one stream, pageable", streams=1, pinned=False),
    "default stream, blocking": partial(with_default_stream, "default stream, blocking", "blocking"),
    "default stream, non-blocking": partial(
        with_default_stream, "default stream, non-blocking", "non-blocking"
    ),
    "diamond": diamond,
    "small kernels side by side": partial(concurrent, "small kernels side by side", kernels=8, share=0.125),
    "big kernels": partial(concurrent, "big kernels", kernels=4, share=1.0),
    "kernels of 60 %": partial(concurrent, "kernels of 60 %", kernels=4, share=0.6),
    "both directions": partial(both_directions, "both directions", ("h2d", "d2h")),
    "same direction": partial(both_directions, "same direction", ("h2d", "h2d")),
    "loader": partial(loader, "loader", prefetch=False),
    "loader, pageable": partial(loader, "loader, pageable", prefetch=False, pinned=False),
    "loader, prefetching": partial(loader, "loader, prefetching", prefetch=True),
    "loader, prefetching pageable": partial(
        loader, "loader, prefetching pageable", prefetch=True, pinned=False
    ),
    "200 kernels one by one": partial(small_kernels, "200 kernels one by one", graph=False),
    "200 kernels in a graph": partial(small_kernels, "200 kernels in a graph", graph=True),
    "graph with a fork": forked_graph,
    "full launch queue": long_queue,
    **{f"random {seed}": partial(drawn, seed) for seed in range(8)},
}


def program(name: str) -> Program:
    """One of `PROGRAMS`, built afresh. Raises UnknownNameError."""
    if name not in PROGRAMS:
        from llmcourse.errors import UnknownNameError

        raise UnknownNameError(
            f"there is no program called {name!r}.",
            f"Programs: {', '.join(PROGRAMS)}.",
            "one of these.",
        )
    return PROGRAMS[name]()
