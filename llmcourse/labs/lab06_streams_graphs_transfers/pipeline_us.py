"""Exercise `pipeline_us`: when the last of n chunks is back, with a given number of streams."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.streams.costs import Costs
from llmcourse.streams.program import Program

pipeline_us = Exercise(
    "pipeline_us",
    title="Overlap, on paper",
    arguments=("n", "stages", "streams"),
    shapes=(
        "n        number of chunks, 0 or more, dealt to the streams in turn: chunk i to stream i % streams",
        "stages   (h, k, d): µs that each chunk takes to be copied in, worked on, and copied out",
        "streams  number of streams, 1 or more",
        "returns  µs from the first copy's start to the last copy's end",
        "",
        "Each stage has one engine, which does one chunk at a time, in the order of the chunks.",
        "A stream does its chunks one after the other. The host's calls cost nothing.",
    ),
    formula="end[i, j] = stages[j] + max(end[i, j−1], end[i−1, j]); chunk i starts after end[i−streams, 2]",
    difficulty=2,
    importance=4,
    minutes=20,
    points=4,
    hints=(
        "Take a sheet of paper, three chunks and stages of 1, 2 and 1 µs. When can the kernel of chunk 1 "
        "start? Name the two things that it waits for.",
        "A stage starts when the chunk's stage before has ended and when its engine has finished the chunk "
        "before: the later of the two. The first stage waits for one thing more, the last chunk of its own "
        "stream, which is `streams` chunks back and must be out. Keep the ends; a loop over chunks and one "
        "over stages do the rest.",
        "engine = [0, 0, 0]; done = []. For chunk i: t = done[i - streams] if i >= streams else 0; for j in "
        "0, 1, 2: t = max(t, engine[j]) + stages[j]; engine[j] = t. Then done.append(t). Return done[-1], "
        "or 0 if there was none.",
    ),
)

IDEAL = Costs.ideal(gigabytes_per_s=1e-3)  # one byte a µs: a copy of h bytes takes h µs


def simulated(n: int, stages: Any, streams: int) -> float:
    """The same pipeline as a program, played by the simulator: it knows nothing of the recurrence."""
    h, k, d = (int(us) for us in stages)
    p = Program()
    queues = [p.stream() for _ in range(streams)]
    for i in range(n):
        s = queues[i % streams]
        p.copy(f"in {i}", h, "h2d", stream=s)
        p.kernel(f"work {i}", k, stream=s)
        p.copy(f"out {i}", d, "d2h", stream=s)
    return p.simulate(IDEAL).makespan_us


def _agree(t: Trial, n: int, stages: tuple[int, int, int], streams: int) -> None:
    got = t.call(n, stages, streams)
    if got is None:
        raise Mismatch("the result is None, expected µs: is a `return` missing?")
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise Mismatch(f"the result is {describe(got)}, expected µs as one number")
    t.close(got, simulated(n, stages, streams), "the last copy's end, µs", rtol=1e-9)


def _stages(t: Trial, low: int = 1, high: int = 30) -> tuple[int, int, int]:
    h, k, d = (int(us) for us in t.integers(low, high, 3))
    return h, k, d


@pipeline_us.check("one chunk takes the sum of its stages, and no chunk takes no time")
def one_chunk(t: Trial) -> None:
    for streams in (1, 2, 5):
        _agree(t, 1, _stages(t), streams)
        _agree(t, 0, _stages(t), streams)


@pipeline_us.check("in one stream everything is in a row")
def one_stream(t: Trial) -> None:
    for n in (t.size(5, 9), 2, 3):
        _agree(t, n, (8, 9, 10), 1)
        _agree(t, n, _stages(t), 1)


@pipeline_us.check("with a stream for every chunk, the slowest stage sets the pace, whichever it is")
def slowest_stage(t: Trial) -> None:
    a, b, c = (int(us) for us in t.integers(1, 8, 3))
    for stages in ((a + 20, b, c), (a, b + 20, c), (a, b, c + 20), (a, a, a), (a + 20, b, a + 20)):
        n = t.size(3, 9)
        _agree(t, n, stages, n)


@pipeline_us.check("a stream takes its next chunk when the one before is out")
def few_streams(t: Trial) -> None:
    for streams in (2, 2, 3, 3, 4):
        for stages in (_stages(t), _stages(t, 5, 15)):
            _agree(t, t.size(streams + 1, 12), stages, streams)
    _agree(t, 7, (10, 10, 10), 2)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@pipeline_us.mistake(
    says="nothing overlaps: every chunk is added to the one before",
    tries="following each stage's engine: it can take chunk 1 while the next engine has chunk 0.",
    caught_by="slowest_stage",
)
def in_a_row(n: Any, stages: Any, streams: Any) -> Any:
    return n * sum(stages)


@pipeline_us.mistake(
    says="only the slowest stage is counted, and neither the first chunk's way in nor the last one's way out",
    tries="sum(stages) for the first chunk, and the slowest stage once for each of the others.",
    caught_by="one_chunk",
)
def pace_only(n: Any, stages: Any, streams: Any) -> Any:
    return n * (sum(stages) if streams == 1 else max(stages))


@pipeline_us.mistake(
    says="the slowest stage is counted for the first chunk too, beside the sum of its stages",
    tries="n − 1 chunks behind the first one.",
    caught_by="one_chunk",
)
def one_too_many(n: Any, stages: Any, streams: Any) -> Any:
    return sum(stages) + n * max(stages) if n and streams > 1 else n * sum(stages)


@pipeline_us.mistake(
    says="the number of streams is not looked at: every chunk is treated as if it had its own",
    tries="chunk i starts when chunk i − streams, which is before it in its stream, is out.",
    caught_by="one_stream",
)
def enough_streams(n: Any, stages: Any, streams: Any) -> Any:
    return sum(stages) + (n - 1) * max(stages) if n else 0


@pipeline_us.mistake(
    says="one stream and many are told apart, but two streams are taken for enough",
    tries="the recurrence for every number of streams: two hold two chunks, and there are three engines.",
    caught_by="few_streams",
)
def two_are_enough(n: Any, stages: Any, streams: Any) -> Any:
    if n == 0:
        return 0
    return n * sum(stages) if streams == 1 else sum(stages) + (n - 1) * max(stages)


@pipeline_us.mistake(
    says="the streams run as if each had engines of its own",
    tries="one engine for each stage, which all streams share.",
    caught_by="slowest_stage",
)
def private_engines(n: Any, stages: Any, streams: Any) -> Any:
    return -(-n // streams) * sum(stages)


@pipeline_us.mistake(
    says="the two copies share one engine",
    tries="three engines: one for each direction, and the SMs.",
    caught_by="slowest_stage",
)
def half_duplex(n: Any, stages: Any, streams: Any) -> Any:
    h, k, d = stages
    if streams == 1 or n < 2:
        return n * sum(stages)
    return sum(stages) + (n - 1) * max(h + d, k)


@pipeline_us.mistake(
    says="a chunk waits for its stream's chunk before to be worked on, not to be out",
    tries="the end of the last stage of chunk i − streams: a stream does its work in order.",
    caught_by="one_stream",
)
def before_it_is_out(n: Any, stages: Any, streams: Any) -> Any:
    engine: list[float] = [0, 0, 0]
    worked: list[float] = []
    for i in range(n):
        time = worked[i - streams] if i >= streams else 0
        for j in range(3):
            time = engine[j] = max(time, engine[j]) + stages[j]
            if j == 1:
                worked.append(time)
    return engine[2]


@pipeline_us.mistake(
    says="a chunk waits for the one that is a place too far back, so that a stream holds two chunks at once",
    tries="done[i − streams]: chunk i and chunk i − streams are in the same stream.",
    caught_by="one_stream",
)
def one_too_far(n: Any, stages: Any, streams: Any) -> Any:
    engine: list[float] = [0, 0, 0]
    done: list[float] = []
    for i in range(n):
        time = done[i - streams - 1] if i > streams else 0
        for j in range(3):
            time = engine[j] = max(time, engine[j]) + stages[j]
        done.append(time)
    return engine[2]


@pipeline_us.mistake(
    says="there is no chunk, and the last of an empty list is asked for",
    tries="0 where n is 0.",
    caught_by="one_chunk",
)
def none_at_all(n: Any, stages: Any, streams: Any) -> Any:
    return _recurrence(n, stages, streams)[-1]


def _recurrence(n: int, stages: Any, streams: int) -> list[float]:
    engine = [0.0, 0.0, 0.0]
    done: list[float] = []
    for i in range(n):
        time = done[i - streams] if i >= streams else 0.0
        for j in range(3):
            time = engine[j] = max(time, engine[j]) + stages[j]
        done.append(time)
    return done


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@pipeline_us.alternative("the ends are kept, for each chunk and stage")
def table(n: Any, stages: Any, streams: Any) -> Any:
    end: dict[tuple[int, int], float] = {}
    for i in range(n):
        for j in range(3):
            before = end.get((i, j - 1), 0) if j else end.get((i - streams, 2), 0)
            end[i, j] = max(before, end.get((i - 1, j), 0)) + stages[j]
    return end[n - 1, 2] if n else 0


@pipeline_us.alternative("a function that calls itself, and remembers")
def recursive(n: Any, stages: Any, streams: Any) -> Any:
    from functools import cache

    @cache
    def end(i: int, j: int) -> float:
        if i < 0:
            return 0
        before = end(i, j - 1) if j else end(i - streams, 2)
        return stages[j] + max(before, end(i - 1, j))

    return end(n - 1, 2)


@pipeline_us.alternative("a list of what each stream ended last, taken in turn")
def by_stream(n: Any, stages: Any, streams: Any) -> Any:
    free, out = [0.0] * 3, [0.0] * streams
    for i in range(n):
        time = out[i % streams]
        for j, us in enumerate(stages):
            time = max(time, free[j]) + us
            free[j] = time
        out[i % streams] = time
    return max(out)
