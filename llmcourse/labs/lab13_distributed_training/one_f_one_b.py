"""Exercise `one_f_one_b`: the order in which a pipeline's stage works, graded on the bubble it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial

if TYPE_CHECKING:  # a list of labs need not wait for PyTorch
    from llmcourse.train.parallel.schedule import Timeline

one_f_one_b = Exercise(
    "one_f_one_b",
    title="A pipeline's order: 1F1B",
    arguments=("stage", "stages", "micros"),
    shapes=(
        "stage    this stage's number s, 0 … p − 1;  stages  p, 1 or more",
        "micros   m, 1 or more, also below p",
        "returns  list of 2·m pairs, what stage s does and in which order: ('F', i) is the forward of",
        "         micro-batch i, ('B', i) its backward",
        "rules    F i waits for F i of stage s − 1, B i for B i of stage s + 1, and B i for F i of the",
        "         stage itself; a stage does one thing at a time, as soon as it can, in the order given",
        "cost     idle share of the stages, when all are equally fast: (p − 1) / (m + p − 1), no more;",
        "         micro-batches with a forward behind them and their backward before them: p − s at most",
    ),
    formula="min(p − s − 1, m) forwards; then F, B in turn while there are forwards; then the other B",
    difficulty=3,
    importance=5,
    minutes=25,
    points=6,
    hints=(
        "Draw p = 3 stages and m = 5 micro-batches on squared paper. When can the last stage do its first "
        "backward at the earliest? How many forwards has stage 0 time for until that backward has come back "
        "to it, and how many activations does it hold then?",
        "The last stage does F0 B0 F1 B1 … at once. The one before it does one forward more first, stage 0 "
        "p − 1 more: those are the warm-up. From then on each stage does one F and one B in turn, oldest "
        "backward first, so that it never holds more than p − s. When the forwards are used up, as many "
        "backwards as the warm-up had forwards are left.",
        "ahead = min(stages - stage - 1, micros); order = [('F', i) for i in range(ahead)]; for i in "
        "range(micros - ahead): order += [('F', ahead + i), ('B', i)]; then [('B', i) for i in range(micros "
        "- ahead, micros)].",
    ),
)

Line = list[tuple[str, int]]


def simulate(lines: Sequence[Line], forward: float = 1.0, backward: float = 2.0) -> Timeline:
    """Run the stages' orders as the package does; Mismatch when they wait for each other in a circle."""
    from llmcourse.train.parallel import schedule

    try:
        return schedule.simulate(lines, forward=forward, backward=backward)
    except schedule.ScheduleError as error:
        raise Mismatch(f"{error.what.rstrip('.')}: {error.why.rstrip('.')}") from None


def _line(t: Trial, stage: int, stages: int, micros: int) -> Line:
    """The learner's order for one stage, which must hold every F and B once, F before B."""
    got = t.call(stage, stages, micros)
    if not isinstance(got, list | tuple):
        missing = ": is a `return` missing?" if got is None else ""
        raise Mismatch(f"the result is {describe(got)}, expected a list of ('F', i) and ('B', i){missing}")
    for pair in got:
        fine = isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] in ("F", "B")
        if not fine or not isinstance(pair[1], int) or isinstance(pair[1], bool):
            raise Mismatch(f"the order holds {describe(pair)}, expected pairs ('F', i) and ('B', i)")
    line = [(str(kind), int(i)) for kind, i in got]
    for kind in ("F", "B"):
        for i in range(micros):
            if (count := line.count((kind, i))) != 1:
                raise Mismatch(
                    f"{kind}{i} stands there {count} times with {micros} micro-batches, expected once"
                )
    if len(line) != 2 * micros:
        strange = next(work for work in line if not 0 <= work[1] < micros)
        raise Mismatch(f"{strange[0]}{strange[1]} stands there; micro-batches are 0 to {micros - 1}")
    for i in range(micros):
        if line.index(("B", i)) < line.index(("F", i)):
            raise Mismatch(f"B{i} stands before F{i}, whose activations it needs")
    return line


def _pipeline(t: Trial, stages: int, micros: int) -> list[Line]:
    return [_line(t, stage, stages, micros) for stage in range(stages)]


