"""Which tiles and schedules of FlashAttention are fastest: the sweep behind `flash_plan` and `flash_hopper`.

python -m llmcourse.bench.flash_sweep --out FOLDER [--seconds 330] [--only forward,hopper] [--workers 15]

Compiling takes most of the time, so a pool of processes does it: each runs its candidate once, which fills
Triton's cache and sorts out what does not run or is wrong. Then the candidates of a group are timed in turns:
all on 8,192 tokens a sequence, the best again with other numbers of heads side by side, and on other lengths.
Results are written after each group.

The three kernels of a plan are independent: candidates for one are timed with the others as they are. Of the
backward kernels it is the whole backward that is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcourse.bench.flash_cases import COLUMNS, HEAD_DIMS, TOKENS
from llmcourse.bench.records import new_record, save
from llmcourse.bench.timing import measure
from llmcourse.kernels.flash_backward import backward as launch_backward
from llmcourse.kernels.flash_cost import flops
from llmcourse.kernels.flash_forward import forward as launch_forward
from llmcourse.kernels.flash_hopper import Schedule
from llmcourse.kernels.flash_hopper import forward as launch_hopper
from llmcourse.kernels.flash_plan import Plan, Tiles, candidates, plan_for

LENGTH = 8192
OTHER_LENGTHS = (2048,)
KERNELS = ("forward", "hopper", "dkdv", "dq")
SHARED_BYTES = 232_448 - 2048
AHEAD = 4  # sweeps of L2 before a call, in which the host gets ahead
KEPT = 4  # of a group, tried further
NOTES = [
    "bf16, 16,384 tokens a batch, 2,048 columns, random data; L2 swept before a call, candidates in turns; "
    "dkdv and dq: the time of the whole backward with that kernel's candidate",
    "stage tiles: all candidates at 8,192 tokens; heads: the best with other numbers of heads side by side; "
    "then the best at another length",
]


@dataclass(frozen=True)
class Group:
    """Candidates that compete. kernel: one of KERNELS."""

    kernel: str
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"{self.kernel} D{self.head_dim}" + (" causal" if self.causal else "")


def hopper_schedules(head_dim: int) -> list[Schedule]:
    """Schedules that fit, and of which none spills (`tests/kernels/test_flash_hopper.py` compiles some)."""
    found = []
    sizes = ((2, 128), (3, 128), (2, 64), (3, 64)) if head_dim == 64 else ((2, 128), (3, 64), (2, 64))
    for (groups, block_n), ordered, overlap in product(sizes, (True, False), (True, False)):
        stages = 2 if head_dim * block_n == 128 * 128 else 3 if block_n == 128 else 4
        found.append(Schedule(groups, block_n, stages, 8, ordered, overlap))
        if ordered and overlap:
            found.append(Schedule(groups, block_n, stages, 8, ordered, overlap, persistent=True))
    return [s for s in found if s.shared_bytes(head_dim) <= SHARED_BYTES]


Choice = Tiles | Schedule


def choices(group: Group) -> Sequence[Choice]:
    """A group's candidates: heads side by side as its own plan has them."""
    if group.kernel == "hopper":
        return hopper_schedules(group.head_dim)
    own = plan_for(group.head_dim, torch.bfloat16, 90, causal=group.causal)
    return candidates(group.kernel, group.head_dim, heads=(own.forward.heads,))


def wider(best: Sequence[Choice]) -> list[Choice]:
    """The best with other numbers of heads side by side."""
    return [
        c._replace(band=heads) if isinstance(c, Schedule) else c._replace(heads=heads)
        for c in best
        for heads in (1, 2, 4, 8, 16)
    ]


@dataclass
class Bench:
    """Tensors of one shape and what runs on them."""

    group: Group
    length: int
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    o: Tensor
    lse: Tensor

    @classmethod
    def of(cls, group: Group, length: int, device: str = "cuda", tokens: int = TOKENS) -> Bench:
        heads = max(1, COLUMNS * tokens // TOKENS // group.head_dim)
        shape = (max(1, tokens // length), heads, length, group.head_dim)
        g = torch.Generator(device=device).manual_seed(0)
        q, k, v, do = (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=g) for _ in range(4))
        bench = cls(group, length, q, k, v, do, q, q)
        bench.o, bench.lse = bench.peer_forward()
        return bench

    def peer_forward(self) -> tuple[Tensor, Tensor]:
        """(o, log-sum-exp) by FlashAttention-2; on a CPU by the reference."""
        if not self.q.is_cuda:
            from llmcourse.kernels.attention_reference import reference

            return reference(self.q, self.k, self.v, causal=self.group.causal)
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        return attend(self.q, self.k, self.v, 0.0, self.group.causal)[:2]

    @property
    def interpret(self) -> bool:
        return not self.q.is_cuda

    def run(self, choice: Any) -> Any:
        """o, or (dq, dk, dv)."""
        group, scale = self.group, 1 / math.sqrt(self.group.head_dim)
        if group.kernel == "hopper":
            return launch_hopper(
                self.q, self.k, self.v, causal=group.causal, plan=choice, interpret=self.interpret
            )[0]
        options: dict[str, Any] = {"causal": group.causal, "scale": scale, "window": 0}
        options["interpret"] = self.interpret
        if group.kernel == "forward":
            return launch_forward(self.q, self.k, self.v, tiles=choice, **options)[0]
        plan: Plan = plan_for(group.head_dim, torch.bfloat16, 90, causal=group.causal)
        plan = plan._replace(**{group.kernel: choice})
        return launch_backward(self.do, self.q, self.k, self.v, self.o, self.lse, None, plan=plan, **options)

    def flops(self) -> int:
        batch, heads, length, head_dim = self.q.shape
        backward = self.group.kernel in ("dkdv", "dq")
        return flops(batch, heads, length, length, head_dim, causal=self.group.causal, backward=backward)

    def right(self) -> tuple[Tensor, ...]:
        """(o,) or (dq, dk, dv) by FlashAttention-2 under autograd; on a CPU by whatever PyTorch has."""
        if self.group.kernel in ("forward", "hopper"):
            return (self.o,)
        parts = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        backends = [SDPBackend.FLASH_ATTENTION] if self.q.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            q, k, v = parts
            o = F.scaled_dot_product_attention(q, k, v, is_causal=self.group.causal)
        return torch.autograd.grad(o, parts, self.do)

    def fault(self, choice: Any) -> str:
        """Empty if this candidate is right."""
        found = self.run(choice)
        pairs = zip(found if isinstance(found, tuple) else (found,), self.right(), strict=True)
        error = max(float((y.float() - r.float()).norm() / r.float().norm()) for y, r in pairs)
        return "" if error < 0.03 else f"wrong: off by {error:.3g}"


def compile_one(task: tuple[Group, Any]) -> str:
    """Run a candidate once, on the shape that will be timed; empty if right, else what went wrong."""
    group, choice = task
    try:
        bench = Bench.of(group, LENGTH)
        fault = bench.fault(choice)
        torch.cuda.synchronize()
        return fault
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:160]}"


