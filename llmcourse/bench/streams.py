"""Stream programs and their constants, measured (see `streams.record`)."""

from llmcourse.streams.record import run

__all__ = ["run"]
