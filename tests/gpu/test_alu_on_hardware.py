"""The machine's arithmetic agrees with a GPU's in every bit; its approximations are as near as PTX states."""

from __future__ import annotations

import pytest
from alu_on_hardware import Case, Gpu, cases, compared, inputs, machine

NEAR = {
    "sin": 2**-19.5,
    "cos": 2**-19.5,
    "lg2": 2**-21,
    "tanh.approx.f16": 2**-9.9,
    "tanh.approx.bf16": 2**-7,
}
"""What PTX bounds as a difference, not in units: twice that, since each side may be off."""
UNITS = {
    "tanh.approx.f32": 1 << 14,
    "rcp.approx.ftz.f64": 1 << 34,
    "rsqrt.approx.ftz.f64": 1 << 34,
    "rsqrt.approx.f64": 1 << 34,
}
"""What PTX bounds in units in the last place of more than a few."""


def allowed(one: Case, table: dict[str, float]) -> float | None:
    opcode = one.text.split()[0]
    return next((limit for name, limit in table.items() if opcode.startswith(name)), None)


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
    if (limit := allowed(one, NEAR)) is not None:
        assert outcome.apart <= limit, outcome.examples
    else:
        assert outcome.units <= (allowed(one, UNITS) or 3), outcome.examples
