"""Benchmark `training_memory`: the ledger beside the allocator's peak, and what recomputing costs.

    llmcourse bench training_memory --device cuda --out llmcourse/bench/records

For each setup a model is built, trained for one step (so that the optimizer's state is there), and the peak
of a second step is read. On a GPU it is `torch.cuda.max_memory_allocated`; on a CPU, which keeps no such
account, the storages that PyTorch's operations have made and that are alive, followed from birth to death.

Times are of forward and backward together, without the optimizer's step, interleaved. Checkpointing every
block should take about 4/3 of the time (forward 1, backward 2, forward again 1).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.bench.records import recorded
from llmcourse.bench.timing import measure
from llmcourse.errors import UnknownNameError
from llmcourse.grading.cost_torch import Births
from llmcourse.kernels.cross_entropy import linear_cross_entropy
from llmcourse.models import ModelConfig, Transformer
from llmcourse.notebook import Table
from llmcourse.train.checkpoint import Checkpointed
from llmcourse.train.fit import build
from llmcourse.train.ledger import Setup, ledger
from llmcourse.train.offload import offload
from llmcourse.train.precision import MasterWeights

NEARLY_1B = ModelConfig(32768, 2048, 16, 32, 8, 64, 5632, max_len=2048, name="0.8B")
SMOL = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, max_len=1024, name="SmolLM2-135M")
NO_GROUPS = ModelConfig(32768, 1024, 12, 16, 16, 64, 2816, max_len=1024, name="0.2B")
SMALL = ModelConfig(500, 64, 6, 4, 4, 16, 172, max_len=64, name="small")
WIDE = ModelConfig(4000, 64, 3, 4, 2, 16, 172, max_len=64, name="small, large vocabulary")

GPU_SETUPS = {
    "all kept": Setup(NEARLY_1B, 8, 2048, itemsize=2, masters=True),
    "pieces of 4": Setup(NEARLY_1B, 8, 2048, itemsize=2, masters=True, every=4),
    "each block": Setup(NEARLY_1B, 8, 2048, itemsize=2, masters=True, every=1),
    "each block, fused loss": Setup(
        NEARLY_1B, 8, 2048, itemsize=2, masters=True, every=1, fused_loss=True, chunk_bytes=1 << 28
    ),
    "gradients there": Setup(NEARLY_1B, 4, 2048, itemsize=2, masters=True, accumulates=True),
    "bfloat16 alone": Setup(SMOL, 16, 1024, itemsize=2),
    "float32": Setup(NO_GROUPS, 8, 1024),
    "float32, small batch": Setup(NO_GROUPS, 2, 512),
}
CPU_SETUPS = {
    "all kept": Setup(SMALL, 8, 64, device="cpu"),
    "pieces of 3": Setup(SMALL, 8, 64, every=3, device="cpu"),
    "each block": Setup(SMALL, 8, 64, every=1, device="cpu"),
    "gradients there": Setup(SMALL, 8, 64, accumulates=True, device="cpu"),
    "large vocabulary": Setup(WIDE, 8, 64, device="cpu"),
}


def that_fit() -> dict[str, Setup]:
    """The GPU's setups that need less than nine tenths of its free memory; bfloat16 from Ampere on."""
    free, _ = torch.cuda.mem_get_info()
    bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    fits = {name: setup for name, setup in GPU_SETUPS.items() if ledger(setup).peak < 0.9 * free}
    return {name: setup for name, setup in fits.items() if bfloat16 or setup.itemsize == 4}


class _Alive(Births):
    """Storages as real kernels make them: fused operations are not taken apart, as `Births` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload):
            self.saw(func, args, kwargs or {}, out)
        return out


@dataclass
class Peak:
    """Bytes: `value` at the peak; on a GPU also what was asked for before the allocator rounded it up."""

    value: int = 0
    requested: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """The most that was allocated at one time inside the `with`; on a GPU what was there before counts."""
    found = Peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.value = torch.cuda.max_memory_allocated()
        found.requested = torch.cuda.memory_stats().get("requested_bytes.all.peak", 0)
        return
    births = _Alive()
    with births:
        yield found
    found.value = found.requested = births.memory.peak


def loss_of(net: Checkpointed, setup: Setup, tokens: Tensor, targets: Tensor) -> Tensor:
    if not setup.fused_loss:
        return F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
    rows = max(1, setup.chunk_bytes // (setup.config.vocab_size * setup.itemsize))
    weight = net.model.head.weight
    return linear_cross_entropy(
        net.features(tokens).flatten(0, 1), weight, targets.flatten(), chunk_rows=rows
    )


def made(setup: Setup, device: str) -> tuple[Checkpointed, Tensor, Tensor]:
    """A model in the setup's format, tokens and targets [B, S]."""
    with torch.device(device):
        model = build(Transformer, setup.config, seed=0)
    model = model.to(torch.float32 if setup.itemsize == 4 else torch.bfloat16)
    tokens, targets = torch.randint(0, setup.config.vocab_size, (2, setup.batch, setup.length), device=device)
    return Checkpointed(model, setup.every), tokens, targets.clone()


