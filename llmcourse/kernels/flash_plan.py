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

import re
from collections.abc import Sequence
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
        if found and found[1] in RUNGS:
            tiles = cls(found[1], *map(int, found.groups()[1:]))
            square = all(n == power_of_two(n) >= 16 for n in (tiles.block_m, tiles.block_n))
            if (square or tiles.rung == "hopper") and min(tiles[3:]) >= 1:
                return tiles
        raise UnknownNameError(
            f"{text!r} is no plan of a FlashAttention kernel.",
            f"It has a rung ({', '.join(RUNGS)}), a tile of powers of two from 16, warps, stages, heads.",
            f"{str(Tiles('pointer', 128, 64, 4, 3))!r}.",
        )


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
        plan = cls(*map(Tiles.parse, parts))
        if "hopper" in (plan.dkdv.rung, plan.dq.rung):
            raise UnknownNameError(
                f"{text!r} has the rung 'hopper' backward.",
                "It was written by hand for forward only.",
                "'descriptor' or 'pointer' for dkdv and dq.",
            )
        return plan


INTERPRETED = Plan(
    Tiles("pointer", 32, 32, 4, 1, 2), Tiles("pointer", 32, 32, 4, 1, 2), Tiles("pointer", 32, 32, 4, 1, 2)
)


# Forward | dK and dV | dQ, by (least capability, bytes a number, columns of a tile). Head dims of 32 and less
# use 64's; of 256 only forward is launched. The tiles of a T4 and of float32 are for products without tensor
# cores, whose operands take registers: small tiles. A causal mask makes programs of unequal work, of which
# those of several heads are ordered by weight; without a mask one head at a time keeps its keys in the cache.
POINTER = {
    (75, 2, 64): "64x32 w8 s1 h4 | 16x32 w8 s1 h4 | 32x32 w8 s1 h4",
    (75, 2, 128): "16x32 w4 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 2, 256): "16x32 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 64): "32x32 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 128): "16x16 w8 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (75, 4, 256): "16x16 w4 s1 h4 | 16x16 w8 s1 h4 | 16x16 w8 s1 h4",
    (80, 2, 64): "128x64 w8 s3 h4 | 32x64 w4 s2 h4 | 128x64 w8 s2 h4",
    (80, 2, 128): "128x64 w8 s3 h4 | 32x64 w8 s2 h4 | 64x64 w8 s2 h4",
    (80, 2, 256): "64x32 w8 s2 h4 | 32x32 w4 s2 h4 | 64x32 w8 s2 h4",
    (90, 2, 64): "64x64 w4 s3 h8 | 32x64 w4 s3 h8 | 128x64 w8 s3 h8",
    (90, 2, 128): "128x128 w8 s3 h8 | 32x128 w8 s3 h8 | 128x32 w8 s3 h8",
    (90, 2, 256): "64x32 w4 s2 h8 | 32x64 w8 s2 h8 | 64x64 w8 s2 h8",
}
DESCRIPTOR_CAUSAL = {
    (90, 2, 64): "64x64 w4 s3 h8 | 32x64 w4 s3 h8 | 128x64 w4 s3 h8",
    (90, 2, 128): "64x64 w4 s3 h4 | 64x64 w4 s2 h8 | 128x64 w8 s3 h2",
    (90, 2, 256): "128x64 w8 s2 h8 | 64x64 w8 s2 h8 | 64x64 w8 s2 h8",
}
DESCRIPTOR_FULL = {
    (90, 2, 64): "64x128 w4 s3 h1 | 64x64 w4 s3 h1 | 128x64 w4 s3 h1",
    (90, 2, 128): "64x64 w4 s3 h1 | 64x64 w4 s2 h1 | 128x64 w8 s3 h1",
    (90, 2, 256): "128x64 w8 s2 h1 | 64x64 w8 s2 h1 | 64x64 w8 s2 h1",
}
# With a window there is a loop more, and dK and dV of 128 columns need a smaller tile for it.
WINDOWED_DKDV = {("descriptor", 128): "descriptor 32x64 w4 s3 h8"}


class ByHand(NamedTuple):
    """Where the hand-written forward rung is faster than the others.

    queries   from this many on: its tiles are tall, and few of them leave multiprocessors idle
    tiles     of its launch, as text
    """

    queries: int
    tiles: str


# By (head dim, causal); measured on an H100 (`llmcourse/bench/records/flash*.json`).
HOPPER = {
    (64, True): ByHand(4096, "hopper 192x128 w16 s3 h8"),
    (64, False): ByHand(2048, "hopper 192x128 w16 s3 h8"),
    (128, True): ByHand(1024, "hopper 128x128 w12 s2 h8"),
    (128, False): ByHand(1024, "hopper 128x128 w12 s2 h8"),
}

