"""The explorables of chapters 03 and 04: pictures follow the sliders, counts are real kernels'."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.hardware import CAPABILITIES, gpu, occupancy, roofline
from llmcourse.vgpu import cuda
from llmcourse.widgets.explorable import Explorable
from llmcourse.widgets.gpu_limits import occupancy_explorer, roofline_explorer
from llmcourse.widgets.memory_access import (
    bank_conflict_explorer,
    bank_conflicts,
    coalescing,
    coalescing_explorer,
)

KERNELS = """
template <typename T>
__global__ void load(const T* in, T* out, int stride, int offset) {
    out[threadIdx.x] = in[offset + threadIdx.x * stride];
}

__global__ void read_rows(float* out, int width, int step) {
    __shared__ float tile[32 * 40 + 128];
    for (int i = threadIdx.x; i < 32 * 40 + 128; i += 32) tile[i] = i;
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x * width + threadIdx.x * step];
}
"""
TYPES = {1: np.int8, 2: np.int16, 4: np.float32, 8: np.float64}
NAMES = {1: "char", 2: "short", 4: "float", 8: "double", 16: "float4"}

EXPLORERS = {
    "coalescing": (coalescing_explorer, {"stride": 7, "offset": 3, "nbytes": 8}),
    "banks": (bank_conflict_explorer, {"width": 33, "step": 2}),
    "occupancy": (occupancy_explorer, {"capability": "7.5", "threads": 512, "registers": 90, "shared": 30}),
    "roofline": (
        lambda: roofline_explorer({"saxpy": (2e6, 12e6), "product": (2e9, 1e6)}),
        {"name": "T4", "dtype": "fp16"},
    ),
}


@pytest.fixture(scope="module")
def kernels() -> cuda.Module:
    return cuda.compile(KERNELS, names=[f"load<{name}>" for name in NAMES.values()])


@pytest.mark.parametrize("name", EXPLORERS)
def test_each_control_changes_the_picture_and_back_the_same(name: str) -> None:
    make, other = EXPLORERS[name]
    explorable: Explorable = make()
    first = bytes(explorable.image.value)
    assert first.startswith(b"\x89PNG")
    assert set(other) == set(explorable.controls)
    for control, value in other.items():
        before = explorable.controls[control].value
        assert value != before
        explorable.controls[control].value = value
        assert bytes(explorable.image.value) != first, control
        explorable.controls[control].value = before
        assert bytes(explorable.image.value) == first, control


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_ends_of_all_controls_can_be_drawn(name: str) -> None:
    explorable: Explorable = EXPLORERS[name][0]()
    values = {
        name: getattr(control, "options", None) or (control.min, control.max)
        for name, control in explorable.controls.items()
    }
    for end in (0, -1):
        figure = explorable.draw(**{name: ends[end] for name, ends in values.items()})
        figure.draw_without_rendering()


@pytest.mark.parametrize("nbytes", NAMES)
@pytest.mark.parametrize(("stride", "offset"), [(0, 5), (1, 0), (1, 1), (2, 0), (3, 7), (8, 0), (32, 16)])
def test_sectors_in_the_title_are_those_of_a_real_kernel(kernels, nbytes, stride, offset) -> None:
    shape = (offset + 32 * stride + 1,) if nbytes < 16 else (offset + 32 * stride + 1, 4)
    memory = np.zeros(shape, TYPES.get(nbytes, np.float32))
    out = np.zeros((32, *shape[1:]), memory.dtype)
    result = kernels[f"load<{NAMES[nbytes]}>"][1, 32](memory, out, stride, offset, where="machine")
    _, sectors = coalescing(stride, offset, nbytes)
    assert (result.counters.global_load_requests, result.counters.global_load_sectors) == (1, sectors)


@pytest.mark.parametrize("width", [24, 31, 32, 33, 34, 36, 40])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_wavefronts_in_the_title_are_those_of_a_real_kernel(kernels, width, step) -> None:
    result = kernels.read_rows[1, 32](np.zeros(32, np.float32), width, step, where="machine")
    _, passes = bank_conflicts(width, step)
    assert result.counters.shared_load_wavefronts == passes
    assert result.counters.shared_load_bank_conflicts == passes - 1


def drawn_text(explorable: Explorable) -> str:
    """All that the picture says, title and legends."""
    from matplotlib.text import Text

    values = {name: control.value for name, control in explorable.controls.items()}
    return "\n".join(text.get_text() for text in explorable.draw(**values).findobj(Text))


def test_pictures_say_the_counts_that_belong_to_the_sliders() -> None:
    coalesced = coalescing_explorer()
    assert "4 sectors in one request, 128 bytes move, 100.0% used" in drawn_text(coalesced)
    coalesced.controls["offset"].value = 1
    assert "5 sectors in one request, 160 bytes move" in drawn_text(coalesced)
    assert "32 wavefronts, 31 of them conflicts" in drawn_text(bank_conflict_explorer(32))
    assert "1 wavefront, 0 of them conflicts" in drawn_text(bank_conflict_explorer(33))


def test_the_occupancy_picture_shows_the_calculators_answer() -> None:
    explorable = occupancy_explorer("9.0", threads=384, registers=70, shared=50)
    found = occupancy(CAPABILITIES["9.0"], 384, 70, 50 << 10)
    text = drawn_text(explorable)
    assert f"{found.warps} of 64 warps ({found.fraction:.0%})" in text
    assert f"limited by {' and '.join(found.limited_by)}" in text
    assert all(f" {limit}" in text for limit in found.limits.values())


def test_the_roofline_picture_shows_which_limit_binds() -> None:
    explorable = roofline_explorer({"saxpy": (2e6, 12e6), "product": (4e8, 1e7)}, name="H100 SXM")
    roof = roofline(gpu("H100 SXM"), "fp32")
    text = drawn_text(explorable)
    assert "0.167 FLOPs a byte, memory: 558 GFLOP/s" in text
    assert "40 FLOPs a byte, compute: 66.9 TFLOP/s" in text
    assert f"ridge at {roof.ridge:,.1f}" in text
    explorable.controls["dtype"].value = "fp16"
    assert "40 FLOPs a byte, memory: 134 TFLOP/s" in drawn_text(explorable)
