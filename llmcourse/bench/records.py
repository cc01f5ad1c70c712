"""Recorded results: what was measured, on which device, with which versions, on which day.

A record is a JSON file under `bench/records/`, written by `llmcourse bench` on a real machine and
committed. Notebooks load it to show GPU figures to a reader who has no GPU, always with its caption:

    recorded on NVIDIA H100 80GB HBM3, 2026-11-23, torch 2.11.0+cu130
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmcourse import __version__
from llmcourse.errors import UnknownNameError
from llmcourse.files import write_whole

FOLDER = Path(__file__).parent / "records"
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Record:
    """One benchmark on one machine.

    name       the benchmark's, e.g. engine_start
    device     name, kind ("cuda" or "cpu"), and of a GPU capability, memory_bytes and driver
    versions   Python and the packages that matter
    date       day of the run, ISO 8601
    command    what to type to repeat it
    results    rows of numbers; keys say the unit (ttft_ms, bytes_per_s)
    notes      what a reader must know to use them
    """

    name: str
    device: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    results: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return f"recorded on {self.device['name']}, {self.date}, torch {self.versions.get('torch', '?')}"

    def row(self, **match: Any) -> dict[str, Any]:
        """The first row whose fields equal `match`."""
        for row in self.results:
            if all(row.get(k) == v for k, v in match.items()):
                return row
        raise UnknownNameError(
            f"the record {self.name} has no row with {match}.",
            f"It has {[r.get('name') for r in self.results]}.",
            "one of these.",
        )

    @property
    def filename(self) -> str:
        slug = "".join(c if c.isalnum() else "-" for c in self.device["name"].lower())
        return f"{self.name}.{'-'.join(filter(None, slug.split('-')))}.json"


def new_record(name: str, device: str, results: list[dict[str, Any]], notes: list[str]) -> Record:
    """A record of this machine, today."""
    return Record(
        name,
        describe_device(device),
        versions(),
        datetime.now(UTC).date().isoformat(),
        f"llmcourse bench {name} --device {device}",
        results,
        notes,
    )


def save(record: Record, folder: Path) -> Path:
    """Write the record as `NAME.DEVICE.json`, whole or not at all; an older one of that name is replaced."""
    path = folder / record.filename
    write_whole(path, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")
    return path


def all_records(folder: Path | None = None) -> list[Record]:
    return [Record(**json.loads(p.read_text())) for p in sorted((folder or FOLDER).glob("*.json"))]


def recorded(name: str, *, device: str = "", folder: Path | None = None) -> Record:
    """The newest record of benchmark `name` whose device's name contains `device` (e.g. "H100").

    Raises UnknownNameError, naming the records there are.
    """
    records = all_records(folder)
    fitting = [r for r in records if r.name == name and device.lower() in r.device["name"].lower()]
    if not fitting:
        known = ", ".join(sorted({f"{r.name} ({r.device['name']})" for r in records})) or "none"
        raise UnknownNameError(
            f"there is no record of {name!r}" + (f" on {device!r}." if device else "."),
            f"Records come from real runs; those there are: {known}.",
            f"`llmcourse bench {name}` on a machine of your own.",
        )
    return max(fitting, key=lambda r: r.date)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "llmcourse": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in found:  # the distribution's metadata leaves out the local part that names the build
        import torch

        found["torch"] = torch.__version__
    return found


def describe_device(device: str) -> dict[str, Any]:
    if device == "cuda":
        import torch

        p = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {"kind": "cpu", "name": cpu_name(), "cores": os.cpu_count()}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
