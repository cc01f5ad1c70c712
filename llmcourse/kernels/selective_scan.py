"""The selective scan in one kernel: states stay in registers, and only inputs and outputs cross the memory.

    h_t = exp(Δ_t·A)·h_{t−1} + Δ_t·B_t·x_t          y_t = C_t·h_t          h [E, N] for each sequence

In tensor operations the states of every token, N times as large as x, are written and read in each round of
the scan. Here a program holds the states of BLOCK channels, [BLOCK, N], and walks over the tokens. That alone
would be S steps of B·E/BLOCK programs, too few to fill a GPU; so the sequence is cut into chunks:

    launch 1      every chunk alone, from h = 0: its last state, and the sum of its Δ
    between       the state before each chunk, by `scan_parallel` over chunks: exp(A·ΣΔ) decays a whole chunk
    launch 2      every chunk again, from the right state: y

Twice the arithmetic, S/chunk times the programs. The launches move `moved_bytes`: x, Δ and B twice, C and y
once, and the states once a chunk. Forward only: for prefill, and for layers whose gradient nobody asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.errors import GraphError, ShapeError
from llmcourse.kernels.checks import Backend, check_float, check_shape, check_together, choose
from llmcourse.kernels.language import tl, triton
from llmcourse.kernels.launch import ceil_div, launch, power_of_two
from llmcourse.models.recurrent import accumulator
from llmcourse.models.ssm import scan_parallel
from llmcourse.models.ssm import selective_scan as reference

BLOCK, CHUNK, WARPS = 32, 256, 4
"""Channels of a program, tokens of a chunk, warps of a program."""


def moved_bytes(
    batch: int, tokens: int, channels: int, states: int, itemsize: int, chunk: int = CHUNK
) -> int:
    """Different bytes of both launches, x, Δ, B, C and y being of `itemsize` and A and the states float32."""
    parts = batch * ceil_div(tokens, chunk)
    streams = batch * tokens * (5 * channels + 3 * states) * itemsize
    return streams + parts * (2 * channels * states + channels) * 4 + 2 * channels * states * 4


@triton.jit
def chunk_kernel(
    x, dt, A, B, C, start, y, last, total, tokens, channels, chunk,
    STATES: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence for BLOCK channels. x, dt, y [B, S, E], B, C [B, S, STATES], A [E, STATES].

    WRITE: from `start` [B, chunks, E, STATES], writes y. Otherwise from zero, writes `last` (shaped as start)
    and the chunk's sum of Δ, `total` [B, chunks, E].
    """
    part, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    there, kept = c < channels, n < STATES
    both = there[:, None] & kept[None, :]
    rate = tl.load(A + c[:, None] * STATES + n[None, :], mask=both, other=0.0).to(tl.float32)
    at = (sequence * tl.num_programs(1) + part) * channels
    cell = at * STATES + c[:, None] * STATES + n[None, :]
    h = tl.zeros((BLOCK, N), tl.float32)
    if WRITE:
        h = tl.load(start + cell, mask=both, other=0.0)
    elapsed = tl.zeros((BLOCK,), tl.float32)
    for t in tl.range(part * chunk, tl.minimum(tokens, (part + 1) * chunk)):
        row = sequence * tokens + t
        step = tl.load(dt + row * channels + c, mask=there, other=0.0).to(tl.float32)
        value = tl.load(x + row * channels + c, mask=there, other=0.0).to(tl.float32)
        write = tl.load(B + row * STATES + n, mask=kept, other=0.0).to(tl.float32)
        h = tl.exp(step[:, None] * rate) * h + (step * value)[:, None] * write[None, :]
        if WRITE:
            read = tl.load(C + row * STATES + n, mask=kept, other=0.0).to(tl.float32)
            out = tl.sum(h * read[None, :], axis=1)
            tl.store(y + row * channels + c, out.to(y.dtype.element_ty), mask=there)
        else:
            elapsed += step
    if not WRITE:
        tl.store(last + cell, h, mask=both)
        tl.store(total + at + c, elapsed, mask=there)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y and the last state, as `llmcourse.models.ssm.selective_scan`: no gradient, float32 inside.

    x, dt [B, S, E], A [E, N], B, C [B, S, N], h [B, E, N] (None: zeros) → y [B, S, E], h [B, E, N]

    Raises ShapeError or DeviceError when the tensors do not belong together, GraphError when a gradient is
    wanted of the kernel.
    """
    check_together(x=x, dt=dt, A=A, B=B, C=C, **({} if h is None else {"h": h}))
    if x.dim() != 3 or A.dim() != 2 or 0 in (*x.shape, *A.shape) or chunk < 1:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, A {tuple(A.shape)}, and a chunk {chunk} tokens.",
            "The scan reads x [B, S, E] with A [E, N], chunk by chunk, and none of them is empty.",
            "at least one of each.",
        )
    batch, tokens, channels = x.shape
    states = A.shape[1]
    check_shape("A", A, (channels, states), "Every channel has its own rates of decay.")
    if h is not None:
        check_shape("h", h, (batch, channels, states), "Every sequence starts from a state for each rate.")
    check_shape("dt", dt, x.shape, "Every token has a step size for each channel.")
    for name, t in (("B", B), ("C", C)):
        check_shape(name, t, (batch, tokens, states), "Every token has a direction of as many states as A.")
    way = choose(backend, x, dt, A, B, C)
    if way == "reference":
        kind = accumulator(x.dtype)
        start = None if h is None else h.to(kind)
        y, after = reference(x.to(kind), dt.to(kind), A.to(kind), B.to(kind), C.to(kind), start)
        return y.to(x.dtype), after
    for name, t in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C)):
        check_float(name, t)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, A, B, C)):
        raise GraphError(
            "a gradient is wanted of the fused scan.",
            "It keeps no states for a backward pass, so the layers before it would silently learn nothing.",
            'torch.no_grad(), or scan="parallel", which has a gradient.',
        )
    x, dt, A, B, C = (t.detach().contiguous() for t in (x, dt, A, B, C))
    parts = ceil_div(tokens, chunk)
    last = x.new_empty(batch, parts, channels, states, dtype=torch.float32)
    total = x.new_empty(batch, parts, channels, dtype=torch.float32)
    y = torch.empty_like(x)
    grid = (ceil_div(channels, BLOCK), parts, batch)

    def run(start: Tensor, *, write: bool) -> None:
        sizes = {"STATES": states, "N": power_of_two(states), "BLOCK": BLOCK, "WRITE": write}
        arguments = (x, dt, A, B, C, start, y, last, total, tokens, channels, chunk)
        launch(chunk_kernel, grid, *arguments, interpret=way == "interpret", num_warps=WARPS, **sizes)

    run(last, write=False)
    first = last.new_zeros(batch, channels, states) if h is None else h.detach().float()
    after = scan_parallel(torch.exp(total.unsqueeze(-1) * A.float()), last, first)
    run(torch.cat((first.unsqueeze(1), after[:, :-1]), dim=1).contiguous(), write=True)
    return y, after[:, -1]
