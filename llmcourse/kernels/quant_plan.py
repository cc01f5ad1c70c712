"""Which kernel multiplies quantized weights, and how it is launched, for given shapes and device.

Like `matmul_plan.py`: a `Choice` says why. The numbers come from a sweep on an H100
(`python -m llmcourse.bench.quant_sweep`); elsewhere they are what compiles without register spills.

    rung         for
    reference    CPU tensors: torch unpacks and multiplies
    gemv         one row of 8-bit codes; GPUs without tensor cores for tl.dot (sm_75), a few rows
    dot          1 to LARGEST rows: unpacked in registers, multiplied by tensor cores
    dequantize   more rows, or groups that are no multiple of 32: unpacked into memory, then torch.matmul
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmcourse.kernels.launch import ceil_div, power_of_two

RUNGS = {
    "reference": "unpack and multiply in torch",
    "gemv": "a row at a time, multiply-adds on the ordinary units",
    "dot": "a few rows, codes become operands of the tensor cores in registers",
    "dequantize": "weights written out in 16 bits, then torch.matmul",
}
LARGEST = {4: 64, 8: 64}
"""Rows up to which `dot` is taken, by bits."""
GEMV_ROWS = 8
PROGRAMS = 3.7
"""Programs for one multiprocessor, each with stages − 1 tiles on their way: K is cut to make as many."""
FEWER = {(4, 64): 2.0, (8, 32): 2.4, (8, 64): 2.0}
"""Where that is better: for many rows the sums of a part weigh as much as what is gained by more parts."""


@dataclass(frozen=True)
class QuantPlan:
    """How a quantized product is launched.

    rung       a key of RUNGS
    block_m    rows of x in a tile; block_n: rows of weights; block_k: codes along K in one step
    warps      of a program; stages: steps whose loads are in flight, and the one computed
    splits     programs that share a tile, each a part of K
    substeps   of block_k codes whose loads are issued together
    """

    rung: str
    block_m: int = 8
    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 4
    splits: int = 1
    substeps: int = 1

    def loop_bytes(self, bits: int, itemsize: int = 2) -> int:
        """Shared memory of the load pipeline."""
        return (
            (self.block_n * bits // 8 + self.block_m * itemsize)
            * self.block_k
            * self.substeps
            * (self.stages - 1)
        )


@dataclass(frozen=True)
class Choice:
    """plan: how it runs; why: the reason in words."""

    plan: QuantPlan
    why: str

    @property
    def rung(self) -> str:
        return self.plan.rung


# (bits, rows at the most): tiles. `wgmma` takes its left operand from registers too, but pairs of bytes at a
# time; two warps a program, or fewer than 64 rows of weights, keep Triton on `mma.sync`, which takes four.
DOT = {
    (4, 8): QuantPlan("dot", 8, 64, 128, 4, 3, substeps=2),
    (4, 16): QuantPlan("dot", 16, 32, 128, 2, 3, substeps=2),
    (4, 32): QuantPlan("dot", 32, 64, 128, 2, 3),
    (4, 64): QuantPlan("dot", 32, 64, 128, 2, 4),
    (8, 8): QuantPlan("dot", 8, 64, 128, 4, 4),
    (8, 16): QuantPlan("dot", 16, 32, 256, 2, 3),
    (8, 32): QuantPlan("dot", 32, 64, 128, 4, 3),
    (8, 64): QuantPlan("dot", 64, 64, 128, 4, 4),
}
FULL_PRECISION = QuantPlan("dot", 16, 32, 32, 4, 2)  # float32 activations: no tensor core, wide operands
GEMV = QuantPlan("gemv", 1, 8, 2048, 4, 1)
INTERPRETED = QuantPlan("dot", 8, 32, 64, 4, 2, 2)


def pick(
    m: int,
    n: int,
    k: int,
    *,
    bits: int,
    group: int,
    itemsize: int = 2,
    capability: int = 90,
    multiprocessors: int = 132,
) -> Choice:
    """The plan for x [m, k] times weights [n, k] in groups of `group` codes (k or more: one scale a row)."""
    if 0 in (m, n, k):
        return Choice(QuantPlan("reference"), f"an empty product ({m} × {k} by {k} × {n})")
    alone = bits == 8 and m == 1 and itemsize == 2
    if (alone or (capability < 80 and m <= GEMV_ROWS)) and (group >= k or chunk_of(group, k) >= 32):
        why = (
            "one row of bytes: a multiplication each is not yet what takes the time"
            if alone
            else f"on sm_{capability} tl.dot has no tensor cores"
        )
        return Choice(replace(GEMV, block_k=min(GEMV.block_k, power_of_two(k))), why)
    if capability < 80:
        return Choice(QuantPlan("dequantize"), f"{m} rows, and on sm_{capability} tl.dot has no tensor cores")
    if m > LARGEST[bits]:
        return Choice(QuantPlan("dequantize"), f"{m} rows: the products take longer than the weights' bytes")
    step = step_of(group, k)
    if step < 32:
        return Choice(
            QuantPlan("dequantize"),
            f"groups of {group}: a step of the kernel is 32 codes or more of one group",
        )
    rows = min(rows for b, rows in DOT if b == bits and rows >= m)
    programs = FEWER.get((bits, rows), PROGRAMS)
    plan = FULL_PRECISION if itemsize == 4 else DOT[bits, rows]
    plan = replace(plan, block_k=min(plan.block_k, step))
    plan = replace(plan, splits=parts(plan, m, n, k, multiprocessors, programs))
    there = ceil_div(m, plan.block_m) * ceil_div(n, plan.block_n) * plan.splits
    if plan.substeps > 1 and there < 3 * multiprocessors:  # short steps leave more parts to cut
        plan = replace(plan, substeps=1)
        plan = replace(plan, splits=parts(plan, m, n, k, multiprocessors, programs))
    return Choice(plan, f"{m} rows: the weights' bytes take the time")


def step_of(group: int, k: int) -> int:
    """The largest power of two of codes along K, 256 at the most, that never crosses from group to group.

    With one scale a row there is nothing to cross: the largest that divides K into 8 steps or more, so that
    no step needs a mask.
    """
    if group < k:
        return chunk_of(group, 256)
    for step in (256, 128, 64):
        if k % step == 0 and k >= 4 * step:
            return step
    return 128 if k >= 1024 else 32


def chunk_of(group: int, most: int) -> int:
    """The largest power of two that divides a group, `most` at the most."""
    return min(group & -group, power_of_two(most))


def parts(plan: QuantPlan, m: int, n: int, k: int, multiprocessors: int, programs: float = PROGRAMS) -> int:
    """Parts of K for about `programs` programs a multiprocessor, none shorter than 4 steps.

    Each part leaves its sums in float32; all of them together stay below a quarter of the weights' bytes.
    """
    tiles = ceil_div(m, plan.block_m) * ceil_div(n, plan.block_n)
    steps = ceil_div(k, plan.block_k * plan.substeps)
    wanted = round(programs * multiprocessors / tiles)
    return max(1, min(wanted, steps // 4, max(2, k // (32 * m)), 16))
