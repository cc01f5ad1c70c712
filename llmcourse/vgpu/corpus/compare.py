"""The machine beside the hardware: the same kernels, the same counters.

    python -m llmcourse.vgpu.corpus.compare            the tables below, from the recorded readings

The machine executes PTX, the GPU executes SASS, which `ptxas` makes of it. Global requests, sectors and bank
conflicts depend on the accesses alone, so they must be equal wherever ptxas left the accesses as they were;
where it did not, `EXCEPTIONS` says what it did and which line of SASS shows it. Counts of instructions have
no reason to be equal (one PTX instruction can be several of SASS, or none), and are compared for orientation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from llmcourse.bench.records import Record, recorded
from llmcourse.vgpu.corpus.cases import CASES, Case
from llmcourse.vgpu.counters import NCU_NAMES
from llmcourse.vgpu.isa import Module
from llmcourse.vgpu.machine import execute
from llmcourse.vgpu.nvrtc import compile_source
from llmcourse.vgpu.ptx import parse

EXACT = (
    "global_load_requests",
    "global_load_sectors",
    "global_store_requests",
    "global_store_sectors",
    "shared_load_bank_conflicts",
    "shared_store_bank_conflicts",
)
"""Counters that equal Nsight Compute's, case by case."""

_REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op_{}.sum"
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op_{}.sum"

OTHERS: dict[str, tuple[str, ...]] = {
    "global_atomic_requests": (_REQUESTS.format("atom"), _REQUESTS.format("red")),
    "global_atomic_sectors": (_SECTORS.format("atom"), _SECTORS.format("red")),
    "shared_atomic_bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_atom.sum",),
    "shared_load_wavefronts": (NCU_NAMES["shared_load_wavefronts"],),
    "shared_store_wavefronts": (NCU_NAMES["shared_store_wavefronts"],),
    "shared_copy_bank_conflicts": (NCU_NAMES["shared_copy_bank_conflicts"],),
    "local_load_sectors": (NCU_NAMES["local_load_sectors"],),
    "local_store_sectors": (NCU_NAMES["local_store_sectors"],),
    "instructions": ("smsp__inst_executed.sum",),
    "thread_instructions": ("smsp__thread_inst_executed.sum",),
    "branches": ("smsp__inst_executed_op_branch.sum",),
    "divergent_branches": ("smsp__sass_branch_targets_threads_divergent.sum",),
}
"""Counters compared for orientation: ours → the metrics whose sum it stands for."""

WHY: dict[str, str] = {
    "global_atomic_requests": "equal",
    "global_atomic_sectors": "ptxas adds up a warp's additions to one word (REDUX), then issues one",
    "shared_atomic_bank_conflicts": "equal",
    "shared_load_wavefronts": "ptxas merges loads of neighbouring words (LDS.64, LDS.128)",
    "shared_store_wavefronts": "as for loads (STS.64, STS.128)",
    "shared_copy_bank_conflicts": "equal",
    "local_load_sectors": "as for shared loads; lanes meet at other places in loops that ptxas unrolled",
    "local_store_sectors": "as for local loads",
    "instructions": "SASS is not PTX: addresses in one instruction, constants in operands, unrolling, moves",
    "thread_instructions": "as for instructions",
    "branches": "ptxas predicates short branches, and unrolls loops",
    "divergent_branches": "a branch that became a predicate cannot diverge",
}
"""Why a counter of `OTHERS` may differ from the hardware's."""


@dataclass(frozen=True)
class Changed:
    """A kernel whose accesses ptxas changed: what it did, and a pattern of the SASS that shows it."""

    what: str
    sass: str


EXCEPTIONS: dict[str, Changed] = {
    "scan_blelloch": Changed(
        "two neighbouring words move as one of 64 bits, whose two wavefronts are no conflict",
        r"(LDS|STS)\.64",
    ),
    "sparse_rows": Changed(
        "the loop over a row is unrolled further, so lanes with rows of different lengths load apart",
        r"LDG\.E R\d+, desc\[UR\d+\]\[R\d+\.64\+0x2c\]",
    ),
    "ragged_sum": Changed(
        "the loop over a row is unrolled by 16, 8 and 4, so lanes with rows of different lengths load apart",
        r"LDG\.E R\d+, desc\[UR\d+\]\[R\d+\.64\+0x3c\]",
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One case on both: `ours` by our names, `hardware` by Nsight Compute's metrics."""

    case: Case
    ours: Mapping[str, int]
    hardware: Mapping[str, float]

    @property
    def different(self) -> dict[str, tuple[int, int]]:
        """Exact counter → (machine's, hardware's), where they are not equal."""
        pairs = {name: (self.ours[name], self.of(NCU_NAMES[name])) for name in EXACT}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def of(self, *metrics: str) -> int:
        """The sum of some metrics; one that is not recorded read 0."""
        return int(sum(self.hardware.get(metric, 0) for metric in metrics))


@lru_cache(maxsize=1)
def readings() -> Record:
    """What Nsight Compute read on the recorded device."""
    return recorded("ncu")


@lru_cache(maxsize=64)
def module_of(file: str) -> Module:
    source = next(case.source for case in CASES if case.file == file)
    return parse(compile_source(source, "sm_90", name=file).ptx)


def compare(case: Case) -> Comparison:
    """Run a case on the machine and put the recorded readings beside it.

    Raises   AssertionError if the machine computes wrong values: its counts would mean nothing.
    """
    module = module_of(case.file)
    arguments = case.arguments()
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    run = execute(
        module.kernels[case.kernel],
        module,
        case.grid,
        case.block,
        arguments,
        dynamic_shared=case.dynamic_shared,
    )
    wrong = case.wrong(before, arguments)
    assert wrong is None, f"{case.name}: {wrong}"
    row: dict[str, Any] = readings().row(name=case.name)
    return Comparison(case, run.counters.total, row["metrics"])


def evidence(kernel: str) -> list[str]:
    """The SASS lines that show what ptxas did to a kernel of `EXCEPTIONS`."""
    lines: list[str] = recorded("ncu_sass").row(name=kernel)["sass"]
    return [line for line in lines if re.search(EXCEPTIONS[kernel].sass, line)]


def everything() -> Iterator[Comparison]:
    """All cases, in order."""
    for case in CASES:
        yield compare(case)


def agreement(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """For each counter of `OTHERS`: the cases in which it counts, those in which it is equal, how far off.

    ratio   the middle of machine / hardware over the cases where the hardware counted
    """
    rows = []
    for name, metrics in OTHERS.items():
        pairs = [(c.ours[name], c.of(*metrics)) for c in comparisons]
        counted = [(a, b) for a, b in pairs if a or b]
        ratios = [a / b for a, b in counted if b]
        rows.append(
            {
                "counter": name,
                "cases": len(counted),
                "equal": sum(a == b for a, b in counted),
                "ratio": round(float(np.median(ratios)), 2) if ratios else None,
                "why it may differ": WHY[name],
            }
        )
    return rows


def main() -> int:
    from llmcourse.notebook import Table

    comparisons = list(everything())
    equal = sum(not c.different for c in comparisons)
    print(f"{readings().caption}: {len(comparisons)} cases, {equal} equal in all of {', '.join(EXACT)}")
    for c in comparisons:
        if c.different:
            shown = ", ".join(f"{name} {a} against {b}" for name, (a, b) in c.different.items())
            print(f"  {c.case.name}: {shown}")
            print(f"    {EXCEPTIONS[c.case.kernel].what}: {evidence(c.case.kernel)[0]}")
    rows = agreement(comparisons)
    print(Table(list(rows[0]), [list(r.values()) for r in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
