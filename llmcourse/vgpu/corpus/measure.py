"""Run the corpus on a GPU under Nsight Compute and write down what it read.

    python -m llmcourse.vgpu.corpus.measure --out DIR

writes into DIR the records `ncu` (every counter of every case), `ncu_sass` (the instructions that touch
memory, for the exceptions) and `occupancy`, to be committed under bench/records/, and beside them
`ncu_raw.csv.gz`, `ncu_source.csv.gz` (counts per SASS instruction) and `measure.log`. A case that crashes is
left out of the profiled run and reported; one whose values are wrong is reported and kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmcourse.bench.records import Record, new_record, save
from llmcourse.vgpu.corpus import profiler
from llmcourse.vgpu.corpus.cases import CASES, KERNELS, Case
from llmcourse.vgpu.corpus.sass import by_kernel, disassemble

CHUNK = 70
"""Cases in one process under ncu, so that a failure loses no more than these."""

COMMAND = "python -m llmcourse.vgpu.corpus.measure --out DIR"

NOT_COUNTED = ("device__", "numa", "nvlink", "profiler", "c2c", "gpu__", "sm__maximum")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=220, help="no new profiled run is begun after this")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    measure(options.out, options.seconds, [c for c in CASES if options.only in c.name])


class Log:
    """Says what happens and when, on the terminal and in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        path.write_text("")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        line = f"[{self.seconds:6.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def measure(out: Path, seconds: float, cases: Sequence[Case]) -> None:
    """All of it; what could not be had is missing from the records and named in the log."""
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "measure.log")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        sass = build_all(work, log)
        keep(
            out,
            "occupancy",
            occupancy(work, log),
            ["blocks: cuOccupancyMaxActiveBlocksPerMultiprocessor"],
            log,
        )
        rows = [{"name": kernel, "sass": lines} for kernel, lines in sass.items()]
        keep(
            out, "ncu_sass", rows, ["nvdisasm; instructions that touch memory, branch, wait or multiply"], log
        )
        plain = run_plain(cases, work, log)
        for row in plain.values():
            if row["wrong"]:
                log(f"WRONG {row['name']}: {row['wrong']}")
        sound = [case for case in cases if case.name in plain]
        profiled = profile(sound, work, out, seconds, log)
        results = [
            {
                "name": case.name,
                "file": case.file,
                "kernel": case.kernel,
                "grid": case.grid,
                "block": case.block,
                **({k: v for k, v in plain[case.name].items() if k != "name"} if case.name in plain else {}),
                "metrics": {k: whole(v) for k, v in profiled.get(case.name, {}).items() if v and kept(k)},
            }
            for case in cases
        ]
        notes = [
            "each case launched once under ncu --clock-control none; metrics that read 0 are not listed",
            "of each metric the sum over the GPU's units is kept; a metric that is not listed read 0",
        ]
        keep(out, "ncu", results, notes, log)
    log("done")


def kept(metric: str) -> bool:
    """Whether a reading goes into the record: a sum over the GPU's units or a ratio."""
    counted = metric.endswith((".sum", ".ratio")) or "." not in metric
    return counted and not metric.startswith(NOT_COUNTED)


def whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def build_all(work: Path, log: Log) -> dict[str, list[str]]:
    """Compile every file into `work`; kernel → its SASS lines."""
    from llmcourse.vgpu.corpus.device import Gpu, build

    arch = Gpu().arch
    sass: dict[str, list[str]] = {}
    for path in sorted(KERNELS.glob("*.cu")):
        try:
            compiled = build(path.read_text(encoding="utf-8"), arch, path.name)
        except Exception as error:  # one file's failure must not lose the others
            log(f"{path.name} does not compile: {error}")
            continue
        (work / path.name).with_suffix(".cubin").write_bytes(compiled.cubin)
        sass |= by_kernel(disassemble((work / path.name).with_suffix(".cubin")))
    log(f"{len(list(work.glob('*.cubin')))} files compiled for {arch}, {len(sass)} kernels disassembled")
    return sass


def occupancy(work: Path, log: Log) -> list[dict[str, Any]]:
    from llmcourse.vgpu.corpus.device import Gpu
    from llmcourse.vgpu.corpus.occupancy_grid import rows

    try:
        found = rows(Gpu())
    except Exception as error:  # the counters matter more
        log(f"occupancy failed: {type(error).__name__}: {error}")
        return []
    log(f"{len(found) - 1} combinations of registers, shared memory and threads")
    return found


