"""printf and assert inside a kernel."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from llmcourse.vgpu.isa import Instruction
from llmcourse.vgpu.lanes import Active
from llmcourse.vgpu.memory import LOCAL_WINDOW

if TYPE_CHECKING:
    from llmcourse.vgpu.machine import Batch, Program, Step

LIMIT = 1 << 16
"""Characters that one launch may print; a GPU's buffer is of a fixed size too."""

_FORMAT = re.compile(rb"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+))?(hh|h|ll|l|z|j|t)?([diouxXeEfFgGaAcsp%])")


def compile_call(program: Program, instruction: Instruction) -> Step | None:
    """vprintf(format, arguments) and __assertfail(message, file, line, function, size)."""
    if instruction.opcode == "vprintf":
        fetches = [program.fetch(operand, np.dtype("u8")) for operand in instruction.operands]

        def show(batch: Batch, active: Active) -> None:
            texts, buffers = (active.own_each(fetch(batch, active)) for fetch in fetches)
            lanes = np.flatnonzero(active.mask)
            used = sum(map(len, batch.launch.printed))
            for lane, text, buffer in zip(lanes, texts, buffers, strict=True):
                if used > LIMIT:
                    break
                line = formatted(batch, batch.memory.text(int(text)), int(lane), int(buffer))
                batch.launch.printed.append(line)
                used += len(line)

        return show
    if instruction.opcode == "__assertfail":
        fetches = [program.fetch(operand, np.dtype("u8")) for operand in instruction.operands]

        def fail(batch: Batch, active: Active) -> None:
            lane = int(np.flatnonzero(active.mask)[0])
            message = batch.memory.text(int(active.own_each(fetches[0](batch, active))[0])).decode(
                errors="replace"
            )
            raise batch.fault(
                "assertion",
                f"assertion failed: {message}",
                "The kernel states that this always holds, and here it does not.",
                "printing the values that the condition uses.",
                instruction.line,
                lane,
            )

        return fail
    return None


def formatted(batch: Batch, template: bytes, lane: int, buffer: int) -> str:
    """One printf: the arguments lie in the thread's local memory, each on a multiple of its size."""
    at = (buffer - LOCAL_WINDOW) + lane * batch.launch.local_bytes
    start = at

    def argument(size: int) -> bytes:
        nonlocal at
        at = start + -(-(at - start) // size) * size
        data = batch.local[at : at + size].tobytes()
        at += size
        return data

    def one(found: re.Match[bytes]) -> bytes:
        flags, width, precision, length, kind = found.groups()
        if kind == b"%":
            return b"%"
        if width == b"*":
            width = str(struct.unpack("<i", argument(4))[0]).encode()
        if precision == b"*":
            precision = str(struct.unpack("<i", argument(4))[0]).encode()
        spec = "%" + flags.decode() + (width or b"").decode()
        spec += f".{precision.decode()}" if precision is not None else ""
        if kind in b"eEfFgGaA":
            value = struct.unpack("<d", argument(8))[0]
            return (value.hex() if kind in b"aA" else (spec + kind.decode()) % value).encode()
        if kind == b"s":
            return (spec + "s").encode() % batch.memory.text(struct.unpack("<Q", argument(8))[0])
        if kind == b"p":
            return hex(struct.unpack("<Q", argument(8))[0]).encode()
        wide = length in (b"l", b"ll", b"z", b"j", b"t")
        code = ("q" if wide else "i") if kind in b"dic" else ("Q" if wide else "I")
        number = struct.unpack("<" + code, argument(8 if wide else 4))[0]
        if kind == b"c":
            return bytes([number & 255])
        return ((spec + {"i": "d", "u": "d"}.get(kind.decode(), kind.decode())) % number).encode()

    return _FORMAT.sub(one, template).decode(errors="replace")
