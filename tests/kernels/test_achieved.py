"""Chapter 05's helpers: savings counted, rates read from a record, the picture of waves."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.figure import Figure

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from llmcourse.bench import achieved, fusion
from llmcourse.bench.records import Record, save
from llmcourse.errors import UnknownNameError
from llmcourse.kernels import add_rms_norm, layer_norm, rms_norm, softmax, swiglu
from llmcourse.kernels.matmul_plan import wave_bytes
from llmcourse.widgets.tile_order import tile_order_explorer

matplotlib.use("Agg")
H100 = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


def record(name: str, rows: list[dict]) -> Record:
    return Record(name, H100, {"torch": "2.11.0"}, "2026-11-23", "llmcourse bench", rows)


@pytest.fixture
def folder(tmp_path):
    rows = [{"name": "ceiling: copy", "who": "torch", "gb_per_s": 3000.0}]
    for name, (shape, dtype) in achieved.SHAPES.items():
        for who, rate in (("ours", 2850.0), ("eager", 1500.0), ("copy of as many bytes", 2900.0)):
            row = {"name": name, "who": who, "shape": shape or "8192×14336", "dtype": dtype}
            rows += [row | {"gb_per_s": rate}, row | {"shape": "1×1", "gb_per_s": 1.0}]
    save(record("kernels", rows), tmp_path)
    square = {"m": 8192, "n": 8192, "k": 8192, "dtype": "bf16"}
    rates = {"torch.matmul": 700.0, "grouped": 350.0, "persistent": 714.0}
    rows = [square | {"layout": "NT", "kernel": kernel, "tflops": rate} for kernel, rate in rates.items()]
    rows += [square | {"layout": "NN", "kernel": "torch.matmul", "tflops": 1.0}]
    rows += [square | {"m": 1024, "layout": "NT", "kernel": "torch.matmul", "tflops": 1.0}]
    save(record("matmul", rows), tmp_path)
    return tmp_path


@pytest.mark.parametrize("sizes", [(3, 5, 7), (64, 576, 1536)])
def test_every_fused_layer_moves_its_least_bytes_and_separate_kernels_what_their_files_say(sizes):
    tokens, width, hidden = sizes
    naive = {"swiglu": swiglu.naive_bytes(tokens, hidden, 2)}
    for module in (softmax, rms_norm, layer_norm, add_rms_norm):
        naive[module.__name__.rpartition(".")[2]] = module.naive_bytes(tokens, width, 2)
    savings = list(fusion.ladder(*sizes))
    assert {s.name: s.separate for s in savings} == naive
    assert all(s.fused == s.least < s.separate for s in savings)
    assert all(s.ratio == s.separate / s.fused for s in savings)


def test_rates_of_a_record_are_held_against_its_own_copy_and_its_own_cublas(folder):
    memory, products = achieved.memory_bound("cpu", folder=folder), achieved.products("cpu", folder=folder)
    assert len(memory.rows) == 2 * len(achieved.SHAPES)
    assert {what for what, *_ in memory.rows} == {name.split()[0] for name in achieved.SHAPES}
    assert memory.share("softmax", "ours") == pytest.approx(0.95)
    assert products.rows == (("grouped", "ours", 350.0, 0.5), ("persistent", "ours", 714.0, 1.02))
    assert "2,850 (95%)" in repr(memory.table())
    assert "714 (102%)" in repr(products.table())
    assert "recorded on NVIDIA H100" in repr(products.table())
    with pytest.raises(UnknownNameError, match="persistent by ours"):
        products.share("persistent", "compile")


def test_bars_are_as_long_as_the_rates(folder):
    axes = Figure().subplots()
    memory = achieved.memory_bound("cpu", folder=folder)
    memory.draw(axes)
    assert sorted(bar.get_width() for bar in axes.patches) == sorted(rate for *_, rate, _ in memory.rows)


def test_without_a_record_the_benchmark_to_run_is_named(tmp_path):
    with pytest.raises(UnknownNameError, match="llmcourse bench kernels"):
        achieved.memory_bound("cpu", folder=tmp_path)


def test_the_title_of_the_waves_says_the_bytes_that_the_plan_counts():
    explorable = tile_order_explorer(group=1)
    config = tile_order_explorer.__kwdefaults__["config"]
    for group, wave in ((1, 0), (8, 3), (64, 15)):
        needed = wave_bytes(8192, 8192, 8192, config, programs=132, itemsize=2, group_m=group, wave=wave)
        title = explorable.draw(group=group, wave=wave).get_suptitle()
        assert f"bands of {group}, wave {wave}" in title
        assert f"{needed / 1e6:,.0f} MB" in title
    first = bytes(explorable.image.value)
    explorable.controls["group"].value = 8
    assert bytes(explorable.image.value) != first