def _sizes(t: Trial) -> list[tuple[int, int]]:
    return [(2, t.size(2, 5)), (3, t.size(5, 8)), (4, 4), (t.size(4, 6), t.size(9, 12))]


@one_f_one_b.check("each stage does every forward and every backward once, F before B")
def complete(t: Trial) -> None:
    for stages, micros in _sizes(t):
        _pipeline(t, stages, micros)


@one_f_one_b.check("the stages never wait for each other in a circle")
def goes_on(t: Trial) -> None:
    for stages, micros in _sizes(t):
        simulate(_pipeline(t, stages, micros))


@one_f_one_b.check("the bubble is (p − 1) / (m + p − 1)")
def bubble(t: Trial) -> None:
    for stages, micros in _sizes(t):
        lines = _pipeline(t, stages, micros)
        for backward in (1.0, 2.0):
            ran = simulate(lines, 1.0, backward)
            ideal = (stages - 1) / (micros + stages - 1)
            t.holds(
                ran.bubble < ideal + 1e-9,
                f"idle for {ran.bubble:.1%} of the time with p = {stages}, m = {micros} and backwards "
                f"{backward:g} times as long as forwards; {ideal:.1%} is possible",
            )


@one_f_one_b.check("stage s holds the activations of p − s micro-batches at most, however many there are")
def memory(t: Trial) -> None:
    for stages, micros in _sizes(t):
        ran = simulate(_pipeline(t, stages, micros))
        for s in range(stages):
            t.at_most(
                ran.peak(s),
                min(stages - s, micros),
                f"micro-batches that stage {s} of {stages} holds at once, m = {micros}",
                "a backward after each forward, as soon as the warm-up is over.",
            )


@one_f_one_b.check("fewer micro-batches than stages, one micro-batch, one stage")
def few(t: Trial) -> None:
    for stages, micros in ((t.size(5, 7), t.size(2, 4)), (4, 1), (1, t.size(2, 4)), (1, 1)):
        ran = simulate(_pipeline(t, stages, micros))
        ideal = (stages - 1) / (micros + stages - 1)
        t.holds(
            ran.bubble < ideal + 1e-9,
            f"idle for {ran.bubble:.1%} of the time with p = {stages}, m = {micros}; {ideal:.1%} is possible",
        )
        for s in range(stages):
            what = f"micro-batches that stage {s} of {stages} holds, m = {micros}"
            t.at_most(ran.peak(s), min(stages - s, micros), what)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def order(ahead: int, micros: int) -> Line:
    """1F1B with a warm-up of so many forwards."""
    ahead = max(0, min(ahead, micros))
    line = [("F", i) for i in range(ahead)]
    for i in range(micros - ahead):
        line += [("F", ahead + i), ("B", i)]
    return line + [("B", i) for i in range(micros - ahead, micros)]


@one_f_one_b.mistake(
    says="all forwards come first, as in GPipe: a stage holds every micro-batch at once",
    tries="a backward after each forward, from the p − s-th forward on.",
    caught_by="memory",
)
def gpipe(stage: Any, stages: Any, micros: Any) -> Any:
    return [("F", i) for i in range(micros)] + [("B", i) for i in range(micros)]


@one_f_one_b.mistake(
    says="all forwards come first, and then the backwards from the newest to the oldest",
    tries="a backward after each forward, the oldest first.",
    caught_by="memory",
)
def last_in_first_out(stage: Any, stages: Any, micros: Any) -> Any:
    return [("F", i) for i in range(micros)] + [("B", i) for i in reversed(range(micros))]


@one_f_one_b.mistake(
    says="there is no warm-up: each micro-batch goes all the way and back before the next one starts",
    tries="min(p − s − 1, m) forwards first.",
    caught_by="bubble",
)
def no_warm_up(stage: Any, stages: Any, micros: Any) -> Any:
    return order(0, micros)


@one_f_one_b.mistake(
    says="the warm-up is one forward short, p − s − 2",
    tries="p − s − 1: one forward for each stage behind this one.",
    caught_by="bubble",
)
def warm_up_short(stage: Any, stages: Any, micros: Any) -> Any:
    return order(stages - stage - 2, micros)


