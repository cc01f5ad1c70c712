"""Which rung of the matmul ladder, and which tiles, for given shapes, layouts and device.

A `Choice` says why, so that a reader who expected the tensor cores' best path and did not get it can see
what to change (`pick(a, b).why`). The tile sizes come from a sweep on an H100
(`python -m llmcourse.bench.matmul_sweep`); on other devices they are what compiles without register spills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RUNGS = {
    "reference": "torch.matmul",
    "naive": "one program a tile, in row-major order",
    "grouped": "one program a tile, in bands that share rows in the L2 cache",
    "descriptor": "grouped, tiles moved by tensor descriptors (TMA)",
    "persistent": "one program a multiprocessor, the next tile's loads under this tile's end",
    "split_k": "a few rows: K cut into parts so that every multiprocessor loads",
}
SKINNY = 64
SHARED_BYTES = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
ALIGNMENT = 16


@dataclass(frozen=True)
class Config:
    """Tile sizes (elements), warps a program, loads in flight (stages), and a rung's own switches."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    splits: int = 1
    subtiles: int = 1
    flatten: bool = True

    def loop_bytes(self, itemsize: int) -> int:
        """Shared memory of the load pipeline."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.stages


@dataclass(frozen=True)
class Choice:
    """rung: a key of RUNGS; why: the reason in words; config: None for the reference."""

    rung: str
    why: str
    config: Config | None = None


# Of several tile shapes the one that wastes least of the last wave is taken (`best_tiles`). The second
# number is the share of the largest tile's rate that a smaller tile reaches once the device is full, from
# the same sweep. 64 × 128 wins at 1024³, where larger tiles leave multiprocessors without one. A tile that
# is finished whole (subtiles=1) with GELU runs out of registers where a thread holds 128 elements of it.
HOPPER_16 = (
    (Config(128, 256, 64, 8, 3, subtiles=2), 1.0),
    (Config(256, 128, 64, 8, 4, subtiles=2), 0.98),
    (Config(128, 128, 64, 8, 5, flatten=False), 0.92),
    (Config(64, 256, 64, 4, 5, subtiles=2), 0.9),
    (Config(64, 128, 128, 4, 4, subtiles=2, flatten=False), 0.74),
    (Config(64, 64, 64, 4, 6, flatten=False), 0.44),
)
HOPPER_8 = (
    (Config(128, 256, 128, 8, 3, group_m=16, subtiles=2), 1.0),
    (Config(256, 128, 128, 8, 4, subtiles=2), 0.98),
    (Config(128, 128, 128, 4, 6, subtiles=2), 0.94),
    (Config(64, 256, 128, 4, 5, subtiles=2), 0.92),
    (Config(64, 128, 256, 4, 4, subtiles=2), 0.8),
    (Config(64, 64, 256, 4, 5, subtiles=2), 0.54),
)
# A second accumulator beside the first, so that 128 × 256 would need more registers than there are.
HOPPER_8_PRECISE = (
    (Config(128, 128, 256, 8, 3), 1.0),
    (Config(64, 128, 128, 4, 5), 0.74),
    (Config(64, 64, 128, 4, 6, subtiles=2, flatten=False), 0.47),
)
# With one program a tile, the end of a 128 × 256 tile hides behind nothing, and 128 × 128 was faster.
DESCRIPTOR_16 = (
    (Config(128, 128, 64, 4, 5, subtiles=2), 1.0),
    (Config(64, 256, 64, 4, 4, group_m=16, subtiles=2), 0.97),
    (Config(64, 128, 64, 4, 6), 0.75),
    (Config(64, 64, 64, 4, 5), 0.45),
)
GROUPED = {
    # (least capability, bytes an element), for lines that start on multiples of 16 bytes
    (75, 2): Config(64, 64, 16, 4, 2),
    (75, 4): Config(64, 64, 16, 4, 2),
    (80, 1): Config(128, 128, 64, 8, 3),
    (80, 2): Config(128, 128, 32, 8, 4),
    (80, 4): Config(64, 64, 32, 8, 3),
    (90, 1): Config(128, 128, 64, 8, 4),
    (90, 2): Config(128, 128, 64, 8, 5),
    (90, 4): Config(64, 64, 32, 8, 3),
}
# Lines that do not: loads of single elements, which pass through registers on their way to shared memory.
UNALIGNED = {(90, 2): Config(128, 64, 32, 8, 4)}
INTERPRETED = Config(32, 32, 32, 4, 2, group_m=2, subtiles=2)


def pick(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    *,
    out_itemsize: int = 0,
    capability: int | None = None,
    multiprocessors: int | None = None,
    fast_accum: bool = True,
) -> Choice:
    """The rung and tiles for a [M, K] times b [K, N]; `out` if the result's place is given.

    out_itemsize   of a new result, in bytes (0: a's, or 2 for fp8)
    capability, multiprocessors    of the device to plan for; None asks the device of `a`
    """
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, n, k):
        return Choice("reference", f"an empty product ({m} × {k} by {k} × {n})")
    if capability is None:
        if not a.is_cuda:
            return Choice("reference", "the tensors are on the CPU")
        capability, multiprocessors = device_of(a)
    size = a.dtype.itemsize
    if size == 1 and capability < 89:
        return Choice(
            "reference", f"sm_{capability} has no fp8 tensor cores; Ada and Hopper (sm_89, sm_90) do"
        )
    if m <= SKINNY and capability >= 80:
        return Choice(
            "split_k",
            f"{m} rows: reading B is what takes time",
            skinny(m, n, k, size, multiprocessors or 108),
        )
    if capability < 90:
        return Choice("grouped", f"sm_{capability} has no TMA", grouped(capability, size))
    if size == 4:
        return Choice(
            "grouped", "float32 in full precision runs on ordinary multiply-adds", grouped(capability, 4)
        )
    if reason := no_descriptor(a, b, out, out_itemsize=out_itemsize):
        return Choice("grouped", reason, grouped(capability, size, aligned=not no_input_descriptor(a, b)))
    tiles = best_tiles(m, n, tiles_for(size, fast_accum), multiprocessors or 132)
    return Choice("persistent", "every tensor fits a descriptor", tiles)


def tiles_for(
    itemsize: int, fast_accum: bool = True, rung: str = "persistent"
) -> tuple[tuple[Config, float], ...]:
    """The tile shapes that Hopper's rungs choose from."""
    if rung == "descriptor" and itemsize == 2:
        return DESCRIPTOR_16
    return HOPPER_16 if itemsize == 2 else HOPPER_8 if fast_accum else HOPPER_8_PRECISE


def device_of(x: Tensor) -> tuple[int, int]:
    """Compute capability (e.g. 90) and number of multiprocessors."""
    import torch

    p = torch.cuda.get_device_properties(x.device)
    return p.major * 10 + p.minor, p.multi_processor_count


def grouped(capability: int, itemsize: int, *, aligned: bool = True) -> Config:
    """The pointer rung's tiles, of the newest device not newer than this one."""
    key = max(key for key in GROUPED if key[0] <= max(capability, 75) and key[1] == itemsize)
    return GROUPED[key] if aligned else UNALIGNED.get(key, GROUPED[key])


def skinny(m: int, n: int, k: int, itemsize: int, multiprocessors: int) -> Config:
    """Tiles for few rows: enough parts of K for about two programs a multiprocessor."""
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n, block_k = (64, 128) if itemsize < 4 else (32, 64)
    tiles = -(-m // block_m) * -(-n // block_n)
    parts = -(-k // block_k)
    splits = max(1, min(2 * multiprocessors // tiles, parts // 4, 16))
    return Config(block_m, block_n, block_k, 4, 3, splits=splits)


def best_tiles(m: int, n: int, table: tuple[tuple[Config, float], ...], multiprocessors: int) -> Config:
    """The tile shape that finishes first: waves of tiles × work of a tile / rate of its shape."""

    def seconds(entry: tuple[Config, float]) -> float:
        config, rate = entry
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        return -(-tiles // multiprocessors) * config.block_m * config.block_n / rate

    return min(table, key=seconds)[0]


def no_descriptor(a: Tensor, b: Tensor, out: Tensor | None = None, *, out_itemsize: int = 0) -> str:
    """Why tensor descriptors cannot describe these matrices and their result; empty if they can."""
    if reason := no_input_descriptor(a, b):
        return reason
    if out is not None:
        return _indescribable("out", out, out.stride(0), out.stride(1))
    size = out_itemsize or max(a.dtype.itemsize, 2)
    return _uneven("the result", b.shape[1], size) if b.shape[1] * size % ALIGNMENT else ""


def no_input_descriptor(a: Tensor, b: Tensor) -> str:
    """Why a descriptor cannot describe what is read; empty if it can: then its loads can be wide as well."""
    if a.dtype.itemsize == 1 and not (a.stride(1) == 1 and b.stride(0) == 1):
        return "Hopper multiplies fp8 only from tiles in which K is contiguous: rows of a, columns of b"
    reasons = (_indescribable(name, x, max(x.stride()), min(x.stride())) for name, x in (("a", a), ("b", b)))
    return next(filter(None, reasons), "")


def _indescribable(name: str, x: Tensor, outer: int, inner: int) -> str:
    if inner != 1:
        return f"{name} has no contiguous dimension (strides {tuple(x.stride())})"
    if x.data_ptr() % ALIGNMENT:
        return f"{name} does not start on a multiple of {ALIGNMENT} bytes"
    return _uneven(name, outer, x.dtype.itemsize) if outer * x.dtype.itemsize % ALIGNMENT else ""


def _uneven(name: str, elements: int, itemsize: int) -> str:
    apart = f"{elements} elements ({elements * itemsize} bytes) apart"
    return f"{name}'s lines are {apart}, not a multiple of {ALIGNMENT} bytes"


def tile_order(tiles_m: int, tiles_n: int, group_m: int = 1) -> Iterator[tuple[int, int]]:
    """(row, column) of tile 0, 1, 2 …, as `grouped_tile` numbers them; 1 is the naive order."""
    for tile in range(tiles_m * tiles_n):
        first = tile // (group_m * tiles_n) * group_m
        height = min(tiles_m - first, group_m)
        within = tile - first * tiles_n
        yield first + within % height, within // height


def wave_tiles(
    m: int, n: int, config: Config, *, programs: int, group_m: int, wave: int = 0
) -> list[tuple[int, int]]:
    """(row, column) of the tiles that run together: `programs` at a time, in the order of their numbers."""
    order = tile_order(-(-m // config.block_m), -(-n // config.block_n), group_m)
    return list(islice(order, wave * programs, (wave + 1) * programs))


def wave_bytes(
    m: int, n: int, k: int, config: Config, *, programs: int, itemsize: int, group_m: int, wave: int = 0
) -> int:
    """Bytes of A and B that a wave's tiles need, each counted once: what is read if L2 serves re-reads."""
    tiles = wave_tiles(m, n, config, programs=programs, group_m=group_m, wave=wave)
    rows = sum(min(config.block_m, m - i * config.block_m) for i in {i for i, _ in tiles})
    columns = sum(min(config.block_n, n - j * config.block_n) for j in {j for _, j in tiles})
    return (rows + columns) * k * itemsize


def asked_bytes(
    m: int, n: int, k: int, config: Config, *, itemsize: int, out_itemsize: int
) -> tuple[int, int]:
    """(loaded, stored) bytes that all programs ask for: every tile-column re-reads A, every tile-row B."""
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    return (tiles_n * m + tiles_m * n) * k * itemsize, m * n * out_itemsize
