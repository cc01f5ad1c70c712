"""The launches that run under compute-sanitizer: every kernel, small, at odd shapes, and planted faults.

Each comes with the result that is expected of it, so that a kernel that did nothing is not called clean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels.launch import Plan
from llmcourse.kernels.vector_add import vector_add

Call = Callable[[], Any]
Launch = tuple[str, Call, Call]

RACE = """
__global__ void planted_race(float* out) {
    __shared__ float held[64];
    held[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = held[63 - threadIdx.x];  // another warp's element, and no barrier
}
"""
OVERRUN = """
__global__ void planted_overrun(float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) out[i] = i;  // one too many
}
"""


def launches() -> Iterator[Launch]:
    """(kernel, a call that launches it, a call that gives the expected result) for all kernels."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((5, 37), (3, 1000)):
            yield from memory_bound(rows, columns, dtype)
        yield from rotations(dtype)
        yield from products(dtype)
    yield from wide_rows()
    yield from cuda_softmax()


def forward_and_backward(function: Callable[..., Any], inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """The outputs, and the gradients of all inputs for gradients of ½."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, **options)
    outs = out if isinstance(out, tuple) else (out,)
    return (*outs, *torch.autograd.grad(outs, leaves, [torch.full_like(o, 0.5) for o in outs]))


def both_ways(name: str, function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Launch:
    """A kernel's launches forward and backward, beside its reference's."""
    run = partial(forward_and_backward, function, inputs)
    return name, partial(run, **options), partial(run, backend="reference")


def memory_bound(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Launch]:
    x, r = (torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(2))
    w, b = (torch.randn(columns, device="cuda").to(dtype) for _ in range(2))
    packed = torch.randn(rows, 2 * columns, device="cuda").to(dtype)
    hidden, weight = (torch.randn(n, 16, device="cuda").to(dtype) for n in (rows, columns))
    target = torch.arange(rows, device="cuda")
    target[1] = -100
    yield "vector_add", partial(vector_add, x, r), partial(torch.add, x, r)
    yield both_ways("softmax", softmax_file.softmax, x)
    yield both_ways("rms_norm", rms.rms_norm, x, w)
    yield both_ways("layer_norm", ln.layer_norm, x, w, b)
    yield both_ways("add_rms_norm", add_norm.add_rms_norm, x, r, w)
    yield both_ways("swiglu", swiglu_file.swiglu, packed)
    yield both_ways("cross_entropy", partial(_cross_entropy, target), x)
    yield both_ways("linear_cross_entropy", partial(_linear_ce, target), hidden, weight, chunk_rows=2)
    for name, naive, inputs in (
        ("softmax naive", softmax_file.softmax_naive, (x,)),
        ("rms_norm naive", rms.rms_norm_naive, (x, w)),
        ("layer_norm naive", ln.layer_norm_naive, (x, w, b)),
        ("add_rms_norm naive", add_norm.add_rms_norm_naive, (x, r, w)),
        ("swiglu naive", swiglu_file.swiglu_naive, (packed,)),
        ("cross_entropy naive", ce.cross_entropy_naive, (x, target)),
    ):
        yield name, partial(naive, *inputs), partial(naive, *inputs, backend="reference")


def _cross_entropy(target: Tensor, x: Tensor, **options: Any) -> Tensor:
    return ce.cross_entropy(x, target, **options)


def _loss_and_gradient(x: Tensor, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of each row, targets being its number: by the kernel, or by torch."""
    target, over = torch.arange(len(x), device="cuda"), x.clone()
    if plan is None:
        gradient = torch.softmax(x, -1) - torch.nn.functional.one_hot(target, x.shape[1])
        return torch.nn.functional.cross_entropy(x, target, reduction="none"), gradient
    loss = torch.empty(len(x), device="cuda")
    ce.losses_and_gradient(over, target, loss, -100, plan)
    return loss, over


def _linear_ce(target: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return ce.linear_cross_entropy(x, weight, target, **options)


def rotations(dtype: torch.dtype) -> Iterator[Launch]:
    q = torch.randn(2, 3, 5, 24, device="cuda").to(dtype)
    cos, sin = (torch.rand(5, 12, device="cuda") for _ in range(2))
    yield both_ways("rope", partial(_rope, cos, sin), q)
    yield (
        "rope naive",
        partial(rope_file.rope_naive, q, cos, sin),
        partial(rope_file.rope, q, cos, sin, backend="reference"),
    )


def _rope(cos: Tensor, sin: Tensor, x: Tensor, **options: Any) -> Tensor:
    return rope_file.rope(x, cos, sin, **options)


def wide_rows() -> Iterator[Launch]:
    """The rungs for rows that one program cannot hold."""
    x, r, w = (torch.randn(s, device="cuda") for s in ((2, 20_001), (2, 20_001), (20_001,)))
    for plan in (
        Plan("split", block=8192, warps=8),
        Plan("online", block=8192, warps=8),
    ):
        yield both_ways(f"softmax {plan.kernel}", softmax_file.softmax, x, plan=plan)
    step = partial(_loss_and_gradient, x, ce.step_plan(x.shape[1]))
    yield "cross_entropy loss and gradient", step, partial(_loss_and_gradient, x)
    yield both_ways("rms_norm looped", rms.rms_norm, x, w)
    yield both_ways("layer_norm looped", ln.layer_norm, x, w, r[0])
    yield both_ways("add_rms_norm looped", add_norm.add_rms_norm, x, r, w)


def products(dtype: torch.dtype) -> Iterator[Launch]:
    """The rungs of the matrix product."""
    from llmcourse.kernels.matmul import matmul
    from llmcourse.kernels.matmul_plan import RUNGS

    a, b = (torch.randn(s, device="cuda").to(dtype) for s in ((72, 160), (160, 104)))
    for rung in RUNGS:
        if rung != "reference":
            yield f"matmul {rung}", partial(matmul, a, b, rung=rung), partial(torch.matmul, a, b)


def cuda_softmax() -> Iterator[Launch]:
    """softmax.cu: a row in registers, and looped over; vectors of 16 bytes and of one element."""
    from llmcourse.kernels.softmax_cuda import softmax_cuda

    for columns in (37, 1000, 1024, 40_000, 40_001):
        x = torch.randn(3, columns, device="cuda").bfloat16()
        yield "softmax.cu", partial(softmax_cuda, x), partial(torch.softmax, x, -1)


def planted(tool: str) -> Iterator[Launch]:
    """A kernel with the fault that this tool must find."""
    from llmcourse.vgpu import cuda

    if tool == "racecheck":
        race, out = cuda.compile(RACE).kernel, torch.zeros(64, device="cuda")
        yield "planted_race", partial(race[1, 64], out), tuple
        return
    overrun, out = cuda.compile(OVERRUN).kernel, torch.zeros(1024, device="cuda")
    yield "planted_overrun", partial(overrun[9, 128], out, 1024), tuple
