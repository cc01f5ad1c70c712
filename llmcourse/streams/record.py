"""Record this chapter's programs on a real GPU: `python -m llmcourse.streams.record --out DIR`.

Writes DIR/streams.DEVICE.json (see `bench.records`): the constants that the simulator needs, every
program of `PROGRAMS` with its measured makespan and spans, and the decode step with and without a graph.
A part that fails is reported, and the record is then written as DIR/partial.json: it is no record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcourse.bench.records import new_record, save
from llmcourse.errors import DeviceError

NOTES = [
    "times are microseconds; a program's makespan is the median of 20 runs without a profiler",
    "spans come from one more run under torch.profiler (CUPTI), which slows the host's calls",
    "constants come from programs of their own (streams/measure.py), none of which is predicted",
    "decode steps: SmolLM2-135M's sizes, random bfloat16 weights, 200 tokens in the cache",
]
SPANS_KEPT = 200  # of a program: a picture shows no more


def run(device: str = "cuda") -> tuple[list[dict[str, Any]], list[str]]:
    """All rows and notes. Raises DeviceError where there is no GPU, and whatever a part raises."""
    _require(device)
    rows: list[dict[str, Any]] = []
    for _, part in parts():
        rows += part()
    return rows, NOTES


def parts() -> list[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """The parts of the record by name, in the order in which they run."""
    from llmcourse.streams import decode_step, measure

    return [
        *((part.__name__, part) for part in measure.PARTS),
        ("programs", programs),
        ("decode steps", decode_step.decode_steps),
        ("loaders", decode_step.loaders),
    ]


def programs() -> list[dict[str, Any]]:
    """Every program, measured: its calls as text, makespan, host times, spans."""
    from llmcourse.streams.native import Native, TraceError
    from llmcourse.streams.programs import PROGRAMS

    rows = []
    for name, build in PROGRAMS.items():
        program = build()
        native = Native(program)
        timed = native.times()
        row: dict[str, Any] = {"name": name, "kind": "program", "program": program.text(), "traced_us": None}
        try:
            traced = native.trace()
            timed.spans, row["traced_us"] = traced.spans[:SPANS_KEPT], traced.makespan_us
        except TraceError as error:
            print(f"{name}: {error}", flush=True)
        rows.append(row | {"timeline": timed.to_json()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llmcourse.streams.record", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the record")
    parser.add_argument("--only", nargs="*", default=None, help="names of parts; the rest is left out")
    arguments = parser.parse_args()
    _require("cuda")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    failed = []
    for name, part in parts():
        if arguments.only is not None and name not in arguments.only:
            failed.append(name)
            continue
        start = time.perf_counter()
        try:
            rows += part()
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        except Exception:
            failed.append(name)
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
    for row in rows:
        if row["kind"] != "program":
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if k != "kind"})
        else:
            print(f"{row['name']}: {row['timeline']['makespan_us']:.1f} µs, traced {row['traced_us']}")
    if failed:
        path = arguments.out / "partial.json"
        path.write_text(json.dumps({"failed": failed, "results": rows}, ensure_ascii=False))
        print(f"not complete ({', '.join(failed)}): {path}")
        return 1
    print(save(new_record("streams", "cuda", rows, NOTES), arguments.out))
    return 0


def _require(device: str) -> None:
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        raise DeviceError(
            "streams are recorded on an NVIDIA GPU, and none is used here.",
            "A CPU has no streams whose times could be measured.",
            "the recorded H100, or `llmcourse bench streams --device cuda` on a machine with a GPU.",
        )


if __name__ == "__main__":
    sys.exit(main())
