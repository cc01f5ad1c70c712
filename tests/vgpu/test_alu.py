"""From an instruction to a function on its registers' values: the contract with the machine."""

from __future__ import annotations

import numpy as np
import pytest
from alu_reference import F32, compare, compiled, execute, instruction, integers

from llmcourse.errors import CourseError
from llmcourse.vgpu.alu import CARRY, compile_alu
from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.isa import Instruction, Register, SourceLine, Special, Symbol

R = [Register(f"%r{i}", "b32") for i in range(5)]


def test_an_instruction_becomes_sources_destinations_and_a_function():
    alu = compiled("add.s32 %r3, %r1, %r2")
    assert alu.sources == (R[1], R[2])
    assert alu.destinations == (R[3],)
    assert alu.apply(np.uint32(3), np.uint32(4)) == 7


def test_constants_are_built_in():
    alu = compiled("add.s32 %r3, %r1, -4")
    assert alu.sources == (R[1],)
    assert alu.apply(np.array([3, 9], np.uint32)).view(np.int32).tolist() == [-1, 5]
    alu = compiled("mov.u32 %r3, 5")
    assert alu.sources == ()
    assert alu.apply() == np.uint32(5)
    assert alu.apply().dtype == np.uint32


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("mov.b32 %r0, -1", 0xFFFFFFFF),
        ("mov.u64 %rd0, 0xFFFFFFFFFFFFFFFF", 2**64 - 1),
        ("mov.s64 %rd0, -9223372036854775808", 2**63),
        ("mov.u16 %rs0, 0x7C00", 0x7C00),
        ("mov.b16 %rs0, 0X1F79U", 0x1F79),
        ("mov.f32 %f0, 0f3F800000", 0x3F800000),
        ("mov.b32 %r0, 0f7FFFFFFF", 0x7FFFFFFF),
        ("mov.f64 %fd0, 0d7FF0000000000000", 0x7FF0000000000000),
        ("mov.f64 %fd0, 0dFFF8000000000001", 0xFFF8000000000001),
        ("mov.pred %p0, 1", 1),
        ("selp.f32 %f0, 0f3F800000, 0f00000000, %p1", None),
    ],
)
def test_constants_keep_their_bits(text, bits):
    if bits is None:
        compare(text, [[1, 0]], lambda p: 0x3F800000 * p)
    else:
        assert execute(text) == [(bits,)]


def test_every_place_may_hold_a_constant():
    compare("sub.s32 %r0, 10, %r1", [[3, 11]], lambda a: (10 - a) % 2**32)
    compare("mad.lo.s32 %r0, %r1, 3, %r2", [[5, 6], [7, 8]], lambda a, c: 3 * a + c)
    compare("mad.lo.s32 %r0, %r1, %r2, 3", [[5, 6], [7, 8]], lambda a, b: a * b + 3)
    compare("mad.lo.s32 %r0, 2, 3, %r2", [[5, 6]], lambda c: 6 + c)
    compare("mad.lo.s32 %r0, 2, %r1, 3", [[5, 6]], lambda b: 2 * b + 3)
    compare("bfi.b32 %r0, %r1, %r2, 8, 4", [[0xF5], [0]], lambda a, b: 0x500)


def test_special_registers_and_symbols_are_sources():
    alu = compiled("mov.u32 %r0, %tid.x")
    assert isinstance(alu.sources[0], Special)
    assert alu.apply(np.arange(3, dtype=np.uint32)).dtype == np.uint32
    wide = compiled("cvt.u64.u32 %rd0, %tid.x")
    assert wide.apply(np.arange(3, dtype=np.uint32)).dtype == np.uint64
    symbol = Instruction("mov", ("u64",), (Register("%rd0", "b64"), Symbol("tile")), None, None, "")
    alu = compile_alu(symbol)
    assert alu is not None
    assert alu.sources == (Symbol("tile"),)
    assert alu.apply(np.uint64(16)) == 16


def test_registers_of_another_type_are_seen_as_the_instructions():
    compare("mov.b32 %r0, %f1", [integers(32)], lambda a: a)
    compare("mov.b32 %f0, %r1", [integers(32)], lambda a: a)
    compare("mov.b64 %rd0, %fd1", [integers(64)], lambda a: a)
    compare("add.f32 %r0, %r1, %f2", [[0x3F800000], [0x40000000]], lambda a, b: 0x40400000)
    compare("shr.s32 %f0, %f1, 31", [[0x80000000, 1]], lambda a: 0xFFFFFFFF * (a >> 31))