# What a sweep on an H100 tries (16 bits): all compile for sm_90 without spills, causal, and fit.
SWEEP = {
    ("forward", "descriptor", 64): "128x64 w4 s2, 128x64 w4 s3, 128x64 w4 s4, 128x64 w8 s3, 128x128 w8 s2, "
    "128x128 w8 s3, 128x128 w4 s2, 128x32 w4 s4, 64x64 w4 s3, 64x128 w4 s3, 256x64 w8 s3, 128x256 w8 s2",
    ("forward", "pointer", 64): "128x64 w4 s2, 128x64 w4 s3, 128x64 w4 s4, 128x64 w8 s3, 128x128 w8 s2, "
    "128x128 w8 s3, 128x32 w4 s4, 64x64 w4 s3, 64x128 w4 s3, 256x64 w8 s3, 128x256 w8 s2",
    ("dkdv", "descriptor", 64): "64x128 w8 s2, 64x128 w8 s3, 64x64 w4 s2, 64x64 w4 s3, 32x128 w4 s3, "
    "32x128 w8 s3, 32x64 w4 s3",
    (
        "dkdv",
        "pointer",
        64,
    ): "64x128 w8 s2, 64x128 w8 s3, 64x64 w4 s2, 64x64 w4 s3, 32x128 w8 s3, 32x64 w4 s3",
    ("dq", "descriptor", 64): "128x64 w4 s2, 128x64 w4 s3, 128x64 w8 s3, 128x128 w8 s2, 128x128 w8 s3, "
    "64x64 w4 s3, 128x32 w4 s3, 64x128 w4 s2, 256x64 w8 s2",
    ("dq", "pointer", 64): "128x64 w8 s3, 128x128 w8 s2, 128x128 w8 s3, 64x64 w4 s3, 128x32 w4 s3, "
    "64x128 w4 s2, 256x64 w8 s2",
    ("forward", "descriptor", 128): "128x64 w8 s2, 128x64 w8 s3, 128x64 w8 s4, 128x128 w8 s2, 128x128 w8 s3, "
    "64x64 w4 s3, 64x128 w4 s2, 64x128 w4 s3, 128x32 w8 s4, 128x32 w4 s3",
    ("forward", "pointer", 128): "128x64 w8 s2, 128x64 w8 s3, 128x64 w8 s4, 128x128 w8 s2, 128x128 w8 s3, "
    "64x64 w4 s3, 128x32 w8 s4, 128x32 w4 s3",
    ("dkdv", "descriptor", 128): "64x128 w8 s2, 64x128 w8 s3, 32x128 w8 s2, 32x128 w8 s3, 64x64 w4 s2, "
    "64x64 w4 s3, 32x64 w4 s3, 64x64 w8 s2",
    ("dkdv", "pointer", 128): "32x128 w8 s2, 32x128 w8 s3, 64x64 w8 s2",
    ("dq", "descriptor", 128): "128x64 w8 s2, 128x64 w8 s3, 128x128 w8 s2, 64x64 w4 s2, 64x64 w4 s3, "
    "128x32 w8 s3, 64x128 w4 s2",
    (
        "dq",
        "pointer",
        128,
    ): "128x64 w8 s2, 128x64 w8 s3, 128x128 w8 s2, 64x64 w4 s2, 64x64 w4 s3, 128x32 w8 s3",
}
HEADS = (1, 8)
LONG = 1 << 20


def plan_for(
    head_dim: int,
    dtype: torch.dtype,
    capability: int,
    *,
    causal: bool,
    window: int = 0,
    descriptors: bool = True,
    hopper: bool = False,
    queries: int = LONG,
) -> Plan:
    """This device's own plan.

    capability    as 90
    queries       of a sequence
    descriptors   whether the copy engine can read the tensors (`unusable`)
    hopper        whether the hand-written rung can (`flash_hopper.unsupported`)
    """
    key = (max(capability, 75), dtype.itemsize, max(64, power_of_two(head_dim)))
    found = _newest(DESCRIPTOR_CAUSAL if causal else DESCRIPTOR_FULL, key) if descriptors else ""
    plan = _of_rung("descriptor", found) if found else _of_rung("pointer", _newest(POINTER, key))
    if window and (smaller := WINDOWED_DKDV.get((plan.dkdv.rung, key[2]))):
        plan = plan._replace(dkdv=Tiles.parse(smaller))
    by_hand = HOPPER.get((head_dim, causal)) if hopper else None
    if by_hand and queries >= by_hand.queries:
        return plan._replace(forward=Tiles.parse(by_hand.tiles))
    return plan


def _newest(table: dict[tuple[int, int, int], str], key: tuple[int, int, int]) -> str:
    """The entry of the newest device not newer than this one; empty if there is none."""
    fitting = [k for k in table if k[0] <= key[0] and k[1:] == key[1:]]
    return table[max(fitting)] if fitting else ""


def _of_rung(rung: str, text: str) -> Plan:
    return Plan(*(Tiles.parse(f"{rung} {part.strip()}") for part in text.split("|")))


def candidates(kernel: str, head_dim: int, *, heads: Sequence[int] = HEADS) -> list[Tiles]:
    """Tiles for one kernel ("forward", "dkdv", "dq") that a sweep on an H100 should time; D 64 or 128."""
    return [
        Tiles.parse(f"{rung} {tile} h{side_by_side}")
        for (name, rung, columns), tiles in SWEEP.items()
        if name == kernel and columns == head_dim
        for tile in tiles.split(", ")
        for side_by_side in heads
    ]


def sweep(head_dim: int, *, causal: bool, heads: Sequence[int] = HEADS) -> list[Plan]:
    """The H100's own plan, then those that differ from it in one kernel: the three are tuned one by one."""
    own = plan_for(head_dim, torch.bfloat16, 90, causal=causal)
    tried = (
        own._replace(**{kernel: tiles})
        for kernel in Plan._fields
        for tiles in candidates(kernel, head_dim, heads=heads)
    )
    return list(dict.fromkeys((own, *tried)))


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
