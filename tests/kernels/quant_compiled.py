"""Quantized products as they are compiled for GPUs that are not here: read, and run on the PTX machine.

The machine of `llmcourse.vgpu` executes PTX on a CPU, tensor-core products and asynchronous copies included
(sm_80's: Hopper's have none in it). So what the interpreter cannot show is tested without a GPU: the inline
assembly, the pipeline through shared memory, and the layouts that the compiler chose.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmcourse.kernels.compile_report import Target, compile_report, signature_of
from llmcourse.kernels.quant_matmul import launch_of
from llmcourse.kernels.quant_plan import QuantPlan
from llmcourse.vgpu import cuda


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def target(
    plan: QuantPlan,
    m: int,
    n: int,
    k: int,
    *,
    bits: int,
    group: int,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    asymmetric: bool = False,
    quick: bool = True,
) -> Target:
    """What the compiler makes of the launch for these shapes."""
    x, packed = meta(m, k, dtype=dtype), meta(n, k * bits // 8, dtype=torch.uint8)
    groups = max(1, k // group)
    zero = meta(n, groups, dtype=torch.uint8) if asymmetric else None
    scale, out = meta(n, groups, dtype=torch.bfloat16), meta(m, n, dtype=dtype)
    kernel, _, arguments, constants = launch_of(x, packed, scale, zero, out, bits, group, plan, quick=quick)
    return compile_report(kernel, *arguments, capabilities=(capability,), **constants)[capability]


def on_the_machine(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, plan: QuantPlan
) -> Tensor:
    """The product by the compiled kernel of an A100, on the PTX machine.

    Beside x and the codes lie NaN and codes of all ones: what reads them is wrong. (Lanes that a copy leaves
    out point there, too.)
    """
    (m, k), n = x.shape, packed.shape[0]
    beside = torch.full((m + 128, k), float("nan"), dtype=x.dtype)
    beside[:m] = x
    codes = torch.full((n + 8, packed.shape[1]), 255, dtype=torch.uint8)
    codes[:n] = packed.view(torch.uint8)
    out = torch.full((m, n), float("nan"), dtype=x.dtype)
    kernel, grid, arguments, constants = launch_of(
        beside[:m], codes[:n].view(packed.dtype), scale, zero, out, bits, group, plan, quick=True
    )
    run(kernel, grid, arguments, constants)
    return out


def run(kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Compile a launch for sm_80 and run it on the PTX machine. Tensors are passed whole."""
    options = {k: constants[k] for k in ("num_warps", "num_stages")}
    given = {k: v for k, v in constants.items() if k not in options}
    signature = signature_of(kernel, *arguments, **given)
    names = kernel.arg_names
    at = {(names.index(k),): v for k, v in signature.constants.items()}
    attributes = {(names.index(k),): [["tt.divisibility", 16]] for k in signature.multiples}
    source = ASTSource(kernel, signature.types, constexprs=at, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    ptx = made.asm["ptx"]
    name = re.search(r"\.entry (\w+)", ptx)[1]
    passed = [a for n, a in zip(names, arguments, strict=False) if signature.types[n] != "constexpr"]
    passed = [whole(a) if isinstance(a, Tensor) else a for a in passed]
    passed += [torch.zeros(16, dtype=torch.int8)] * 2  # Triton's own two scratch buffers
    launched = cuda.from_ptx(ptx, name)[grid, 32 * options["num_warps"], made.metadata.shared]
    launched(*passed, where="machine")


def whole(x: Tensor) -> Tensor:
    """The storage of a contiguous view, with what lies beyond its end."""
    rest = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((rest,), (1,))
