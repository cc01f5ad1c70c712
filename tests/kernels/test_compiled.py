"""The memory-bound kernels' default plans, compiled for T4, A100 and H100: no spills, and wide loads.

What is compiled is what the wrappers launch, with tensors that have a shape and no memory. Every kernel is
compiled for every GPU, in number formats that take turns, so that each format meets each GPU: all pairs for
all kernels would take minutes (`EVERY=1` in the environment does that).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.kernels import add_rms_norm as add_norm
from llmcourse.kernels import cross_entropy as ce
from llmcourse.kernels import layer_norm as ln
from llmcourse.kernels import rms_norm as rms
from llmcourse.kernels import rope as rope_file
from llmcourse.kernels import softmax as softmax_file
from llmcourse.kernels import swiglu as swiglu_file
from llmcourse.kernels import vector_add as add_file
from llmcourse.kernels.compile_report import CAPABILITIES, compile_report

FORMATS = (torch.float32, torch.float16, torch.bfloat16)
FILES = (add_file, add_norm, ce, ln, rms, rope_file, softmax_file, swiglu_file)
ROWS = 64


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def softmax(columns: int) -> Callable[[torch.dtype], Any]:
    return lambda d: softmax_file.forward(meta(ROWS, columns, dtype=d), softmax_file.softmax_plan(columns))


def softmax_backward(columns: int) -> Callable[[torch.dtype], Any]:
    return lambda d: softmax_file.backward(meta(ROWS, columns, dtype=d), meta(ROWS, columns, dtype=d))


def rms_norm(bytes_of_a_row: int) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        n = bytes_of_a_row // d.itemsize
        rms.forward(meta(ROWS, n, dtype=d), meta(n, dtype=d), 1e-6, rms.forward_plan(n, d.itemsize), False)

    return run


def layer_norm(bytes_of_a_row: int) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        n = bytes_of_a_row // d.itemsize
        w = meta(n, dtype=d)
        ln.forward(meta(ROWS, n, dtype=d), w, w, 1e-5, ln.forward_plan(n, d.itemsize), False)

    return run


def add_rms_norm(bytes_of_a_row: int) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        n = bytes_of_a_row // d.itemsize
        x, plan = meta(ROWS, n, dtype=d), rms.forward_plan(n, d.itemsize)
        add_norm.forward(x, x, meta(n, dtype=d), 1e-6, plan, False)

    return run


def rms_backward(columns: int) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        x = meta(ROWS, columns, dtype=d)
        rms.backward(x, meta(columns, dtype=d), meta(ROWS), x, x)

    return run


def layer_norm_backward(columns: int) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        x = meta(ROWS, columns, dtype=d)
        ln.backward(x, meta(columns, dtype=d), meta(ROWS), meta(ROWS), x)

    return run


def rope(layout: str) -> Callable[[torch.dtype], Any]:
    def run(d: torch.dtype) -> None:
        x = (
            meta(2, 32, 64, 128, dtype=d)
            if layout == "BHSD"
            else meta(2, 64, 32, 128, dtype=d).transpose(1, 2)
        )
        table = meta(64, 64)
        rope_file.turn(x, table, table, None, rope_file.rope_plan(x), backward=False, interpret=False)

    return run


def swiglu(d: torch.dtype) -> None:
    x = meta(ROWS, 1024, dtype=d)
    swiglu_file.forward(x, x, swiglu_file.PLAN, False)


def swiglu_backward(d: torch.dtype) -> None:
    x = meta(ROWS, 1024, dtype=d)
    swiglu_file.backward(x, x, x, x, x, swiglu_file.PLAN, False)


V = 128_256


def loss(d: torch.dtype) -> None:
    ce.losses(meta(ROWS, V, dtype=d), meta(ROWS, dtype=torch.int64), -100, ce.loss_plan(V))


def gradient(d: torch.dtype) -> None:
    x = meta(ROWS, V, dtype=d)
    ce.gradient(x, meta(ROWS, dtype=torch.int64), meta(ROWS), meta(ROWS), x, -100)


def step(d: torch.dtype) -> None:
    ce.losses_and_gradient(
        meta(ROWS, V, dtype=d), meta(ROWS, dtype=torch.int64), meta(ROWS), -100, ce.step_plan(V)
    )


def vector_add(d: torch.dtype) -> None:
    add_file._VectorAdd.apply(meta(1 << 20, dtype=d), meta(1 << 20, dtype=d), add_file.GOOD, False)


LAUNCHES: dict[str, Callable[[torch.dtype], Any]] = {
    "softmax row": softmax(softmax_file.ROW_LIMIT),
    "softmax online": softmax(softmax_file.ONLINE_LIMIT),
    "softmax split": softmax(2 * softmax_file.ONLINE_LIMIT),
    "softmax backward": softmax_backward(softmax_file.ROW_LIMIT),
    "softmax backward looped": softmax_backward(2 * softmax_file.ROW_LIMIT),
    "rms_norm row": rms_norm(rms.ROW_BYTES),
    "rms_norm looped": rms_norm(2 * rms.ROW_BYTES),
    "rms_norm backward": rms_backward(rms.BACKWARD_ROW_LIMIT),
    "rms_norm backward looped": rms_backward(2 * rms.BACKWARD_ROW_LIMIT),
    "rms_norm backward, short rows": rms_backward(1024),
    "layer_norm row": layer_norm(ln.ROW_BYTES),
    "layer_norm looped": layer_norm(2 * ln.ROW_BYTES),
    "layer_norm backward": layer_norm_backward(ln.BACKWARD_ROW_LIMIT),
    "layer_norm backward looped": layer_norm_backward(2 * ln.BACKWARD_ROW_LIMIT),
    "layer_norm backward, short rows": layer_norm_backward(1024),
    "add_rms_norm row": add_rms_norm(rms.ROW_BYTES),
    "add_rms_norm looped": add_rms_norm(2 * rms.ROW_BYTES),
    "cross_entropy loss": loss,
    "cross_entropy gradient": gradient,
    "cross_entropy loss and gradient": step,
    "rope BSHD": rope("BSHD"),
    "rope BHSD": rope("BHSD"),
    "swiglu": swiglu,
    "swiglu backward": swiglu_backward,
    "vector_add": vector_add,
}


def cases() -> Iterator[tuple[str, int, torch.dtype]]:
    for i, name in enumerate(LAUNCHES):
        for j, capability in enumerate(CAPABILITIES):
            for k, dtype in enumerate(FORMATS):
                if os.environ.get("EVERY") or (i + j + k) % len(FORMATS) == 0:
                    yield name, capability, dtype


@pytest.mark.parametrize(("name", "capability", "dtype"), list(cases()), ids=str)
def test_default_plans_compile_without_spills_and_load_16_bytes_at_a_time(
    name, capability, dtype, monkeypatch
):
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, programs: Any, *arguments: Any, interpret: bool = False, **meta: Any) -> None:
        launched.append((kernel, arguments, meta))

    for file in FILES:
        monkeypatch.setattr(file, "launch", record)
    LAUNCHES[name](dtype)
    ((kernel, arguments, options),) = launched
    target = compile_report(kernel, *arguments, capabilities=(capability,), **options)[capability]
    assert target.error is None
    assert target.spills == 0, target
    assert target.fits, f"{target.shared_bytes} bytes of shared memory"
    assert 128 in target.load_widths or target.count("LDGSTS", "128"), target.load_widths
    assert 128 in target.store_widths or name == "cross_entropy loss", target.store_widths