def worker(folder: Path) -> None:
    """In a process of its own: launch the cases listed in todo.json, a line of done.jsonl for each."""
    from llmcourse.vgpu.corpus.device import run_cases

    names = json.loads((folder / "todo.json").read_text())
    by_name = {case.name: case for case in CASES}
    with (folder / "done.jsonl").open("a") as file:

        def done(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        run_cases([by_name[name] for name in names], folder, done)


def worker_command(work: Path, cases: Sequence[Case]) -> list[str]:
    (work / "todo.json").write_text(json.dumps([case.name for case in cases]))
    (work / "done.jsonl").unlink(missing_ok=True)
    module = [sys.executable, "-m", "llmcourse.vgpu.corpus.measure"]
    return [*module, "--out", str(work), "--worker", str(work)]


def finished(work: Path) -> list[dict[str, Any]]:
    path = work / "done.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_plain(cases: Sequence[Case], work: Path, log: Log) -> dict[str, dict[str, Any]]:
    """Every case without a profiler: what it computed. One that kills its process is left out."""
    done: dict[str, dict[str, Any]] = {}
    todo = [case for case in cases if (work / case.file).with_suffix(".cubin").exists()]
    crashes = 0
    while todo and crashes < 12:
        run = subprocess.run(worker_command(work, todo), capture_output=True, text=True, timeout=120)
        rows = finished(work)
        done |= {row["name"]: row for row in rows}
        todo = todo[len(rows) :]
        if todo:
            crashes += 1
            log(f"CRASHED {todo[0].name}: {run.stderr.strip()[-300:]}")
            todo = todo[1:]
    right = sum(not row["wrong"] for row in done.values())
    log(f"{len(done)} of {len(cases)} cases ran, {right} with the right values")
    return done


def profile(
    cases: Sequence[Case], work: Path, out: Path, seconds: float, log: Log
) -> dict[str, dict[str, float]]:
    """Every case under ncu; case → metric → value. First all hardware counters, then those of the SASS."""
    ncu = shutil.which("ncu") or next(iter(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu"))), None)
    found: dict[str, dict[str, float]] = {case.name: {} for case in cases}
    if ncu is None:
        log("there is no ncu on this machine")
        return found
    known = profiler.known_metrics(ncu)
    log(f"ncu knows {len(known)} metrics")
    raw, source = [], []
    for group in ("hardware", "source"):
        metrics = profiler.choose(known, group)
        log(f"{group}: {len(metrics)} metrics")
        for start in range(0, len(cases), CHUNK):
            if log.seconds > seconds:
                log(f"NO TIME for {group} from case {start} on")
                break
            chunk = cases[start : start + CHUNK]
            report = work / f"{group}_{start}.ncu-rep"
            metrics, said = profiler.collect(ncu, metrics, worker_command(work, chunk), report, 150)
            if not report.exists():
                log(f"{group} {start}: nothing profiled: {said.strip()[-1500:]}")
                continue
            text = profiler.printed(ncu, report, "raw", "--print-units", "base")
            raw.append(text)
            launches = profiler.read_raw(text)
            if [kernel for kernel, _ in launches] != [case.kernel for case in chunk]:
                log(f"{group} {start}: {len(launches)} launches, not {len(chunk)}: {launches[:2]}")
                continue
            for case, (_, values) in zip(chunk, launches, strict=True):
                found[case.name] |= values
            if group == "source":
                source.append(profiler.source_page(ncu, report))
            log(f"{group} {start}–{start + len(chunk) - 1}: {len(launches[0][1])} metrics")
    for name, parts in (("ncu_raw.csv.gz", raw), ("ncu_source.csv.gz", source)):
        with gzip.open(out / name, "wt") as file:
            file.write("\n".join(parts))
    return found


def keep(out: Path, name: str, rows: list[dict[str, Any]], notes: list[str], log: Log) -> None:
    record: Record = new_record(name, "cuda", rows, notes)
    versions = record.versions | tool_versions()
    log(f"written: {save(replace(record, command=COMMAND, versions=versions), out)}")


def tool_versions() -> dict[str, str]:
    """Of what made the readings: ncu, the driver, NVRTC."""
    from llmcourse.vgpu.nvrtc import version

    found = {"nvrtc": ".".join(map(str, version()))}
    for name, command in (
        ("ncu", ["ncu", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=30, env=dict(os.environ))
            lines = [line for line in run.stdout.splitlines() if line.strip()]
            found[name] = lines[-1].strip() if lines else "?"
        except OSError:
            found[name] = "?"
    return found


if __name__ == "__main__":
    main()
