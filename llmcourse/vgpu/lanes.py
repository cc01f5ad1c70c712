"""Which lanes of a batch carry out an instruction, and how values reach them.

A batch holds many thread blocks, each padded to whole warps; lane l belongs to warp l // 32. Registers are
arrays over all lanes of the batch, or NumPy scalars where every lane holds the same value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmcourse.vgpu.isa import WARP_SIZE

SPARSE = 4
"""Below a quarter of the lanes, an instruction computes on the active lanes alone."""


@dataclass(eq=False)
class Active:
    """A set of lanes that run together.

    mask      bool [all lanes]
    lanes     their numbers, None if they are all lanes of the batch
    whole     every lane that is still running is among them: results may replace registers outright
    warps     warps with an active lane; threads: active lanes
    cache     what the memory found out about addresses of these lanes, by the register that holds them
    """

    mask: np.ndarray
    lanes: np.ndarray | None
    whole: bool
    warps: int
    threads: int
    cache: dict[object, object] = field(default_factory=dict)

    @property
    def sparse(self) -> bool:
        return self.lanes is not None and not self.whole and self.threads * SPARSE < len(self.mask)

    def own(self, value: np.ndarray) -> np.ndarray:
        """The active lanes' elements of a fetched value (which holds just these where few are active).

        A scalar stays one.
        """
        if self.sparse or self.lanes is None or not isinstance(value, np.ndarray):
            return value
        return value[self.lanes]

    def own_each(self, value: np.ndarray) -> np.ndarray:
        """The same with one element for each active lane, a scalar's too."""
        own = self.own(value)
        return own if isinstance(own, np.ndarray) else np.full(self.threads, own)

    def spread(self, holds: np.ndarray) -> np.ndarray:
        """A fetched condition over all lanes of the batch; a scalar stays one."""
        if not (self.sparse and isinstance(holds, np.ndarray)):
            return holds
        out = np.zeros(len(self.mask), bool)
        out[self.lanes] = holds
        return out

    def warps_taking_part(self) -> np.ndarray:
        """bool [warps with an active lane, 32]"""
        rows = self.by_warp()
        return rows[rows.any(axis=1)]

    def by_warp(self) -> np.ndarray:
        """bool [warps of the batch, 32]"""
        return self.mask.reshape(-1, WARP_SIZE)


def active_lanes(mask: np.ndarray, live: int) -> Active:
    """The lanes of a mask; `live` is how many lanes of the batch are still running."""
    threads = int(np.count_nonzero(mask))
    warps = int(np.count_nonzero(mask.reshape(-1, WARP_SIZE).any(axis=1)))
    lanes = None if threads == len(mask) else np.flatnonzero(mask)
    return Active(mask, lanes, threads == live, warps, threads)


def written(old: np.ndarray, new: np.ndarray, active: Active) -> np.ndarray:
    """A register after `new`, which holds a value for every lane of the batch, was written by active lanes.

    Registers are never changed in place: other registers, and the caches, may hold the same array.
    """
    if active.whole:
        return new
    return np.where(active.mask, new, old)


def scattered(old: np.ndarray, new: np.ndarray, active: Active) -> np.ndarray:
    """A register after `new`, one value for each active lane in order, was written."""
    if active.lanes is None:
        return new
    out = old.copy() if isinstance(old, np.ndarray) else np.full(len(active.mask), old)
    if not isinstance(new, np.ndarray) or new.dtype == out.dtype:
        out[active.lanes] = new
        return out
    raise AssertionError(f"{new.dtype} does not fit a register of {out.dtype}")
