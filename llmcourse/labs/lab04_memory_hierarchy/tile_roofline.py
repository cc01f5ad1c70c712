"""Exercise `tile_roofline`: what a tile does to a matrix product's place under the roofline."""

from __future__ import annotations

from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.hardware import GPUS

tile_roofline = Exercise(
    "tile_roofline",
    title="A tile under the roofline",
    arguments=("m", "n", "k", "tile", "peak", "bandwidth"),
    shapes=(
        "m, n, k     a is float32 [m, k], b [k, n], c [m, n]; any sizes from 1",
        "tile        a block computes tile × tile elements of c, as in the exercise before; 1 means",
        "            no tiling",
        "peak        of the GPU, float32 operations a second; bandwidth of its memory, bytes a second",
        "returns     (nbytes, intensity, seconds, bound): bytes moved, loads and stores; operations",
        "            for each byte, a multiplication and an addition counted as two; the least time,",
        "            if arithmetic and memory traffic overlap; 'memory' or 'compute', whichever",
        "            takes longer (equal: 'compute')",
    ),
    formula="nbytes = 4·(m·k·⌈n/tile⌉ + k·n·⌈m/tile⌉ + m·n);  seconds = max(2mnk / peak, nbytes / bandwidth)",
    difficulty=2,
    importance=5,
    minutes=20,
    points=4,
    hints=(
        "How often is one element of a fetched if each thread computes one element of c by itself? How "
        "often, if blocks compute tiles of 16 × 16? What if n is 40?",
        "An element of a is needed by every tile in its row of tiles, and there are ⌈n / tile⌉ of those; an "
        "element of b by ⌈m / tile⌉. c is stored once. The time is that of the slower of the two: memory or "
        "arithmetic.",
        "nbytes = 4 * (m * k * -(-n // tile) + k * n * -(-m // tile) + m * n); operations = 2 * m * n * k; "
        "intensity = operations / nbytes; max of operations / peak and nbytes / bandwidth.",
    ),
)

Result = tuple[int, float, float, str]


