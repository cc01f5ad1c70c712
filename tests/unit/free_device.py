"""A device on which sums can be done in the head, and programs of any kind for it."""

from __future__ import annotations

from hypothesis import strategies as st

from llmcourse.streams.calls import Event
from llmcourse.streams.costs import Costs
from llmcourse.streams.program import Program

MEGABYTE = 1_000_000  # 100 µs at 10 GB/s


FREE = Costs.ideal(gigabytes_per_s=10)


@st.composite
def programs(draw: st.DrawFn, *, calls: int = 14) -> Program:
    """Any program of up to three streams of any kind and the default stream."""
    p = Program("drawn")
    kinds = draw(st.lists(st.sampled_from(["non-blocking", "blocking"]), min_size=1, max_size=3))
    streams = [p.default, *(p.stream(kind=kind) for kind in kinds)]
    events: list[Event] = []
    for i in range(draw(st.integers(1, calls))):
        stream = draw(st.sampled_from(streams))
        match draw(st.sampled_from(["kernel", "kernel", "copy", "copy", "record", "wait", "host", "sync"])):
            case "kernel":
                share = draw(st.sampled_from([0.1, 0.4, 0.6, 1.0, 1.5]))
                p.kernel(f"k{i}", draw(st.integers(0, 50)), stream=stream, share=share)
            case "copy":
                p.copy(
                    f"c{i}",
                    draw(st.integers(1, MEGABYTE)),
                    draw(st.sampled_from(["h2d", "d2h", "d2d"])),
                    stream=stream,
                    pinned=draw(st.booleans()),
                    wait=draw(st.booleans()),
                )
            case "record":
                events.append(p.record(stream))
            case "wait":
                if events:
                    p.wait(draw(st.sampled_from(events)), stream)
            case "host":
                p.host(f"h{i}", draw(st.integers(0, 50)))
            case "sync":
                p.synchronize(draw(st.sampled_from([None, *streams, *events])))
    return p
