"""Exercise `launch_order`: jobs of a copy and a kernel, ordered so that the last one ends early."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key
from itertools import permutations
from typing import Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Oracle, RaisedError, Trial
from llmcourse.streams.costs import Costs
from llmcourse.streams.programs import jobs as program_of

launch_order = Exercise(
    "launch_order",
    title="A schedule for a target",
    arguments=("jobs", "makespan"),
    shapes=(
        "jobs      list of (copy µs, kernel µs), 1 job or more: a job's data is copied in, then a",
        "          kernel that fills the GPU works on it; each job has a stream of its own",
        "makespan  function: makespan(order) is the simulator's answer, in µs, for jobs launched in",
        "          that order; it is asked at most twice for each job (or not at all)",
        "returns   list of the jobs' indices in the order in which they are to be launched; no other",
        "          order ends earlier",
    ),
    formula="the copy engine and the SMs each take the jobs one by one, in the order of the launches",
    difficulty=3,
    importance=3,
    minutes=20,
    points=4,
    hints=(
        "The SMs are idle while the first copy runs, and the copy engine while the last kernel does. Which "
        "job would you send first, and which last?",
        "Jobs with a shorter copy than kernel feed the GPU: send them first, the shortest copies before the "
        "others, so that the SMs start early and have a reserve. Jobs with a longer copy eat the reserve: "
        "send them last, and end with the shortest kernel, because nothing runs beside it.",
        "first = sorted((i for i … if jobs[i][0] < jobs[i][1]), key=copy); last = sorted(the others, "
        "key=kernel, reverse=True); return first + last. This is Johnson's rule (1954): no order is better.",
    ),
)

Jobs = Sequence[tuple[int, int]]
IDEAL = Costs.ideal(gigabytes_per_s=1)  # a thousand bytes a µs


def simulated(jobs: Jobs, order: Sequence[int]) -> float:
    """The jobs launched in that order, each in a stream of its own, µs."""
    return program_of(jobs, order, bytes_per_us=1000).simulate(IDEAL).makespan_us


def two_stages(jobs: Jobs, order: Sequence[int]) -> float:
    """The same number by arithmetic, a hundred times as fast: for searches, the judge's and the learner's."""
    copied = worked = 0
    for i in order:
        copied += jobs[i][0]
        worked = max(worked, copied) + jobs[i][1]
    return worked


def target(jobs: Jobs) -> float:
    """The makespan of the best order: every one is tried, or Johnson's rule where there are too many."""
    if len(jobs) <= 5:
        return min(two_stages(jobs, order) for order in permutations(range(len(jobs))))
    return two_stages(jobs, johnson(jobs, None))


def _asked(t: Trial, jobs: Jobs, limit: int) -> list[int]:
    """The learner's order, which must be one. Mismatch if the simulator was asked too often."""

    def makespan(order: Any) -> float:
        return two_stages(jobs, _order(order, len(jobs), "makespan was asked for"))

    oracle = Oracle(makespan, "the simulator", limit)
    try:
        got = t.call([tuple(job) for job in jobs], oracle)
    except RaisedError:
        if oracle.calls <= limit:
            raise
        raise Mismatch(
            f"the simulator was asked more than {limit} times for {len(jobs)} jobs",
            tries="a rule that needs no trying: which jobs first, which last?",
        ) from None
    t.counts[-1] = oracle.calls
    return _order(got, len(jobs), "the result is")


def _order(got: Any, count: int, said: str) -> list[int]:
    missing = ": is a `return` missing?" if got is None else ""
    if not isinstance(got, list | tuple):
        raise Mismatch(f"{said} {describe(got)}, expected a list of the jobs' indices{missing}")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in got):
        raise Mismatch(f"{said} {describe(got)}, expected the jobs' indices, as whole numbers")
    if sorted(got) != list(range(count)):
        raise Mismatch(f"{said} {describe(got)}, expected each of the indices 0 to {count - 1} once")
    return list(got)


