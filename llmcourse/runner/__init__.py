"""Executing notebooks: one process each, several at once, on this machine or on a Ray cluster.

discover    which notebooks a name means
engine      papermill's engine, without its stalls
worker      the process that executes one notebook
supervise   the thread that watches a worker: `execute`
pool        several at once: `execute_all`
cluster     the same on a Ray cluster
progress    what is shown meanwhile; report: what is kept
command     `llmcourse run`
"""

from llmcourse.runner.command import run
from llmcourse.runner.outcome import CellError, CellRun, Event, Outcome
from llmcourse.runner.pool import execute_all
from llmcourse.runner.supervise import execute

__all__ = ["CellError", "CellRun", "Event", "Outcome", "execute", "execute_all", "run"]
