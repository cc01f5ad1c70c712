"""The last rung of FlashAttention's ladder: Hopper's copy engine, tensor cores and warps by hand, launched.

`flash_hopper_kernel.py` is the kernel and says how it works. Here: how it can be launched (`Schedule`), which
tensors it takes (`unsupported`), and the launch, on a GPU or by `gluon_threads` on a CPU.

Forward only; D 64 and 128 in fp16 and bf16; any lengths (the copy engine fills with zeros beyond the last key
and clips what is written beyond the last query); what a query sees is as in `attention_reference.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcourse.errors import CourseError
from llmcourse.kernels.flash_hopper_kernel import hopper_kernel
from llmcourse.kernels.flash_plan import Tiles
from llmcourse.kernels.gluon_language import TensorDescriptor, gl, gluon
from llmcourse.kernels.launch import ceil_div

LOG2_E = 1.4426950408889634
ROWS = 64  # queries of a consumer: the M of a WGMMA
REGISTERS = {2: (168, 240, 24), 3: (128, 160, 32)}
"""By number of consumers: registers a thread at the start, then a consumer's and the producer's thread.
(consumers + 1) · 128 threads share 65,536 registers (three of the producer's four warps are idle), and counts
go in steps of eight."""


class Schedule(NamedTuple):
    """How the kernel is launched; no choice changes the result.

    groups      consumers: 64 queries a tile for each, 2 or 3
    block_n     keys of a block, 64 or 128
    stages      blocks of K and of V in shared memory at once
    band        heads whose tiles are side by side
    ordered     consumers take turns at issuing products (ping-pong)
    overlap     the softmax of a block beside the output product of the block before
    persistent  as many programs as multiprocessors, each with many tiles; else a program a tile
    """

    groups: int = 2
    block_n: int = 128
    stages: int = 2
    band: int = 8
    ordered: bool = True
    overlap: bool = True
    persistent: bool = False

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory for queries, keys and values; barriers and the compiler's own add less than 2 KiB."""
        return 2 * head_dim * (self.groups * ROWS + 2 * self.stages * self.block_n)


# The fastest of `python -m llmcourse.bench.flash_sweep` on an H100.
SCHEDULES = {
    (64, False): Schedule(3, 128, 3, ordered=True, overlap=False),
    (64, True): Schedule(3, 128, 3, ordered=True, overlap=False),
    (128, False): Schedule(2, 128, 2, ordered=False, overlap=True),
    (128, True): Schedule(2, 128, 2, ordered=False, overlap=True),
}
"""By head dimension and whether causal."""

INTERPRETED = Schedule(2, 64, 2, 3)


class UnsupportedError(CourseError, ValueError):
    """Inputs for which there is another rung, but not this one."""


def unsupported(q: Tensor, k: Tensor, v: Tensor, *, interpret: bool = False) -> str:
    """Why this rung cannot take these tensors; empty if it can."""
    if not gluon.found:
        return "this Triton has no Gluon for Hopper (3.6 and later have)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"WGMMA multiplies 16-bit floats here, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128):
        return f"a head dimension of {q.shape[-1]}, not 64 or 128"
    if not interpret and q.device.type != "meta":
        if not q.is_cuda:
            return "the tensors are on the CPU"
        if torch.cuda.get_device_capability(q.device)[0] != 9:
            return "WGMMA exists on Hopper (sm_90) only"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{name}'s last dimension is not contiguous"
        if x.data_ptr() % 16 or any(stride == 0 or stride * x.itemsize % 16 for stride in strides):
            return f"{name}'s rows do not start on different multiples of 16 bytes, as the copy engine asks"
    return ""


