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


# Forward | dK and dV | dQ, by (least capability, bytes a number, columns of a tile).
POINTER = {
    (75, 2, 64): "64x32 w8 s1 h4 | 16x32 w8 s1 h4 | 32x32 w8 s1 h4",
    (75, 2, 128): "16x32 w4 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 2, 256): "16x32 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 64): "32x32 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 128): "16x16 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 256): "16x16 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (80, 2, 64): "128x64 w8 s3 h4 | 32x128 w8 s2 h4 | 128x64 w8 s2 h4",
    (80, 2, 128): "64x64 w8 s2 h4 | 32x64 w8 s3 h4 | 64x64 w8 s2 h4",
    (80, 2, 256): "64x32 w8 s2 h4 | 32x32 w4 s2 h4 | 64x32 w8 s2 h4",
    (90, 2, 64): "128x64 w4 s3 h8 | 64x128 w8 s2 h8 | 128x64 w8 s3 h8",
    (90, 2, 128): "128x64 w8 s3 h8 | 32x128 w8 s3 h8 | 128x64 w8 s3 h8",
    (90, 2, 256): "64x32 w4 s2 h8 | 32x64 w8 s2 h8 | 64x64 w8 s2 h8",
}
DESCRIPTOR = {
    (90, 2, 64): "128x64 w4 s3 h8 | 64x128 w8 s2 h8 | 128x64 w8 s3 h8",
    (90, 2, 128): "128x128 w8 s2 h8 | 64x128 w8 s2 h8 | 128x64 w8 s3 h8",
    (90, 2, 256): "128x64 w8 s2 h8 | 64x64 w8 s2 h8 | 64x64 w8 s2 h8",
}


def plan_for(
    head_dim: int, dtype: torch.dtype, capability: int, *, causal: bool, window: int, descriptors: bool
) -> Plan:
    """This device's own plan.

    capability    as 90;  descriptors   whether the copy engine can read the tensors (`unusable`)
    """
    columns = max(64, power_of_two(head_dim))
    key = (max(capability, 75), dtype.itemsize, columns)
    if descriptors and (found := _newest(DESCRIPTOR, key)):
        return Plan(*(Tiles.parse(f"descriptor {part.strip()}") for part in found.split("|")))
    return Plan(*(Tiles.parse(f"pointer {part.strip()}") for part in _newest(POINTER, key).split("|")))


def _newest(table: dict[tuple[int, int, int], str], key: tuple[int, int, int]) -> str:
    """The entry of the newest device not newer than this one; empty if there is none."""
    fitting = [k for k in table if k[0] <= key[0] and k[1:] == key[1:]]
    return table[max(fitting)] if fitting else ""


def unusable(*tensors: torch.Tensor, packed: bool = False) -> str:
    """Why the copy engine cannot read these tensors [B, H, tokens, D]; empty if it can."""
    if packed:
        return "packed sequences end within a tile, and the copy engine would read on into the next one"
    for x in tensors:
        if x.numel() == 0:
            return "a tensor is empty"
        if x.data_ptr() % 16:
            return "a tensor does not start on a multiple of 16 bytes"
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if stride * x.element_size() % 16 or (stride == 0 and size > 1):
                return f"strides {tuple(x.stride())} of {x.element_size()}-byte numbers"
    return ""