def time_all(bench: Bench, some: list[Any], stage: str) -> list[dict[str, Any]]:
    """Rows, the fastest first."""
    functions: dict[str, Callable[[], object]] = {
        str(i): (lambda c=c: bench.run(c))  # type: ignore[misc]
        for i, c in enumerate(some)
    }
    samples = measure(functions, device=bench.q.device.type, warmup=2, graph=False, sweeps=AHEAD)
    rows = []
    for i, choice in enumerate(some):
        seconds = samples[str(i)].median
        rows.append(
            {
                "group": bench.group.name,
                "stage": stage,
                "length": bench.length,
                "us": round(seconds * 1e6, 1),
                "tflops": round(bench.flops() / seconds / 1e12, 1),
                "choice": choice._asdict(),
                "text": str(choice),
            }
        )
    return sorted(rows, key=lambda row: row["us"])


def sweep_group(group: Group, good: list[Any]) -> list[dict[str, Any]]:
    """All rows of a group: tiles, heads side by side, other lengths."""
    bench = Bench.of(group, LENGTH)
    kind: type[Any] = Schedule if group.kernel == "hopper" else Tiles
    rows = time_all(bench, good, "tiles")
    best = [kind(**row["choice"]) for row in rows[:KEPT]]
    rows += time_all(bench, list(dict.fromkeys(best[:2] + wider(best[:2]))), "heads")
    first = min(rows, key=lambda row: row["us"])
    print(f"{group.name}: {first['tflops']} TFLOP/s, {first['text']}", flush=True)
    for length in OTHER_LENGTHS:
        again = list(dict.fromkeys([kind(**first["choice"]), *best]))
        rows += time_all(Bench.of(group, length), again, f"length {length}")
    return rows


def best_of(file: Path) -> dict[str, Choice]:
    """The fastest choice of each group and rung in a sweep's record, by "forward D64 causal descriptor"."""
    found: dict[str, tuple[float, Choice]] = {}
    for row in json.loads(file.read_text())["results"]:
        if row["length"] != LENGTH:
            continue
        by_hand = row["group"].startswith("hopper")
        choice: Choice = Schedule(**row["choice"]) if by_hand else Tiles(**row["choice"])
        key = f"{row['group']} {'hopper' if isinstance(choice, Schedule) else choice.rung}"
        if key not in found or row["us"] < found[key][0]:
            found[key] = (row["us"], choice)
    return {key: choice for key, (_, choice) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="sweep tiles and schedules of FlashAttention on this GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--only", default="", help=f"kernels, of {', '.join(KERNELS)}")
    parser.add_argument("--workers", type=int, default=max(1, min(15, (os.cpu_count() or 2) - 1)))
    options = parser.parse_args()
    started = time.monotonic()
    kernels = [k for k in KERNELS if not options.only or k in options.only.split(",")]
    groups = [Group(k, d, c) for k, c, d in product(kernels, (True, False), HEAD_DIMS)]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        # All candidates are queued at once; while one group is timed the others go on compiling, which a
        # GPU that is timed does not mind: they run on it for a moment each.
        waiting = {
            group: [(c, pool.apply_async(compile_one, ((group, c),))) for c in choices(group)]
            for group in groups
        }
        compiled: dict[Group, list[Any]] = {}
        for group in groups:
            compiled[group] = []
            for choice, result in waiting[group]:
                left = options.seconds - (time.monotonic() - started)
                try:
                    fault = result.get(timeout=max(left, 0.0))
                except multiprocessing.TimeoutError:
                    fault = "not compiled in time"
                if fault:
                    failed.append(f"{group.name} {choice}: {fault}")
                else:
                    compiled[group].append(choice)
            print(
                f"{time.monotonic() - started:4.0f} s  {group.name}: {len(compiled[group])} of "
                f"{len(waiting[group])} candidates run",
                flush=True,
            )
        pool.terminate()
    for group in groups:
        if not compiled[group]:
            print(f"{group.name}: no candidate", flush=True)
            continue
        rows += sweep_group(group, compiled[group])
        torch.cuda.empty_cache()
        record = new_record("flash_sweep", "cuda", rows, [*NOTES, *failed])
        record = replace(record, command="python -m llmcourse.bench.flash_sweep --out FOLDER")
        save(record, options.out)
    for fault in failed[:30]:
        print(f"  {fault}", flush=True)
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
