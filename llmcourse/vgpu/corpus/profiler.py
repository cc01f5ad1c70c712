"""Nsight Compute on the command line: which metrics it knows, running it, reading what it wrote.

Metric names differ between releases, and one unknown name makes `ncu` refuse a run. So names are chosen
from what `ncu --query-metrics` lists, by the patterns below, and a name that is refused later is dropped.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

HARDWARE = (
    r"l1tex__t_(requests|sectors)_pipe_lsu_mem_(global|local)_op_(ld|st|atom|red)",
    r"l1tex__t_(requests|sectors)_pipe_lsu_mem_global_op_ldgsts(_cache_access|_cache_bypass)?",
    r"l1tex__t_sectors_pipe_lsu_mem_global_op_ld_lookup_(hit|miss)",
    r"l1tex__data_bank_conflicts_pipe_lsu(_mem_(shared|global))?(_op_(ld|st|atom|red))?",
    r"l1tex__data_pipe_lsu_wavefronts(_mem_shared(_op_(ld|st|atom|red))?)?",
    r"smsp__(thread_)?inst_executed",
    r"smsp__inst_executed_op_(generic|global|local|shared|ldgsts|branch|ldsm)\w*",
    r"smsp__inst_executed_pipe_(lsu|adu|tensor\w*)",
    r"lts__t_sectors(_op_(read|write|atom|red))?",
    r"lts__t_(sectors|requests)_srcunit_tex(_op_(read|write|atom|red))?",
    r"dram__bytes_(read|write)",
    r"gpu__time_duration",
)
"""Counters of the hardware itself."""

SOURCE = (
    r"smsp__sass_inst_executed",
    r"smsp__sass_inst_executed_op_(branch|barrier|global|local|shared|ldsm|ldgsts|memory)\w*",
    r"smsp__sass_thread_inst_executed_op_[fdh](add|mul|fma)_pred_on",
    r"smsp__sass_thread_inst_executed(_pred_on)?",
    r"smsp__sass_branch_targets(_threads_(divergent|uniform))?",
    r"smsp__sass_l1tex_\w+_mem_(shared|global|local)(_op_(ld|st|atom|red|ldgsts\w*|ldsm))?",
    r"smsp__sass_data_bytes_mem_(shared|global|local)\w*",
)
"""Counts made by patching the instructions (SASS): independent of what else goes on in the hardware."""

PLAIN = {
    "hardware": (
        "smsp__thread_inst_executed_per_inst_executed.ratio",
        "launch__registers_per_thread",
        "launch__occupancy_limit_blocks",
        "launch__occupancy_limit_registers",
        "launch__occupancy_limit_shared_mem",
        "launch__occupancy_limit_warps",
        "sm__maximum_warps_per_active_cycle_pct",
    ),
    "source": (
        "memory_l1_tag_requests_global",
        "memory_l1_wavefronts_shared",
        "memory_l1_wavefronts_shared_ideal",
        "memory_l2_theoretical_sectors_global",
        "memory_l2_theoretical_sectors_local",
    ),
}
"""Names that are asked for as they are, whether listed or not."""

FALLBACK = {
    "hardware": tuple(
        f"l1tex__{what}_pipe_lsu_mem_global_op_{op}.sum"
        for what in ("t_requests", "t_sectors")
        for op in ("ld", "st")
    )
    + tuple(
        f"l1tex__{what}_mem_shared_op_{op}.sum"
        for what in ("data_pipe_lsu_wavefronts", "data_bank_conflicts_pipe_lsu")
        for op in ("ld", "st")
    ),
    "source": ("smsp__sass_branch_targets_threads_divergent.sum",),
}
"""Seen to exist on an H100: asked for even if the list of names cannot be read."""


def known_metrics(ncu: str) -> set[str]:
    """Base names (without .sum) of this machine's GPU; empty if `ncu` does not say."""
    asked = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=90)
    return set(re.findall(r"^\s*([a-z][a-z0-9]*__\w+)", asked.stdout, re.M))


def choose(known: Iterable[str], group: str) -> list[str]:
    """Full metric names of a group: "hardware" or "source"."""
    patterns = {"hardware": HARDWARE, "source": SOURCE}[group]
    chosen = [f"{n}.sum" for n in sorted(known) if any(re.fullmatch(p, n) for p in patterns)]
    return list(dict.fromkeys([*chosen, *FALLBACK[group], *PLAIN[group]]))


def collect(
    ncu: str, metrics: Sequence[str], command: Sequence[str], report: Path, seconds: float
) -> tuple[list[str], str]:
    """Run `command` under `ncu` into `report` (.ncu-rep); refused names are dropped and it runs again.

    Returns (metrics that were collected, what ncu said). The report is missing if nothing was profiled.
    """
    wanted, said = list(metrics), ""
    for _ in range(4):
        arguments = [ncu, "--clock-control", "none", "-f", "-o", str(report.with_suffix(""))]
        try:
            run = subprocess.run(
                [*arguments, "--metrics", ",".join(wanted), *command],
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return wanted, f"{said}\nncu was stopped after {seconds:.0f} s"
        said = run.stdout + run.stderr
        if report.exists():
            break
        complaints = "\n".join(x for x in said.splitlines() if re.search("ERROR|WARNING|fail", x, re.I))
        refused = [m for m in wanted if re.search(rf"\b{m.split('.')[0]}\b", complaints)]
        kept = [m for m in wanted if m not in refused]
        last = [m for names in FALLBACK.values() for m in names if m in metrics]
        wanted = kept if refused and kept else last
    return wanted, said


def printed(ncu: str, report: Path, page: str, *options: str) -> str:
    """A page of a report as text."""
    run = subprocess.run(
        [ncu, "--import", str(report), "--csv", "--page", page, *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stdout if run.returncode == 0 else ""


def source_page(ncu: str, report: Path) -> str:
    """Counts per SASS instruction; releases name the option differently."""
    for options in (("--print-source", "sass"), ("--source-view", "sass"), ()):
        text = printed(ncu, report, "source", *options)
        if text.strip():
            return text
    return ""


def read_raw(text: str) -> list[tuple[str, dict[str, float]]]:
    """The raw page in CSV → for each profiled launch, in order, (kernel's name, metric → value).

    The page is a heading, a row of units, and a row for each launch; a cell that is no number is left out.
    Releases that print one row for each metric instead are read too.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(lines[start:]))
    launches: dict[int, tuple[str, dict[str, float]]] = {}
    for row in rows:
        if not (row.get("ID") or "").strip().isdigit():
            continue  # the row of units
        _, values = launches.setdefault(int(row["ID"]), (_plain(row.get("Kernel Name") or ""), {}))
        pairs = [(row["Metric Name"], row["Metric Value"])] if "Metric Name" in row else row.items()
        for name, value in pairs:
            number = _number(value)
            if number is not None and re.match(r"memory_|[a-z0-9]+__", name or ""):
                values[name] = number
    return [launches[i] for i in sorted(launches)]


def _plain(kernel: str) -> str:
    """`copy_float(const float *, float *, int)` → copy_float."""
    return kernel.partition("(")[0].split()[-1] if kernel else ""


def _number(text: str | None) -> float | None:
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value
