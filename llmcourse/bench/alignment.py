"""Benchmark `alignment`: DPO and GRPO raise a reward that a program checks, on prompts kept from training.

    llmcourse bench alignment --device cuda --out llmcourse/bench/records

On a GPU the real model (SmolLM2-135M-Instruct) learns to write one sentence with two given words, which it
does for about one prompt in three: all weights train, in float32 (TF32 products), a minute or two a method.
On a CPU the small model of `llmcourse.train.alignment` learns to sort digits, in seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmcourse.models import Transformer, load
from llmcourse.train.alignment import (
    Run,
    Sentences,
    Sorting,
    checked,
    draw_pairs,
    held_out_reward,
    imitate,
    kl_from,
    rollout,
    train_dpo,
    train_grpo,
)
from llmcourse.train.alignment.rewards import Task
from llmcourse.train.precision import tf32


@dataclass(frozen=True)
class Plan:
    """A model, its task, how DPO's pairs are drawn, and the settings of both trainings."""

    base: Transformer
    task: Task
    show: Callable[[Sequence[int]], str]
    asked: int
    pairs: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    grpo: dict[str, Any] = field(default_factory=dict)


def small_plan(base: Transformer | None = None) -> Plan:
    """Sorting digits on a CPU, by a model that imitates demonstrators (made here unless given)."""
    task = Sorting(digits=4)
    return Plan(
        base or imitate(task, seed=0),
        task,
        task.show,
        256,
        pairs={"prompts": 1024, "samples": 4},
        dpo={"steps": 60, "batch": 64, "beta": 0.5, "lr": 5e-4},
        grpo={"rounds": 30, "prompts": 16, "group": 8, "beta": 0.02, "lr": 2e-3},
    )


def real_plan(device: str = "cuda") -> Plan:
    """Sentences with given words, by the course's model with all of its weights in float32."""
    model, tokenizer = load(device=device, dtype="float32")
    task = Sentences(tokenizer)
    return Plan(
        model,
        task,
        task.show,
        512,
        pairs={"prompts": 1024, "samples": 4},
        dpo={"steps": 100, "batch": 32, "beta": 0.1, "lr": 5e-6},
        grpo={"rounds": 80, "prompts": 16, "group": 8, "beta": 0.02, "lr": 1e-5},
    )


def run_dpo(plan: Plan, seed: int) -> tuple[Run[Transformer], dict[str, Any]]:
    """Pairs drawn from the base model and judged by the check, then DPO on them."""
    pairs = draw_pairs(plan.base, plan.task, seed=seed + 1, **plan.pairs)
    run = train_dpo(plan.base, pairs, seed=seed, **plan.dpo)
    drawn = plan.pairs["prompts"] * plan.pairs["samples"]
    return run, {"answers": drawn, "pairs": len(pairs), "updates": len(run.loss), **plan.dpo}


def run_grpo(plan: Plan, seed: int) -> tuple[Run[Transformer], dict[str, Any]]:
    run = train_grpo(plan.base, plan.task, seed=seed, **plan.grpo)
    drawn = len(run.reward) * plan.grpo["prompts"] * plan.grpo["group"]
    return run, {"answers": drawn, "updates": len(run.loss), **plan.grpo}


METHODS = {"dpo": run_dpo, "grpo": run_grpo}


def measured(model: Transformer, plan: Plan) -> dict[str, Any]:
    """Rewards and KL on prompts kept from training, and what the model says to three of them.

    The standard error is that of a mean of so many rewards of 0 or 1.
    """
    reward = held_out_reward(model, plan.task, prompts=plan.asked)
    asked = plan.task.prompts(3, random.Random("shown"), held_out=True)
    drawn = rollout(model, asked, plan.task)
    judged = checked(plan.task)(drawn).tolist()
    shown = zip(drawn.prompts, drawn.answers, judged, strict=True)
    return {
        "held_out": reward,
        "standard_error": (reward * (1 - reward) / plan.asked) ** 0.5,
        "held_out_greedy": held_out_reward(model, plan.task, prompts=plan.asked, greedy=True),
        "kl_nats": kl_from(model, plan.base, plan.task),
        "samples": [{"prompt": plan.show(p), "answer": plan.show(a), "reward": r} for p, a, r in shown],
    }


def align(
    plan: Plan, *, seeds: Sequence[int], methods: Sequence[str] = tuple(METHODS)
) -> list[dict[str, Any]]:
    """A row for the base model, then one for each method and seed."""
    about = {"model": plan.base.config.name, "task": type(plan.task).__name__, "prompts": plan.asked}
    rows = [{"name": "base", "kind": "alignment", **about, **measured(plan.base, plan)}]
    on_gpu = plan.base.device.type == "cuda"
    for name in methods:
        for seed in seeds:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            run, settings = METHODS[name](plan, seed)
            if on_gpu:
                torch.cuda.synchronize()
            row = {"name": name, "kind": "alignment", **about, "seed": seed}
            row["seconds"] = time.perf_counter() - started
            if on_gpu:
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row |= measured(run.model, plan)
            row["settings"] = settings
            row["curve"] = {"loss": run.loss, "reward": run.reward, "kl": run.kl}
            rows.append(row)
            del run
    return rows


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows and notes, for `llmcourse bench`."""
    if device == "cuda":
        with tf32():
            rows = align(real_plan(), seeds=(0,))
    else:
        rows = align(small_plan(), seeds=(0,))
    return rows, [
        "held_out: mean reward of one sample (temperature 1) for each prompt kept from training, "
        "held_out_greedy of the likeliest tokens; kl_nats: from the base model, a sequence.",
        "seconds: all of a method, the drawing of answers included.",
        "Sentences asks for one sentence of 6 to 30 words with two given words, checked by a program; "
        "it checks the form and the words, not the sense. Sorting asks for four digits in order.",
        "curve.reward: of each batch of samples (GRPO), the mean margin of each batch of pairs (DPO).",
    ]
