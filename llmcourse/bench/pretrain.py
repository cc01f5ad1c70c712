"""Benchmark `pretrain`: a GPT from raw Shakespeare to samples, its speed step by step, and what size buys.

    llmcourse bench pretrain --device cuda --out llmcourse/bench/records

run       one pre-training from text to model, every second counted: tokenizer, compilation, training, tests;
          its loss at every step, nats a byte of held-out plays, tokens a second, MFU, and what it writes
ladder    the same model and batch in float32, on tensor cores, in bfloat16, compiled: tokens a second and MFU
scaling   smaller models on the same tokens: held-out loss against FLOPs
resume    whether a run that is written down and taken up again ends with the same bits on this device

On a CPU everything is small, so that the benchmark ends within a minute: its numbers then mean little.
"""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch

from llmcourse.models import Transformer
from llmcourse.train.fit import one_thread
from llmcourse.train.loop import Trainer
from llmcourse.train.mfu import flops_per_token, mfu, peak_flops
from llmcourse.train.precision import tf32
from llmcourse.train.pretrain import PLANS, Corpus, Plan, corpus, read_plays, trainer_of, write

Row = dict[str, Any]
LADDER = (
    # name, precision, TF32 products, compiled
    ("float32", "float32", False, False),
    ("TF32", "float32", True, False),
    ("bfloat16 autocast", "bfloat16 autocast", True, False),
    ("bfloat16, compiled", "bfloat16 autocast", True, True),
)
SIZES = ((64, 2), (128, 4), (256, 4), (384, 6))
"""Width and layers of the smaller models of `scaling`; heads of 64 features, or one head where it is less."""


def run(device: str) -> tuple[list[Row], list[str]]:
    """All rows, and what a reader must know to use them."""
    with one_thread() if device == "cpu" else nullcontext():  # a small model is slower on many
        return _run(device)


def _run(device: str) -> tuple[list[Row], list[str]]:
    began = time.perf_counter()
    plan = PLANS["full" if device == "cuda" else "ci"]
    if device == "cpu":
        plan = replace(plan, plays=1, steps=20, warmup=4)
    data = corpus(read_plays(plan.plays), plan.vocab_size)
    tokenizer_s = time.perf_counter() - began
    rows = [main_run(plan, data, device, began, tokenizer_s)]
    rows += ladder_rows(plan, data, device)
    rows += scaling_rows(plan, data, device, largest=rows[0])
    rows.append(resume_row(plan, data, device))
    notes = [
        "losses in nats; a byte's is the token's divided by bytes_per_token, both on held-out plays.",
        "MFU by 6·N + 12·L·H·D·S FLOPs a token; peak: published dense peak of the number format used (GPU), "
        "measured rate of a large product (CPU). Speeds leave out held-out tests and the first steps.",
        "scaling: same tokenizer, batches and steps for all; FLOPs by the same formula. The text is read "
        "many times over, so that a large model's held-out loss can rise again: best is the lowest.",
    ]
    if device == "cpu":
        notes.append("Small sizes and few steps: a check that it runs.")
    return rows, notes


