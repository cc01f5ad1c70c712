"""Every arithmetic instruction that NVRTC makes of a wide set of C++ expressions has a form here."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from alu_expressions import source

from llmcourse.vgpu import ptx
from llmcourse.vgpu.alu import compile_alu
from llmcourse.vgpu.nvrtc import compile_source

NOT_ARITHMETIC = {"ld", "st", "bra", "ret", "cvta"}


@pytest.mark.parametrize(
    ("arch", "options"),
    [("sm_75", ()), ("sm_80", ("--use_fast_math",)), ("sm_90", ())],
    ids=["sm_75", "sm_80-fast", "sm_90"],
)
def test_every_arithmetic_instruction_of_nvrtc_has_a_form(arch, options):
    module = ptx.parse(compile_source(source(arch), arch, options=options).ptx)
    forms, others = set(), set()
    for kernel in module.kernels.values():
        for instruction in kernel.code:
            covered = (
                compile_alu(instruction) is not None
            )  # raises, naming the instruction, if it has no form
            (forms if covered else others).add((instruction.opcode, *instruction.modifiers))
    assert {opcode for opcode, *_ in others} <= NOT_ARITHMETIC
    assert len(forms) > 300