def expected(*args: float) -> Result:
    """Tile by tile, each fetching what of it lies inside."""
    m, n, k, tile = (int(a) for a in args[:4])
    peak, bandwidth = args[4:]
    rows, columns = -(-m // tile), -(-n // tile)
    nbytes = sum(4 * k * (min(tile, m - tile * i) * columns) for i in range(rows))
    nbytes += sum(4 * k * (min(tile, n - tile * j) * rows) for j in range(columns)) + 4 * m * n
    operations = 2 * m * n * k
    compute, memory = operations / peak, nbytes / bandwidth
    bound = "compute" if compute >= memory else "memory"
    return nbytes, operations / nbytes, max(compute, memory), bound


NAMES = ("nbytes", "intensity", "seconds", "bound")


def _agree(t: Trial, about: tuple[str, ...], *args: float) -> None:
    """Those of the four results that the check is about."""
    got = t.pair(t.call(*args), len(NAMES), "(nbytes, intensity, seconds, bound)")
    for name, value, right in zip(NAMES, got, expected(*args), strict=True):
        if name in about and isinstance(right, str):
            t.equal(value, right, name)
        elif name in about:
            t.close(value, right, name)


def _sizes(t: Trial, unit: int) -> tuple[int, int, int]:
    """Three sizes that differ, multiples of `unit`."""
    first = t.size(2, 9)
    return unit * first, unit * (first + t.size(1, 4)), unit * (first + t.size(5, 9))


@tile_roofline.check("bytes and intensity, where the tiles fit")
def traffic(t: Trial) -> None:
    for tile in (1, 16, 32, t.size(3, 9)):
        _agree(t, ("nbytes", "intensity"), *_sizes(t, tile), tile, 60e12, 3e12)


@tile_roofline.check("tiles at the edges, which are not full, fetch what is there")
def edges(t: Trial) -> None:
    for _ in range(4):
        tile = t.size(5, 40)
        sizes = (tile * t.size(1, 4) + t.size(1, tile - 1) for _ in range(3))
        _agree(t, ("nbytes", "intensity"), *sizes, tile, 60e12, 3e12)
    _agree(t, ("nbytes", "intensity"), 1, 1, 1, 16, 60e12, 3e12)


@tile_roofline.check("how long it takes at least, and which of memory and arithmetic takes that long")
def time(t: Trial) -> None:
    for gpu in GPUS.values():
        size = 64 * t.size(8, 40)
        for tile in (16, 64, 256):
            _agree(t, ("seconds", "bound"), size, size + 64, size, tile, gpu.peak["fp32"], gpu.bandwidth)


def _solved(
    m: int,
    n: int,
    k: int,
    tile: int,
    peak: float,
    bandwidth: float,
    *,
    up: Any = lambda a, b: -(-a // b),
    size: int = 4,
    stores: bool = True,
    swapped: bool = False,
    operations: int = 2,
    together: Any = max,
    inverted: bool = False,
    names: tuple[str, str] = ("compute", "memory"),
) -> Result:
    columns, rows = up(n, tile), up(m, tile)
    if swapped:
        columns, rows = rows, columns
    nbytes = size * (m * k * columns + k * n * rows + (m * n if stores else 0))
    done = operations * m * n * k
    compute, memory = done / peak, nbytes / bandwidth
    intensity = nbytes / done if inverted else done / nbytes if nbytes else 0.0
    return nbytes, intensity, together(compute, memory), names[0] if compute >= memory else names[1]


@tile_roofline.mistake(
    says="a fused multiply-add is counted as one operation",
    tries="2·m·n·k: peaks count the multiplication and the addition.",
    caught_by="traffic",
)
def one_operation(*args: Any) -> Any:
    return _solved(*args, operations=1)


@tile_roofline.mistake(
    says="elements are counted, not bytes",
    tries="4 bytes for a float32.",
    caught_by="traffic",
)
def elements(*args: Any) -> Any:
    return _solved(*args, size=1)


@tile_roofline.mistake(
    says="the stores of c are left out",
    tries="m·n elements more.",
    caught_by="traffic",
)
def no_stores(*args: Any) -> Any:
    return _solved(*args, stores=False)


@tile_roofline.mistake(
    says="a is fetched once for each row of tiles, and b for each column: it is the other way round",
    tries="a once for each of the ⌈n / tile⌉ columns of tiles, b once for each of the ⌈m / tile⌉ rows.",
    caught_by="traffic",
)
def exchanged(*args: Any) -> Any:
    return _solved(*args, swapped=True)


@tile_roofline.mistake(
    says="the tiling is left out: every product fetches its two factors",
    tries="⌈n / tile⌉ times for a, ⌈m / tile⌉ times for b.",
    caught_by="traffic",
)
def untiled(m: int, n: int, k: int, tile: int, *rates: float) -> Any:
    return _solved(m, n, k, 1, *rates)


@tile_roofline.mistake(
    says="the intensity is upside down: bytes for each operation",
    tries="operations / nbytes.",
    caught_by="traffic",
)
def upside_down(*args: Any) -> Any:
    return _solved(*args, inverted=True)


@tile_roofline.mistake(
    says="the number of tiles is rounded down: a partial tile fetches too",
    tries="⌈n / tile⌉, in integers -(-n // tile).",
    caught_by="edges",
)
def rounded_down(*args: Any) -> Any:
    return _solved(*args, up=lambda a, b: a // b)


@tile_roofline.mistake(
    says="the number of tiles is a fraction where they do not fit",
    tries="⌈n / tile⌉: a partial tile fetches the whole row.",
    caught_by="edges",
)
def fractions(*args: Any) -> Any:
    return _solved(*args, up=lambda a, b: a / b)


@tile_roofline.mistake(
    says="tiles at the edges are taken to be full",
    tries="m·k·⌈n / tile⌉: what lies outside of a and b is not fetched.",
    caught_by="edges",
)
def full_tiles(m: int, n: int, k: int, tile: int, peak: float, bandwidth: float) -> Any:
    def up(a: int) -> int:
        return -(-a // tile) * tile

    nbytes = 4 * (up(m) * up(k) * (up(n) // tile) + up(k) * up(n) * (up(m) // tile) + m * n)
    done = 2 * m * n * k
    seconds = max(done / peak, nbytes / bandwidth)
    return nbytes, done / nbytes, seconds, "compute" if done / peak >= nbytes / bandwidth else "memory"


@tile_roofline.mistake(
    says="the two times are added, as if memory waited for the arithmetic",
    tries="max: while some warps wait for memory, others compute.",
    caught_by="time",
)
def added(*args: Any) -> Any:
    return _solved(*args, together=lambda a, b: a + b)


@tile_roofline.mistake(
    says="the shorter of the two times is taken",
    tries="max: both must be done.",
    caught_by="time",
)
def shorter(*args: Any) -> Any:
    return _solved(*args, together=min)


@tile_roofline.mistake(
    says="the two bounds have each other's names",
    tries="'memory' where nbytes / bandwidth is the longer time.",
    caught_by="time",
)
def names_exchanged(*args: Any) -> Any:
    return _solved(*args, names=("memory", "compute"))


@tile_roofline.alternative("by the ridge: the intensity from which on arithmetic takes longer")
def by_the_ridge(m: int, n: int, k: int, tile: int, peak: float, bandwidth: float) -> Any:
    tiles = ((m + tile - 1) // tile, (n + tile - 1) // tile)
    nbytes = 4 * (m * k * tiles[1] + k * n * tiles[0]) + 4 * m * n
    intensity = 2 * m * n * k / nbytes
    rate = min(peak, intensity * bandwidth)
    return nbytes, intensity, 2 * m * n * k / rate, "memory" if intensity < peak / bandwidth else "compute"


@tile_roofline.alternative("as a list, the tiles counted one by one")
def counted(m: int, n: int, k: int, tile: int, peak: float, bandwidth: float) -> Any:
    return list(expected(m, n, k, tile, peak, bandwidth))
