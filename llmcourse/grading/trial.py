"""What a check works with: fresh inputs from a seed, calls of the learner's function, comparisons.

Every check has random numbers of its own, drawn from the seed and the check's name. So one check's
inputs do not depend on what another did, and a failure is repeated by repeating the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from llmcourse.grading import compare
from llmcourse.grading.compare import Mismatch
from llmcourse.grading.perform import Call, Failure, perform
from llmcourse.grading.plain import laid_out

if TYPE_CHECKING:
    from llmcourse.grading.distribution import Evidence


class Subject(Protocol):
    """A learner's function, here or in another process."""

    name: str

    def call(self, args: tuple[Any, ...], watch: Sequence[str] = (), grads: bool = False) -> Call: ...


class LocalSubject:
    """A function of this process."""

    def __init__(self, fn: Callable[..., Any], name: str = "") -> None:
        self.fn, self.name = fn, name or getattr(fn, "__name__", "the function")

    def call(self, args: tuple[Any, ...], watch: Sequence[str] = (), grads: bool = False) -> Call:
        return perform(self.fn, args, watch, grads)


class RaisedError(Exception):
    """The learner's function raised, was stopped, or returned no plain data."""

    def __init__(self, call: Call) -> None:
        assert call.error is not None
        self.call, self.failure = call, call.error
        super().__init__(f"{call.error.kind}: {call.error.message}")


class BudgetError(RuntimeError):
    """An oracle was asked more often than any right solution would."""


class Oracle:
    """A function that is handed to the learner's function and stays with the judge, who counts.

    calls     how often it was asked;  sent: bytes of the arrays that it was given
    limit     the call after which it raises BudgetError, so that a runaway search ends
    """

    def __init__(self, fn: Callable[..., Any], says: str, limit: int | None) -> None:
        self.fn, self.says, self.limit = fn, says, limit
        self.calls = self.sent = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        self.sent += sum(int(a.nbytes) for a in args if hasattr(a, "nbytes"))
        if self.limit is not None and self.calls > self.limit:
            raise BudgetError(f"{self.says} was asked more than {self.limit:,} times")
        return self.fn(*args)


@dataclass
class Trial:
    """One run of one check on one subject."""

    subject: Subject
    arguments: tuple[str, ...]
    seed: int
    check: str
    calls: list[Call] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed % 2**64, crc32(self.check.encode())])
        self._oracles: list[Oracle] = []

    # ── inputs ───────────────────────────────────────────────────────────────────────────────────

    def normal(self, *shape: int, dtype: Any = np.float64, scale: float = 1.0) -> np.ndarray:
        """Normal random numbers of that shape."""
        return np.asarray(self.rng.normal(0, scale, shape)).astype(dtype)

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Random integers, low ≤ n < high."""
        return np.asarray(self.rng.integers(low, high, shape))

    def size(self, low: int = 2, high: int = 9) -> int:
        """A random size, low ≤ n ≤ high."""
        return int(self.rng.integers(low, high + 1))

    def odd(self, low: int = 3, high: int = 17) -> int:
        """A random odd size."""
        return int(self.rng.choice(np.arange(low | 1, high + 1, 2)))

    def layouts(self, array: np.ndarray) -> list[np.ndarray]:
        """The same numbers as they can lie in memory: in C order, transposed, with gaps."""
        return [laid_out(array, order) for order in ("C", "F", "gaps")]

    def oracle(self, fn: Callable[..., Any], says: str = "a function", limit: int | None = None) -> Oracle:
        """`fn`, counted, as an argument for the learner's function."""
        made = Oracle(fn, says, limit)
        self._oracles.append(made)
        return made

    # ── calls ────────────────────────────────────────────────────────────────────────────────────

    def call(self, *args: Any, watch: Sequence[str] = (), grads: bool = False) -> Any:
        """The function's value for `args`. Raises RaisedError if it has none.

        The arguments become part of the message, should what follows fail.
        """
        return self.perform(*args, watch=watch, grads=grads).value

    def perform(self, *args: Any, watch: Sequence[str] = (), grads: bool = False) -> Call:
        """Like `call`, with the whole record: costs, gradients, written arguments."""
        asked = [a.calls for a in self._oracles]
        call = self.subject.call(args, watch, grads)
        self.calls.append(call)
        self.counts.append(sum(a.calls for a in self._oracles) - sum(asked))
        if call.error is not None:
            raise RaisedError(call)
        if call.overrun:
            raise Mismatch(f"{self._argument(call.overrun[0])} was written past its end")
        return call

    def raises(self, *args: Any) -> Failure | None:
        """What the function raises for `args`, None if it returns."""
        try:
            self.call(*args)
        except RaisedError as error:
            return error.failure
        return None

    # ── judgements ───────────────────────────────────────────────────────────────────────────────

    def close(self, got: Any, expected: Any, what: str = "", **tolerance: float | None) -> None:
        """`got` has the shape and, within rounding, the values of `expected`."""
        self._judge(what, lambda: compare.close(got, expected, **tolerance))

    def equal(self, got: Any, expected: Any, what: str = "") -> None:
        """`got` is exactly `expected`."""
        self._judge(what, lambda: compare.equal(got, expected))

    def holds(self, fact: bool, otherwise: str, tries: str = "") -> None:
        """`fact` is true; if not, the message says `otherwise`."""
        if not fact:
            raise Mismatch(otherwise, tries=tries)

    def at_most(self, count: float, bound: float, what: str, tries: str = "") -> None:
        """A cost stays within its bound: `what` names it with its unit."""
        if count > bound:
            raise Mismatch(f"{what}: {count:,.6g}, expected at most {bound:,.6g}", tries=tries)

    def pair(self, got: Any, count: int, what: str) -> tuple[Any, ...]:
        """`got` as a tuple of `count` results."""
        if not isinstance(got, list | tuple) or len(got) != count:
            missing = ": is a `return` missing?" if got is None else ""
            raise Mismatch(f"the result is {compare.describe(got)}, expected {what}{missing}")
        return tuple(got)

    def unchanged(self) -> None:
        """The last call left its arguments as they were."""
        if changed := self.calls[-1].changed:
            raise Mismatch(
                f"{self._argument(changed[0])} was written to; the caller still needs it",
                tries="a copy, or an operation that makes a new array.",
            )

    def likely(self, evidence: Evidence) -> None:
        """Random results agree with what they should be distributed as (see `distribution`)."""
        if not evidence.ok:
            raise Mismatch(str(evidence))

    def _judge(self, what: str, comparison: Callable[[], None]) -> None:
        try:
            comparison()
        except Mismatch as mismatch:
            if what:
                raise Mismatch(f"{what}: {mismatch.text}", tries=mismatch.tries) from None
            raise

    # ── words ────────────────────────────────────────────────────────────────────────────────────

    def inputs(self) -> str:
        """The arguments of the last call, for a message."""
        if not self.calls:
            return ""
        named = zip(self.arguments, self.calls[-1].args, strict=False)
        return ", ".join(f"{name} {compare.describe(value)}" for name, value in named)

    def _argument(self, position: int) -> str:
        names = self.arguments
        return f"argument {names[position] if position < len(names) else position}"
