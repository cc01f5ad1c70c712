"""How the 2:4 kernels are launched: which of the two, and the tiles. Speed only; results do not depend on it.

The figures that chose these plans come from `bench.sparse24 --sweep` once it has run on a GPU; `candidates`
is what it tries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
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
    """What the sweep tries for a shape: enough to see which way is better, few enough to compile."""
    if m <= 4:
        for block_n, block_k, warps in product((2, 4, 8, 16), (512, 1024, 2048), (1, 2, 4, 8)):
            if m * block_n * block_k // (64 * warps) in (16, 32, 64):  # values that a thread holds
                for stages in (1, 3):
                    yield SparsePlan("select", block_n, block_k, m, warps, stages)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    for block_n, block_k, warps in product((32, 64, 128), (64, 128, 256), (4, 8)):
        tiles = -(-n // block_n) * -(-m // block_m)
        if block_n * block_k // (32 * warps) not in (32, 64):
            continue
        for splits in (1, 2, 4, 8):
            # At least half a wave of programs, at most four, and two steps for each.
            enough = multiprocessors // 2 <= tiles * splits <= 4 * multiprocessors
            if enough and 2 * splits * block_k <= k:
                for stages in (2, 4):
                    yield SparsePlan("expand", block_n, block_k, block_m, warps, stages, splits)
