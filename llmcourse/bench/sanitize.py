"""Every kernel under NVIDIA's compute-sanitizer: memory accesses and shared-memory races.

    python -m llmcourse.bench.sanitize --out llmcourse/bench/records

`memcheck` follows every address that a kernel touches and says which lie outside an allocation; `racecheck`
watches shared memory for accesses by two threads with no barrier between. Silence would be worth nothing if

- a kernel that leaves its tensor landed in the next one, since torch takes memory from the driver in large
  pieces. So each tensor gets an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1).
- the tool had not looked. So kernels with a planted fault run too, and must be reported.

The tools see a small launch of every kernel, at odd shapes, and every result is compared with the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmcourse.errors import DeviceError, MissingPackageError

TOOLS = ("memcheck", "racecheck")


def worst(result: Any, expected: Any) -> float:
    """Largest ‖out − ref‖ / (‖ref‖ + 10⁻³) over the tensors."""
    outs, refs = (v if isinstance(v, tuple) else (v,) for v in (result, expected))
    return max(
        float(
            (o.detach().double() - e.detach().double()).nan_to_num(1e9).norm()
            / (e.detach().double().norm() + 1e-3)
        )
        for o, e in zip(outs, refs, strict=True)
    )


def run_all(faults: str) -> None:
    """In the child: launch everything, one JSON line for each kernel to standard output."""
    from llmcourse.bench.sanitize_launches import launches, planted

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, call, expected in planted(faults) if faults else launches():
        try:
            result = call()
            torch.cuda.synchronize()
        except Exception as error:  # a fault ends the context: what came after it did not run
            print(json.dumps({"kernel": name, "raised": str(error).splitlines()[0]}), flush=True)
            if faults:
                return
            raise
        found = 0.0 if faults else worst(result, expected())
        print(json.dumps({"kernel": name, "error": found}), flush=True)


def tool_path() -> str:
    """compute-sanitizer, from PATH or beside the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    for candidate in ("compute-sanitizer", *(f"{home}/bin/compute-sanitizer" for home in homes if home)):
        if found := shutil.which(candidate):
            return found
    raise MissingPackageError(
        "compute-sanitizer was not found.",
        "It comes with NVIDIA's CUDA toolkit, not with torch.",
        "installing the toolkit, or setting CUDA_HOME to where it is.",
    )


def start(tool: str, faults: bool, log: Path) -> subprocess.Popen[str]:
    """Start this module under a tool; what it launches goes to the log, with the tool's findings."""
    # API errors are left out: looking for functions that a driver lacks is how its bindings start.
    options = ["--print-limit", "200", "--report-api-errors", "no"]
    command = [tool_path(), "--tool", tool, *options] if tool else []
    command += [sys.executable, "-m", "llmcourse.bench.sanitize", "--launch"]
    command += ["--faults", tool] if faults else []
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)


def parse(text: str) -> dict[str, Any]:
    """What a log says: kernels launched, the tool's error count, and the findings with the kernel each names.

    errors   None where the tool printed no summary: then nothing is known
    """
    launched: dict[str, float] = {}
    raised: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith('{"kernel"'):
            row = json.loads(line)
            if "raised" in row:
                raised[row["kernel"]] = row["raised"]
            else:
                launched[row["kernel"]] = max(row["error"], launched.get(row["kernel"], 0.0))
    errors = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    hazards = [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    kinds = "Invalid|Misaligned|Error:|Warning:|Program hit|Race"
    findings = re.findall(rf"=========\s+((?:{kinds})[^\n]*)((?:\n=========[^\n]+){{0,4}})", text)
    return {
        "launched": launched,
        "raised": raised,
        "errors": sum(errors + hazards) if errors or hazards else None,
        "findings": [
            (head + " " + re.sub(r"\s*\n=========\s+", " · ", tail)).strip()[:400] for head, tail in findings
        ],
    }


def check_all(out: Path | None) -> list[dict[str, Any]]:
    """Run both tools over all kernels and over the planted faults, at the same time; rows of the record."""
    logs = Path(tempfile.mkdtemp(prefix="sanitize-"))
    begun = time.monotonic()
    first = start("", False, logs / "plain.log")  # compiles everything, so that the tools need not wait
    if first.wait():
        said = (logs / "plain.log").read_text().strip().splitlines()
        print("\n".join(said[-40:]))
        raise DeviceError(
            f"the kernels failed before any tool watched: {said[-1] if said else 'no word'}.",
            "A run that stops early proves nothing about the kernels after it.",
            "pytest tests/gpu, which says what fails.",
        )
    print(f"compiled after {time.monotonic() - begun:.0f} s")
    running = {
        (tool, faults): start(tool, faults, logs / f"{tool}{'-planted' if faults else ''}.log")
        for tool in TOOLS
        for faults in (False, True)
    }
    rows = []
    for (tool, faults), child in running.items():
        child.wait()
        text = (logs / f"{tool}{'-planted' if faults else ''}.log").read_text()
        found = parse(text)
        name, seconds = f"{tool}, planted fault" if faults else tool, time.monotonic() - begun
        print(f"{name}: {found['errors']} findings, {seconds:.0f} s")
        if out:
            (out / f"sanitizer-{tool}{'-planted' if faults else ''}.log").write_text(text[-200_000:])
        rows.append(
            {
                "name": name,
                "kernels": len(found["launched"]) + len(found["raised"]),
                "launched": sorted(found["launched"] | dict.fromkeys(found["raised"], 0.0)),
                "errors": found["errors"],
                "findings": found["findings"][:20],
                "worst_error": None if faults else max(found["launched"].values(), default=None),
            }
        )
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with these rows; nothing if both tools were silent and found what was planted."""
    wrong = []
    for row in rows:
        if row["errors"] is None:
            wrong.append(f"{row['name']}: the tool printed no summary")
        elif "planted" in row["name"] and row["errors"] == 0:
            wrong.append(f"{row['name']} was not found")
        elif "planted" not in row["name"] and row["errors"]:
            wrong.append(f"{row['name']}: {row['errors']} findings, such as {row['findings'][:1]}")
        elif "planted" not in row["name"] and not (row["worst_error"] or 0.0) < 3e-2:
            wrong.append(f"{row['name']}: a result is off by {row['worst_error']}")
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmcourse.bench.sanitize", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the record and the tools' logs")
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, under no tool")
    parser.add_argument("--faults", default="", help="with --launch: only the faults planted for this tool")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise DeviceError(
            "there is no GPU here.",
            "compute-sanitizer watches kernels on the device.",
            "a machine with an NVIDIA GPU; Triton's interpreter checks bounds on a CPU.",
        )
    if args.launch:
        run_all(args.faults)
        return 0
    rows = check_all(args.out)
    wrong = verdict(rows)
    from llmcourse.bench import new_record, save

    version = subprocess.run([tool_path(), "--version"], capture_output=True, text=True).stdout
    notes = [
        "every kernel forward and backward at small odd shapes; PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        next((line.strip() for line in version.splitlines() if "ersion" in line), "version unknown"),
        *(wrong or ["no finding in any kernel; every planted fault was found"]),
    ]
    record = replace(
        new_record("sanitizer", "cuda", rows, notes), command="python -m llmcourse.bench.sanitize"
    )
    for line in notes:
        print(line)
    if args.out:
        print("written:", save(record, args.out))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
