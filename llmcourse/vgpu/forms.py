"""Forms: what an arithmetic instruction does to values, whoever's registers hold them.

PTX has few arithmetic opcodes and many variants: `add` alone exists for seven integer types, four float
types with four roundings each, with and without flushing or saturation, packed halves, and with a carry.
A *builder* reads the modifiers once and returns a `Form`: a function on NumPy values, the types that it
takes and the types that it gives. `alu` then fits it to the registers of one instruction.

Builders are registered by opcode and type, so that `add` can be described where it belongs: integers in
`integer`, floats in `floats`, halves in `half`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmcourse.vgpu.isa import Instruction

SIGNED = ("s8", "s16", "s32", "s64")
UNSIGNED = ("u8", "u16", "u32", "u64")
BITS = ("b8", "b16", "b32", "b64")
INTEGERS = (*SIGNED, *UNSIGNED, *BITS)
FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16")
PACKED_HALVES = ("f16x2", "bf16x2")
PACKED_INTEGERS = ("u16x2", "s16x2")
NARROW = ("tf32", "e4m3x2", "e5m2x2")
TYPES = frozenset(("pred", *INTEGERS, *FLOATS, "f32x2", *HALVES, *PACKED_HALVES, *PACKED_INTEGERS, *NARROW))
"""Every type that an arithmetic instruction can name."""


@dataclass(frozen=True)
class Form:
    """One variant of one opcode.

    function   on NumPy arrays of n lanes or NumPy scalars, in any mix; never writes into its arguments
    takes      type of each source, a name of `isa.DTYPES` (halves come as the bits that registers hold)
    gives      type of each result; with more than one, the function returns a tuple
    flops      (counter, operations per lane), as Nsight Compute counts: add, subtract and multiply are 1,
               a fused multiply-add 2, everything else 0
    """

    function: Callable[..., Any]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    flops: tuple[str, int] | None = None
    reads_carry: bool = False
    writes_carry: bool = False


class Modifiers:
    """The dot-separated parts of an opcode. Builders take what they know; what is left is not covered."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.left = list(instruction.modifiers)

    def take(self, *names: str) -> str:
        """The first of `names` that is there, taken out; "" if none is."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return ""

    def flag(self, name: str) -> bool:
        return self.take(name) == name

    def type(self) -> str:
        """The next type from the left, taken out; "" if there is none."""
        return self.take(*(name for name in self.left if name in TYPES))


Builder = Callable[[Modifiers], Form | None]
"""Returns None where the combination of modifiers has no form."""

FORMS: dict[tuple[str, str], Builder] = {}
"""(opcode, type) → builder. The type is the last one among the modifiers; "" stands for any."""

OPCODES: set[str] = set()


def form(*opcodes: str, types: Iterable[str] = ("",)) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes and types."""

    def register(builder: Builder) -> Builder:
        for opcode in opcodes:
            OPCODES.add(opcode)
            for type_ in types:
                FORMS[opcode, type_] = builder
        return builder

    return register


def builder_of(instruction: Instruction) -> Builder | None:
    last = next((m for m in reversed(instruction.modifiers) if m in TYPES), "")
    return FORMS.get((instruction.opcode, last)) or FORMS.get((instruction.opcode, ""))


def width(type_: str) -> int:
    """Bits of a simple type: s32 → 32."""
    return int(type_[1:])


def unsigned(type_: str) -> str:
    """The unsigned type of the same width: registers hold integers so, and no view is needed."""
    return f"u{width(type_)}"


def signed(type_: str) -> str:
    return f"s{width(type_)}"
