"""The device's side of the simulation: copy engines, and block slots shared by kernels.

Copies   An engine serves one direction, one copy at a time, in the order in which copies become ready, but
         stays with a stream while that has copies ready. While both directions run, each goes at `duplex`
         of its speed.
Kernels  A kernel's blocks take slots as soon as some are free, kernels in the order in which they become
         ready: one that does not fit whole starts with the blocks that fit, and those behind it wait until
         its last block has a slot (Amert et al. 2017, "GPU Scheduling on the NVIDIA TX2").
Queues   The streams' kernels reach the GPU through `connections` hardware queues, dealt to the streams in
         turn. A queue hands on a kernel when its stream lets it start, and meanwhile holds those behind it,
         of whatever stream: with more streams than queues, kernels wait for strangers.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from llmcourse.streams.calls import Copy, Kernel, Stream
from llmcourse.streams.costs import Costs
from llmcourse.streams.order import Task

Reason = tuple[str, int]  # ("task", its index), or ("call", the number of the call that submitted it)
TIE = 1e-9


@dataclass
class Running:
    """A copy in its engine: microseconds left at full speed."""

    task: Task
    left: float


class Device:
    """State of the device at `now`. `ended` holds the end of each task that has ended."""

    def __init__(self, costs: Costs, streams: Sequence[Stream] = ()) -> None:
        self.costs = costs
        own = [s for s in streams if s.kind != "legacy"]
        self.connection = {s: i % costs.connections for i, s in enumerate(own)}
        self.queued: dict[int, int] = {}  # the last kernel of each connection
        self.behind: dict[int, list[int]] = defaultdict(
            list
        )  # kernels held by one before them in their queue
        self.handed: set[int] = set()
        self.now = 0.0
        self.ended: dict[int, float] = {}
        self.spans: dict[int, tuple[float, float]] = {}
        self.reasons: dict[int, Reason] = {}
        self.tasks: dict[int, Task] = {}
        self.missing: dict[int, int] = {}  # how many predecessors have not ended
        self.followers: dict[int, list[int]] = defaultdict(list)
        self.ready_at: dict[int, tuple[float, Reason]] = {}
        self.pending: Counter[Stream] = Counter()
        self.events: list[tuple[float, int, str, int, float]] = []
        self.order = count()
        self.copying: dict[str, list[Running]] = defaultdict(list)
        self.copy_queue: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.free = 1.0
        self.served: dict[str, Stream] = {}
        self.freed_by: dict[str, int] = {}
        self.kernel_queue: list[tuple[float, int]] = []
        self.unissued: dict[int, float] = {}
        self.pieces: Counter[int] = Counter()

    # ------------------------------------------------------------ what the host does

    def add(self, task: Task, at: float, call: int) -> None:
        """Work arrives; it may start at `at` at the earliest, by call number `call`."""
        self.tasks[task.index] = task
        self.pending[task.stream] += 1  # type: ignore[index]
        self.ready_at[task.index] = (at, ("call", call))
        open_ = [i for i in task.after if i not in self.ended]
        self.missing[task.index] = len(open_) + self._held(task)
        for i in task.after:
            if i in self.ended:
                self._after(task, i)
            else:
                self.followers[i].append(task.index)
        if not self.missing[task.index]:
            self._push(self.ready_at[task.index][0], "ready", task.index)

    def until(self, tasks: tuple[int, ...]) -> float:
        """Go on until these tasks have ended; returns the end of the last."""
        while any(i not in self.ended for i in tasks):
            self._step(math.inf)
        return max((self.ended[i] for i in tasks), default=self.now)

    def room(self, stream: Stream | None) -> float:
        """When the launch queue of `stream` has room: now, unless it is full."""
        before = self.now
        while stream is not None and self.pending[stream] >= self.costs.queue:
            self._step(math.inf)
            before = self.now
        return before

    def advance(self, until: float) -> None:
        """Let time pass up to `until`."""
        while self._step(until):
            pass

    # ------------------------------------------------------------ time

    def _step(self, until: float) -> bool:
        """The next thing that happens, if it happens by `until`."""
        next_copy = min((self.now + r.left / self._speed(e) for e, r in self._copies()), default=math.inf)
        at = min(next_copy, self.events[0][0] if self.events else math.inf)
        if at > until or at == math.inf:
            if until < math.inf:
                self._pass(max(until, self.now))
            return False
        self._pass(max(at, self.now))
        for engine, running in self._copies():
            if running.left <= TIE:
                self.copying[engine].remove(running)
                self.freed_by[engine] = running.task.index
                self._end(running.task)
        while self.events and self.events[0][0] <= self.now + TIE:
            _, _, kind, index, share = heapq.heappop(self.events)
            if kind == "ready":
                self._ready(self.tasks[index])
            else:
                self._piece_ends(index, share)
        self._start()
        return True

    def _pass(self, to: float) -> None:
        elapsed = to - self.now
        for engine, running in self._copies():
            running.left -= elapsed * self._speed(engine)
        self.now = to

    def _copies(self) -> list[tuple[str, Running]]:
        return [(engine, r) for engine, running in self.copying.items() for r in running]

    def _speed(self, engine: str) -> float:
        both = bool(self.copying["h2d"]) and bool(self.copying["d2h"])
        return self.costs.duplex if both and engine != "d2d" else 1.0

    # ------------------------------------------------------------ tasks

    def _after(self, task: Task, before: int) -> None:
        """`task` may start a little after `before` ended: how much depends on what they are."""
        at = self.ended[before] + self._lag(self.tasks[before], task)
        if at > self.ready_at[task.index][0]:
            self.ready_at[task.index] = (at, ("task", before))

    def _held(self, task: Task) -> bool:
        """Put a kernel in its hardware queue: does one of another stream there hold it?"""
        connection = self.connection.get(task.stream) if task.graph is None else None  # type: ignore[arg-type]
        if connection is None or not isinstance(task.call, Kernel):
            return False
        before = self.queued.get(connection)
        self.queued[connection] = task.index
        if before is None or before in self.handed or self.tasks[before].stream == task.stream:
            return False
        self.behind[before].append(task.index)
        return True

    def _lag(self, before: Task, task: Task) -> float:
        c = self.costs
        if before.stream != task.stream:
            return c.event
        kinds = (type(before.call), type(task.call))
        if kinds == (Kernel, Kernel):
            return c.node_gap if task.graph is not None and task.graph == before.graph else c.gap
        if kinds in ((Kernel, Copy), (Copy, Kernel)):
            return c.switch
        return 0.0

    def _ready(self, task: Task) -> None:
        self.reasons[task.index] = self.ready_at[task.index][1]
        match task.call:
            case Copy():
                self.copy_queue[task.call.direction].append((self.now, task.index))
            case Kernel():
                self.handed.add(task.index)
                for held in self.behind.pop(task.index, ()):
                    if self.now > self.ready_at[held][0]:
                        self.ready_at[held] = (self.now, ("task", task.index))
                    self._freed(held)
                heapq.heappush(self.kernel_queue, (self.now, task.index))
                self.unissued[task.index] = task.call.share
            case _:
                self.spans[task.index] = (self.now, self.now)
                self._end(task)

    def _start(self) -> None:
        """Give free engines and slots to what is ready."""
        for engine, queue in self.copy_queue.items():
            while queue and len(self.copying[engine]) < self.costs.engines.get(engine, 1):
                served = self.served.get(engine)
                ready, index = min(queue, key=lambda item: (self.tasks[item[1]].stream != served, item))
                queue.remove((ready, index))
                if ready < self.now - TIE:
                    self.reasons[index] = ("task", self.freed_by[engine])
                call = self.tasks[index].call
                assert isinstance(call, Copy)
                self.served[engine] = call.stream
                self.spans[index] = (self.now, self.now)
                self.copying[engine].append(Running(self.tasks[index], self.costs.copy_us(call)))
        while self.kernel_queue and self.free > TIE:
            ready, index = self.kernel_queue[0]
            call = self.tasks[index].call
            assert isinstance(call, Kernel)
            share = min(self.free, self.unissued[index])
            if index not in self.spans:
                self.spans[index] = (self.now, self.now)
            if ready < self.now - TIE and self.freed_by.get("sm", index) != index:
                self.reasons[index] = ("task", self.freed_by["sm"])
            self.free -= share
            self.unissued[index] -= share
            self.pieces[index] += 1
            self._push(self.now + call.us + self.costs.floor, "piece", index, share)
            if self.unissued[index] > TIE:
                break
            heapq.heappop(self.kernel_queue)

    def _piece_ends(self, index: int, share: float) -> None:
        self.free += share
        self.pieces[index] -= 1
        self.freed_by["sm"] = index
        if not self.pieces[index] and self.unissued[index] <= TIE:
            self._end(self.tasks[index])

    def _end(self, task: Task) -> None:
        self.ended[task.index] = self.now
        self.spans[task.index] = (self.spans[task.index][0], self.now)
        self.pending[task.stream] -= 1  # type: ignore[index]
        for follower in self.followers.pop(task.index, ()):
            self._after(self.tasks[follower], task.index)
            self._freed(follower)

    def _freed(self, index: int) -> None:
        """One of the things that `index` waits for has happened."""
        self.missing[index] -= 1
        if not self.missing[index]:
            self._push(self.ready_at[index][0], "ready", index)

    def _push(self, at: float, kind: str, index: int, share: float = 0.0) -> None:
        heapq.heappush(self.events, (max(at, self.now), next(self.order), kind, index, share))
