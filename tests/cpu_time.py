"""How long something takes on a machine that nothing disturbs, told on one that is shared."""

from __future__ import annotations

import time
from collections.abc import Callable


def least(work: Callable[[], object], within: float, tries: int = 8) -> float:
    """Seconds of this process's CPU time that `work` took at its fastest; ends at the first try `within`.

    Neighbours empty a core's caches and lower its clock, so that one slow try proves nothing; eight do.
    """
    best = float("inf")
    while best >= within and tries:
        began = time.process_time()
        work()
        best, tries = min(best, time.process_time() - began), tries - 1
    return best
