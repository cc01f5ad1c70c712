"""What benchmark `kernels` measures: for each kernel a shape, the bytes it must move, and who computes it.

A case holds functions without arguments that all return the same tensors: this package's kernel ("ours"), its
naive rung, torch op by op ("eager"), torch.compile of the same expression ("compile"), and what else does the
job. `exact` computes them in float64, which every function is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels import vector_add as add_file

Outputs = tuple[Tensor, ...]
Function = Callable[[], Any]
Formula = Callable[..., Any]


@dataclass
class Case:
    """One kernel at one shape.

    direction   forward, backward, or step (both)
    bytes       that must cross the memory, whoever computes it
    functions   by name; "ours" among them
    exact       the result in float64, compared with every function's (the first tensors, as many as it gives)
    graph       whether the functions can be captured in a CUDA graph (autograd's backward pass cannot)
    notes       "flops" of a step, "memory" if its peak is to be measured, the "rung" that runs
    """

    kernel: str
    direction: str
    shape: str
    dtype: torch.dtype
    bytes: int
    functions: dict[str, Function]
    exact: Callable[[], Outputs]
    graph: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


def cases(only: str = "") -> Iterator[Case]:
    """All cases, each made when it is asked for, so that only its own tensors are in memory."""
    for name, make in MAKERS.items():
        if only in name:
            yield from make()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def tuple_of(result: Any) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def forward(
    formula: Formula, inputs: Outputs, *, ours: Formula, naive: Formula | None = None
) -> tuple[dict[str, Function], Callable[[], Outputs]]:
    """(functions, exact) of a forward pass."""
    by_compile = torch.compile(formula, dynamic=False)
    functions: dict[str, Function] = {
        "ours": lambda: ours(*inputs),
        "eager": lambda: formula(*inputs),
        "compile": lambda: by_compile(*inputs),
    }
    if naive is not None:
        functions["naive"] = lambda: naive(*inputs)
    return functions, lambda: tuple_of(formula(*(t.double() for t in inputs)))


def backward_of(function: Formula, inputs: Outputs, grads: Outputs) -> Function:
    """The backward pass of `function` at `inputs`, to be run as often as one likes."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    outs = tuple_of(function(*leaves))
    grads = tuple(g.to(o.dtype) for g, o in zip(grads, outs, strict=True))
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def backward(
    formula: Formula, inputs: Outputs, grads: Outputs, *, ours: Formula
) -> tuple[dict[str, Function], Callable[[], Outputs]]:
    """(functions, exact) of a backward pass."""
    functions = {
        "ours": backward_of(ours, inputs, grads),
        "eager": backward_of(formula, inputs, grads),
        "compile": backward_of(torch.compile(formula, dynamic=False), inputs, grads),
    }
    double = tuple(t.double() for t in inputs)
    return functions, lambda: backward_of(formula, double, grads)()


def vector_add() -> Iterator[Case]:
    for dtype, n in ((torch.float32, 1 << 26), (torch.bfloat16, 1 << 27)):
        functions, exact = forward(
            lambda x, y: x + y,
            (randn(n, dtype=dtype), randn(n, dtype=dtype)),
            ours=add_file.vector_add,
            naive=lambda x, y: add_file.vector_add(x, y, plan=add_file.NAIVE),
        )
        size = add_file.minimum_bytes(n, dtype.itemsize)
        yield Case("vector_add", "forward", f"{n}", dtype, size, functions, exact)


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


SOFTMAX_SHAPES = (
    (16384, 8192), (131072, 1024), (4096, 32768), (2048, 65536), (1024, 131072), (512, 262144), (16381, 8191),
)  # fmt: skip


def softmax() -> Iterator[Case]:
    from llmcourse.vgpu import native

    sizes = [(m, n, torch.bfloat16) for m, n in SOFTMAX_SHAPES] + [(16384, 8192, torch.float32)]
    for rows, columns, dtype in sizes:
        x = randn(rows, columns, dtype=dtype, scale=3.0)
        naive = softmax_file.softmax_naive if columns <= softmax_file.NAIVE_LIMIT else None
        functions, exact = forward(_softmax, (x,), ours=softmax_file.softmax, naive=naive)
        if native.available():
            functions["ours, CUDA C++"] = _cuda_softmax(x)
        size = softmax_file.minimum_bytes(rows, columns, dtype.itemsize)
        notes = {"rung": softmax_file.softmax_plan(columns).kernel}
        yield Case("softmax", "forward", f"{rows}×{columns}", dtype, size, functions, exact, notes=notes)


def _cuda_softmax(x: Tensor) -> Function:
    from llmcourse.kernels.softmax_cuda import softmax_cuda

    return lambda: softmax_cuda(x)


def softmax_backward() -> Iterator[Case]:
    for rows, columns in ((16384, 8192), (2048, 65536)):
        x, dy = randn(rows, columns, scale=3.0), randn(rows, columns)
        functions, exact = backward(_softmax, (x,), (dy,), ours=softmax_file.softmax)
        size, shape = 3 * x.numel() * x.element_size(), f"{rows}×{columns}"
        yield Case("softmax", "backward", shape, x.dtype, size, functions, exact, graph=False)


NORM_SHAPES = ((16384, 8192), (32768, 4096), (131072, 1024))


def _rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def _add_rms(x: Tensor, residual: Tensor, w: Tensor) -> Outputs:
    h = x + residual
    return _rms(h, w), h


def norm_forward() -> Iterator[Case]:
    for rows, columns in (*NORM_SHAPES, (4096, 32768)):
        x, w, b = randn(rows, columns), randn(columns), randn(columns)
        shape = f"{rows}×{columns}"
        functions, exact = forward(_rms, (x, w), ours=rms.rms_norm, naive=rms.rms_norm_naive)
        size = rms.minimum_bytes(rows, columns, 2)
        yield Case("rms_norm", "forward", shape, x.dtype, size, functions, exact)
        functions, exact = forward(_layer, (x, w, b), ours=ln.layer_norm, naive=ln.layer_norm_naive)
        size = ln.minimum_bytes(rows, columns, 2)
        yield Case("layer_norm", "forward", shape, x.dtype, size, functions, exact)


def norm_backward() -> Iterator[Case]:
    for rows, columns in NORM_SHAPES:
        x, dy, w, b = randn(rows, columns), randn(rows, columns), randn(columns), randn(columns)
        shape = f"{rows}×{columns}"
        functions, exact = backward(_rms, (x, w), (dy,), ours=rms.rms_norm)
        size = rms.minimum_backward_bytes(rows, columns, 2)
        yield Case("rms_norm", "backward", shape, x.dtype, size, functions, exact, graph=False)
        functions, exact = backward(_layer, (x, w, b), (dy,), ours=ln.layer_norm)
        size = ln.minimum_backward_bytes(rows, columns, 2)
        yield Case("layer_norm", "backward", shape, x.dtype, size, functions, exact, graph=False)


def add_norm_forward() -> Iterator[Case]:
    for rows, columns in NORM_SHAPES[:2]:
        functions, exact = forward(
            _add_rms,
            (randn(rows, columns), randn(rows, columns), randn(columns)),
            ours=add_norm.add_rms_norm,
            naive=add_norm.add_rms_norm_naive,
        )
        size, shape = add_norm.minimum_bytes(rows, columns, 2), f"{rows}×{columns}"
        yield Case("add_rms_norm", "forward", shape, torch.bfloat16, size, functions, exact)


def add_norm_backward() -> Iterator[Case]:
    rows, columns = NORM_SHAPES[0]
    x, residual, dy, dh = (randn(rows, columns) for _ in range(4))
    functions, exact = backward(_add_rms, (x, residual, randn(columns)), (dy, dh), ours=add_norm.add_rms_norm)
    size, shape = add_norm.minimum_backward_bytes(rows, columns, 2), f"{rows}×{columns}"
    yield Case("add_rms_norm", "backward", shape, x.dtype, size, functions, exact, graph=False)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def swiglu() -> Iterator[Case]:
    rows, columns = 8192, 14336
    x, dout, shape = randn(rows, 2 * columns), randn(rows, columns), f"{rows}×{columns}"
    functions, exact = forward(_swiglu, (x,), ours=swiglu_file.swiglu, naive=swiglu_file.swiglu_naive)
    size = swiglu_file.minimum_bytes(rows, columns, 2)
    yield Case("swiglu", "forward", shape, x.dtype, size, functions, exact)
    functions, exact = backward(_swiglu, (x,), (dout,), ours=swiglu_file.swiglu)
    size = swiglu_file.minimum_backward_bytes(rows, columns, 2)
    yield Case("swiglu", "backward", shape, x.dtype, size, functions, exact, graph=False)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope() -> Iterator[Case]:
    batch, heads, length, head_dim = 8, 32, 4096, 128
    frequencies = 10000.0 ** -(torch.arange(0, 1, 2 / head_dim, device="cuda"))
    angles = torch.outer(torch.arange(length, device="cuda"), frequencies)
    cos, sin = angles.cos(), angles.sin()
    for layout in ("B H S D", "B S H D"):
        if layout == "B H S D":
            x = randn(batch, heads, length, head_dim)
        else:
            x = randn(batch, length, heads, head_dim).transpose(1, 2)
        functions, exact = forward(_rope, (x, cos, sin), ours=rope_file.rope, naive=rope_file.rope_naive)
        size = rope_file.minimum_bytes(x.numel(), 2, tables=2 * cos.numel() * 4)
        shape = f"[{batch}, {heads}, {length}, {head_dim}] in memory {layout}"
        yield Case("rope", "forward", shape, x.dtype, size, functions, exact)


def cross_entropy() -> Iterator[Case]:
    rows, columns = 8192, 128256
    logits = randn(rows, columns, scale=2.0)
    target = torch.randint(0, columns, (rows,), device="cuda")
    one = torch.ones((), device="cuda")
    lse = ce.losses(logits, target, -100, ce.loss_plan(columns))[1]
    factor, spoiled = (one / rows).expand(rows), logits.clone()

    def formula(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float() if x.dtype == torch.bfloat16 else x, target)

    def ours(x: Tensor) -> Tensor:
        return ce.cross_entropy(x, target)

    shape, dtype = f"{rows}×{columns}", logits.dtype
    functions, exact = forward(
        formula, (logits,), ours=ours, naive=lambda x: ce.cross_entropy_naive(x, target)
    )
    functions["eager, in bf16"] = lambda: F.cross_entropy(logits, target)
    size = ce.minimum_bytes(rows, columns, 2)
    yield Case("cross_entropy", "forward", shape, dtype, size, functions, exact)
    functions, exact = backward(formula, (logits,), (one,), ours=ours)
    functions["ours, in place"] = lambda: ce.gradient(spoiled, target, lse, factor, spoiled, -100)
    size = ce.minimum_backward_bytes(rows, columns, 2)
    yield Case("cross_entropy", "backward", shape, dtype, size, functions, exact, graph=False)


def linear_cross_entropy() -> Iterator[Case]:
    rows, width, vocabulary = 8192, 4096, 128256
    x, weight = randn(rows, width), randn(vocabulary, width, scale=width**-0.5)
    target = torch.randint(0, vocabulary, (rows,), device="cuda")
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def step(function: Formula) -> Function:
        def run() -> Outputs:
            loss = function(*leaves)
            return (loss.detach(), *torch.autograd.grad(loss, leaves))

        return run

    def ours(n: int | None = None, sum_dtype: torch.dtype = torch.float32) -> Function:
        return step(lambda x, w: ce.linear_cross_entropy(x, w, target, chunk_rows=n, sum_dtype=sum_dtype))

    def exact() -> Outputs:
        """In chunks of rows: all logits in float64 would take 8 GB, thrice."""
        dx, dw = (torch.zeros(t.shape, dtype=torch.float64, device="cuda") for t in leaves)
        loss = torch.zeros((), dtype=torch.float64, device="cuda")
        w = weight.double().requires_grad_()
        for part in torch.arange(rows, device="cuda").split(1024):
            leaf = x[part].double().requires_grad_()
            piece = F.cross_entropy(leaf @ w.T, target[part], reduction="sum") / rows
            dx[part], dw_part = torch.autograd.grad(piece, (leaf, w))
            dw += dw_part
            loss += piece.detach()
        return loss, dx, dw

    def formula(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), target)

    functions = {
        "ours": ours(),
        "ours, dW summed in bf16": ours(None, torch.bfloat16),
        "ours, 1024 rows at a time": ours(1024),
        "ours, 4096 rows at a time": ours(4096),
        "eager": step(formula),
        "eager, in bf16": step(lambda x, w: F.cross_entropy(x @ w.T, target)),
        "compile": step(torch.compile(formula, dynamic=False)),
    }
    size, shape = 6 * (x.numel() + weight.numel()), f"{rows}×{width}×{vocabulary}"
    notes = {"flops": 6 * rows * width * vocabulary, "memory": True}
    yield Case(
        "linear_cross_entropy", "step", shape, x.dtype, size, functions, exact, graph=False, notes=notes
    )


MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "vector_add": vector_add,
    "softmax": softmax,
    "softmax backward": softmax_backward,
    "rms_norm layer_norm": norm_forward,
    "rms_norm layer_norm backward": norm_backward,
    "add_rms_norm": add_norm_forward,
    "add_rms_norm backward": add_norm_backward,
    "swiglu": swiglu,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
}
