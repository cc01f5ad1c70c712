"""FlashAttention's shipped plans, compiled for T4, A100 and H100: no spills, they fit, and use what is there.

Each kernel of each plan is compiled with options that take turns (causal, full, a window, packed sequences;
one key/value head for one or for four query heads). `EVERY=1` in the environment compiles all options of all,
and what `flash_plan.sweep` offers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from flash_compiled import Case, compiled

from llmcourse.kernels import flash_plan as plans

OPTIONS = (
    {"causal": True, "group": 4},
    {"causal": False},
    {"causal": True, "window": 1000, "group": 4},
    {"causal": True, "group": 4, "packed": True},
)
EVERY = bool(os.environ.get("EVERY"))


def shipped() -> Iterator[Case]:
    """Kernels without tensor cores (a T4's, and float32's) take the compiler longest: fewer of those."""
    turn = 0
    wanted = [
        (90, torch.bfloat16, True, (64, 128, 256)),
        (90, torch.float16, False, (64, 128, 96)),
        (80, torch.bfloat16, False, (64, 128, 256)),
        (75, torch.float16, False, (64, 128, 256) if EVERY else (64,)),
        (80, torch.float32, False, (64, 128, 256) if EVERY else (128,)),
    ]
    for capability, dtype, descriptors, head_dims in wanted:
        for head_dim in head_dims:
            for kernel in ("forward", "dkdv", "dq") if head_dim <= 128 else ("forward",):
                for i, options in enumerate(OPTIONS):
                    if options.get("packed") and descriptors:
                        continue  # no plan: a descriptor does not know where a sequence ends
                    if not EVERY and (i + turn) % len(OPTIONS):
                        continue
                    plan = plans.plan_for(
                        head_dim,
                        dtype,
                        capability,
                        causal=bool(options["causal"]),
                        window=int(options.get("window", 0)),
                        descriptors=descriptors,
                    )
                    yield Case(kernel, getattr(plan, kernel), head_dim, dtype, capability, **options)
                turn += 1


def swept() -> Iterator[Case]:
    for head_dim in (64, 128) if EVERY else ():
        for kernel in plans.Plan._fields:
            for tiles in plans.candidates(kernel, head_dim, heads=(1,)):
                yield Case(kernel, tiles, head_dim, torch.bfloat16, 90)


@pytest.mark.parametrize("case", [*shipped(), *swept()], ids=str)
def test_plans_compile_without_spills_and_use_tensor_cores_and_copy_engine(case, monkeypatch):
    target = compiled(case, monkeypatch)
    assert target.error is None
    assert target.spills == 0, target
    assert target.fits, f"{target.shared_bytes} bytes of shared memory"
    assert (target.tensor_cores > 0) == (case.capability >= 80 and case.dtype != torch.float32)
    assert set(target.tensor_core_opcodes) <= {"HGMMA" if case.capability == 90 else "HMMA"}
    assert (target.tma > 0) == (case.tiles.rung == "descriptor")


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_row_kernel_loads_16_bytes_at_a_time(capability, monkeypatch):
    tiles = plans.plan_for(64, torch.float16, capability, causal=True, descriptors=False).dq
    target = compiled(Case("rows", tiles, 64, torch.float16, capability), monkeypatch)
    assert target.spills == 0
    assert 128 in target.load_widths
