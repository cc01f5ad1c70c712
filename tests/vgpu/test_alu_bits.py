"""Logic, shifts, fields and permutations against the PTX ISA's own pseudo-code."""

from __future__ import annotations

import pytest
from alu_reference import as_signed, compare, execute, grid, integers

LETTERS = {16: "%rs", 32: "%r", 64: "%rd"}
SMALL = [0, 1, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 300, 65539, 0x80000001, 0xFFFFFFFF]


def columns(*bits: int) -> list[list[int]]:
    return grid(*(integers(b, 40, seed=i) for i, b in enumerate(bits)), most=1200)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    r, mask = LETTERS[bits], (1 << bits) - 1
    two = columns(bits, bits)
    compare(f"and.b{bits} {r}0, {r}1, {r}2", two, lambda a, b: a & b)
    compare(f"or.b{bits} {r}0, {r}1, {r}2", two, lambda a, b: a | b)
    compare(f"xor.b{bits} {r}0, {r}1, {r}2", two, lambda a, b: a ^ b)
    compare(f"not.b{bits} {r}0, {r}1", columns(bits), lambda a: a ^ mask)
    compare(f"cnot.b{bits} {r}0, {r}1", columns(bits), lambda a: int(a == 0))


def test_predicate_logic():
    two = grid([0, 1], [0, 1])
    compare("and.pred %p0, %p1, %p2", two, lambda a, b: a & b)
    compare("or.pred %p0, %p1, !%p2", two, lambda a, b: a | (1 - b))
    compare("xor.pred %p0, %p1, %p2", two, lambda a, b: a ^ b)
    compare("not.pred %p0, %p1", [[0, 1]], lambda a: 1 - a)
    compare("mov.pred %p0, !%p1", [[0, 1]], lambda a: 1 - a)


def test_lop3_does_every_truth_table():
    a, b, c = 0xF0, 0xCC, 0xAA
    full = 0xFFFFFFFF
    for table in range(256):
        ((result,),) = execute(f"lop3.b32 %r0, %r1, %r2, %r3, {table}", [a], [b], [c])
        assert result & 0xFF == table, table
        assert result >> 8 == (full >> 8 if table & 1 else 0), table
    three = columns(32, 32, 32)
    compare("lop3.b32 %r0, %r1, %r2, %r3, 0xCC", three, lambda a, b, c: b)
    compare("lop3.b32 %r0, %r1, %r2, %r3, 0x96", three, lambda a, b, c: a ^ b ^ c)
    compare("lop3.b32 %r0, %r1, %r2, %r3, 0xE8", three, lambda a, b, c: (a & b) | (a & c) | (b & c))


def test_lop3_gives_a_predicate_too():
    sources = grid(integers(32, 10), [0, 3], [0, 0xFFFFFFFF], [0, 1])

    def expected(a: int, b: int, c: int, q: int) -> tuple[int, int]:
        result = a & b & c
        return result, int(result != 0) | q

    compare("lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 0x80, %p1", sources, expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_beyond_the_width_shift_everything_out(bits):
    r, mask = LETTERS[bits], (1 << bits) - 1
    two = grid(integers(bits, 40), SMALL)

    def clamp(n: int) -> int:
        return min(n, bits)

    compare(f"shl.b{bits} {r}0, {r}1, %r2", two, lambda a, n: a << clamp(n) & mask)
    compare(f"shr.u{bits} {r}0, {r}1, %r2", two, lambda a, n: a >> clamp(n))
    compare(f"shr.b{bits} {r}0, {r}1, %r2", two, lambda a, n: a >> clamp(n))
    compare(f"shr.s{bits} {r}0, {r}1, %r2", two, lambda a, n: as_signed(a, bits) >> clamp(n) & mask)
    for n in (0, 1, 15, 16, 31, 32, 63, 64, 200):
        one = columns(bits)
        compare(f"shl.b{bits} {r}0, {r}1, {n}", one, lambda a, n=n: a << clamp(n) & mask)
        compare(f"shr.s{bits} {r}0, {r}1, {n}", one, lambda a, n=n: as_signed(a, bits) >> clamp(n) & mask)


def test_a_constant_can_be_shifted_by_a_register():
    compare("shl.b32 %r0, 1, %r1", [SMALL], lambda n: 1 << min(n, 32) & 0xFFFFFFFF)
    compare("shl.b32 %r0, 1, 4", [], lambda: 16)


def test_funnel_shifts_take_32_bits_out_of_64():
    three = grid(integers(32, 30), integers(32, 30, 1), SMALL)
    for mode, limit in (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n & 31)):
        compare(
            f"shf.l.{mode}.b32 %r0, %r1, %r2, %r3",
            three,
            lambda a, b, n, limit=limit: ((b << 32 | a) << limit(n)) >> 32 & 0xFFFFFFFF,
        )
        compare(
            f"shf.r.{mode}.b32 %r0, %r1, %r2, %r3",
            three,
            lambda a, b, n, limit=limit: (b << 32 | a) >> limit(n) & 0xFFFFFFFF,
        )


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bit_fields_are_extracted_bit_by_bit(type_):
    bits, signed = int(type_[1:]), type_[0] == "s"
    r = LETTERS[bits]

    def expected(a: int, start: int, length: int) -> int:
        if bits == 32:  # only these count modulo 256 on hardware
            start, length = start & 255, length & 255
        top = bits - 1
        sign = 0 if not signed or length == 0 else a >> min(start + length - 1, top) & 1
        out = 0
        for i in range(bits):
            bit = a >> (start + i) & 1 if i < length and start + i <= top else sign
            out |= bit << i
        return out

    compare(f"bfe.{type_} {r}0, {r}1, %r2, %r3", grid(integers(bits, 30), SMALL, SMALL), expected)
    compare(f"bfe.{type_} {r}0, {r}1, 5, 9", columns(bits), lambda a: expected(a, 5, 9))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields_are_inserted_bit_by_bit(bits):
    r = LETTERS[bits]

    def expected(a: int, b: int, start: int, length: int) -> int:
        if bits == 32:
            start, length = start & 255, length & 255
        for i in range(length):
            if start + i >= bits:
                break
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
        return b

    four = grid(integers(bits, 20), integers(bits, 20, 1), SMALL, SMALL)
    compare(f"bfi.b{bits} {r}0, {r}1, {r}2, %r3, %r4", four, expected)


