"""The explorables of chapter 14: what they say and draw is what the package computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmcourse.compress.formats import FORMATS, FP8_E4M3
from llmcourse.errors import ShapeError, UnknownNameError
from llmcourse.widgets.number_format import AROUND, colours, moved, neighbours, number_format, sentence, span
from llmcourse.widgets.perplexity_size import Stored, best_within, explore, frontier

POINTS = [
    Stored("bf16", "bf16", 269e6, 20.0),
    Stored("INT8", "RTN", 140e6, 20.1),
    Stored("INT4", "RTN", 75e6, 26.0),
    Stored("INT4 too", "GPTQ", 75e6, 22.0),
    Stored("INT4, larger", "RTN", 80e6, 23.0),
    Stored("INT3", "RTN", 60e6, 90.0),
]


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.bits <= 8])
def test_the_neighbours_of_a_number_are_the_next_ones_of_the_whole_table(name):
    form = FORMATS[name]
    numbers = sorted({float(v) for v in form.table() if math.isfinite(v)})
    for code in range(1 << form.bits):
        value = form.value(code)
        if not math.isfinite(value):
            assert neighbours(form, code) == []
            continue
        place = numbers.index(value)
        assert neighbours(form, code) == numbers[max(0, place - AROUND) : place + AROUND + 1]


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_the_neighbours_of_wide_formats_are_torchs_next_numbers(name):
    form = FORMATS[name]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    x = torch.tensor(0.3, dtype=dtype)
    around = neighbours(form, int(form.encode(x.double().view(1))))
    up = torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)).item()
    assert around[AROUND : AROUND + 2] == [x.item(), up]


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_has_a_colour_and_every_code_a_sentence(name):
    form = FORMATS[name]
    assert len(colours(form)) == form.bits
    for code in (0, 1, (1 << form.bits) - 1, 1 << (form.bits - 1)):
        assert sentence(form, code)
    least, normal, largest = span(form)
    assert 0 < least <= normal <= largest


def test_a_sentence_holds_the_formula():
    assert sentence(FP8_E4M3, 0b01000100) == "2^(8 − 7) · (1 + 4/8) = 3"
    assert sentence(FP8_E4M3, 0b10000001) == "−2^−6 · 1/8 = −0.001953125  (subnormal)"
    assert sentence(FORMATS["int8"], 0b11111110) == "−128·1 + 126 = −2"


def test_a_click_on_a_bit_flips_it_in_the_code_and_in_the_picture():
    shown = number_format("fp8_e4m3", 0.3)
    code, before = shown.controls["code"], bytes(shown.image.value)
    assert FP8_E4M3.value(code.value) == 0.3125
    shown.bits[31].click()
    assert FP8_E4M3.value(code.value) == 0.34375
    assert bytes(shown.image.value) != before
    shown.bits[31].click()
    assert bytes(shown.image.value) == before


def test_another_format_takes_the_number_along():
    shown = number_format("fp32", 0.3)
    pick, code = shown.controls["format"], shown.controls["code"]
    for name in ("bf16", "fp8_e5m2", "nf4", "int4", "fp32"):
        old = FORMATS[pick.value].value(code.value)
        pick.value = name
        nearest = FORMATS[name].round(torch.tensor([old], dtype=torch.float64)).item()
        assert FORMATS[name].value(code.value) == nearest
        shown_bits = "".join(b.description for b in shown.bits if b.layout.display != "none")
        assert shown_bits == f"{code.value:0{FORMATS[name].bits}b}"
    assert moved(FP8_E4M3, FORMATS["int8"], 127) == 0  # NaN


def test_a_format_that_is_not_there_is_named():
    with pytest.raises(UnknownNameError, match="fp6"):
        number_format("fp6")


def test_the_frontier_holds_what_nothing_beats_in_both():
    assert [p.name for p in frontier(POINTS)] == ["INT3", "INT4 too", "INT8", "bf16"]
    rng = np.random.default_rng(0)
    points = [Stored(str(i), "x", float(a), float(b)) for i, (a, b) in enumerate(rng.integers(0, 9, (30, 2)))]
    edge = frontier(points)
    for p in points:
        assert any(q.nbytes <= p.nbytes and q.perplexity <= p.perplexity for q in edge)
    for p in edge:
        others = [q for q in edge if q is not p]
        assert not any(q.nbytes <= p.nbytes and q.perplexity <= p.perplexity for q in others)


def test_a_budget_buys_the_best_that_fits():
    assert best_within(POINTS, 100e6).name == "INT4 too"
    assert best_within(POINTS, 1e9).name == "bf16"
    assert best_within(POINTS, 1e6) is None


def test_moving_the_budget_or_the_scale_draws_another_picture_and_back_the_same():
    shown = explore(POINTS, budget=100e6)
    for name in ("budget", "most"):
        control, before = shown.controls[name], bytes(shown.image.value)
        first, last = control.value, control.options[-1]
        control.value = last[1]
        assert bytes(shown.image.value) != before
        control.value = first
        assert bytes(shown.image.value) == before
    with pytest.raises(ShapeError, match="no choice"):
        explore(POINTS[:1])