def _best(t: Trial, jobs: Jobs, limit: int) -> None:
    order = _asked(t, jobs, limit)
    mine, best = simulated(jobs, order), target(jobs)
    t.holds(
        mine <= best + 0.5,
        f"launched as {describe(order)}, the jobs take {mine:,.0f} µs; {best:,.0f} is possible",
    )


def _jobs(t: Trial, count: int) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in t.integers(1, 40, count, 2)]


TRIES = 200  # more than five jobs have orders


@launch_order.check("every job is launched once")
def each_once(t: Trial) -> None:
    for count in (1, 2, 5):
        _asked(t, _jobs(t, count), TRIES)


@launch_order.check("no other order of up to five jobs ends earlier")
def small(t: Trial) -> None:
    known = [[(8, 2), (2, 8), (4, 6), (6, 4)], [(5, 9), (1, 7), (9, 3)], [(3, 1), (9, 6), (7, 4), (8, 2)]]
    for jobs in known:
        _best(t, jobs, TRIES)
    for count in (4, 4, 4, 4, 5, 5):
        _best(t, _jobs(t, count), TRIES)


@launch_order.check("the simulator is asked at most twice for each job")
def frugal(t: Trial) -> None:
    for count in (6, 9):
        _asked(t, _jobs(t, count), 2 * count)


@launch_order.check("forty jobs are ordered as well")
def large(t: Trial) -> None:
    for _ in range(3):
        _best(t, _jobs(t, 40), 80)


@launch_order.check("jobs may be alike, and a kernel may take no time")
def alike(t: Trial) -> None:
    a, b = t.size(3, 9), t.size(10, 20)
    for jobs in (
        [(a, a)] * 4,
        [(a, b), (a, b), (b, a)],
        [(a, 0), (b, 0), (a, b)],
        [(a, b)] * 3 + [(b, a)] * 2,
    ):
        _best(t, jobs, 2 * len(jobs))


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@launch_order.mistake(
    says="the jobs stay in the order in which they came",
    tries="sending first what gives the SMs work early.",
    caught_by="small",
)
def as_they_came(jobs: Any, makespan: Any) -> Any:
    return list(range(len(jobs)))


@launch_order.mistake(
    says="all jobs are sorted by their copies",
    tries="two groups: jobs whose copy is the longer part are sorted by their kernels, longest first.",
    caught_by="small",
)
def shortest_copy(jobs: Any, makespan: Any) -> Any:
    return sorted(range(len(jobs)), key=lambda i: jobs[i][0])


@launch_order.mistake(
    says="all jobs are sorted by their kernels, longest first",
    tries="two groups: jobs whose copy is the shorter part are sorted by their copies, shortest first.",
    caught_by="small",
)
def longest_kernel(jobs: Any, makespan: Any) -> Any:
    return sorted(range(len(jobs)), key=lambda i: -jobs[i][1])


@launch_order.mistake(
    says="the jobs are sorted by the sum of their parts",
    tries="comparing a job's two parts with each other: it matters which is longer.",
    caught_by="small",
)
def shortest_job(jobs: Any, makespan: Any) -> Any:
    return sorted(range(len(jobs)), key=lambda i: sum(jobs[i]))


@launch_order.mistake(
    says="the jobs are sorted by the difference of their parts",
    tries="the sign of the difference only: within a group the shorter part decides.",
    caught_by="small",
)
def by_difference(jobs: Any, makespan: Any) -> Any:
    return sorted(range(len(jobs)), key=lambda i: jobs[i][0] - jobs[i][1])


def _grouped(jobs: Any, first_key: Any, last_key: Any, swapped: bool = False) -> list[int]:
    feeding = [i for i in range(len(jobs)) if (jobs[i][0] < jobs[i][1]) != swapped]
    eating = [i for i in range(len(jobs)) if i not in feeding]
    return sorted(feeding, key=first_key) + sorted(eating, key=last_key)


@launch_order.mistake(
    says="the second group begins with its shortest kernel",
    tries="its longest kernel first: nothing runs beside the last one, so the last one should be short.",
    caught_by="small",
)
def second_group_turned(jobs: Any, makespan: Any) -> Any:
    return _grouped(jobs, lambda i: jobs[i][0], lambda i: jobs[i][1])