def main_run(plan: Plan, data: Corpus, device: str, began: float, tokenizer_s: float) -> Row:
    """The pre-training itself. `began`: when the clock of `total_s` started, before the tokenizer."""
    gpu = device == "cuda"
    with tf32(gpu):
        trainer = trainer_of(plan, data, device=device, forward=torch.compile if gpu else None)
        first = time.perf_counter()
        _steps(trainer, 3)  # compiled here, and part of the run
        compile_s = time.perf_counter() - first
        warm_s, warm_tokens = trainer.curve.seconds, trainer.curve.tokens
        trainer.run(plan.steps, test_every=max(1, plan.steps // 20), progress=gpu)
    total_s = time.perf_counter() - began
    curve, model = trainer.curve, trainer.model
    speed = (curve.tokens - warm_tokens) / (curve.seconds - warm_s)
    best_step, best = min(curve.held_out, key=lambda point: point[1])
    return {
        "kind": "run",
        "name": plan.config.name,
        "params": sum(p.numel() for p in model.parameters()),
        "steps": plan.steps,
        "tokens": curve.tokens,
        "train_tokens": len(data.train),
        "vocab_size": data.tokenizer.vocab_size,
        "bytes_per_token": data.bytes_per_token,
        "loss": curve.loss[-1],
        "held_out": curve.held_out[-1][1],
        "best_held_out": best,
        "best_step": best_step,
        "best_nats_per_byte": best / data.bytes_per_token,
        "tokens_per_s": speed,
        "mfu": _mfu(trainer, plan, speed, device, tf32=gpu),
        "tokenizer_s": tokenizer_s,
        "first_steps_s": compile_s,
        "train_s": curve.seconds,
        "total_s": total_s,
        "curve": [round(x, 5) for x in curve.loss],
        "held_out_curve": [[step, round(x, 5)] for step, x in curve.held_out],
        "sample": write(model, data.tokenizer, "**KING", tokens=120, context=plan.length),
    }


def ladder_rows(plan: Plan, data: Corpus, device: str) -> list[Row]:
    """Tokens a second of a few steps at each rung, its own FLOPs over its own peak."""
    rows = []
    for name, precision, tensor_cores, compiled in LADDER:
        if device == "cpu" and (tensor_cores or compiled):
            continue
        with tf32(tensor_cores):
            rung = replace(plan, precision=precision)
            trainer = trainer_of(
                rung, data, device=device, forward=torch.compile if compiled else None, tests=1
            )
            _steps(trainer, 3)
            speeds = []
            for _ in range(3):
                before = trainer.curve.tokens
                seconds = _steps(trainer, 2 if device == "cpu" else 15)
                speeds.append((trainer.curve.tokens - before) / seconds)
        speed = sorted(speeds)[1]
        row = {"kind": "ladder", "name": name, "tokens_per_s": speed, "low": min(speeds), "high": max(speeds)}
        row["mfu"] = _mfu(trainer, rung, speed, device, tf32=tensor_cores)
        if device == "cuda":
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        rows.append(row)
    return rows


def scaling_rows(plan: Plan, data: Corpus, device: str, *, largest: Row) -> list[Row]:
    """Smaller models on the same batches, and the main run beside them."""
    rows = []
    for width, layers in SIZES if device == "cuda" else SIZES[:1]:
        heads = max(1, width // 64)
        d_ff = 8 * round(width * 8 / 3 / 8)
        smaller = replace(plan, width=width, layers=layers, heads=heads, d_ff=d_ff, lr=plan.lr * 1.5)
        with tf32(device == "cuda"):
            trainer = trainer_of(smaller, data, device=device)
            trainer.run(smaller.steps, test_every=max(1, plan.steps // 20), progress=False)
        rows.append(_scaling_row(trainer, smaller, data))
    rows.append(
        {
            "kind": "scaling",
            "name": largest["name"],
            "params": largest["params"],
            "flops": _flops_of(plan, data) * largest["tokens"],
            "held_out": largest["held_out"],
            "best_held_out": largest["best_held_out"],
            "best_nats_per_byte": largest["best_nats_per_byte"],
        }
    )
    return rows


def _scaling_row(trainer: Trainer, plan: Plan, data: Corpus) -> Row:
    best = min(loss for _, loss in trainer.curve.held_out)
    return {
        "kind": "scaling",
        "name": plan.config.name,
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "flops": _flops_of(plan, data) * trainer.curve.tokens,
        "held_out": trainer.curve.held_out[-1][1],
        "best_held_out": best,
        "best_nats_per_byte": best / data.bytes_per_token,
    }


def resume_row(plan: Plan, data: Corpus, device: str) -> Row:
    """20 steps in one go against 10, written to disk, and 10 more in another trainer: equal bit for bit?"""
    small = replace(plan, width=128, layers=2, heads=2, d_ff=344, batch=min(16, plan.batch), steps=20)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as folder, tf32(device == "cuda"):
            whole, first, second = (trainer_of(small, data, device=device, tests=1) for _ in range(3))
            whole.run(20, progress=False)
            first.run(10, folder=folder, progress=False)
            second.run(20, folder=folder, progress=False)
    finally:
        torch.use_deterministic_algorithms(before)
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return {"kind": "resume", "name": small.config.name, "bit_exact": gap == 0.0, "largest_difference": gap}


# ----------------------------------------------------------------------------------------------- measuring


def _steps(trainer: Trainer, steps: int) -> float:
    """Seconds of that many more steps, by the loop's clock: it waits for the device, and leaves tests out."""
    before = trainer.curve.seconds
    trainer.run(trainer.step + steps, look_every=steps, progress=False)
    trainer.curve.held_out.pop()  # the loop tests where it ends
    return trainer.curve.seconds - before


def _flops_of(plan: Plan, data: Corpus) -> int:
    """Training FLOPs a token of the plan's model."""
    config = replace(plan.config, vocab_size=data.tokenizer.vocab_size)
    with torch.device("meta"):
        return flops_per_token(Transformer(config), config, plan.length)


def _mfu(trainer: Trainer, plan: Plan, speed: float, device: str, *, tf32: bool) -> float:
    computed = trainer.precision.computed or torch.float32
    peak = peak_flops(device, computed, tf32=tf32 and computed == torch.float32)
    share = mfu(
        speed, flops_per_token(trainer.model, cast(Transformer, trainer.model).config, plan.length), peak
    )
    return share if math.isfinite(share) else 0.0
