"""A learner's kernels beside the package's own: one row for each launch, with what it cost.

    ladder = Ladder()
    ladder.run(transpose, (2, 2), (32, 8), x, y, 64, 64)
    ladder.run_file("transpose.cu", ["transpose_padded"], (2, 2), (32, 8), x, y, 64, 64)
    ladder.table()

The package's kernels are those of `llmcourse.vgpu.corpus`, whose counters were read on an H100 as well. On a
GPU the launches run there and have a time; the counters then come from the machine, on copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcourse.hardware import Capability, gpu
from llmcourse.notebook import Table

if TYPE_CHECKING:
    from llmcourse.vgpu.cuda import Kernel
    from llmcourse.vgpu.result import Result

COLUMNS = (
    *("kernel", "active of 32", "diverged", "loaded, bytes", "sectors/load", "sectors/store"),
    *("shared", "conflicts", "barriers", "instructions"),
)

REDUCTIONS = {
    "reduce_1_interleaved": 32,
    "reduce_2_conflicts": 32,
    "reduce_3_sequential": 32,
    "reduce_4_first_add": 16,
    "reduce_5_last_warp": 16,
    "reduce_6_unrolled": 16,
    "reduce_7_shuffle": 8,
}
"""The package's sums of a block, and how many blocks of 128 threads each takes for 4,096 elements."""

MATMULS = {
    "matmul_uncoalesced": ((2, 16), (32, 4)),
    "matmul_naive": ((4, 4), (16, 16)),
    "matmul_tiled_16": ((4, 4), (16, 16)),
    "matmul_tiled_32": ((2, 2), (32, 32)),
    "matmul_registers": ((2, 2), (64,)),
}
"""The package's products, and the grid and block that each takes for 64 × 64 matrices."""
TRANSPOSES = {
    "transpose_read_coalesced": ((2, 16), (32, 4)),
    "transpose_write_coalesced": ((2, 16), (32, 4)),
    "transpose_shared": ((2, 2), (32, 8)),
    "transpose_padded": ((2, 2), (32, 8)),
    "transpose_swizzled": ((2, 2), (32, 8)),
}
"""The same of the transposes."""


def of_gpu(name: str) -> dict[str, int]:
    """A GPU of `llmcourse.hardware` as plain numbers: its SMs, and what each of them has."""
    found = gpu(name)
    return sm(found.capability, found.sms)


def sm(capability: Capability, sms: int) -> dict[str, int]:
    """The same of any compute capability."""
    return {
        "sms": sms,
        "max_warps": capability.max_warps,
        "max_blocks": capability.max_blocks,
        "registers": capability.registers,
        "register_unit": capability.register_unit,
        "partitions": capability.partitions,
        "shared": capability.shared_per_sm,
        "shared_unit": capability.shared_unit,
        "shared_reserved": capability.shared_reserved,
    }


class Ladder:
    """Launches of one notebook, in order. `results` holds each kernel's last, by its name."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}

    def run(self, kernel: Kernel, grid: Any, block: Any, *arguments: object) -> Result:
        """Launch `kernel[grid, block](*arguments)`, counted. Arrays are written in place."""
        result = kernel[grid, block](*arguments, counters=True)
        self.results[kernel.plain] = result
        return result

    def run_file(self, file: str, names: Sequence[str], grid: Any, block: Any, *arguments: object) -> None:
        """Launch kernels of one of the package's files, each on the same arguments."""
        from llmcourse.vgpu import cuda
        from llmcourse.vgpu.corpus.cases import KERNELS

        module = cuda.compile((KERNELS / file).read_text(encoding="utf-8"), name=file)
        for name in names:
            self.run(module[name], grid, block, *arguments)

    def table(self, note: str = "") -> Table:
        """A row for each kernel; on a GPU with its time."""
        timed = any(r.where == "gpu" for r in self.results.values())
        rows = [_row(name, result, timed) for name, result in self.results.items()]
        return Table([*COLUMNS, *(["µs, one launch"] if timed else [])], rows, note=note)


def _row(name: str, result: Result, timed: bool) -> list[Any]:
    counters = result.counters
    assert counters is not None  # every launch here is counted
    total = counters.total
    shared = sum(total[f"shared_{kind}_requests"] for kind in ("load", "store", "atomic"))
    row: list[Any] = [
        name,
        f"{counters.active_threads:.1f}",
        total["divergent_branches"],
        total["global_load_bytes"],
        f"{counters.global_load_sectors_per_request:.1f}",
        f"{counters.global_store_sectors_per_request:.1f}",
        shared,
        counters.bank_conflicts,
        total["barriers"],
        total["instructions"],
    ]
    if timed:
        seconds = result.seconds
        row.append("–" if seconds is None else f"{1e6 * seconds:,.1f}")
    return row