def test_masks_and_extensions_follow_the_manual():
    full = 0xFFFFFFFF

    def bmsk(mode: str):
        def expected(a: int, b: int) -> int:
            start, count = a & 31, b & 31
            low, high = full << start & full, full << (start + count) & full
            overflow = start + count >= 32
            if mode == "clamp":
                if a >= 32:
                    low, overflow = 0, True
                overflow = overflow or b >= 32
            if overflow:
                high = 0
            elif count == 0:
                high = full
            return low & ~high

        return expected

    def szext(mode: str, signed: bool):
        def expected(a: int, b: int) -> int:
            count, large = b & 31, b >= 32 and mode == "clamp"
            mask = 0 if large else full << count & full
            sign = signed and count and not large and a >> (count - 1) & 1
            return (a & ~mask) | (mask if sign else 0)

        return expected

    two = grid(SMALL + integers(32, 10), SMALL)
    for mode in ("clamp", "wrap"):
        compare(f"bmsk.{mode}.b32 %r0, %r1, %r2", two, bmsk(mode))
        compare(f"szext.{mode}.s32 %r0, %r1, %r2", two, szext(mode, True))
        compare(f"szext.{mode}.u32 %r0, %r1, %r2", two, szext(mode, False))


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_and_reversal(bits):
    r = LETTERS[bits]
    one = columns(bits)
    compare(f"popc.b{bits} %r0, {r}1", one, lambda a: a.bit_count())
    compare(f"clz.b{bits} %r0, {r}1", one, lambda a: bits - a.bit_length())
    compare(f"brev.b{bits} {r}0, {r}1", one, lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize("type_", ["u32", "s32", "u64", "s64"])
def test_bfind_finds_the_highest_bit_that_matters(type_):
    bits = int(type_[1:])

    def expected(a: int) -> int:
        if type_[0] == "s" and a >> (bits - 1):
            a ^= (1 << bits) - 1
        return a.bit_length() - 1 & 0xFFFFFFFF

    def shift(a: int) -> int:
        place = expected(a)
        return place if place == 0xFFFFFFFF else bits - 1 - place

    r = LETTERS[bits]
    compare(f"bfind.{type_} %r0, {r}1", columns(bits), expected)
    compare(f"bfind.shiftamt.{type_} %r0, {r}1", columns(bits), shift)


def picked(a: int, b: int, digits: list[int]) -> int:
    every = b << 32 | a
    out = 0
    for i, digit in enumerate(digits):
        byte = every >> 8 * (digit & 7) & 255
        if digit & 8:
            byte = 255 if byte >> 7 else 0
        out |= byte << 8 * i
    return out


def test_prmt_picks_bytes_by_digits():
    def expected(a: int, b: int, c: int) -> int:
        return picked(a, b, [c >> 4 * i & 15 for i in range(4)])

    compare("prmt.b32 %r0, %r1, %r2, %r3", columns(32, 32, 32), expected)
    for selector in (0x5410, 0x7632, 0x1032, 0xBA98, 0x4440, 0x7770):
        compare(
            f"prmt.b32 %r0, %r1, %r2, {selector}", columns(32, 32), lambda a, b, s=selector: expected(a, b, s)
        )


def test_prmt_has_six_fixed_patterns():
    def f4e(s: int) -> list[int]:
        return [s + i for i in range(4)]

    patterns = {
        "f4e": f4e,
        "b4e": lambda s: [(s - i) % 8 for i in range(4)],
        "rc8": lambda s: [s] * 4,
        "ecl": lambda s: [max(i, s) for i in range(4)],
        "ecr": lambda s: [min(i, s) for i in range(4)],
        "rc16": lambda s: [0, 1, 0, 1] if s % 2 == 0 else [2, 3, 2, 3],
    }
    for name, digits in patterns.items():
        compare(
            f"prmt.b32.{name} %r0, %r1, %r2, %r3",
            columns(32, 32, 32),
            lambda a, b, c, digits=digits: picked(a, b, digits(c & 3)),
        )


def test_fns_finds_the_nth_set_bit():
    def expected(mask: int, base: int, offset: int) -> int:
        offset = as_signed(offset, 32)
        if offset == -(2**31):
            return 0
        if offset == 0:
            return base if base < 32 and mask >> base & 1 else 0xFFFFFFFF
        left, step, place = abs(offset) - 1, 1 if offset > 0 else -1, base
        while 0 <= place < 32:
            if mask >> place & 1:
                if left == 0:
                    return place
                left -= 1
            place += step
        return 0xFFFFFFFF

    offsets = [0, 1, 2, 3, 8, 32, 2**31, 2**31 + 1, 2**32 - 1, 2**32 - 2, 2**32 - 5]
    compare("fns.b32 %r0, %r1, %r2, %r3", grid(integers(32, 30), [0, 1, 7, 16, 31, 32], offsets), expected)
