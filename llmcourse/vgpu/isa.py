"""PTX instructions as typed Python values.

PTX is the virtual instruction set that NVRTC emits (NVIDIA, *PTX ISA*, version 9.0). The parser turns its
text into these values once; everything after works on them and never looks at text again.

    add.s32 %r3, %r1, 4;        Instruction(opcode="add", modifiers=("s32",),
                                            operands=(Register("%r3"), Register("%r1"), Immediate(4)))
    @%p1 bra $L__BB0_2;         guard=Guard(Register("%p1"), negated=False), operands=(Label("$L__BB0_2"),)
    ld.global.v4.f32 {…}, [%rd1+16];   operands=(Vector(…), Address(Register("%rd1"), 16))

How the machine holds a register: an array with one element for each lane, or a NumPy scalar where all lanes
hold the same value; its dtype is that of the register's declared type in `DTYPES` (b32 as uint32, f32 as
float32, pred as bool; f16 and bf16 data live in b16 registers as uint16).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WARP_SIZE = 32
SECTOR_BYTES = 32
BANKS = 32

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "pred": "?",
        "b8": "u1",
        "u8": "u1",
        "s8": "i1",
        "b16": "u2",
        "u16": "u2",
        "s16": "i2",
        "f16": "f2",
        "b32": "u4",
        "u32": "u4",
        "s32": "i4",
        "f32": "f4",
        "b64": "u8",
        "u64": "u8",
        "s64": "i8",
        "f64": "f8",
    }.items()
}
"""NumPy dtype of a PTX type. bf16 has none in NumPy: `alu` converts it through float32."""


@dataclass(frozen=True)
class SourceLine:
    """Where an instruction comes from; `inlined_at` is the call that brought an inlined function's."""

    file: str
    line: int
    inlined_at: SourceLine | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Register:
    name: str
    type: str
    """The declared type: b32, f32, pred, …"""


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine: %tid.x, %ctaid.y, %laneid, %clock64, …"""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant. Integers as Python int; 0f… and 0d… constants as NumPy float32 and float64."""

    value: int | np.floating


@dataclass(frozen=True)
class Symbol:
    """The address of a variable: a shared, constant, local or global array, or a parameter."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], offset in bytes."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """{%r1, %r2, …}: the parts of a vector access or of a matrix fragment. None stands for `_` (unused)."""

    parts: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Pair:
    """%r1|%p1: a result and its predicate (shfl, setp, match)."""

    first: Register | None
    second: Register | None


@dataclass(frozen=True)
class Negated:
    """!%p1 as a source."""

    register: Register


Operand = Register | Special | Immediate | Symbol | Label | Address | Vector | Pair | Negated


@dataclass(frozen=True)
class Guard:
    """@%p or @!%p before an instruction: only lanes where it holds carry it out."""

    register: Register
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction. `modifiers` are the dot-separated parts after the opcode, types among them."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: SourceLine | None
    text: str

    @property
    def type(self) -> str:
        """The last type among the modifiers (`cvt.rn.f32.s32` → s32)."""
        return next(
            (m for m in reversed(self.modifiers) if m in DTYPES or m in ("f16x2", "bf16", "bf16x2")), ""
        )

    def has(self, *names: str) -> bool:
        return any(n in self.modifiers for n in names)


@dataclass(frozen=True)
class Variable:
    """A declared array: shared, local, constant, global or a parameter. `initial` holds its first bytes."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes = b""
    type: str = "b8"


@dataclass
class Kernel:
    """One `.entry`: its parameters in order, its variables, its registers and its code.

    labels   name → index into `code` of the instruction that follows
    """

    name: str
    parameters: list[Variable]
    variables: dict[str, Variable]
    registers: dict[str, str]
    code: list[Instruction]
    labels: dict[str, int]
    files: dict[int, str]
    max_threads: int | None = None


@dataclass
class Module:
    """What one PTX text holds: kernels by name, and the variables that they share."""

    kernels: dict[str, Kernel]
    variables: dict[str, Variable]
    target: str
    """sm_75, sm_80, …"""
