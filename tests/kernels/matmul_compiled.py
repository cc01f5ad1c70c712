"""Compile the shipped matmul configurations for GPUs that are not here, and read the binaries."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmcourse.kernels.matmul_persistent import descriptor_kernel, persistent_kernel
from llmcourse.kernels.matmul_plan import Config
from llmcourse.kernels.matmul_splitk import split_k_kernel
from llmcourse.kernels.matmul_tiled import grouped_kernel, naive_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp8": "fp8e4nv"}
STRIDES = {
    "NT": {"stride_ak": 1, "stride_bk": 1, "stride_cn": 1},
    "NN": {"stride_ak": 1, "stride_bn": 1, "stride_cn": 1},
    "any strides": {"stride_cn": 1},
}


@dataclass(frozen=True)
class Case:
    """A kernel as one call of `matmul` would specialise it."""

    rung: str
    capability: int
    dtype: str
    config: Config
    layout: str = "NT"
    odd: bool = False  # no size or stride is a multiple of 16
    precise: bool = False

    def __str__(self) -> str:
        c = self.config
        tile = f"{c.block_m}x{c.block_n}x{c.block_k}"
        extra = "-odd" * self.odd + "-precise" * self.precise
        return f"sm_{self.capability}-{self.rung}-{self.dtype}-{tile}-{self.layout.replace(' ', '_')}{extra}"


@dataclass(frozen=True)
class Binary:
    registers: int
    stack_bytes: int  # registers that did not fit live here
    shared_bytes: int
    ptx: str


def compiled(case: Case) -> Binary:
    c, dtype = case.config, TYPES[case.dtype]
    out = "bf16" if case.dtype == "fp8" else dtype
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "c": f"*{out}", "bias": f"*{out}"}
    types |= {"scale_a": "*fp32", "scale_b": "*fp32", "workspace": "*fp32", "counters": "*i32"}
    transposed = case.layout == "NT"
    types["a_desc"] = f"tensordesc<{dtype}[{c.block_m}, {c.block_k}]>"
    b_block = [c.block_n, c.block_k] if transposed else [c.block_k, c.block_n]
    types["b_desc"] = f"tensordesc<{dtype}{b_block}>"
    types["c_desc"] = f"tensordesc<{out}[{c.block_m}, {c.block_n // c.subtiles}]>"
    constants: dict[str, Any] = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    constants |= {"GROUP_M": c.group_m, "SPLITS": c.splits, "SUBTILES": c.subtiles, "FLATTEN": c.flatten}
    constants |= {"PROGRAMS": 132, "A_TRANSPOSED": False, "B_TRANSPOSED": transposed, "ACTIVATION": "gelu"}
    constants |= {"IMPRECISE": min(128, c.block_k) if case.precise else None, **STRIDES[case.layout]}
    if case.dtype != "fp8":
        constants |= {"scale_a": None, "scale_b": None}
    kernel: Any = {
        "naive": naive_kernel,
        "grouped": grouped_kernel,
        "descriptor": descriptor_kernel,
        "persistent": persistent_kernel,
        "split_k": split_k_kernel,
    }[case.rung]
    names = kernel.arg_names
    constants = {k: v for k, v in constants.items() if k in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] == "i32" and not case.odd)
    }
    at = {(names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature, constexprs=at, attrs=divisible)
    options = {"num_warps": c.warps, "num_stages": c.stages}
    made = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    return Binary(*resources(made.asm["cubin"]), made.metadata.shared, made.asm["ptx"])


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from the binary."""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])
