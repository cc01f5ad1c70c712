"""Benchmarks and their records.

A benchmark is a module of this package with `run(device) -> (rows, notes)`. `llmcourse bench NAME`
runs it, prints the rows and, with `--out`, writes the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llmcourse.bench.records import FOLDER, Record, all_records, new_record, recorded, save
from llmcourse.errors import UnknownNameError

BENCHMARKS = {
    "alignment": "DPO and GRPO raise a checkable reward of the real model, on prompts kept from training",
    "attention_variants": "MHA, GQA, MQA, MLA and windows: what each learns, and its decode step",
    "ceilings": "copy bandwidth and matrix FLOP/s of this machine",
    "cocktail": "fine-tuning over a slow link: all gradients, float16, top-k and CocktailSGD",
    "distill": "a draft model distilled from the real one, its acceptance on held-out prompts, and its file",
    "engine_start": "notebook 00's ladder of the engine, beside transformers",
    "flash": "FlashAttention beside FlashAttention-2, cuDNN, flex_attention and the ceiling model",
    "kernels": "the memory-bound kernels beside torch.compile and a copy of as many bytes",
    "lora": "full fine-tuning, LoRA and QLoRA of the real model: loss, right answers, memory; ranks; merging",
    "memory_levels": "latency and bandwidth of each level of a GPU's memory",
    "matmul": "the ladder of matrix products in bf16, fp16 and fp8, beside cuBLAS",
    "multi_lora": "1 to 64 adapters in a decode batch, beside peft, a loop and gather + bmm; share of a step",
    "pretrain": "a GPT from raw Shakespeare to samples: loss, tokens/s, MFU, size against loss, resume",
    "prune": "the real model's perplexity against zeros: magnitude, Wanda, SparseGPT, 2:4, smaller models",
    "quant_matmul": "4- and 8-bit weights beside tinygemm, int8pack, fp8 and bfloat16, batch 1 to 1024",
    "quantize": "the real model's perplexity against its size: RTN, GPTQ, AWQ, QAT; INT8 activations",
    "quantized_decode": "the real model's decode step with weights of 16, 8 and 4 bits, through the engine",
    "parallel": "2 GPUs through NCCL against one, and against DDP, FSDP2, DTensor and PyTorch's pipelines",
    "sparse24": "2:4 weights beside dense ones: our kernels, cuSPARSELt and cuBLAS, decode and prefill",
    "subquadratic": "attention, linear attention, SSM and Hyena layers against length; decoding; recall",
    "training_memory": "a training step's peak memory beside the ledger's prediction; time of recomputing",
    "streams": "stream programs, CUDA graphs and input loaders, with the constants that predict them",
}
WRITES = {"distill"}
"""Benchmarks whose `run` takes the folder of `--out` too, and leaves a file of its own there."""
GPU_ONLY = {"streams"}

__all__ = ["BENCHMARKS", "FOLDER", "Record", "all_records", "command", "new_record", "recorded", "save"]


def command(names: Sequence[str], *, device: str, out: Path | None, list_only: bool) -> int:
    """`llmcourse bench`: run the named benchmarks (all without names) and print or keep their records."""
    from rich.console import Console

    console = Console()
    if unknown := [n for n in names if n not in BENCHMARKS]:
        raise UnknownNameError(
            f"there is no benchmark called {unknown[0]!r}.",
            f"Benchmarks: {', '.join(BENCHMARKS)}.",
            "one of these, or none to run all.",
        )
    if list_only:
        for name, text in BENCHMARKS.items():
            console.print(f"[bold]{name}[/]: {text}")
            for record in all_records():
                if record.name == name:
                    console.print(f"    {record.caption}")
        return 0
    from llmcourse.models.loading import resolve_device

    kind = resolve_device(device).type
    for name in names or BENCHMARKS:
        if not names and kind == "cpu" and name in GPU_ONLY:
            console.print(f"\n[bold]{name}[/]: left out, it needs a GPU")
            continue
        where = {"out": out} if name in WRITES else {}
        rows, notes = import_module(f"llmcourse.bench.{name}").run(kind, **where)
        record = new_record(name, kind, rows, notes)
        console.print(f"\n[bold]{name}[/]: {record.device['name']}, torch {record.versions['torch']}")
        print(text_of(rows))  # not through rich, which would fold the table
        for note in notes:
            print(f"  note: {note}")
        if out is not None:
            print(f"  written: {save(record, out)}")
    return 0


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table: numbers and short texts; lists and whole programs are left to the record."""
    from llmcourse.notebook import Table

    def fits(value: Any) -> bool:
        return not isinstance(value, dict | list | tuple) and "\n" not in str(value)

    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if all(fits(row.get(key)) for row in rows)]
    return repr(Table(columns, [[row.get(key) for key in columns] for row in rows]))