@launch_order.mistake(
    says="the first group begins with its longest copy",
    tries="its shortest copy first: the SMs are idle until it is in.",
    caught_by="small",
)
def first_group_turned(jobs: Any, makespan: Any) -> Any:
    return _grouped(jobs, lambda i: -jobs[i][0], lambda i: -jobs[i][1])


@launch_order.mistake(
    says="the two groups are the wrong way round",
    tries="the jobs with the shorter copy first.",
    caught_by="small",
)
def groups_swapped(jobs: Any, makespan: Any) -> Any:
    return _grouped(jobs, lambda i: jobs[i][0], lambda i: -jobs[i][1], swapped=True)


@launch_order.mistake(
    says="both groups are sorted by their copies",
    tries="the second group by its kernels, longest first: its copies are never waited for by anyone else.",
    caught_by="small",
)
def second_by_copy(jobs: Any, makespan: Any) -> Any:
    return _grouped(jobs, lambda i: jobs[i][0], lambda i: -jobs[i][0])


@launch_order.mistake(
    says="each job's place is returned, not the job at each place",
    tries="the list of indices as sorted() gives it.",
    caught_by="small",
)
def places(jobs: Any, makespan: Any) -> Any:
    order = johnson(jobs, None)
    return [order.index(i) for i in range(len(jobs))]


@launch_order.mistake(
    says="the jobs themselves are returned",
    tries="their indices: sorted(range(len(jobs)), key=lambda i: jobs[i][0]).",
    caught_by="each_once",
)
def jobs_themselves(jobs: Any, makespan: Any) -> Any:
    return [list(jobs[i]) for i in johnson(jobs, None)]


@launch_order.mistake(
    says="every order is tried in the simulator",
    tries="a rule: six jobs have 720 orders, and forty have 8·10⁴⁷.",
    caught_by="frugal",
)
def all_orders(jobs: Any, makespan: Any) -> Any:
    return list(min(permutations(range(len(jobs))), key=lambda order: makespan(list(order))))


@launch_order.mistake(
    says="a second group is forgotten: jobs whose copy is as long as their kernel, or longer, are left out",
    tries="`else`: every job belongs to one of the two groups.",
    caught_by="each_once",
)
def one_group(jobs: Any, makespan: Any) -> Any:
    return sorted((i for i in range(len(jobs)) if jobs[i][0] < jobs[i][1]), key=lambda i: jobs[i][0])


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@launch_order.alternative("one key: the group, then its shorter part")
def johnson(jobs: Any, makespan: Any) -> Any:
    def key(i: int) -> tuple[int, float]:
        copy, kernel = jobs[i]
        return (0, copy) if copy < kernel else (1, -kernel)

    return sorted(range(len(jobs)), key=key)


@launch_order.alternative("the shortest part of all is taken: a copy goes to the front, a kernel to the back")
def from_both_ends(jobs: Any, makespan: Any) -> Any:
    front: list[int] = []
    back: list[int] = []
    left = set(range(len(jobs)))
    while left:
        i = min(left, key=lambda i: min(jobs[i]))
        (front if jobs[i][0] <= jobs[i][1] else back).append(i)
        left.remove(i)
    return front + back[::-1]


@launch_order.alternative("Johnson's comparison of two jobs, within the two groups")
def compared(jobs: Any, makespan: Any) -> Any:
    def before(i: int, j: int) -> int:
        a, b = min(jobs[i][0], jobs[j][1]), min(jobs[j][0], jobs[i][1])
        return -1 if a < b else 1 if b < a else 0

    order = [i for i in range(len(jobs)) if jobs[i][0] < jobs[i][1]]
    rest = [i for i in range(len(jobs)) if jobs[i][0] >= jobs[i][1]]
    return sorted(order, key=cmp_to_key(before)) + sorted(rest, key=cmp_to_key(before))


@launch_order.alternative("a second order is asked for, and the better one of two is taken")
def asked_twice(jobs: Any, makespan: Any) -> Any:
    orders = [johnson(jobs, None), list(range(len(jobs)))]
    return min(orders, key=makespan)