@one_f_one_b.mistake(
    says="the warm-up is one forward too long, p − s: a micro-batch more is held, and nothing is gained",
    tries="p − s − 1: the forward of the first pair F, B comes on top.",
    caught_by="memory",
)
def warm_up_long(stage: Any, stages: Any, micros: Any) -> Any:
    return order(stages - stage, micros)


@one_f_one_b.mistake(
    says="every stage has stage 0's warm-up",
    tries="p − s − 1 forwards: the last stage can go back at once.",
    caught_by="bubble",
)
def same_warm_up(stage: Any, stages: Any, micros: Any) -> Any:
    return order(stages - 1, micros)


@one_f_one_b.mistake(
    says="the warm-up grows towards the last stage, and stage 0 waits for a backward that cannot come",
    tries="p − s − 1 forwards: most at stage 0.",
    caught_by="goes_on",
)
def warm_up_reversed(stage: Any, stages: Any, micros: Any) -> Any:
    return order(stage, micros)


@one_f_one_b.mistake(
    says="after the warm-up the backward comes before the forward",
    tries="F, then B: the last stage has nothing to go back with yet.",
    caught_by="complete",
)
def backward_first(stage: Any, stages: Any, micros: Any) -> Any:
    ahead = min(stages - stage - 1, micros)
    line = [("F", i) for i in range(ahead)]
    for i in range(micros - ahead):
        line += [("B", i), ("F", ahead + i)]
    return line + [("B", i) for i in range(micros - ahead, micros)]


@one_f_one_b.mistake(
    says="each backward is that of the newest forward; the oldest micro-batches are held to the end",
    tries="the oldest first: it is the first to come back.",
    caught_by="bubble",
)
def newest_backward(stage: Any, stages: Any, micros: Any) -> Any:
    ahead = min(stages - stage - 1, micros)
    line = [("F", i) for i in range(ahead)]
    for i in range(ahead, micros):
        line += [("F", i), ("B", i)]
    return line + [("B", i) for i in range(ahead)]


@one_f_one_b.mistake(
    says="the backwards of the warm-up are left out at the end",
    tries="the remaining backwards, micros − ahead to micros − 1.",
    caught_by="complete",
)
def not_drained(stage: Any, stages: Any, micros: Any) -> Any:
    return order(stages - stage - 1, micros)[: 2 * micros - min(stages - stage - 1, micros)]


@one_f_one_b.mistake(
    says="the warm-up has p − s − 1 forwards even where there are fewer micro-batches",
    tries="min(stages - stage - 1, micros).",
    caught_by="few",
)
def more_than_there_are(stage: Any, stages: Any, micros: Any) -> Any:
    ahead = stages - stage - 1
    line = [("F", i) for i in range(ahead)]
    for i in range(micros - ahead):
        line += [("F", ahead + i), ("B", i)]
    return line + [("B", i) for i in range(max(0, micros - ahead), micros)]


@one_f_one_b.mistake(
    says="micro-batches are counted from 1",
    tries="range(micros): 0 to micros − 1.",
    caught_by="complete",
)
def from_one(stage: Any, stages: Any, micros: Any) -> Any:
    return [(kind, i + 1) for kind, i in order(stages - stage - 1, micros)]


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@one_f_one_b.alternative("step by step: forward while fewer than p − s are held, else backward")
def by_counting(stage: Any, stages: Any, micros: Any) -> Any:
    line: list[list[Any]] = []
    forward = backward = 0
    while backward < micros:
        if forward < micros and forward - backward < stages - stage:
            line.append(["F", forward])
            forward += 1
        else:
            line.append(["B", backward])
            backward += 1
    return line


@one_f_one_b.alternative("sorted by when each piece would run, were a backward as long as a forward")
def by_time(stage: Any, stages: Any, micros: Any) -> Any:
    timed = []
    for i in range(micros):
        timed.append((stage + (i if i < stages - stage else 2 * i), "F", i))
        timed.append((2 * stages - stage - 1 + 2 * i, "B", i))
    return tuple((kind, i) for _, kind, i in sorted(timed))