def measure_peak(setup: Setup, device: str) -> Peak:
    """The peak of a training step of this setup, in steady state."""
    with nullcontext() if device == "cuda" else peak_memory(device) as whole:
        net, tokens, targets = made(setup, device)
        masters = MasterWeights(net.parameters()) if setup.masters else None
        trained = masters.parameters if masters else list(net.parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        for step in range(2):
            if setup.accumulates:  # an earlier micro-batch
                loss_of(net, setup, tokens, targets).backward()
            # On a CPU the whole life is followed, else memory from before would be missing.
            with peak_memory(device) if device == "cuda" and step else nullcontext() as second:
                loss_of(net, setup, tokens, targets).backward()
                if masters:
                    masters.take_gradients()
                optimizer.step()
                if masters:
                    masters.write_back()
            optimizer.zero_grad()
    return second or whole  # type: ignore[return-value]


def peak_row(name: str, setup: Setup, device: str) -> dict[str, Any]:
    bill = ledger(setup)
    found = measure_peak(setup, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {
        "kind": "peak",
        "name": name,
        "model": setup.config.name,
        "dtype": "float32" if setup.itemsize == 4 else "bfloat16",
        "batch": setup.batch,
        "length": setup.length,
        "masters": setup.masters,
        "every": setup.every,
        "fused_loss": setup.fused_loss,
        "accumulates": setup.accumulates,
        "at": bill.at,
        "predicted_bytes": bill.peak,
        "measured_bytes": found.value,
        "requested_bytes": found.requested,
        "error": bill.peak / found.value - 1,
    }


def time_rows(setup: Setup, device: str, *, pieces: tuple[int, ...], offloaded: bool) -> list[dict[str, Any]]:
    """Forward and backward of one setup: all kept, checkpointed in pieces, and offloaded; time and peak."""
    net, tokens, targets = made(setup, device)
    traffic: list[Any] = []

    def call(every: int, away: bool) -> Callable[[], object]:
        def run() -> None:
            net.every = every
            for p in net.parameters():
                p.grad = None
            if away:
                with offload(net) as moved:
                    loss = loss_of(net, setup, tokens, targets)
                loss.backward()
                traffic[:] = [moved]
            else:
                loss_of(net, setup, tokens, targets).backward()

        return run

    calls = {"all kept": call(0, False)} | {f"pieces of {k}": call(k, False) for k in pieces}
    if offloaded:
        calls["offloaded"] = call(0, True)
    rows: list[dict[str, Any]] = []
    for name, sample in measure(calls, device=device, warmup=1, graph=False).items():
        with peak_memory(device) as peak:
            calls[name]()
        rows.append(
            {
                "kind": "time",
                "name": name,
                "model": setup.config.name,
                "batch": setup.batch,
                "length": setup.length,
                "ms": sample.median * 1e3,
                "low_ms": sample.low * 1e3,
                "high_ms": sample.high * 1e3,
                "peak_bytes": peak.value,
                "moved_bytes": traffic[0].out + traffic[0].back if name == "offloaded" else 0,
            }
        )
    base = float(rows[0]["ms"])
    return [row | {"times": float(row["ms"]) / base} for row in rows]


def run(device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows and notes, for `llmcourse bench`."""
    setups = GPU_SETUPS if device == "cuda" else CPU_SETUPS
    rows = [peak_row(name, setup, device) for name, setup in setups.items()]
    timed = Setup(NEARLY_1B, 2, 2048, itemsize=2) if device == "cuda" else Setup(SMALL, 8, 64, device="cpu")
    rows += time_rows(timed, device, pieces=(4, 1), offloaded=True)
    worst = max(abs(row["error"]) for row in rows if row["kind"] == "peak")
    return rows, [
        f"The ledger's largest error in these setups: {worst:.2%} of the measured peak.",
        "Peak: of a whole training step in steady state, AdamW in one fused kernel. On a GPU it is the "
        "allocator's own reading, rounding and the matrix library's workspace included.",
        "Time: forward and backward without the optimizer's step; random weights and tokens.",
    ]


def recorded_table(kind: str, device: str = "H100") -> Table | str:
    """The record's rows of one kind, "peak" or "time"; without a record, how to make one."""
    try:
        record = recorded("training_memory", device=device)
    except UnknownNameError:
        return "not recorded yet: llmcourse bench training_memory --device cuda"
    found = [row for row in record.results if row["kind"] == kind]
    if kind == "peak":
        heads = ["model", "setup", "peak at", "predicted, GB", "allocator, GB", "error"]
        columns: list[Any] = [
            (r["model"], r["name"], r["at"], r["predicted_bytes"] / 1e9, r["measured_bytes"] / 1e9)
            for r in found
        ]
        columns = [(*c, f"{r['error']:+.1%}") for c, r in zip(columns, found, strict=True)]
    else:
        heads = ["forward and backward", "tokens", "ms", "times as long", "peak, GB"]
        columns = [
            (r["name"], r["batch"] * r["length"], r["ms"], f"{r['times']:.2f}", r["peak_bytes"] / 1e9)
            for r in found
        ]
    return Table(heads, columns, record.caption)
