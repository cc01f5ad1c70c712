"""The machine's arithmetic agrees with a GPU's in every bit; its approximations are as near as PTX states."""

from __future__ import annotations

import pytest
from alu_on_hardware import Gpu, cases, compared, inputs, machine

APPROXIMATE = {"tanh": 1 << 14, "sin": 1 << 30, "cos": 1 << 30, "lg2": 1 << 30}
"""Largest distance in units in the last place: near a zero an absolute error is many units."""


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize("one", [c for c in cases() if not c.approximate], ids=lambda c: c.text)
def test_exact_instructions_agree_in_every_bit(one, gpu):
    values = inputs(one)
    outcome = compared(one, values, machine(one, values), gpu.run(one, values))
    assert outcome.different == 0, outcome.examples


@pytest.mark.parametrize("one", [c for c in cases() if c.approximate], ids=lambda c: c.text)
def test_approximate_instructions_are_near(one, gpu):
    values = inputs(one)
    outcome = compared(one, values, machine(one, values), gpu.run(one, values))
    limit = APPROXIMATE.get(one.text.split(".")[0], 1 << 34 if "f64" in one.text else 3)
    assert outcome.units <= limit, outcome.examples
