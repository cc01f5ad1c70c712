"""The launches of the corpus: which kernel, how many threads, which arguments, what must come out.

Shapes are small, so that the PTX machine runs each in a fraction of a second, and many are odd, so that
tails, partial warps and half-empty tiles are part of every comparison.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KERNELS = Path(__file__).parent / "kernels"

Arguments = list[Any]
Index3 = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One launch.

    file            in kernels/
    make_arguments  random generator → NumPy arrays and NumPy scalars, in the kernel's order
    expected        arguments before the launch → {position: the array after it}
    dynamic_shared  bytes
    tolerance       relative, for sums whose order is not the reference's; 0 where every bit must be right
    """

    name: str
    file: str
    kernel: str
    grid: Index3
    block: Index3
    make_arguments: Callable[[np.random.Generator], Arguments]
    expected: Callable[[Sequence[Any]], dict[int, np.ndarray]]
    dynamic_shared: int = 0
    tolerance: float = 0.0

    @property
    def source(self) -> str:
        return (KERNELS / self.file).read_text(encoding="utf-8")

    def arguments(self) -> Arguments:
        """The same arguments on every machine: the generator's seed is the case's name."""
        return self.make_arguments(np.random.default_rng(zlib.crc32(self.name.encode())))

    def wrong(self, before: Sequence[Any], after: Sequence[Any]) -> str | None:
        """The first disagreement with the reference, or None. `after` holds the arguments of a launch."""
        for position, right in self.expected(before).items():
            got = np.asarray(after[position])
            if got.shape != right.shape:
                return f"argument {position}: shape {got.shape}, expected {right.shape}"
            a, b = as_numbers(got), as_numbers(right)
            scale = max(1.0, float(np.abs(b).max(initial=0)))
            bad = np.argwhere(~(np.abs(a - b) <= self.tolerance * scale))
            if len(bad):
                at = tuple(bad[0])
                return (
                    f"argument {position}{list(map(int, at))}: {a[at]}, expected {b[at]} ({len(bad)} differ)"
                )
        return None


