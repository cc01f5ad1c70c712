"""Capture and replay with nothing but arrays: what a CUDA graph remembers, and what it cannot know.

    tape = Tape(token=…, position=…, weights=…)
    tape.op("x", "gather", "weights", "token")     # runs now
    with tape.capture():
        tape.op("x", "gather", "weights", "token")  # is only written down
    tape.replay()                                  # runs, on what the buffers hold by then

A buffer is a name for a place: its size never changes. A captured launch keeps the names, and the
numbers that stood in the call; a replay repeats the launches and no line of Python. So the host can read
nothing while it captures, and what depends on a value must be computed by a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from llmcourse.errors import CourseError

Array = np.ndarray
Input = str | int | float


class TapeError(CourseError, ValueError):
    """A launch that names no buffer or no kernel, or that would change a buffer's size."""


class CaptureError(CourseError, RuntimeError):
    """Something that a graph cannot hold, asked for while it is captured."""


def _store(cache: Array, position: Array, x: Array) -> Array:
    written = cache.copy()
    written[np.arange(len(cache)), position] = x
    return written


def _mask(scores: Array, position: Array) -> Array:
    return np.where(np.arange(scores.shape[1]) <= position[:, None], scores, -np.inf)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


KERNELS: dict[str, tuple[Callable[..., Array], str]] = {
    "gather": (lambda table, index: table[index], "rows of table [V, D] at index [B] → [B, D]"),
    "matmul": (lambda a, b: a @ b, "a [B, D] · b [D, E] → [B, E]"),
    "store": (_store, "out [B, T, D] with x [B, D] at slot position [B] of each sequence; reads out"),
    "scores": (
        lambda q, keys: np.einsum("bd,btd->bt", q, keys) / np.sqrt(q.shape[-1]),
        "q [B, D] against keys [B, T, D], over √D → [B, T]",
    ),
    "mask": (_mask, "scores [B, T], −∞ at every slot after position [B]"),
    "softmax": (_softmax, "x [B, T], along T"),
    "mix": (lambda p, values: np.einsum("bt,btd->bd", p, values), "p [B, T] · values [B, T, D] → [B, D]"),
    "argmax": (lambda x: x.argmax(axis=-1), "x [B, V] → [B], whole numbers"),
    "max": (lambda x: np.full_like(x, x.max()), "x [B] → [B], its largest element everywhere"),
    "add": (lambda x, y: x + y, "x + y"),
    "copy": (lambda x: x.copy(), "x"),
}
READS_OUT = {"store"}


class Tape:
    """Named buffers, and the launches that a capture has kept.

    lines   the captured launches: (out, kernel, *inputs)
    refused the buffers that the host asked for during a capture
    """

    def __init__(self, **buffers: Array) -> None:
        self.buffers = {name: np.array(value) for name, value in buffers.items()}
        self.lines: list[tuple[Input, ...]] = []
        self.refused: list[str] = []
        self._scratch: dict[str, Array] | None = None

    def op(self, out: str, kernel: str, *inputs: Input) -> None:
        """Launch a kernel on buffers (by name) and numbers; its result goes to the buffer `out`.

        A buffer that is not there yet is made, as large as the result. Raises TapeError.
        """
        capturing = self._scratch is not None
        self._run(self.buffers if self._scratch is None else self._scratch, (out, kernel, *inputs))
        if capturing:
            self.lines.append((out, kernel, *inputs))

    def read(self, name: str) -> list:
        """The buffer's numbers, for the host, which waits for them. Raises CaptureError in a capture."""
        if self._scratch is not None:
            self.refused.append(name)
            raise CaptureError(
                f"read({name!r}) was called while the step is captured.",
                "Nothing runs during a capture, so there is no value yet; a replay would not ask again.",
                "a launch that computes what you need from the buffer.",
            )
        return list(self._buffer(self.buffers, name, "read").tolist())

    @contextmanager
    def capture(self) -> Iterator[Tape]:
        """Write launches down instead of running them; shapes are tried out on copies."""
        self.lines = []
        self._scratch = dict(self.buffers)
        try:
            yield self
        finally:
            self._scratch = None

    def replay(self) -> None:
        """Run the captured launches on what the buffers hold now."""
        for line in self.lines:
            self._run(self.buffers, line)

    def _run(self, buffers: dict[str, Array], line: tuple[Input, ...]) -> None:
        out, kernel, *inputs = line
        if kernel not in KERNELS or not isinstance(out, str):
            raise TapeError(
                f"op({out!r}, {kernel!r}, …): there is no such kernel.",
                "A launch names its result's buffer, its kernel, and the buffers that it reads.",
                f"one of {', '.join(KERNELS)}.",
            )
        given = [self._buffer(buffers, x, str(kernel)) if isinstance(x, str) else x for x in inputs]
        if kernel in READS_OUT:
            given.insert(0, self._buffer(buffers, out, str(kernel)))
        try:
            with np.errstate(all="ignore"):
                result = np.asarray(KERNELS[str(kernel)][0](*given))
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            shapes = ", ".join(
                f"{x} {list(np.shape(g))}" for x, g in zip(inputs, given[-len(inputs) :], strict=True)
            )
            raise TapeError(
                f"op({out!r}, {kernel!r}, …) cannot run on {shapes or 'nothing'}: {error}.",
                f"{kernel}: {KERNELS[str(kernel)][1]}.",
                "inputs of these shapes.",
            ) from None
        if out in buffers and _kind(buffers[out]) != _kind(result):
            raise TapeError(
                f"op({out!r}, {kernel!r}, …) makes {_kind(result)}, and {out!r} holds {_kind(buffers[out])}.",
                "A graph remembers a buffer's address and size: it stays where it is, as large as it is.",
                "another name for this result.",
            )
        buffers[out] = result

    @staticmethod
    def _buffer(buffers: dict[str, Array], name: Input, kernel: str) -> Array:
        if name not in buffers:
            raise TapeError(
                f"{kernel} reads {name!r}, and there is no such buffer.",
                "A buffer exists from the start, or from the launch that writes it first.",
                f"one of {', '.join(buffers)}.",
            )
        return buffers[str(name)]


def _kind(array: Array) -> str:
    numbers = "whole numbers" if array.dtype.kind in "iu" else "numbers"
    return f"{list(array.shape)} {numbers}"


def toy(batch: int = 2, slots: int = 16, *, vocabulary: int = 50, width: int = 16, seed: int = 0) -> Tape:
    """A tape with a layer of attention and random weights, its sequences four tokens long.

    token [B], position [B]; embedding [V, D], wq, wk, wv [D, D], wo [D, V]; keys, values [B, slots, D]
    """
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (vocabulary, width),
        **dict.fromkeys(("wq", "wk", "wv"), (width, width)),
        "wo": (width, vocabulary),
        **dict.fromkeys(("keys", "values"), (batch, slots, width)),
    }
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return Tape(**weights, token=rng.integers(0, vocabulary, batch), position=np.full(batch, 4))