def test_a_mov_takes_registers_apart_and_puts_them_together():
    compare("mov.b64 {%r0, %r1}, %rd2", [integers(64)], lambda a: (a & 0xFFFFFFFF, a >> 32))
    compare("mov.b64 %rd0, {%r1, %r2}", [integers(32), integers(32, seed=1)], lambda a, b: a | b << 32)
    compare("mov.b32 {%rs0, %rs1}, %r2", [integers(32)], lambda a: (a & 0xFFFF, a >> 16))
    compare("mov.b32 %r0, {%rs1, %rs2}", [integers(16), integers(16, seed=1)], lambda a, b: a | b << 16)
    compare("mov.b64 {%f0, %f1}, %fd2", [integers(64)], lambda a: (a & 0xFFFFFFFF, a >> 32))
    compare("mov.b64 %fd0, {%r1, %r2}", [integers(32), integers(32, seed=1)], lambda a, b: a | b << 32)
    compare(
        "mov.b64 {%rs0, %rs1, %rs2, %rs3}, %rd4",
        [integers(64)],
        lambda a: tuple(a >> s & 0xFFFF for s in (0, 16, 32, 48)),
    )
    four = [integers(16, seed=i) for i in range(4)]
    compare(
        "mov.b64 %rd0, {%rs1, %rs2, %rs3, %rs4}", four, lambda *p: sum(v << 16 * i for i, v in enumerate(p))
    )


def test_an_unused_part_has_no_destination():
    alu = compiled("mov.b64 {_, %r1}, %rd2")
    assert alu.destinations == (None, R[1])
    assert alu.apply(np.uint64(7 << 32))[1] == 7


def test_the_carry_flag_is_a_predicate_register():
    assert CARRY.type == "pred"
    assert compiled("add.cc.u32 %r0, %r1, %r2").destinations == (R[0], CARRY)
    assert compiled("addc.u32 %r0, %r1, 0").sources == (R[1], CARRY)


@pytest.mark.parametrize(
    "name", ["ld", "st", "bra", "bar", "shfl", "atom", "mma", "cvta", "isspacep", "vote"]
)
def test_what_is_not_arithmetic_is_left_to_others(name):
    assert compile_alu(Instruction(name, ("b32",), (R[0], R[1]), None, None, name)) is None


@pytest.mark.parametrize(
    "text",
    [
        "add.rn.bogus.f32 %f0, %f1, %f2",
        "cvt.rs.f16x2.f32 %r0, %f1, %f2, %r3",
        "cvt.rn.satfinite.e2m1x2.f32 %rs0, %f1, %f2",
        "min.ftz.f16 %rs0, %rs1, %rs2",
        "setp.lt.f64 %p0, %f1, %f2",
        "add.s32 %r0, %r1",
        "mul.wide.u64 %rd0, %rd1, %rd2",
        "rcp.f32 %f0, %f1",
        "and.pred %p0, %p1, %r1",
    ],
)
def test_a_form_that_is_not_covered_is_named_with_its_line(text):
    plain = instruction(text)
    at = Instruction(
        plain.opcode, plain.modifiers, plain.operands, plain.guard, SourceLine("cell.cu", 12), plain.text
    )
    with pytest.raises(PtxError) as caught:
        compile_alu(at)
    assert isinstance(caught.value, CourseError)
    assert caught.value.what.startswith("cell.cu:12: ")
    assert plain.opcode in caught.value.what
    assert str(caught.value).count("\n") == 2


def test_a_mov_copies_nothing():
    value = np.arange(4, dtype=np.uint32)
    assert compiled("mov.u32 %r0, %r1").apply(value) is value
    assert np.shares_memory(compiled("mov.b32 %f0, %r1").apply(value), value)


def test_the_last_bit_of_a_dot_product_is_that_of_fused_multiply_adds():
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((16, 64)).astype(np.float32) for _ in range(2))
    fma = compiled("fma.rn.f32 %f0, %f1, %f2, %f3").apply
    total = np.zeros(16, np.float32)
    exact = [0] * 16
    for k in range(64):
        column = np.ascontiguousarray(a[:, k]), np.ascontiguousarray(b[:, k])
        total = fma(*column, total)
        for lane in range(16):
            x, y = (F32.value(int(c[lane].view(np.uint32))) for c in column)
            exact[lane] = F32.round(F32.value(exact[lane]) + x * y)
    assert total.view(np.uint32).tolist() == exact
