"""Products with 2:4 sparse weights: y = x Wᵀ, W packed in 9/16 of its bytes.

    rung        reads of W                 multiplies              for
    reference   all, unpacked by torch     all                     any device
    select      values and indices once    what stays              decoding, 1 to 4 rows of x
    expand      values and indices once    all, on tensor cores    batches to 64 rows
    cusparselt  values and its indices     what stays, on sparse   prefill
                                           tensor cores

The last is `torch.sparse.to_sparse_semi_structured`. NVIDIA's library arranges its indices in its own way
and serves large products; `sparse24_kernel` says how the two kernels here work, and `bench.sparse24` where
each of them pays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import ShapeError
from llmcourse.kernels.checks import Backend, check_float, check_rows, check_together, choose, row_stride
from llmcourse.kernels.launch import ceil_div, launch
from llmcourse.kernels.matmul_splitk import counters_for
from llmcourse.kernels.sparse24_format import WORD, Sparse24, mask24, pack24, packed_bytes
from llmcourse.kernels.sparse24_kernel import expand_kernel, select_kernel
from llmcourse.kernels.sparse24_plan import INTERPRETED, SparsePlan, plan_for

__all__ = ["Sparse24", "SparsePlan", "mask24", "minimum_bytes", "pack24", "reference", "sparse24_linear"]


def reference(x: Tensor, weight: Sparse24) -> Tensor:
    """x [..., K] times the unpacked weight's transpose, summed in float32 (or wider)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ weight.dense().to(wide).T).to(x.dtype)


def minimum_bytes(m: int, n: int, k: int, itemsize: int) -> int:
    """Bytes of y = x Wᵀ for x [m, k]: packed W and x read, y written."""
    return packed_bytes(n, k, itemsize) + m * (k + n) * itemsize


def check(x: Tensor, weight: Sparse24) -> None:
    check_float("x", x)
    check_rows("x", x)
    check_float("weight.values", weight.values, (x.dtype,))
    check_together(x=x, values=weight.values, indices=weight.indices)
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x has {x.shape[-1]} columns, and the weight {weight.shape[1]}.",
            "Each output is a product of a row of x with a row of the weight.",
            f"x of shape [..., {weight.shape[1]}].",
        )


def sparse24_linear(
    x: Tensor, weight: Sparse24, *, backend: Backend = "auto", plan: SparsePlan | None = None
) -> Tensor:
    """y = x Wᵀ for a packed W. Forward only: the weights are frozen.

    Shapes   x [..., K] of the format of the weight's values, rows one stride apart; weight.shape = (N, K).
             Returns [..., N], contiguous.
    Moves    values and indices once for each `plan.block_m` rows of x: 9/16 of the dense bytes in 16 bits.
    Raises   ShapeError, DtypeError, StrideError, DeviceError.
    """
    check(x, weight)
    chosen = choose(backend, x)
    if chosen == "reference":
        return reference(x, weight)
    (n, k), m = weight.shape, x.numel() // x.shape[-1]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    plan = plan or _plan(m, n, k, x, chosen)
    filled = k + -k % WORD
    strides = (row_stride(x) or k, weight.values.stride(0), weight.indices.stride(0), n)
    options: dict[str, Any] = {"num_warps": plan.warps, "STAGES": plan.stages}
    options["interpret"] = chosen == "interpret"
    if plan.kernel == "select":
        if m % plan.block_m:
            raise ShapeError(
                f"a plan for {plan.block_m} rows at a time came for {m} rows.",
                "The select kernel takes whole blocks of rows: one that is not there would be read.",
                "block_m=1, or a plan for the expand kernel.",
            )
        launch(
            select_kernel, (ceil_div(n, plan.block_n), m // plan.block_m),
            x, weight.values, weight.indices, y, n, k, filled, *strides,
            M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, **options,
        )  # fmt: skip
        return y
    tiles = ceil_div(n, plan.block_n) * ceil_div(m, plan.block_m)
    parts = plan.splits > 1
    workspace = torch.empty((plan.splits, m, n), dtype=torch.float32, device=x.device) if parts else y
    counters = counters_for(tiles, x.device) if parts else y
    launch(
        expand_kernel, (tiles, plan.splits),
        x, weight.values, weight.indices, y, workspace, counters, m, n, k, filled, *strides,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, SPLITS=plan.splits, **options,
    )  # fmt: skip
    return y


def _plan(m: int, n: int, k: int, x: Tensor, backend: str) -> SparsePlan:
    if backend == "interpret":
        return INTERPRETED["select" if m <= 2 else "expand"]._replace(block_m=1 if m <= 2 else 16)
    from llmcourse.kernels.matmul_plan import device_of

    return plan_for(m, n, k, *device_of(x))
