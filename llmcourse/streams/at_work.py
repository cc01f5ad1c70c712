"""Lab 06's functions put to work: on an H100's constants, on a GPU where there is one, and on a tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llmcourse.notebook import Table
from llmcourse.streams.calls import MB
from llmcourse.streams.costs import Costs
from llmcourse.streams.loop import Loop
from llmcourse.streams.program import Program
from llmcourse.streams.programs import jobs, pipeline
from llmcourse.streams.tape import toy

MEGABYTES, KERNEL_US, CHUNKS, STREAMS = 64, 1200, 8, 4  # notebook 06's task
PAIRS = [(80, 20), (20, 90), (60, 70), (30, 35), (90, 60), (50, 10)]  # copy and kernel, µs
REPLAYS = 10


def at_work(
    pipeline_us: Callable[..., Any],
    best_chunks: Callable[..., Any],
    prefetch: Callable[..., Any],
    launch_order: Callable[..., Any],
    decode_step: Callable[..., Any],
    *,
    device: str = "cpu",
) -> tuple[Program, Table]:
    """The loop that `prefetch` made, as a program, and a table of what each function does.

    device   "cuda" runs the programs on this machine's GPU; "cpu" simulates an H100
    """
    costs = Costs.of("H100")
    time = partial(_measured if device == "cuda" else _simulated, costs)
    chunk = MEGABYTES * MB // CHUNKS
    copy = costs.copies["h2d pinned"][-1][1] / costs.copies["h2d pinned"][-1][0]  # µs a byte
    stages = copy * chunk, KERNEL_US / CHUNKS, copy * chunk
    whole = tuple(us * CHUNKS for us in stages)
    calls = costs.call["copy h2d"] + costs.call["kernel"] + costs.call["copy d2h"]

    # More chunks than this, and the host needs longer for its calls than the engines for the data.
    chunks = best_chunks(whole, costs.switch, int(max(whole) / calls))
    cut = pipeline("", chunks=chunks, streams=STREAMS, nbytes=MEGABYTES * MB // chunks, us=KERNEL_US / chunks)
    loop = Loop(batches=8, buffers=2)
    prefetch(8, 2, *loop.calls)
    order = launch_order(PAIRS, lambda o: jobs(PAIRS, o).simulate(costs).makespan_us)
    with (tape := toy()).capture():
        decode_step(tape.op, tape.read)
    for _ in range(REPLAYS):
        tape.replay()

    came = time(jobs(PAIRS, range(len(PAIRS))))
    rows = [
        (
            "pipeline_us",
            f"{pipeline_us(CHUNKS, stages, STREAMS):.0f} µs",
            time(pipeline("", streams=STREAMS)),
        ),
        ("best_chunks", f"{chunks} chunks", time(cut)),
        ("prefetch", "8 batches through 2 buffers", time(loop.program)),
        ("launch_order", f"{list(order)}", f"{time(jobs(PAIRS, order))}, as they came {came}"),
        ("decode_step", f"{len(tape.lines)} launches", f"positions {tape.read('position')} after {REPLAYS}"),
    ]
    note = "at work: measured on this GPU" if device == "cuda" else f"at work: simulated, {costs.source}"
    return loop.program, Table(["function", "yours", "at work"], rows, note)


def _simulated(costs: Costs, program: Program) -> str:
    return f"{program.simulate(costs).makespan_us:,.0f} µs"


def _measured(costs: Costs, program: Program) -> str:
    return f"{program.run().makespan_us:,.0f} µs"
