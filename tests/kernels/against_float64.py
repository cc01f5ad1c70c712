"""What the kernel tests share: a float64 result to compare with, and the same for its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse.errors import CourseError

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)


def error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖, NaN where one has a NaN that the other lacks."""
    out = out.detach().double()
    exact = exact.detach().double().to(out.device)
    assert out.shape == exact.shape
    if not torch.equal(out.isnan(), exact.isnan()):
        return float("nan")
    return float((out - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp_min(1e-30))


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the inputs) for random gradients of the outputs, the same for every dtype.

    Inputs keep their strides: a view stays the view that it is.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    found = torch.autograd.grad(outs, [t for t in leaves if t.requires_grad], grads)
    return outs, list(found)


def check(
    function: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    backward: bool = True,
    tolerance: float | None = None,
) -> None:
    """Outputs and gradients of `function` are those of `exact` in float64, but for rounding to their format.

    A gradient that is zero but for rounding (of a norm's input with one column, say) is compared with the
    largest term of its sum instead: it must be small, not equal in relative terms.
    """
    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    tolerance = tolerance or TOLERANCE[dtype]
    double = [t.double() if t.is_floating_point() else t for t in inputs]
    if not backward:
        out, ref = function(*inputs), exact(*double)
        for o, r in zip(*(v if isinstance(v, tuple) else (v,) for v in (out, ref)), strict=True):
            assert error(o, r) <= tolerance
        return
    outs, grads = run(function, inputs)
    refs, exact_grads = run(exact, double)
    for i, (o, r) in enumerate(zip(outs, refs, strict=True)):
        assert error(o, r) <= tolerance, f"output {i}"
    for i, (g, r) in enumerate(zip(grads, exact_grads, strict=True)):
        assert g.dtype == inputs[i].dtype
        assert error(g, r) <= 2 * tolerance or float(g.double().norm()) <= 10 * tolerance, (
            f"gradient of input {i}"
        )


def refused(call: Callable[[], Any], kind: type[CourseError], *words: str) -> None:
    """The call raises this error, in three parts, with these words in it."""
    with pytest.raises(kind) as raised:
        call()
    error = raised.value
    assert error.what
    assert error.why
    assert error.fix
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"


def saved_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the different storages that autograd keeps for a backward pass through `call`."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(storages.values())
