"""How the 2:4 kernels are launched: which of the two, and the tiles. Speed only; results do not depend on it.

The figures that chose these plans come from `bench.sparse24 --sweep` once it has run on a GPU; `candidates`
is what it tries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class SparsePlan(NamedTuple):
    """kernel    "select" or "expand"

    block_n   outputs a program computes
    block_k   columns of W (twice the values) that it holds at a time, a multiple of 16
    block_m   rows of x a program: exact for select (1, 2 or 4), for expand tensor cores want 16 or more
    warps, stages   of the program; loads of so many steps are in flight
    splits    parts of K for expand
    """

    kernel: str
    block_n: int
    block_k: int
    block_m: int = 1
    warps: int = 4
    stages: int = 2
    splits: int = 1

    def __str__(self) -> str:
        rest = f"{self.warps} warps, {self.stages} stages" + f", {self.splits} splits" * (self.splits > 1)
        return f"{self.kernel} {self.block_m}×{self.block_n}×{self.block_k}, {rest}"


INTERPRETED = {"select": SparsePlan("select", 64, 128), "expand": SparsePlan("expand", 32, 128, 16, splits=2)}


def plan_for(m: int, n: int, k: int, capability: int = 90, multiprocessors: int = 132) -> SparsePlan:
    """The plan for x [m, k] and W [n, k]."""
    if m <= 2:
        return SparsePlan("select", 8, 1024 if k >= 1024 else 256, block_m=m, warps=4, stages=3)
    if capability < 80:  # no tensor cores for this product: every thread holds all that it multiplies
        return SparsePlan("expand", 32, 32, 16, warps=4, stages=1, splits=max(1, min(4, k // 128)))
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    tiles = -(-n // 64) * -(-m // block_m)
    block_k = 128
    splits = max(1, min(2 * multiprocessors // tiles, -(-k // (4 * block_k)), 16))
    return SparsePlan("expand", 64, block_k, block_m, warps=4, stages=3, splits=splits)


def candidates(m: int, n: int, k: int, multiprocessors: int = 132) -> Iterator[SparsePlan]:
    """What the sweep tries for a shape."""
    if m <= 4:
        for block_n in (2, 4, 8, 16):
            for block_k in (256, 512, 1024, 2048):
                for warps in (1, 2, 4, 8):
                    values = m * block_n * block_k // 2 // (32 * warps)  # a thread
                    if 8 <= values <= 64:
                        for stages in (1, 2, 4):
                            yield SparsePlan("select", block_n, block_k, m, warps, stages)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    for block_n in (32, 64, 128):
        for block_k in (64, 128, 256):
            for warps in (4, 8):
                if not 16 <= block_n * block_k // (32 * warps) <= 128:
                    continue
                tiles = -(-n // block_n) * -(-m // block_m)
                most = max(1, 4 * multiprocessors // tiles)
                for splits in sorted({1, max(1, most // 4), max(1, most // 2), most}):
                    if splits <= -(-k // block_k):
                        for stages in (2, 3, 4):
                            yield SparsePlan("expand", block_n, block_k, block_m, warps, stages, splits)
