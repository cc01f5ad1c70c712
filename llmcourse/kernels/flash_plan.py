"""Tile sizes of the FlashAttention kernels: what runs on which GPU, and what a sweep should try.

A plan has tiles for three kernels, since each keeps other things on the chip:

    forward   a block of BLOCK_M queries and its output (float32, registers) stay; keys and values stream by
    dkdv      a block of BLOCK_N keys and values and two sums of their size stay; queries and dO stream by
    dq        a block of BLOCK_M queries, dO and one sum stay; keys and values stream by

Larger tiles that stay mean fewer passes over what streams. Their limit is the registers: 65,536 an SM, 255 a
thread at most; a plan of which any is exceeded spills to memory, and is not shipped
(`tests/kernels/test_flash_compiled.py` compiles each). What streams goes through shared memory, `stages`
blocks at a time.

A plan can be written and read as text, which is how an operator of torch.compile and a record carry it:

    Plan.parse("descriptor 128x64 w4 s3 h1 | pointer 64x128 w8 s2 h1 | pointer 128x64 w8 s2 h1")
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from llmcourse.errors import UnknownNameError
from llmcourse.kernels.launch import power_of_two

RUNGS = {
    "pointer": "tiles by addresses that each thread computes: any strides, any GPU",
    "descriptor": "tiles by the copy engine of Hopper (TMA): strides of multiples of 16 bytes",
    "hopper": "WGMMA and TMA by hand, two groups of warps in turn (flash_hopper.py), forward only",
}
_TILES = re.compile(r"(\w+) (\d+)x(\d+) w(\d+) s(\d+) h(\d+)")


class Tiles(NamedTuple):
    """One kernel's launch.

    rung      a key of RUNGS
    block_m   queries of a tile;  block_n   keys of a tile
    warps     of a program;  stages   blocks on their way at once
    heads     heads whose programs are side by side (`flash_tiles.place`)
    """

    rung: str
    block_m: int
    block_n: int
    warps: int
    stages: int
    heads: int = 1

    def __str__(self) -> str:
        return f"{self.rung} {self.block_m}x{self.block_n} w{self.warps} s{self.stages} h{self.heads}"

    @classmethod
    def parse(cls, text: str) -> Tiles:
        found = _TILES.fullmatch(text.strip())
        if not found or found[1] not in RUNGS:
            raise UnknownNameError(
                f"{text!r} is no plan of a FlashAttention kernel.",
                f"It names a rung ({', '.join(RUNGS)}), a tile, warps, stages and heads.",
                f"{str(Tiles('pointer', 128, 64, 4, 3))!r}.",
            )
        return cls(found[1], *map(int, found.groups()[1:]))


class Plan(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    dkdv: Tiles
    dq: Tiles

    def __str__(self) -> str:
        return " | ".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Plan:
        parts = text.split("|")
        if len(parts) != 3:
            raise UnknownNameError(
                f"{text!r} has {len(parts)} parts.",
                "A plan has tiles for three kernels: forward, dkdv and dq.",
                f"{str(INTERPRETED)!r}.",
            )
        return cls(*map(Tiles.parse, parts))


INTERPRETED = Plan(
    Tiles("pointer", 32, 32, 4, 1, 2), Tiles("pointer", 32, 32, 4, 1, 2), Tiles("pointer", 32, 32, 4, 1, 2)
)
