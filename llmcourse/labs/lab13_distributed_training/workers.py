"""The workers of lab 13, in one process: what each sends is held by the judge, who counts.

The learner's function is the code of one worker. The judge calls it for each rank in turn, with functions
that send and receive. A worker that must wait for something that nobody has sent yet is stopped there
(`Waiting`), and called again from its beginning when there is news: it receives the same as before, and one
thing more. What it sends again is the same message and is counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.compare import Mismatch, describe
from llmcourse.grading.plain import is_tensor
from llmcourse.grading.trial import Oracle, RaisedError, Trial
from llmcourse.labs import late_torch as torch


class Waiting(RuntimeError):
    """Not there yet: the worker's call is made again later."""


@dataclass
class Sent:
    """What a worker sent: messages and their bytes."""

    messages: int = 0
    nbytes: int = 0


@dataclass
class Workers:
    """`world_size` workers on a ring, rank r sending to r + 1, or meeting in all-reduces.

    limit    messages of a worker after which it is stopped
    sent     what each worker sent in the last run
    """

    t: Trial
    world_size: int
    limit: int = 200
    sent: list[Sent] = field(default_factory=list)
    _inbox: list[list[Any]] = field(default_factory=list)
    _rounds: list[dict[int, Any]] = field(default_factory=list)
    _fault: str = ""

    def run(self, arguments: Callable[[int], tuple[Any, ...]], *, ring: bool) -> list[Any]:
        """What each rank's call returns; send and recv, or all_reduce, come behind `arguments(rank)`."""
        n = self.world_size
        self.sent, self._inbox, self._rounds = [Sent() for _ in range(n)], [[] for _ in range(n)], []
        results: dict[int, Any] = {}
        seen: dict[int, int] = {}
        while len(results) < n:
            ready = [r for r in range(n) if r not in results and seen.get(r, -1) < self._news(r, ring)]
            if not ready:
                self._stuck([r for r in range(n) if r not in results], ring)
            for rank in ready:
                seen[rank] = self._news(rank, ring)
                try:
                    results[rank] = self._call(rank, arguments(rank), ring)
                except Waiting:
                    continue
        return [results[rank] for rank in range(n)]

    def _news(self, rank: int, ring: bool) -> int:
        if ring:
            return len(self._inbox[rank])
        return sum(len(met) == self.world_size for met in self._rounds)

    def _call(self, rank: int, args: tuple[Any, ...], ring: bool) -> Any:
        functions = self._ring(rank) if ring else (self._meeting(rank),)
        self._fault = ""
        try:
            return self.t.call(*args, *functions)
        except RaisedError as error:
            if self._fault:
                raise Mismatch(self._fault) from None
            if error.failure.kind == "Waiting":
                raise Waiting from None
            raise

    # ── a ring ───────────────────────────────────────────────────────────────────────────────────

    def _ring(self, rank: int) -> tuple[Oracle, Oracle]:
        to = (rank + 1) % self.world_size
        place = {"sent": 0, "received": 0}

        def send(numbers: Any) -> None:
            if not is_tensor(numbers):
                self._refuse(f"worker {rank} sends {describe(numbers)}, expected a tensor")
            if place["sent"] == self.sent[rank].messages:
                if self.sent[rank].messages == self.limit:
                    self._refuse(f"worker {rank} of {self.world_size} sends more than {self.limit} messages")
                self.sent[rank].messages += 1
                self.sent[rank].nbytes += numbers.nbytes
                self._inbox[to].append(numbers.detach().clone())
            place["sent"] += 1

        def recv() -> Any:
            if place["received"] >= len(self._inbox[rank]):
                raise Waiting(f"worker {rank} waits for a message")
            place["received"] += 1
            return self._inbox[rank][place["received"] - 1].clone()

        return self.t.oracle(send, "send(numbers)"), self.t.oracle(recv, "recv()")

    # ── all-reduces ──────────────────────────────────────────────────────────────────────────────

    def _meeting(self, rank: int) -> Oracle:
        place = {"call": 0}

        def all_reduce(numbers: Any) -> Any:
            if not is_tensor(numbers):
                self._refuse(f"worker {rank} gives all_reduce {describe(numbers)}, expected a tensor")
            i = place["call"]
            place["call"] += 1
            if i == len(self._rounds):
                if i == self.limit:
                    self._refuse(f"worker {rank} calls all_reduce more than {self.limit} times")
                self._rounds.append({})
            met = self._rounds[i]
            if rank not in met:
                for other, theirs in met.items():
                    if theirs.shape != numbers.shape:
                        self._refuse(
                            f"all_reduce of {list(numbers.shape)} on worker {rank} and {list(theirs.shape)} "
                            f"on worker {other}: the shapes must be the same"
                        )
                met[rank] = numbers.detach().clone()
                self.sent[rank].messages += 1
                self.sent[rank].nbytes += numbers.nbytes
            if len(met) < self.world_size:
                raise Waiting(f"worker {rank} waits in all_reduce")
            return torch.stack([met[r] for r in range(self.world_size)]).sum(0)

        return self.t.oracle(all_reduce, "all_reduce(numbers)")

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, fault: str) -> None:
        self._fault = fault
        raise RuntimeError(fault)

    def _stuck(self, waiting: list[int], ring: bool) -> None:
        names = f"worker{'s' * (len(waiting) > 1)} {', '.join(map(str, waiting))} of {self.world_size}"
        wait = "wait" if len(waiting) > 1 else "waits"
        if ring:
            raise Mismatch(
                f"{names} {wait} for a message that nobody sends",
                tries="send before recv in each step, and as many recv as send.",
            )
        raise Mismatch(
            f"{names} {wait} in an all_reduce that the others do not call",
            tries="the same all_reduces, in the same order, on every worker.",
        )
