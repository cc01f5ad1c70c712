"""Exercise `prefetch`: a loop that prepares and copies batches while the GPU works on earlier ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Oracle, Trial
from llmcourse.streams.calls import Copy, Host, Kernel
from llmcourse.streams.costs import Costs
from llmcourse.streams.loop import Loop
from llmcourse.streams.order import Task, ancestors, lower

prefetch = Exercise(
    "prefetch",
    title="A prefetching loop",
    arguments=("batches", "buffers"),
    shapes=(
        "batches      number of batches, 1 or more",
        "buffers      buffers on the host, and as many on the device; batch i goes through",
        "             buffer i % buffers of both",
        "prepare      prepare(i, b): the host fills its buffer b with batch i, and does nothing else",
        "copy         copy(i, b): the host's buffer b to the device's b, in the stream 'copies'",
        "step         step(i, b): a kernel reads the device's buffer b, in the stream 'compute'",
        "record       record(stream): a number, the event that the stream has done all it holds now",
        "wait         wait(stream, event): what the stream is given from now on waits for the event",
        "synchronize  synchronize(event): the host waits for the event",
        "returns      nothing; all batches are prepared, copied and worked on once, in order",
    ),
    formula="prepare(i) after copy(i − buffers);  copy(i) after step(i − buffers);  step(i) after copy(i)",
    difficulty=3,
    importance=5,
    minutes=30,
    points=6,
    hints=(
        "copy and step return at once. Draw two buffers and four batches: what must have happened before "
        "the host may fill buffer 0 again? Before the copy may overwrite the device's? Before the kernel "
        "may read it? Which of the three must the host itself wait for?",
        "Two events for each batch: one recorded in 'copies' after its copy (arrived), one in 'compute' "
        "after its step (used). The compute stream waits for arrived[i] before step i. From batch `buffers` "
        "on, the stream 'copies' waits for used[i − buffers], and the host, which writes its own "
        "buffer, for arrived[i − buffers]. Waiting for anything newer gives the overlap away.",
        "For i in range(batches): b = i % buffers; if i >= buffers: synchronize(arrived[i - buffers]) and "
        "wait('copies', used[i - buffers]). Then prepare(i, b), copy(i, b), "
        "arrived.append(record('copies')), wait('compute', arrived[i]), step(i, b), "
        "used.append(record('compute')).",
    ),
)

IDEAL = Costs.ideal(gigabytes_per_s=1)  # a thousand bytes a µs
RUNAWAY = 40  # calls for each batch


def run(
    t: Trial, batches: int, buffers: int, us: tuple[int, int, int] = (100, 160, 250), copy_costs: bool = True
) -> Loop:
    """The learner's loop, as the judge saw it: what it called, in order, is kept with the trial's call."""
    prepare, copy, step = us
    loop = Loop(batches, buffers, prepare_us=prepare, nbytes=copy * 1000, step_us=step)
    limit = RUNAWAY * (batches + 1)
    oracles = [Oracle(fn, fn.__name__, limit) for fn in loop.calls]
    try:
        t.call(batches, buffers, *oracles)
    finally:
        if t.calls and t.calls[-1].error is None:
            t.calls[-1].value = [list(line) for line in loop.lines]
    return loop


def _names(loop: Loop, kind: type) -> list[str]:
    return [c.name for c in loop.program.calls if isinstance(c, kind)]


@prefetch.check("every batch is prepared, copied and worked on once, in order, in buffer i % buffers")
def complete(t: Trial) -> None:
    for batches, buffers in ((1, 1), (2, 2), (1, 3), (5, 2), (t.size(6, 9), 3)):
        loop = run(t, batches, buffers)
        for kind, word in ((Host, "prepare"), (Copy, "copy"), (Kernel, "step")):
            expected = [f"{word} {i}" for i in range(batches)]
            _same(_names(loop, kind), expected, word)
        for line in loop.lines:
            if line[0] in ("prepare", "copy", "step"):
                name, i, b = line
                t.holds(
                    b == i % buffers,  # type: ignore[operator]
                    f"{name}({i}, {b}) with {buffers} buffers: batch {i} belongs in buffer {i % buffers}",  # type: ignore[operator]
                )


def _same(got: list[str], expected: list[str], word: str) -> None:
    if got == expected:
        return
    counted = Counter(got)
    for name in expected:
        if counted[name] != 1:
            raise Mismatch(
                f"{name} was called {counted[name]} times with {len(expected)} batches, expected once"
            )
    raise Mismatch(f"{word} was called in the order {', '.join(n.split()[1] for n in got)}")


def _ordered(t: Trial, first: str, then: str, apart: int, why: str, tries: str) -> None:
    """`first i` is certain to have ended before `then i+apart` starts."""
    for batches, buffers in ((6, 1), (7, 2), (9, 3), (t.size(8, 12), 4)):
        loop = run(t, batches, buffers)
        tasks = lower(loop.program)
        known = ancestors(tasks)
        place: dict[str, Task] = {x.call.name: x for x in tasks if isinstance(x.call, Host | Copy | Kernel)}
        for i in range(batches - apart * buffers):
            a, b = place.get(f"{first} {i}"), place.get(f"{then} {i + apart * buffers}")
            if a is not None and b is not None and not known[b.index] >> a.index & 1:
                raise Mismatch(
                    f"nothing makes {b.call.name} wait for {a.call.name}, {why}",
                    tries=tries,
                )


@prefetch.check("a step starts when its batch has arrived on the device")
def arrived(t: Trial) -> None:
    _ordered(
        t,
        "copy",
        "step",
        0,
        "whose data it reads",
        "wait('compute', e) before step(i, b), where e was recorded in 'copies' after copy(i, b).",
    )


@prefetch.check("a copy starts when the step that read the device's buffer has ended")
def not_overwritten(t: Trial) -> None:
    _ordered(
        t,
        "step",
        "copy",
        1,
        "which reads the same buffer of the device",
        "wait('copies', e) before copy(i, b), where e was recorded in 'compute' after step(i − buffers, b).",
    )


@prefetch.check("the host writes its buffer when the copy from it has ended")
def host_memory(t: Trial) -> None:
    _ordered(
        t,
        "copy",
        "prepare",
        1,
        "which reads the same buffer of the host",
        "synchronize(e) before prepare(i, b), where e was recorded in 'copies' after copy(i − buffers, b).",
    )


@prefetch.check("the host waits once for each buffer that it fills again, and for nothing else")
def few_waits(t: Trial) -> None:
    for batches, buffers in ((6, 1), (8, 2), (3, 3), (t.size(8, 12), 3)):
        loop = run(t, batches, buffers)
        t.at_most(
            sum(line[0] == "synchronize" for line in loop.lines),
            max(0, batches - buffers),
            "calls of synchronize",
            "synchronize only from batch `buffers` on; streams wait for each other by wait().",
        )


@prefetch.check("preparing, copying and working overlap as far as the buffers allow")
def overlap(t: Trial) -> None:
    a, b = t.size(60, 90), t.size(91, 140)
    for us in ((a, a, a), (b, a, a), (a, b, a), (a, a, b), (20, a, b)):
        for batches, buffers in ((12, 2), (12, 3)):
            loop = run(t, batches, buffers, us)
            best = best_us(batches, buffers, us)
            t.at_most(
                loop.program.simulate(IDEAL).makespan_us,
                best + us[0] + max(us),
                f"µs in all, with {us[0]} µs to prepare, {us[1]} to copy and {us[2]} to work on each batch",
                "waiting for what is `buffers` batches back, and for nothing newer.",
            )


def best_us(batches: int, buffers: int, us: tuple[int, int, int]) -> float:
    """The makespan by the three rules alone: each stage does one batch at a time."""
    prepared = [0.0] * batches
    copied, worked = prepared.copy(), prepared.copy()
    for i in range(batches):
        before = (prepared[i - 1], copied[i - 1], worked[i - 1]) if i else (0.0, 0.0, 0.0)
        back = i - buffers
        prepared[i] = max(before[0], copied[back] if back >= 0 else 0.0) + us[0]
        copied[i] = max(before[1], prepared[i], worked[back] if back >= 0 else 0.0) + us[1]
        worked[i] = max(before[2], copied[i]) + us[2]
    return worked[-1]


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _loop(
    batches: int,
    buffers: int,
    calls: tuple[Any, ...],
    *,
    host: int | None = 0,
    copies: int | None = 0,
    compute: bool = True,
    host_event: str = "arrived",
    last: int = 0,
) -> None:
    """The right loop, and what can be wrong with it: `host` and `copies` shift what is waited for, None
    waits for nothing."""
    prepare, copy, step, record, wait, synchronize = calls
    events: dict[str, list[int]] = {"arrived": [], "used": []}
    for i in range(batches + last):
        b = i % buffers
        if host is not None and 0 <= i - buffers + host < len(events[host_event]):
            synchronize(events[host_event][i - buffers + host])
        if copies is not None and 0 <= i - buffers + copies < len(events["used"]):
            wait("copies", events["used"][i - buffers + copies])
        prepare(i, b)
        copy(i, b)
        events["arrived"].append(record("copies"))
        if compute:
            wait("compute", events["arrived"][i])
        step(i, b)
        events["used"].append(record("compute"))


@prefetch.mistake(
    says="the compute stream does not wait for the copy: streams know nothing of each other",
    tries="an event recorded in 'copies' after the copy, and wait('compute', event) before the step.",
    caught_by="arrived",
)
def no_arrival(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, compute=False)


@prefetch.mistake(
    says="the copies do not wait for the steps, and overwrite a buffer that is being read",
    tries="wait('copies', used[i - buffers]) before copy(i, b).",
    caught_by="not_overwritten",
)
def no_used(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, copies=None)


@prefetch.mistake(
    says="the host does not wait, and fills a buffer that a copy is still reading",
    tries="synchronize(arrived[i - buffers]) before prepare(i, b): copy returned long before it was done.",
    caught_by="host_memory",
)
def no_host_wait(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, host=None)


@prefetch.mistake(
    says="the copies wait for a step that is one batch too far back, whose buffer is another one",
    tries="used[i - buffers].",
    caught_by="not_overwritten",
)
def one_too_far(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, copies=-1)


@prefetch.mistake(
    says="the host waits for a copy that is one batch too far back, from another buffer",
    tries="arrived[i - buffers].",
    caught_by="host_memory",
)
def host_too_far(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, host=-1)


@prefetch.mistake(
    says="the copies wait for the step of the batch before, so that copying and working never overlap",
    tries="used[i - buffers]: the batch before lies in another buffer.",
    caught_by="overlap",
)
def previous_step(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    arrived: list[int] = []
    used: list[int] = []
    for i in range(batches):
        if i >= buffers:
            synchronize(arrived[i - buffers])
        if i:
            wait("copies", used[i - 1])
        prepare(i, i % buffers)
        copy(i, i % buffers)
        arrived.append(record("copies"))
        wait("compute", arrived[i])
        step(i, i % buffers)
        used.append(record("compute"))


@prefetch.mistake(
    says="the host waits for the step of the old batch, where its copy is enough",
    tries="synchronize(arrived[i - buffers]): the host's own buffer is free as soon as it has been copied.",
    caught_by="overlap",
)
def host_waits_for_step(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, host_event="used")


@prefetch.mistake(
    says="the host waits for every copy as soon as it has asked for it",
    tries="synchronize from batch `buffers` on, and for the copy that is `buffers` batches back.",
    caught_by="few_waits",
)
def every_copy(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    used: list[int] = []
    for i in range(batches):
        if i >= buffers:
            wait("copies", used[i - buffers])
        prepare(i, i % buffers)
        copy(i, i % buffers)
        synchronize(record("copies"))
        step(i, i % buffers)
        used.append(record("compute"))


@prefetch.mistake(
    says="the host waits for every step: nothing is ever done ahead",
    tries="events between the streams, and the host waiting only for the buffer that it fills.",
    caught_by="few_waits",
)
def every_step(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    for i in range(batches):
        prepare(i, i % buffers)
        copy(i, i % buffers)
        wait("compute", record("copies"))
        step(i, i % buffers)
        synchronize(record("compute"))


@prefetch.mistake(
    says="the event is recorded before the copy, and so marks what was there before it",
    tries="record('copies') after copy(i, b).",
    caught_by="arrived",
)
def recorded_early(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    arrived: list[int] = []
    used: list[int] = []
    for i in range(batches):
        if i >= buffers:
            synchronize(arrived[i - buffers])
            wait("copies", used[i - buffers])
        prepare(i, i % buffers)
        arrived.append(record("copies"))
        copy(i, i % buffers)
        wait("compute", arrived[i])
        step(i, i % buffers)
        used.append(record("compute"))


@prefetch.mistake(
    says="wait is called after the copy that should wait, and holds only the next one",
    tries="wait('copies', …) before copy(i, b).",
    caught_by="not_overwritten",
)
def waits_late(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    arrived: list[int] = []
    used: list[int] = []
    for i in range(batches):
        if i >= buffers:
            synchronize(arrived[i - buffers])
        prepare(i, i % buffers)
        copy(i, i % buffers)
        if i >= buffers:
            wait("copies", used[i - buffers])
        arrived.append(record("copies"))
        wait("compute", arrived[i])
        step(i, i % buffers)
        used.append(record("compute"))


@prefetch.mistake(
    says="the last batch is left out",
    tries="range(batches).",
    caught_by="complete",
)
def last_one_missing(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, buffers, calls, last=-1)


@prefetch.mistake(
    says="all batches go through buffer 0, and the others are never used",
    tries="b = i % buffers.",
    caught_by="complete",
)
def one_buffer(batches: Any, buffers: Any, *calls: Any) -> Any:
    _loop(batches, 1, calls)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@prefetch.alternative("dicts of events by buffer: the last copy from it, the last step on it")
def by_buffer(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    arrived: dict[int, int] = {}
    used: dict[int, int] = {}
    for i in range(batches):
        b = i % buffers
        if b in arrived:
            synchronize(arrived[b])
        prepare(i, b)
        if b in used:
            wait("copies", used[b])
        copy(i, b)
        arrived[b] = record("copies")
        wait("compute", arrived[b])
        step(i, b)
        used[b] = record("compute")


@prefetch.alternative("the step is launched one batch behind the copies")
def one_behind(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    arrived: list[int] = []
    used: list[int] = []

    def work(i: int) -> None:
        wait("compute", arrived[i])
        step(i, i % buffers)
        used.append(record("compute"))

    for i in range(batches):
        if i >= buffers == 1:
            work(i - 1)
        if i >= buffers:
            synchronize(arrived[i - buffers])
            wait("copies", used[i - buffers])
        prepare(i, i % buffers)
        copy(i, i % buffers)
        arrived.append(record("copies"))
        if i and buffers > 1:
            work(i - 1)
    work(batches - 1)


@prefetch.alternative("a loop for the first batches, which find their buffers free, and one for the rest")
def filled_first(batches: Any, buffers: Any, *calls: Any) -> Any:
    prepare, copy, step, record, wait, synchronize = calls
    events: list[tuple[int, int]] = []

    def send(i: int) -> None:
        b = i % buffers
        prepare(i, b)
        copy(i, b)
        here = record("copies")
        wait("compute", here)
        step(i, b)
        events.append((here, record("compute")))

    for i in range(min(batches, buffers)):
        send(i)
    for i in range(buffers, batches):
        here, done = events[i - buffers]
        wait("copies", done)
        synchronize(here)
        send(i)