def _described(x: Tensor, rows: int, interpret: bool) -> Any:
    """A descriptor of [B, H, S, D] with blocks of [1, 1, rows, D]."""
    block = [1, 1, rows, x.shape[-1]]
    if interpret:
        from llmcourse.kernels.gluon_threads import Descriptor

        return Descriptor(x, block)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # A dimension of one element may have any stride, and the engine looks at it all the same.
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def arguments_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Any,
    scale: float,
    causal: bool,
    plan: Schedule,
    interpret: bool,
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """(arguments, constants and compiler options, tiles) of a launch."""
    batch, heads, queries, _ = q.shape
    blocks = ceil_div(queries, ROWS * plan.groups)
    tiles = batch * heads * blocks
    sizes = (queries, k.shape[2], heads, heads // k.shape[1], blocks, tiles, min(plan.band, batch * heads))
    descriptors = (
        _described(q, ROWS, interpret),
        _described(k, plan.block_n, interpret),
        _described(v, plan.block_n, interpret),
        _described(o, ROWS, interpret),
    )
    start, consumer, producer = REGISTERS[plan.groups]
    constants: dict[str, Any] = {
        "GROUPS": plan.groups,
        "STAGES": plan.stages,
        "CAUSAL": causal,
        "ORDERED": plan.ordered,
        "OVERLAP": plan.overlap,
        "PERSISTENT": plan.persistent,
        "PRODUCER": producer,
        "CONSUMER": consumer,
    }
    if not interpret:
        constants |= {"num_warps": 4, "maxnreg": start}
    return (*descriptors, lse, *sizes, scale * LOG2_E), constants, tiles


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    plan: Schedule | None = None,
    interpret: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o [B, Hq, S, D], log-sum-exp [B, Hq, S] in float32) of attention.

    q [B, Hq, S, D], k and v [B, Hkv, T, D], Hq a multiple of Hkv, fp16 or bf16, D 64 or 128
    scale       1/√D if None
    interpret   on the CPU, by `gluon_threads`

    Does     4·D FLOPs and one exponential for each visible pair, a query and a key.
    Raises   UnsupportedError with the reason that `unsupported` gives.
    """
    if reason := unsupported(q, k, v, interpret=interpret):
        raise UnsupportedError(
            f"the Hopper rung of FlashAttention cannot run: {reason}.",
            "It is written for one GPU, and for what its copy engine and tensor cores take.",
            "llmcourse.kernels.flash_attention.attention, which takes the best rung that can.",
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, 1e-30)  # −∞ (a masked score) times 0 would be NaN
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if 0 in o.shape or k.shape[2] == 0:
        return o.zero_(), lse.fill_(-math.inf)
    plan = plan or (INTERPRETED if interpret else SCHEDULES[q.shape[-1], causal])
    if interpret:
        from llmcourse.kernels.gluon_threads import Pointer, run

        place: Any = Pointer(lse)
        arguments, constants, tiles = arguments_of(q, k, v, o, place, scale, causal, plan, True)
        run(hopper_kernel, 3 if plan.persistent else tiles, *arguments, **constants)
        return o, lse
    arguments, constants, tiles = arguments_of(q, k, v, o, lse, scale, causal, plan, False)
    programs = tiles
    if plan.persistent:
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device(q.device):
        hopper_kernel[(programs,)](*arguments, **constants)
    return o, lse


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int = 0, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """`forward` as `flash_attention` calls it, with its tiles (`flash_plan.Tiles`); None for the best known.

    Raises   UnsupportedError for a window: which keys a query sees has no lower end here.
    """
    if window:
        raise UnsupportedError(
            f"the Hopper rung of FlashAttention has no sliding window (of {window} keys).",
            "Its consumers walk from the last visible key to the first.",
            "the descriptor rung, which skips the blocks before the window.",
        )
    plan = None if tiles is None else scheduled(tiles, q.shape[-1], causal)
    return forward(q, k, v, causal=causal, scale=scale, plan=plan)


def scheduled(tiles: Tiles, head_dim: int, causal: bool) -> Schedule | None:
    """The schedule of `flash_plan`'s tiles, the rest as in SCHEDULES; None for a head dim that has none."""
    plan = SCHEDULES.get((head_dim, causal))
    return plan and plan._replace(
        groups=tiles.block_m // ROWS, block_n=tiles.block_n, stages=tiles.stages, band=tiles.heads
    )
