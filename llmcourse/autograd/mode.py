"""Recording on or off: `with no_grad():` runs operations forward only, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_recording: ContextVar[bool] = ContextVar("recording", default=True)


def grad_enabled() -> bool:
    """Whether operations are being recorded for a backward pass."""
    return _recording.get()


@contextmanager
def no_grad() -> Iterator[None]:
    """Inference: operations in this block build no graph and save no bytes."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)
