"""Benchmark `lora`: the real model learns a small task in three ways; what each holds; what a rank is worth.

    llmcourse bench lora --device cuda --out llmcourse/bench/records

run     full fine-tuning, LoRA and QLoRA (NF4, groups of 64) of SmolLM2-135M on the task of `finetune.task`:
        loss and share of right answers on held-out records before and after; on a GPU the allocator's peak
rank    LoRA of ranks 1 to 32 at one learning rate, alpha = 2·r
merge   the largest difference between logits beside and inside the weights, and after taking out, by format

On a GPU every block is adapted; on a CPU the last four, for few steps, so that it ends within two minutes.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from llmcourse.bench.records import recorded
from llmcourse.compress.quantize import Scheme
from llmcourse.compress.quantized_linear import quantize_model
from llmcourse.errors import UnknownNameError
from llmcourse.finetune import task
from llmcourse.finetune.bill import trainable
from llmcourse.finetune.lora import PLACES, LoRA, attach
from llmcourse.models import Transformer, load
from llmcourse.notebook import Table
from llmcourse.text.tokenizer import Tokenizer
from llmcourse.train.fit import fit

Row = dict[str, Any]
STYLE = "say"
EVERYWHERE = tuple(PLACES)


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them."""
    model, tokenizer = load(device=device, dtype="float32")
    first = 0 if device == "cuda" else len(model.blocks) - 4
    layers = tuple(range(first, len(model.blocks)))
    count, steps, batch = (256, 60, 16) if device == "cuda" else (96, 24, 8)
    how = {"first": first, "count": count, "steps": steps, "batch": batch}
    lora = LoRA(8, 16, EVERYWHERE, layers)
    small = quantize_model(model, Scheme(4, 64, codes="nf4"))
    assert isinstance(small, Transformer)
    rows = [
        trained("LoRA", model, tokenizer, lora, **how),
        trained("QLoRA", small, tokenizer, lora, **how),
    ]
    ranks = (1, 2, 4, 8, 16, 32) if device == "cuda" else (1, 8)
    for r in ranks:
        row = trained(f"r {r}", model, tokenizer, LoRA(r, 2 * r, EVERYWHERE, layers), **how)
        rows.append(row | {"kind": "rank", "r": r})
    rows += [merge_row(dtype, tokenizer, layers, device) for dtype in ("float32", "bfloat16")]
    if device == "cuda":
        rows.append(trained("full", model, tokenizer, None, **how))  # last: it changes the model
    notes = [
        f"{count} records, {steps} steps of {batch}, AdamW, float32 but for QLoRA's frozen weights; exact: "
        "share of 200 held-out answers (40 on a CPU) that are right to the last token.",
        "learning rate 1e-2 for adapters (3e-3 where all blocks have one), 1e-4 for full fine-tuning.",
    ]
    if device == "cuda":
        notes.append(
            "more_bytes: the allocator's peak in training over what was there before it (the models of all "
            "runs, the examples); peak_bytes: with the bytes of this run's own frozen weights."
        )
    return rows, notes


def trained(
    name: str,
    model: Transformer,
    tokenizer: Tokenizer,
    lora: LoRA | None,
    *,
    first: int,
    count: int,
    steps: int,
    batch: int,
) -> Row:
    """One fine-tuning; the adapter is taken off afterwards. lora None: all weights are trained."""
    on_gpu = model.device.type == "cuda"
    gc.collect()
    learn = task.read_ahead(model, task.examples(tokenizer, STYLE, count), first)
    held_out = task.examples(tokenizer, STYLE, 200 if on_gpu else 40, held_out=True)
    test = task.read_ahead(model, held_out, first)
    before = task.test(model, test)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated() if on_gpu else 0
    began = time.perf_counter()
    adapter = attach(model, lora, seed=0) if lora else None
    if adapter is None:
        model.requires_grad_(True)
    lr = 1e-4 if adapter is None else 3e-3 if on_gpu else 1e-2
    curve = fit(
        model,
        learn.batches(batch, seed=0),
        steps=steps,
        lr=lr,
        loss=task.loss,
        weight_decay=0.0,
        optimizer=adamw,
    )
    seconds = time.perf_counter() - began
    after = task.test(model, test)
    row: Row = {
        "kind": "run",
        "name": name,
        "trained": adapter.n_params if adapter else sum(p.numel() for p in model.parameters()),
        "frozen_bytes": _bytes(model) - (4 * adapter.n_params if adapter else 0),
        "loss_before": before[0],
        "loss": after[0],
        "exact_before": before[1],
        "exact": after[1],
        "seconds": seconds,
        "curve": [round(x, 4) for x in curve],
    }
    if on_gpu:
        more = torch.cuda.max_memory_allocated() - there  # than the models and the examples
        row |= {"more_bytes": more, "peak_bytes": row["frozen_bytes"] + more}
    if adapter is not None:
        assert lora is not None
        assert adapter.n_params == trainable(model.config, lora)
        adapter.remove()
    model.requires_grad_(False)
    return row


def adamw(groups: Any, *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


@torch.no_grad()
def merge_row(dtype: str, tokenizer: Tokenizer, layers: tuple[int, ...], device: str) -> Row:
    """Logits beside, inside and after, of an adapter of random factors as large as trained ones."""
    model, _ = load(device=device, dtype=dtype)
    tokens = task.examples(tokenizer, STYLE, 8).tokens.to(model.device)
    plain = model(tokens).float()
    adapter = attach(model, LoRA(8, 16, EVERYWHERE, layers))
    generator = torch.Generator().manual_seed(1)
    for layer in adapter.layers.values():
        for b in layer.B.values():
            b.copy_(0.02 * torch.randn(b.shape, generator=generator))
    beside = model(tokens).float()
    adapter.merge()
    inside = model(tokens).float()
    adapter.unmerge()
    adapter.remove()
    again = model(tokens).float()
    return {
        "kind": "merge",
        "name": dtype,
        "moved": float((beside - plain).abs().max()),
        "merged": float((inside - beside).abs().max()),
        "unmerged": float((again - plain).abs().max()),
    }


def _bytes(model: Transformer) -> int:
    """Bytes of all parameters and of quantized layers' buffers."""
    return model.weight_bytes + sum(getattr(m, "weight_bytes", 0) for m in model.modules() if m is not model)


COLUMNS = {
    "run": ("name", "trained", "loss", "exact", "seconds", "peak_bytes"),
    "rank": ("r", "trained", "loss", "exact"),
    "merge": ("name", "moved", "merged", "unmerged"),
}


def recorded_table(kind: str, *, device: str = "H100") -> Table:
    """The record's rows of a kind, with the caption; where there is no record yet, a table that says so."""
    columns = COLUMNS[kind]
    try:
        record = recorded("lora", device=device)
    except UnknownNameError as missing:
        return Table(columns, [], f"not recorded yet: {missing.what}")
    rows = [[row.get(c) for c in columns] for row in record.results if row["kind"] == kind]
    return Table(columns, rows, record.caption)
