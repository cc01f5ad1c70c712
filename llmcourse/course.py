"""The chapters of the course and how far this learner has come.

Progress is one small JSON file in the user's data folder (`LLMCOURSE_PROGRESS` overrides the path):
a chapter counts as read when the last cell of its notebook has run, whatever the day.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from llmcourse.errors import UnknownNameError
from llmcourse.files import write_whole

PARTS = (
    "Start",
    "Neural network fundamentals",
    "GPU programming and CUDA foundations",
    "Transformers and LLM architecture",
    "Training optimisations",
    "Compression and parameter-efficient tuning",
    "Inference and serving",
)


@dataclass(frozen=True)
class Chapter:
    """One notebook. `moves` names which of latency, throughput, cost and memory it changes."""

    number: str
    slug: str
    title: str
    part: int
    moves: str
    ready: bool = False

    @property
    def name(self) -> str:
        return f"{self.number}_{self.slug}"


CHAPTERS = (
    Chapter("00", "start_here", "Start here: a model that speaks, measured", 0, "measures all", ready=True),
    Chapter(
        "01", "backprop", "Backpropagation, from one scalar to a trained network", 1, "memory", ready=True
    ),
    Chapter(
        "02",
        "activations_losses_optimizers",
        "Activations, losses, optimizers",
        1,
        "cost, memory",
        ready=True,
    ),
    Chapter(
        "03",
        "gpu_architecture",
        "GPU architecture: threads, warps, occupancy",
        2,
        "latency, throughput",
        ready=True,
    ),
    Chapter(
        "04",
        "memory_hierarchy",
        "The memory hierarchy and the roofline",
        2,
        "latency, throughput",
        ready=True,
    ),
    Chapter("05", "triton_kernels", "Triton kernels and layer fusion", 2, "latency", ready=True),
    Chapter("06", "streams_graphs_transfers", "Streams, CUDA graphs, transfers", 2, "latency", ready=True),
    Chapter("07", "transformer", "The transformer, built and loaded", 3, "cost", ready=True),
    Chapter("08", "pretraining_to_rlhf", "From pre-training to RLHF", 3, "cost", ready=True),
    Chapter(
        "09",
        "attention_variants",
        "MHA, MQA, GQA, MLA, sliding windows",
        3,
        "memory, throughput",
        ready=True,
    ),
    Chapter("10", "flash_attention", "FlashAttention", 3, "latency, memory", ready=True),
    Chapter("11", "subquadratic", "Sub-quadratic sequence models", 3, "latency, memory", ready=True),
    Chapter("12", "training_memory", "Training in little memory", 4, "memory, cost", ready=True),
    Chapter("13", "distributed_training", "Distributed training", 4, "throughput, memory", ready=True),
    Chapter("14", "quantization", "Quantization", 5, "latency, memory, cost", ready=True),
    Chapter("15", "lora", "LoRA and QLoRA", 5, "memory, cost", ready=True),
    Chapter("16", "distillation", "Distillation", 5, "latency, cost", ready=True),
    Chapter("17", "pruning", "Pruning and sparsity", 5, "memory, latency", ready=True),
    Chapter("18", "kv_cache_and_decoding", "KV cache and decoding", 6, "latency"),
    Chapter("19", "paged_kv_cache", "The paged KV cache", 6, "memory, throughput"),
    Chapter("20", "continuous_batching", "Continuous batching", 6, "throughput, cost"),
    Chapter("21", "speculative_decoding", "Speculative decoding", 6, "latency"),
    Chapter("22", "serving_frameworks", "Serving frameworks", 6, "all"),
    Chapter("23", "capstone", "Capstone: put it all together", 6, "all"),
    Chapter("24", "interview", "Interview", 6, "explains all"),
)


def chapter(name: str) -> Chapter:
    """The chapter called `name`: its number (`1`, `01`), its slug or its full name."""
    wanted = name.removesuffix(".ipynb")
    for c in CHAPTERS:
        if wanted in (c.number, c.slug, c.name) or (wanted.isdigit() and wanted.zfill(2) == c.number):
            return c
    raise UnknownNameError(
        f"there is no chapter called {name!r}.",
        f"Chapters are numbered 00 to {CHAPTERS[-1].number}.",
        "a number such as 01, or a name such as 01_backprop.",
    )


def progress_path() -> Path:
    if path := os.environ.get("LLMCOURSE_PROGRESS"):
        return Path(path)
    from platformdirs import user_data_path

    return user_data_path("llmcourse") / "progress.json"


def progress() -> dict[str, str]:
    """Chapters read so far, `{"01_backprop": "2026-11-22"}`. A missing or broken file reads as none."""
    try:
        return dict(json.loads(progress_path().read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def mark_read(name: str) -> str:
    """Record that a chapter's notebook ran to its end, and say what comes next."""
    done = progress()
    this = chapter(name)
    done.setdefault(this.name, date.today().isoformat())
    write_whole(progress_path(), json.dumps(done, indent=1))
    ready = [c for c in CHAPTERS if c.ready and c.name not in done]
    following = f"Next: {ready[0].name}." if ready else "You have read every chapter that is ready."
    return f"Read: {this.name}. {following}"
