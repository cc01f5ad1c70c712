"""What a launch cost, counted for each source line, under our short names and Nsight Compute's.

A *request* is one memory instruction of one warp. A *sector* is 32 bytes of global memory, the unit in which
caches and DRAM move data: a request for 32 neighbouring floats touches 4 sectors, one with a stride of 32
floats touches 32. A *wavefront* is one pass through shared memory's 32 banks: a request needs as many as the
busiest bank has different words to give, and those beyond the least its width needs are *bank conflicts*.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

NCU_NAMES: dict[str, str] = {
    "global_load_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "global_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "global_store_requests": "l1tex__t_requests_pipe_lsu_mem_global_op_st.sum",
    "global_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "local_load_requests": "l1tex__t_requests_pipe_lsu_mem_local_op_ld.sum",
    "local_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum",
    "local_store_requests": "l1tex__t_requests_pipe_lsu_mem_local_op_st.sum",
    "local_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum",
    "shared_load_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "shared_load_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "shared_store_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
    "shared_store_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "shared_copy_wavefronts": "smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum",
    "shared_copy_bank_conflicts": "smsp__sass_l1tex_data_bank_conflicts_pipe_lsu_mem_shared_op_ldgsts.sum",
    "instructions": "smsp__inst_executed.sum",
    "thread_instructions": "smsp__thread_inst_executed.sum",
    "branches": "smsp__sass_inst_executed_op_branch.sum",
    "divergent_branches": "smsp__sass_branch_targets_threads_divergent.sum",
}
"""Our name → Nsight Compute's metric, for the counters that exist there under one name."""

NAMES: tuple[str, ...] = (
    *(
        f"global_{kind}_{what}"
        for kind in ("load", "store")
        for what in ("requests", "sectors", "bytes", "unique_bytes")
    ),
    *(f"global_atomic_{what}" for what in ("requests", "sectors", "bytes", "contention")),
    *(
        f"shared_{kind}_{what}"
        for kind in ("load", "store", "atomic", "copy")
        for what in ("requests", "wavefronts", "bank_conflicts", "bytes")
    ),
    *(f"local_{kind}_{what}" for kind in ("load", "store") for what in ("requests", "sectors")),
    "instructions",
    "thread_instructions",
    "branches",
    "divergent_branches",
    "barriers",
    "flops_fp16",
    "flops_fp32",
    "flops_fp64",
    "flops_tensor",
)


class Counters:
    """The counts of one launch.

    total   name → count over the launch; attributes give the same (`counters.global_load_sectors`)
    lines   line of the CUDA source → name → count
    """

    def __init__(self) -> None:
        self.lines: defaultdict[int, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.whole: dict[str, int] = {}

    def at(self, line: int) -> defaultdict[str, int]:
        return self.lines[line]

    @property
    def total(self) -> dict[str, int]:
        """Every counter of the launch, zeros included, in a fixed order."""
        sums = dict.fromkeys(NAMES, 0)
        for counts in self.lines.values():
            for name, count in counts.items():
                sums[name] += count
        return sums | self.whole

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or name not in NAMES:
            raise AttributeError(f"there is no counter called {name!r}; there are {', '.join(NAMES)}")
        return self.total[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __getitem__(self, name: str) -> int:
        return self.total[name]

    def ncu(self) -> dict[str, int]:
        """The counts under Nsight Compute's metric names."""
        total = self.total
        return {metric: total[name] for name, metric in NCU_NAMES.items()}

    @property
    def global_load_sectors_per_request(self) -> float:
        """4 for neighbouring 4-byte elements, 32 at worst; 0 where nothing was loaded."""
        return _ratio(self.total, "global_load_sectors", "global_load_requests")

    @property
    def global_store_sectors_per_request(self) -> float:
        return _ratio(self.total, "global_store_sectors", "global_store_requests")

    @property
    def active_threads(self) -> float:
        """Threads that took part in an instruction, on average: 32 without divergence."""
        return _ratio(self.total, "thread_instructions", "instructions")

    @property
    def bank_conflicts(self) -> int:
        total = self.total
        return sum(total[f"shared_{kind}_bank_conflicts"] for kind in ("load", "store", "atomic", "copy"))

    @property
    def flops(self) -> int:
        """Floating-point operations of all types; a fused multiply-add counts two."""
        total = self.total
        return sum(total[name] for name in NAMES if name.startswith("flops"))

    def __repr__(self) -> str:
        counted = ", ".join(f"{name}={count}" for name, count in self.total.items() if count)
        return f"Counters({counted})"


def _ratio(total: Mapping[str, int], above: str, below: str) -> float:
    return total[above] / total[below] if total[below] else 0.0