def as_numbers(array: np.ndarray) -> np.ndarray:
    """Values as float64."""
    return array.astype(np.float64)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 → the bits of bfloat16, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def ceil(n: int, by: int) -> int:
    return -(-n // by)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def integers(rng: np.random.Generator, low: int, high: int, *shape: int, dtype: Any = np.int32) -> np.ndarray:
    """Uniform in low … high - 1."""
    return rng.integers(low, high, shape).astype(dtype)


def i32(*values: int) -> list[np.int32]:
    return [np.int32(v) for v in values]


def matrices(rows: int, columns: int, *sizes: int) -> Callable[[np.random.Generator], Arguments]:
    """A random matrix, room for another of its shape, and `sizes`."""
    return lambda rng: [floats(rng, rows, columns), np.zeros((rows, columns), np.float32), *i32(*sizes)]


CASES: list[Case] = []


def _add(
    name: str,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    make: Callable[[np.random.Generator], Arguments],
    expected: Callable[[Sequence[Any]], dict[int, np.ndarray]],
    *,
    shared: int = 0,
    tolerance: float = 0.0,
) -> None:
    CASES.append(Case(name, _FILE[0], kernel, _three(grid), _three(block), make, expected, shared, tolerance))


def _three(size: int | tuple[int, ...]) -> Index3:
    x, y, z = (*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3]
    return x, y, z


_FILE = [""]


def _in(file: str) -> None:
    _FILE[0] = file


# ---------------------------------------------------------------------------------------------- copies
_in("copies.cu")


def _copy(
    kernel: str, n: int, dtype: Any, width: int = 1, *, block: int = 128, grid: int = 0, step: int = 1
) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        size = (n, width) if width > 1 else (n,)
        data = rng.integers(-100, 100, size).astype(dtype)
        return [data, np.zeros_like(data), *i32(n)]

    blocks = grid or ceil(n, block)
    _add(f"{kernel}, {n} elements", kernel, blocks, block, make, lambda a: {1: a[0][::step]})


_copy("copy_float", 4096, np.float32)
_copy("copy_float", 4099, np.float32, block=96)
_copy("copy_float", 1, np.float32)
_copy("copy_char", 4096, np.int8)
_copy("copy_char", 1001, np.int8)
_copy("copy_double", 2048, np.float64)
_copy("copy_double", 2047, np.float64)
_copy("copy_float2", 2048, np.float32, 2)
_copy("copy_float2", 1023, np.float32, 2)
_copy("copy_float4", 1024, np.float32, 4)
_copy("copy_float4", 997, np.float32, 4)
_copy("copy_read_only", 4096, np.float32)
_copy("copy_grid_stride", 3000, np.float32, grid=5)
_copy("copy_reversed", 4096, np.float32, step=-1)
_copy("copy_reversed", 1005, np.float32, step=-1)


def _strided_read(kernel: str, n: int, stride: int, dtype: Any = np.float32) -> None:
    _add(
        f"{kernel}, stride {stride}",
        kernel,
        ceil(n, 128),
        128,
        lambda rng: [rng.integers(-99, 99, n * stride).astype(dtype), np.zeros(n, dtype), *i32(n, stride)],
        lambda a: {1: a[0][::stride]},
    )


for _stride in (2, 3, 8, 32):
    _strided_read("copy_strided_read", 2048, _stride)
_strided_read("copy_strided_double", 1000, 3, np.float64)


def _strided_write(n: int, stride: int) -> None:
    def expected(a: Sequence[Any]) -> dict[int, np.ndarray]:
        out = np.zeros(n * stride, np.float32)
        out[::stride] = a[0]
        return {1: out}

    _add(
        f"copy_strided_write, stride {stride}",
        "copy_strided_write",
        ceil(n, 128),
        128,
        lambda rng: [floats(rng, n), np.zeros(n * stride, np.float32), *i32(n, stride)],
        expected,
    )


for _stride in (2, 7, 32):
    _strided_write(1500, _stride)


def _shifted(n: int, shift: int) -> None:
    _add(
        f"copy_shifted by {shift}",
        "copy_shifted",
        ceil(n, 128),
        128,
        lambda rng: [floats(rng, n + shift), np.zeros(n, np.float32), *i32(n, shift)],
        lambda a: {1: a[0][shift:]},
    )


for _shift in (1, 7, 8, 20):
    _shifted(2048, _shift)


def _permuted(mask: int) -> None:
    _add(
        f"copy_permuted, mask {mask}",
        "copy_permuted",
        16,
        128,
        lambda rng: [floats(rng, 2048), np.zeros(2048, np.float32), *i32(mask)],
        lambda a: {1: a[0][np.arange(2048) ^ mask]},
    )


for _mask in (5, 27, 40):
    _permuted(_mask)


def _broadcast(share: int) -> None:
    _add(
        f"copy_broadcast to {share}",
        "copy_broadcast",
        16,
        128,
        lambda rng: [floats(rng, ceil(2000, share)), np.zeros(2000, np.float32), *i32(2000, share)],
        lambda a: {1: a[0][np.arange(2000) // share]},
    )


for _share in (2, 5, 32):
    _broadcast(_share)


def _even(a: Sequence[Any]) -> dict[int, np.ndarray]:
    return {1: np.where(np.arange(1000) % 2 == 0, a[0], 0)}


_add(
    "copy_even_lanes",
    "copy_even_lanes",
    8,
    128,
    lambda rng: [floats(rng, 1000), np.zeros(1000, np.float32), *i32(1000)],
    _even,
)


def _matrix(rows: int, columns: int, block: tuple[int, int]) -> None:
    _add(
        f"copy_matrix {rows}×{columns}, block {block[0]}×{block[1]}",
        "copy_matrix",
        (ceil(columns, block[0]), ceil(rows, block[1])),
        block,
        matrices(rows, columns, rows, columns),
        lambda a: {1: a[0]},
    )


_matrix(40, 64, (8, 8))
_matrix(33, 61, (8, 8))
_matrix(19, 50, (5, 6))
_matrix(24, 70, (32, 4))


def _axpy(kernel: str, dtype: Any, n: int) -> None:
    _add(
        f"{kernel}, {n} elements",
        kernel,
        ceil(n, 256),
        256,
        lambda rng: [dtype(3), *(rng.integers(-50, 50, n).astype(dtype) for _ in range(2)), *i32(n)],
        lambda a: {2: a[0] * a[1] + a[2]},
    )


_axpy("saxpy", np.float32, 5000)
_axpy("daxpy", np.float64, 3001)

# ------------------------------------------------------------------------------------------- transpose
_in("transpose.cu")


def _transpose(
    kernel: str, rows: int, columns: int, block: tuple[int, int], tile: int, *, by_output: bool = False
) -> None:
    """A block makes 32 × `tile` elements; `by_output` counts them in the output's rows and columns."""
    wide, high = (rows, columns) if by_output else (columns, rows)
    _add(
        f"{kernel} {rows}×{columns}",
        kernel,
        (ceil(wide, 32), ceil(high, tile)),
        block,
        lambda rng: [floats(rng, rows, columns), np.zeros((columns, rows), np.float32), *i32(rows, columns)],
        lambda a: {1: a[0].T},
    )


for _rows, _columns in ((64, 96), (65, 47)):
    _transpose("transpose_read_coalesced", _rows, _columns, (32, 4), 4)
    _transpose("transpose_write_coalesced", _rows, _columns, (32, 4), 4, by_output=True)
    for _kernel in ("shared", "padded", "padded_too_little", "swizzled"):
        _transpose(f"transpose_{_kernel}", _rows, _columns, (32, 8), 32)

# --------------------------------------------------------------------------------------- shared memory
_in("shared_memory.cu")


def _shared_read(stride: int, block: int = 128) -> None:
    _add(
        f"shared_strided_read, stride {stride}, {block} threads",
        "shared_strided_read",
        1,
        block,
        lambda rng: [np.zeros(block, np.float32), *i32(stride)],
        lambda a: {0: (np.arange(block) * stride % 4096).astype(np.float32)},
    )


for _stride in (1, 2, 3, 4, 8, 16, 31, 32, 33):
    _shared_read(_stride)
_shared_read(6, 80)


def _shared_write(stride: int) -> None:
    _add(
        f"shared_strided_write, stride {stride}",
        "shared_strided_write",
        1,
        128,
        lambda rng: [np.zeros(128, np.float32), *i32(stride)],
        lambda a: {0: np.arange(127, -1, -1).astype(np.float32)},
        shared=128 * stride * 4,
    )


for _stride in (1, 2, 8, 17, 32):
    _shared_write(_stride)


def _round_trip(kernel: str, stride: int, dtype: Any, width: int = 1) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        data = rng.integers(-100, 100, (96, width) if width > 1 else (96,)).astype(dtype)
        return [data, np.zeros_like(data), *i32(stride)]

    _add(
        f"{kernel}, stride {stride}",
        kernel,
        1,
        96,
        make,
        lambda a: {1: a[0][np.arange(96) ^ 1]},
        shared=96 * stride * width * np.dtype(dtype).itemsize,
    )


for _stride in (1, 4, 128):
    _round_trip("shared_char", _stride, np.int8)
for _stride in (1, 2, 5, 16):
    _round_trip("shared_double", _stride, np.float64)
for _stride in (1, 3, 8):
    _round_trip("shared_float2", _stride, np.float32, 2)
for _stride in (1, 2, 5, 8):
    _round_trip("shared_float4", _stride, np.float32, 4)


def _shared_broadcast(distinct: int, spacing: int) -> None:
    _add(
        f"shared_broadcast of {distinct}, {spacing} apart",
        "shared_broadcast",
        1,
        128,
        lambda rng: [floats(rng, 4096), np.zeros(128, np.float32), *i32(distinct, spacing)],
        lambda a: {1: a[0][np.arange(128) % distinct * spacing]},
    )


for _distinct, _spacing in ((1, 1), (2, 32), (4, 32), (8, 16), (7, 33)):
    _shared_broadcast(_distinct, _spacing)
_add(
    "shared_lookup",
    "shared_lookup",
    3,
    128,
    lambda rng: [floats(rng, 1024), integers(rng, 0, 1024, 384), np.zeros(384, np.float32)],
    lambda a: {2: a[0][a[1]]},
)

# ---------------------------------------------------------------------------------------------- matmul
_in("matmul.cu")


def _matmul(
    kernel: str, m: int, n: int, k: int, tile: tuple[int, int], block: Any, *, transposed: bool = False
) -> None:
    """`tile` is (columns, rows) of C a block makes; integer values, so that every order of adding agrees."""

    def make(rng: np.random.Generator) -> Arguments:
        a, b = integers(rng, -8, 9, m, k, dtype=np.float32), integers(rng, -8, 9, k, n, dtype=np.float32)
        b = np.ascontiguousarray(b.T) if transposed else b
        return [a, b, np.zeros((m, n), np.float32), *i32(m, n, k)]

    across = kernel == "matmul_uncoalesced"
    grid = (ceil(m, tile[0]), ceil(n, tile[1])) if across else (ceil(n, tile[0]), ceil(m, tile[1]))
    _add(
        f"{kernel} {m}×{n}×{k}",
        kernel,
        grid,
        block,
        make,
        lambda a: {2: a[0] @ (a[1].T if transposed else a[1])},
    )


for _m, _n, _k in ((64, 64, 64), (37, 50, 29)):
    _matmul("matmul_naive", _m, _n, _k, (16, 16), (16, 16))
    _matmul("matmul_uncoalesced", _m, _n, _k, (32, 4), (32, 4))
    _matmul("matmul_tiled_16", _m, _n, _k, (16, 16), (16, 16))
    _matmul("matmul_tiled_32", _m, _n, _k, (32, 32), (32, 32))
    _matmul("matmul_tiled_padded", _m, _n, _k, (32, 32), (32, 32))
    _matmul("matmul_transposed_conflicts", _m, _n, _k, (32, 32), (32, 32), transposed=True)
    _matmul("matmul_transposed_padded", _m, _n, _k, (32, 32), (32, 32), transposed=True)
    _matmul("matmul_registers", _m, _n, _k, (32, 32), 64)
_matmul("matmul_vectorised", 64, 64, 64, (32, 32), 64)
_matmul("matmul_vectorised", 96, 32, 40, (32, 32), 64)

# ------------------------------------------------------------------------------------------ reductions
_in("reductions.cu")


def _reduce(kernel: str, n: int, each: int, dtype: Any = np.float32, grid: int | None = None) -> None:
    """`each` elements a block; without `grid`, as many blocks as that needs."""
    blocks = grid or ceil(n, each)

    def expected(a: Sequence[Any]) -> dict[int, np.ndarray]:
        if grid:
            i = np.arange(n)
            return {1: np.bincount(i // 128 % grid, a[0], grid).astype(dtype)}
        padded = np.zeros(blocks * each, dtype)
        padded[:n] = a[0]
        return {1: padded.reshape(blocks, each).sum(1)}

    _add(
        f"{kernel}, {n} elements",
        kernel,
        blocks,
        128,
        lambda rng: [integers(rng, -50, 51, n, dtype=dtype), np.zeros(blocks, dtype), *i32(n)],
        expected,
    )


for _n in (2048, 1900):
    _reduce("reduce_1_interleaved", _n, 128)
    _reduce("reduce_2_conflicts", _n, 128)
    _reduce("reduce_3_sequential", _n, 128)
    _reduce("reduce_4_first_add", _n, 256)
    _reduce("reduce_5_last_warp", _n, 256)
    _reduce("reduce_6_unrolled", _n, 256)
    _reduce("reduce_7_shuffle", _n, 0, grid=3)
_reduce("reduce_double", 1111, 128, np.float64)

# ------------------------------------------------------------------------------------------------ scan
_in("scan.cu")


def _scan(kernel: str, blocks: int, each: int, *, exclusive: bool = False) -> None:
    def expected(a: Sequence[Any]) -> dict[int, np.ndarray]:
        sums = np.cumsum(a[0], axis=1, dtype=np.int32)
        return {1: sums - a[0] if exclusive else sums}

    _add(
        f"{kernel}, {blocks} × {each} elements",
        kernel,
        blocks,
        128,
        lambda rng: [integers(rng, -9, 10, blocks, each), np.zeros((blocks, each), np.int32)],
        expected,
    )


_scan("scan_hillis_steele", 6, 128)
_scan("scan_blelloch", 5, 256, exclusive=True)
_scan("scan_blelloch_padded", 5, 256, exclusive=True)
_scan("scan_warps", 7, 128)

# ------------------------------------------------------------------------------------------- histogram
_in("histogram.cu")


def _histogram(kernel: str, n: int, grid: int, block: int, data: str) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        values = {
            "uniform": lambda: rng.integers(0, 256, n),
            "skewed": lambda: rng.poisson(4, n),
            "all equal": lambda: np.full(n, 7),
        }[data]()
        return [values.astype(np.uint8), np.zeros(64, np.int32), *i32(n)]

    _add(
        f"{kernel}, {n} elements, {data}",
        kernel,
        grid,
        block,
        make,
        lambda a: {1: np.bincount(a[0] % 64, minlength=64).astype(np.int32)},
    )


for _data in ("uniform", "skewed", "all equal"):
    _histogram("histogram_global", 2000, 8, 256, _data)
    _histogram("histogram_shared", 3000, 4, 128, _data)
_histogram("histogram_private", 3000, 4, 64, "uniform")

# --------------------------------------------------------------------------------------------- atomics
_in("atomics.cu")


def _sum_into(kernel: str, cells: int, shared: int = 0) -> None:
    _add(
        f"{kernel}, {cells} cells",
        kernel,
        8,
        128,
        lambda rng: [
            integers(rng, -9, 10, 1000, dtype=np.float32),
            np.zeros(cells, np.float32),
            *i32(1000, cells),
        ],
        lambda a: {1: np.bincount(np.arange(1000) % cells, a[0], cells).astype(np.float32)},
        shared=shared,
    )


for _cells in (1, 5, 48):
    _sum_into("atomic_float_spread", _cells)
_sum_into("atomic_shared_float", 16, 64)


def _largest(a: Sequence[Any]) -> dict[int, np.ndarray]:
    out = a[1].copy()
    np.maximum.at(out, a[0] & 15, a[0])
    return {1: out}


_add(
    "atomic_max",
    "atomic_max",
    6,
    128,
    lambda rng: [integers(rng, -999, 999, 700), np.full(16, -1000, np.int32), *i32(700)],
    _largest,
)


def _drawn(a: Sequence[Any]) -> dict[int, np.ndarray]:
    i = np.arange(600)
    return {0: np.bincount(i % 50, i % 7 + 1, 50).astype(np.int32)}


_add(
    "atomic_ticket",
    "atomic_ticket",
    5,
    128,
    lambda rng: [np.zeros(50, np.int32), np.zeros(600, np.int32), *i32(600, 50)],
    _drawn,
)


def _exchange(stride: int) -> None:
    _add(
        f"atomic_exchange, stride {stride}",
        "atomic_exchange",
        4,
        128,
        lambda rng: [integers(rng, 0, 99, 400 * stride), np.zeros(400, np.int32), *i32(400, stride)],
        lambda a: {1: a[0][::stride]},
    )


_exchange(1)
_exchange(5)


def _swapped(a: Sequence[Any]) -> dict[int, np.ndarray]:
    return {0: np.where(a[0] == a[1], -1, a[0])}


_add(
    "atomic_compare_and_swap",
    "atomic_compare_and_swap",
    4,
    128,
    lambda rng: [integers(rng, 0, 3, 500), integers(rng, 0, 3, 500), *i32(500)],
    _swapped,
)
_add(
    "atomic_count",
    "atomic_count",
    8,
    128,
    lambda rng: [integers(rng, -9, 10, 1000), np.zeros(1, np.int32), *i32(1000)],
    lambda a: {1: np.array([(a[0] > 0).sum()])},
)

# ------------------------------------------------------------------------------------- softmax, norms
_in("softmax.cu")


def _softmax_rows(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


for _rows, _columns in ((6, 512), (5, 333), (3, 50)):
    for _kernel in ("softmax_block", "softmax_online"):
        _add(
            f"{_kernel} {_rows}×{_columns}",
            _kernel,
            _rows,
            128,
            matrices(_rows, _columns, _columns),
            lambda a: {1: _softmax_rows(a[0])},
            tolerance=2e-6,
        )
for _rows, _columns in ((16, 128), (13, 77)):
    _add(
        f"softmax_warp {_rows}×{_columns}",
        "softmax_warp",
        ceil(_rows, 4),
        128,
        matrices(_rows, _columns, _rows, _columns),
        lambda a: {1: _softmax_rows(a[0])},
        tolerance=2e-6,
    )

_in("norms.cu")


def _layernorm(a: Sequence[Any]) -> dict[int, np.ndarray]:
    x = a[0].astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return {3: x * a[1] + a[2]}


def _norm(rows: int, columns: int) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        x, out = matrices(rows, columns)(rng)
        return [x, floats(rng, columns), floats(rng, columns), out, *i32(columns)]

    _add(f"layernorm {rows}×{columns}", "layernorm", rows, 128, make, _layernorm, tolerance=2e-6)


_norm(6, 512)
_norm(4, 301)


def _rmsnorm(a: Sequence[Any]) -> dict[int, np.ndarray]:
    x = a[0].astype(np.float64)
    return {2: x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * a[1]}


def _norm_by_four(rows: int, columns: int) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        x, out = matrices(rows, columns)(rng)
        return [x, floats(rng, columns), out, *i32(columns // 4)]

    _add(f"rmsnorm_float4 {rows}×{columns}", "rmsnorm_float4", rows, 128, make, _rmsnorm, tolerance=2e-6)


_norm_by_four(6, 1024)
_norm_by_four(4, 300)

# --------------------------------------------------------------------------------------------- stencil
_in("stencil.cu")


def _stencil_1d(a: Sequence[Any]) -> dict[int, np.ndarray]:
    return {1: np.convolve(a[0], np.ones(7), "same")}


def _line(kernel: str, n: int) -> None:
    _add(
        f"{kernel}, {n} elements",
        kernel,
        ceil(n, 128),
        128,
        lambda rng: [integers(rng, -9, 10, n, dtype=np.float32), np.zeros(n, np.float32), *i32(n)],
        _stencil_1d,
    )


for _n in (1024, 900):
    _line("stencil_1d_global", _n)
    _line("stencil_1d_shared", _n)


def _five_points(x: np.ndarray) -> np.ndarray:
    p = np.pad(x.astype(np.float64), 1)
    return 0.2 * (p[1:-1, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] + p[:-2, 1:-1] + p[2:, 1:-1])


def _keep_border(a: Sequence[Any]) -> dict[int, np.ndarray]:
    out = a[0].astype(np.float64)
    out[1:-1, 1:-1] = _five_points(a[0])[1:-1, 1:-1]
    return {1: out}


def _blurred(a: Sequence[Any]) -> dict[int, np.ndarray]:
    p = np.pad(a[0].astype(np.float64), 1)
    across = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return {1: (across[:-2] + 2 * across[1:-1] + across[2:]) / 16}


for _rows, _columns in ((32, 96), (29, 75)):
    for _kernel, _expected in (
        ("stencil_2d_global", _keep_border),
        ("stencil_2d_shared", lambda a: {1: _five_points(a[0])}),
        ("stencil_blur", _blurred),
    ):
        _add(
            f"{_kernel} {_rows}×{_columns}",
            _kernel,
            (ceil(_columns, 32), ceil(_rows, 8)),
            (32, 8),
            matrices(_rows, _columns, _rows, _columns),
            _expected,
            tolerance=1e-6,
        )

# ---------------------------------------------------------------------------------------------- gather
_in("gather.cu")


def _gather(order: str) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        index = integers(rng, 0, 5000, 1500)
        return [
            floats(rng, 5000),
            np.sort(index) if order == "sorted" else index,
            np.zeros(1500, np.float32),
            *i32(1500),
        ]

    _add(f"gather, {order} indices", "gather", 12, 128, make, lambda a: {2: a[0][a[1]]})


_gather("random")
_gather("sorted")


def _scattered(a: Sequence[Any]) -> dict[int, np.ndarray]:
    out = np.zeros(3000, np.float32)
    out[a[1]] = a[0]
    return {2: out}


_add(
    "scatter, random indices",
    "scatter",
    12,
    128,
    lambda rng: [
        floats(rng, 1500),
        rng.permutation(3000)[:1500].astype(np.int32),
        np.zeros(3000, np.float32),
        *i32(1500),
    ],
    _scattered,
)


def _embedding(width: int) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        table, tokens = floats(rng, 40, width), integers(rng, 0, 40, 9)
        return [table, tokens, np.zeros((9, width), np.float32), *i32(width)]

    _add(f"embedding, width {width}", "embedding", 9, 64, make, lambda a: {2: a[0][a[1]]})


_embedding(256)
_embedding(75)
_add(
    "array_of_structures",
    "array_of_structures",
    8,
    128,
    lambda rng: [floats(rng, 1000, 5), np.zeros(1000, np.float32), *i32(1000)],
    lambda a: {1: a[0][:, 3] * a[0][:, 4]},
)
_add(
    "structure_of_arrays",
    "structure_of_arrays",
    8,
    128,
    lambda rng: [floats(rng, 1000), floats(rng, 1000), np.zeros(1000, np.float32), *i32(1000)],
    lambda a: {2: a[0] * a[1]},
)
_add(
    "array_of_float4",
    "array_of_float4",
    8,
    128,
    lambda rng: [integers(rng, -99, 99, 1000, 4, dtype=np.float32), np.zeros(1000, np.float32), *i32(1000)],
    lambda a: {1: a[0].sum(1)},
)


def _sparse(rng: np.random.Generator) -> Arguments:
    start = np.concatenate([[0], np.cumsum(rng.integers(0, 12, 300))]).astype(np.int32)
    count = int(start[-1])
    return [
        start,
        integers(rng, 0, 200, count),
        integers(rng, -9, 10, count, dtype=np.float32),
        integers(rng, -9, 10, 200, dtype=np.float32),
        np.zeros(300, np.float32),
        *i32(300),
    ]


def _sparse_product(a: Sequence[Any]) -> dict[int, np.ndarray]:
    rows = np.repeat(np.arange(300), np.diff(a[0]))
    return {4: np.bincount(rows, a[2] * a[3][a[1]], 300).astype(np.float32)}


_add("sparse_rows", "sparse_rows", 3, 128, _sparse, _sparse_product)

# ------------------------------------------------------------------------------------------ divergence
_in("divergence.cu")


def _odd_even(a: Sequence[Any]) -> dict[int, np.ndarray]:
    odd, even = a[0].astype(np.float64), a[0].astype(np.float64)
    for _ in range(8):
        odd = odd * 1.5 - 0.25
    for _ in range(12):
        even = even * 0.5 + 1
    return {1: np.where(np.arange(1000) % 2, odd, even)}


_add(
    "odd_even",
    "odd_even",
    8,
    128,
    lambda rng: [floats(rng, 1000), np.zeros(1000, np.float32), *i32(1000)],
    _odd_even,
    tolerance=1e-6,
)


def _collatz_steps(a: Sequence[Any]) -> dict[int, np.ndarray]:
    steps = np.zeros(500, np.int32)
    for i in range(500):
        v = i + 1
        while v != 1:
            v = 3 * v + 1 if v % 2 else v // 2
            steps[i] += 1
    return {0: steps}


_add("collatz", "collatz", 4, 128, lambda rng: [np.zeros(500, np.int32), *i32(500)], _collatz_steps)


def _early(a: Sequence[Any]) -> dict[int, np.ndarray]:
    i = np.arange(1000)
    return {1: np.where(i % 128 // 32 < 3, a[0] * 2, 0)}


_add(
    "early_exit",
    "early_exit",
    8,
    128,
    lambda rng: [floats(rng, 1000), np.zeros(1000, np.float32), *i32(1000, 3)],
    _early,
)


def _four(a: Sequence[Any]) -> dict[int, np.ndarray]:
    x, i = a[0], np.arange(len(a[0]))
    ways = [x + np.roll(x, -1), x * np.roll(x, -2), x - np.roll(x, -3), np.sqrt(x)]
    return {1: np.choose(i & 3, ways)}


_add(
    "four_ways",
    "four_ways",
    7,
    128,
    lambda rng: [np.abs(floats(rng, 801)), np.zeros(801, np.float32), *i32(801)],
    _four,
    tolerance=1e-6,
)
_add(
    "ragged_sum",
    "ragged_sum",
    3,
    96,
    lambda rng: [
        integers(rng, -9, 10, 250, 24, dtype=np.float32),
        integers(rng, 0, 25, 250),
        np.zeros(250, np.float32),
        *i32(250, 24),
    ],
    lambda a: {2: np.where(np.arange(24) < a[1][:, None], a[0], 0).sum(1)},
)
_add(
    "binary_search",
    "binary_search",
    4,
    128,
    lambda rng: [
        np.sort(integers(rng, 0, 9999, 777)),
        integers(rng, 0, 9999, 500),
        np.zeros(500, np.int32),
        *i32(777, 500),
    ],
    lambda a: {2: np.searchsorted(a[0], a[1])},
)

# ----------------------------------------------------------------------------------------------- warps
_in("warps.cu")


def _of_warps(x: np.ndarray, threads: int) -> np.ndarray:
    out = np.zeros(threads, x.dtype)
    out[: len(x)] = x
    return out.reshape(-1, 32)


_add(
    "warp_reduce",
    "warp_reduce",
    8,
    128,
    lambda rng: [integers(rng, -99, 99, 1000, dtype=np.float32), np.zeros(32, np.float32), *i32(1000)],
    lambda a: {1: _of_warps(a[0], 1024).sum(1)},
)
_add(
    "warp_reduce_integer",
    "warp_reduce_integer",
    8,
    128,
    lambda rng: [integers(rng, -99, 99, 1000), np.zeros(32, np.int32), *i32(1000)],
    lambda a: {1: _of_warps(a[0], 1024).sum(1)},
)
_add(
    "ballot_count",
    "ballot_count",
    8,
    128,
    lambda rng: [integers(rng, -99, 99, 1000), np.zeros(32, np.int32), *i32(1000)],
    lambda a: {1: (_of_warps(a[0], 1024) > 0).sum(1)},
)


def _compacted(a: Sequence[Any]) -> dict[int, np.ndarray]:
    out = np.zeros((32, 32), np.int32)
    for row, values in zip(out, a[0].reshape(32, 32), strict=True):
        kept = values[values > 0]
        row[: len(kept)] = kept
    return {1: out.reshape(-1), 2: (a[0].reshape(32, 32) > 0).sum(1)}


_add(
    "warp_compact",
    "warp_compact",
    8,
    128,
    lambda rng: [integers(rng, -99, 99, 1024), np.zeros(1024, np.int32), np.zeros(32, np.int32)],
    _compacted,
)
_add(
    "warp_match",
    "warp_match",
    8,
    128,
    lambda rng: [integers(rng, 0, 12, 1024), np.zeros(1024, np.int32)],
    lambda a: {1: (a[0].reshape(32, 32, 1) == a[0].reshape(32, 1, 32)).sum(2).reshape(-1)},
)
_add(
    "warp_rotate",
    "warp_rotate",
    8,
    128,
    lambda rng: [floats(rng, 1024), np.zeros(1024, np.float32), *i32(5)],
    lambda a: {1: np.roll(a[0].reshape(32, 32), -5, axis=1).reshape(-1)},
)

# ------------------------------------------------------------------------------------------------ half
_in("half.cu")
_copy("copy_half", 4096, np.float16)
_copy("copy_half", 1003, np.float16)


def _half_axpy(a: Sequence[Any]) -> dict[int, np.ndarray]:
    return {2: 3 * a[1] + a[2]}


_add(
    "half2_axpy",
    "half2_axpy",
    6,
    128,
    lambda rng: [
        np.full(2, 3, np.float16).view(np.uint32)[0],
        integers(rng, -99, 99, 700, 2, dtype=np.float16),
        integers(rng, -99, 99, 700, 2, dtype=np.float16),
        *i32(700),
    ],
    _half_axpy,
)
_add(
    "half_dot 9×200",
    "half_dot",
    9,
    32,
    lambda rng: [
        integers(rng, -9, 10, 9, 200, dtype=np.float16),
        integers(rng, -9, 10, 9, 200, dtype=np.float16),
        np.zeros(9, np.float32),
        *i32(200),
    ],
    lambda a: {2: (a[0].astype(np.float32) * a[1].astype(np.float32)).sum(1)},
)


def _scaled_bits(a: Sequence[Any]) -> dict[int, np.ndarray]:
    return {1: bfloat16(from_bfloat16(a[0]) * a[2])}


_add(
    "bfloat16_scale",
    "bfloat16_scale",
    8,
    128,
    lambda rng: [bfloat16(floats(rng, 1000)), np.zeros(1000, np.uint16), np.float32(1.7), *i32(1000)],
    _scaled_bits,
)


def _half_transpose(n: int) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        return [integers(rng, -99, 99, n, n, dtype=np.float16), np.zeros((n, n), np.float16), *i32(n)]

    tiles = ceil(n, 32)
    _add(
        f"half_transpose {n}×{n}",
        "half_transpose",
        (tiles, tiles),
        (32, 8),
        make,
        lambda a: {1: a[0].T},
    )


_half_transpose(64)
_half_transpose(45)

# ---------------------------------------------------------------------------------------- tensor cores
_in("tensor_cores.cu")


def _wmma(kernel: str, m: int, n: int, k: int, dtype: Any, out: Any, tile: int = 16, block: int = 32) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        left, right = integers(rng, -8, 9, m, k), integers(rng, -8, 9, k, n)
        if kernel == "mma_half":
            right = np.ascontiguousarray(right.T)
        if dtype is bfloat16:
            pair = [bfloat16(left.astype(np.float32)), bfloat16(right.astype(np.float32))]
        else:
            pair = [left.astype(dtype), right.astype(dtype)]
        return [*pair, np.zeros((m, n), out), *i32(n, k)]

    def expected(a: Sequence[Any]) -> dict[int, np.ndarray]:
        left, right = (from_bfloat16(x) if dtype is bfloat16 else x.astype(np.float32) for x in a[:2])
        return {2: (left @ (right.T if kernel == "mma_half" else right)).astype(out)}

    _add(f"{kernel} {m}×{n}×{k}", kernel, (n // tile, m // 16), block, make, expected)


_wmma("wmma_half", 32, 48, 64, np.float16, np.float32)
_wmma("wmma_half", 16, 16, 16, np.float16, np.float32)
_wmma("wmma_bfloat16", 32, 32, 48, bfloat16, np.float32)
_wmma("wmma_int8", 32, 32, 48, np.int8, np.int32)
_wmma("wmma_half_sums", 32, 32, 16, np.float16, np.float16)
_wmma("wmma_shared_tiles", 32, 64, 48, np.float16, np.float32, tile=32, block=64)
_wmma("wmma_shared_padded", 32, 64, 48, np.float16, np.float32, tile=32, block=64)
_wmma("mma_half", 32, 32, 48, np.float16, np.float32, tile=8)

# ---------------------------------------------------------------------------------------- async copies
_in("async_copies.cu")


def _stream(kernel: str, width: int, blocks: int, tiles: int) -> None:
    size = (blocks, tiles, 64, width) if width > 1 else (blocks, tiles, 64)

    def make(rng: np.random.Generator) -> Arguments:
        data = rng.integers(-9, 10, size).astype(np.float32)
        return [data, np.zeros_like(data[:, 0]), *i32(tiles)]

    _add(f"{kernel}, {tiles} tiles", kernel, blocks, 64, make, lambda a: {1: a[0].sum(1)[:, ::-1]})


_stream("async_float", 1, 4, 6)
_stream("async_float4", 4, 4, 5)
_add(
    "async_columns 64×32 of 40",
    "async_columns",
    2,
    32,
    lambda rng: [floats(rng, 64, 40), np.zeros((64, 32), np.float32), *i32(40)],
    lambda a: {1: a[0][:, :32]},
)

# ------------------------------------------------------------------------------------------- quantised
_in("quantised.cu")


def _packed(rows: int, columns: int) -> None:
    def make(rng: np.random.Generator) -> Arguments:
        return [
            rng.integers(0, 1 << 32, (rows, columns // 8), np.uint32),
            np.exp2(rng.integers(-3, 2, (rows, columns // 32))).astype(np.float32),
            integers(rng, -9, 10, columns, dtype=np.float32),
            np.zeros(rows, np.float32),
            *i32(columns),
        ]

    _add(f"int4_gemv {rows}×{columns}", "int4_gemv", rows, 32, make, _unpacked)


def _unpacked(a: Sequence[Any]) -> dict[int, np.ndarray]:
    rows = len(a[0])
    weight = (a[0][:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.float64) - 8
    weight = weight.reshape(rows, -1) * np.repeat(a[1], 32, axis=1)
    return {3: weight @ a[2]}


_packed(12, 512)
_packed(7, 416)
_add(
    "int8_gemv 10×500",
    "int8_gemv",
    10,
    32,
    lambda rng: [
        integers(rng, -128, 128, 10, 500, dtype=np.int8),
        np.float32(0.25),
        integers(rng, -9, 10, 500, dtype=np.float32),
        np.zeros(10, np.float32),
        *i32(125),
    ],
    lambda a: {3: (a[0].astype(np.float32) @ a[2]) * a[1]},
)

# ----------------------------------------------------------------------------- local, constant memory
_in("local_constant.cu")


def _digits(a: Sequence[Any]) -> dict[int, np.ndarray]:
    counts = [np.bincount([int(c) for c in str(v)], minlength=10) if v else np.zeros(10) for v in a[0]]
    return {1: np.argmax(counts, axis=1)}


_add(
    "local_digits",
    "local_digits",
    3,
    96,
    lambda rng: [
        integers(rng, 0, 1 << 30, 270, dtype=np.uint32),
        np.zeros(270, np.int32),
        *i32(270),
    ],
    _digits,
)
_add(
    "local_sort",
    "local_sort",
    3,
    96,
    lambda rng: [floats(rng, 8, 270), np.zeros((8, 270), np.float32), *i32(270)],
    lambda a: {1: np.sort(a[0], axis=0)},
)
_add(
    "polynomial",
    "polynomial",
    8,
    128,
    lambda rng: [floats(rng, 1000), np.zeros(1000, np.float32), *i32(1000)],
    lambda a: {1: np.polyval([0.0625, 0.125, 0.25, 0.5, 1, 1], a[0].astype(np.float64))},
    tolerance=1e-6,
)
_add(
    "constant_lookup",
    "constant_lookup",
    8,
    128,
    lambda rng: [integers(rng, 0, 999, 1000), np.zeros(1000, np.int32), *i32(1000)],
    lambda a: {1: np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])[a[0] & 15]},
)

assert len({c.name for c in CASES}) == len(CASES), "two cases share a name"
