"""What can be wrong with a stream program."""

from __future__ import annotations

from llmcourse.errors import CourseError


class ProgramError(CourseError, ValueError):
    """A stream program that CUDA would refuse, or whose calls make no sense."""


class StreamRace(CourseError, RuntimeError):
    """Two calls touch one buffer, one of them writes, and nothing says which comes first."""
