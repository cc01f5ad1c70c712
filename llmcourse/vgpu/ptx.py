"""PTX text → typed instructions.

NVRTC writes PTX as text: declarations, then for each kernel a body of statements that end in `;`, labels,
`.loc` lines that name the source line of what follows, and braces that open a scope (inline assembly, the
parameters of a call). `parse` reads all of it once.

Device functions that the compiler did not inline are inlined here: their parameters become registers, their
`ret` a branch. Recursion therefore has no translation, and is refused.

The text may come from anybody (labs are graded on the PTX that learners hand in). So reading takes time in
proportion to the text, what a text may declare is limited (`LIMIT`), and whatever is no PTX is a PtxError.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath

import numpy as np

from llmcourse.vgpu.faults import PtxError
from llmcourse.vgpu.isa import (
    DTYPES,
    Address,
    Guard,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Module,
    Negated,
    Operand,
    Pair,
    Register,
    SourceLine,
    Special,
    Symbol,
    Variable,
    Vector,
)

BUILT_IN_CALLS = ("vprintf", "__assertfail")

LIMIT = 200_000
"""Instructions, registers, variables, scopes and calls of a module in all, inlined code included."""
LARGEST = 1 << 32
"""Bytes of a variable."""

NAME = r"[%$\w][\w$.]*"
_COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)|//[^\n]*", re.S)
_BLANKS = re.compile(r"[^\S\n]+")
_LINE_ENDS = re.compile(r"(?: ?\n ?)+")
_TARGET = re.compile(r"\.target\s+(\w+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_FUNCTION = re.compile(
    r"\.(?P<kind>entry|func)\s+(?:\((?P<returns>[^(){};]*)\)\s*)?"
    rf"(?P<name>{NAME})\s*(?:\((?P<params>[^(){{}};]*)\))?(?P<rest>[^{{;]{{0,300}})(?P<open>[{{;])"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(?P<space>param|shared|local|const|global)\s+"
    r"(?:\.attribute\s*\([^)]*\)\s*)?(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s*(?:\.(?:global|shared|const|local)\s*)?)?(?:\.align\s+\d+\s+)?"
    rf"(?P<name>{NAME})\s*(?P<dims>(?:\[\s*(?:\d+\s*)?\])*)\s*(?:=\s*(?P<initial>.*))?$",
    re.S,
)
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:\s*,\s*function_name\s+[\w$]+(?:\s*\+\s*\d+)?\s*,"
    r"\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[^\n]*"
)
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file|section)\s")
_LABEL = re.compile(rf"({NAME})\s*:(?!:)")
_REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+(.*)$", re.S)
_GUARD = re.compile(rf"@(!?)\s*({NAME})\s+")
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\)|[^,\s][^,]*")
_TARGETS = re.compile(r"\.branchtargets\s+(.*)$", re.S)


def parse(text: str, limit: int = LIMIT) -> Module:
    """Read a PTX module. `limit` is the size beyond which it is refused (see `LIMIT`).

    Raises   PtxError for text that is not PTX of one 64-bit module, or uses what the machine has not.
    """
    try:
        return _parse(text, Room(limit))
    except PtxError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}".rstrip(": ")
    except RecursionError:
        reason = "operands or calls within each other, too deep"
    raise PtxError(
        f"this text is not PTX as the compiler writes it ({reason}).",
        "A statement has a form that none of the instruction set's has.",
        "the text that llmcourse.vgpu.cuda.compile(source) makes (its attribute ptx).",
    )


class Room:
    """What a module may still declare."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def take(self, count: int = 1) -> None:
        """Raises   PtxError when there is no more."""
        self.left -= count
        if self.left < 0:
            raise PtxError(
                f"this PTX has more than {self.limit:,} instructions, registers and variables.",
                "Each of them takes the machine memory and time, and no kernel of that size is expected.",
                "a kernel with less unrolling and fewer inlined calls.",
            )


def _parse(text: str, room: Room) -> Module:
    text = _LINE_ENDS.sub("\n", _BLANKS.sub(" ", _COMMENT.sub("", text)))
    target = _TARGET.search(text)
    if target is None:
        raise PtxError(
            "this text is not PTX: it names no .target.",
            "PTX starts with .version, .target and .address_size.",
            "the text that llmcourse.vgpu.cuda.compile(source) makes (its attribute ptx).",
        )
    files = {int(n): PurePath(name).name for n, name in _FILE.findall(text)}
    functions, outside = _split(text)
    variables: dict[str, Variable] = {}
    for statement in outside:
        if (found := _VARIABLE.match(statement)) is not None:
            room.take()
            variable = _variable(found)
            variables[variable.name] = variable
    kernels = {
        name: _kernel(function, functions, variables, files, room)
        for name, function in functions.items()
        if function.kind == "entry"
    }
    return Module(kernels, variables, target[1])


@dataclass
class _Function:
    kind: str
    name: str
    returns: list[Variable]
    params: list[Variable]
    body: str
    max_threads: int | None = None


def _split(text: str) -> tuple[dict[str, _Function], list[str]]:
    """The functions that have a body, by name, and the statements outside of them."""
    functions: dict[str, _Function] = {}
    outside: list[str] = []
    at = 0
    for found in _FUNCTION.finditer(text):
        if found.start() < at:
            continue
        outside += [s.strip() for s in text[at : found.start()].split(";")]
        at = found.end()
        if found["open"] == ";":
            continue
        end = _closing_brace(text, at)
        limit = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", found["rest"] or "")
        functions[found["name"]] = _Function(
            found["kind"],
            found["name"],
            _parameters(found["returns"]),
            _parameters(found["params"]),
            text[at:end],
            math.prod(int(n) for n in limit.groups() if n) if limit else None,
        )
        at = end + 1
    outside += [s.strip() for s in text[at:].split(";")]
    # A directive without `;` (.version, .file …) stands before the declaration that follows it.
    starts = re.compile(r"\.(?:const|global|shared)\s")
    return functions, [s[m.start() :] for s in outside if (m := starts.search(s))]


def _closing_brace(text: str, at: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.start()
    raise PtxError(
        "this PTX ends inside a function.",
        "A brace that was opened is never closed.",
        "compiling the source again: the text was cut.",
    )


def _parameters(text: str | None) -> list[Variable]:
    return [
        _variable(found)
        for part in (text or "").split(",")
        if (found := _VARIABLE.match(part.strip())) is not None
    ]


def _variable(found: re.Match[str]) -> Variable:
    kind, dims = found["type"], re.findall(r"\[\s*(\d*)\s*\]", found["dims"] or "")
    size = DTYPES[kind].itemsize if kind in DTYPES else 8
    count = math.prod(int(d or 0) for d in dims)
    align = int(found["align"] or size)
    if count * size > LARGEST or not 0 < align <= LARGEST or align & (align - 1):
        raise PtxError(
            f"the variable {found['name'][:80]} has {count * size:,} bytes on multiples of {align:,}.",
            f"A variable has at most {LARGEST:,} bytes, and its alignment is a power of two.",
            "a smaller array.",
        )
    initial = _initial(found["initial"], kind, size) if found["initial"] else b""
    return Variable(found["name"], found["space"], align, count * size, initial, kind)


def _initial(text: str, kind: str, size: int) -> bytes:
    parts = [p.strip() for p in text.replace("{", " ").replace("}", " ").split(",") if p.strip()]
    out = bytearray()
    for part in parts:
        value = _number(part)
        if value is None:
            raise PtxError(
                f"a variable is initialised with {part!r}.",
                "The machine lays out numbers only, not addresses of other variables.",
                "setting the pointer in the kernel, or passing the array as an argument.",
            )
        if isinstance(value, np.floating):
            out += value.tobytes()
        else:
            out += (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(out)


def _number(text: str) -> int | np.floating | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.frombuffer(struct.pack("<I", int(text[2:], 16)), "<f4")[0]
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.frombuffer(struct.pack("<Q", int(text[2:], 16)), "<f8")[0]
    if re.fullmatch(r"-?0[xX][0-9a-fA-F]+U?", text):
        return int(text.rstrip("U"), 16)
    if re.fullmatch(r"-?\d+U?", text):
        return int(text.rstrip("U"))
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
        return np.float64(text)
    return None


@dataclass
class _Call:
    """One inlining of a function: how its own names are spelled in the kernel."""

    prefix: str
    bindings: dict[str, str]
    """Formal parameter or result → the caller's variable (its name in the kernel)."""
    end: str


@dataclass
class _Builder:
    """Collects a kernel's code while its statements are read."""

    functions: dict[str, _Function]
    module_variables: dict[str, Variable]
    files: dict[int, str]
    kernel_parameters: dict[str, Variable]
    room: Room
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    scopes: int = 0
    calls: int = 0
    active: tuple[str, ...] = ()
    places: dict[tuple[str, str, str], SourceLine] = field(default_factory=dict)
    """File, line and column of each .loc read so far, as the line that it names."""

    def body(self, function: _Function, call: _Call | None) -> None:
        """Read the statements of a function, `call` saying how it was inlined (None: the kernel itself)."""
        prefix = call.prefix if call else ""
        names: list[dict[str, str]] = [{}]  # innermost scope last: name as written → name in the kernel
        line: SourceLine | None = None
        waiting: str | None = None
        if function.name in self.active:
            raise PtxError(
                f"the device function {function.name} calls itself.",
                "The machine inlines every call, and a recursion has no end.",
                "a loop with a stack in local memory.",
            )
        self.active += (function.name,)
        for kind, text in _statements(function.body):
            self.room.take(kind != "loc")
            if kind == "loc":
                line = self._location(text) or line
            elif kind == "open":
                self.scopes += 1
                names.append({})
            elif kind == "close":
                names.pop()
            elif kind == "label":
                self.labels[prefix + text] = len(self.code)
                waiting = prefix + text
            elif (found := _TARGETS.match(text)) is not None and waiting:
                self.tables[waiting] = [prefix + t.strip() for t in found[1].split(",")]
            elif text.startswith(".reg"):
                self._declare_registers(text, names, prefix)
            elif (variable := _VARIABLE.match(text)) is not None:
                self._declare_variable(_variable(variable), names, prefix)
            elif not text.startswith("."):
                self._instruction(text, line, names, call)
        self.active = self.active[:-1]

    def _location(self, text: str) -> SourceLine | None:
        found = _LOC.match(text)
        if found is None or found[2] == "0":
            return None
        outer = None
        if found[4]:
            # The call itself may have been inlined: its own .loc, with its caller, stands above.
            call = (found[4], found[5], found[6])
            outer = self.places.get(call) or SourceLine(self.files.get(int(call[0]), call[0]), int(call[1]))
        line = SourceLine(self.files.get(int(found[1]), found[1]), int(found[2]), outer)
        self.places[found[1], found[2], found[3]] = line
        return line

    def _unique(self, name: str, names: list[dict[str, str]], prefix: str) -> str:
        unique = prefix + (f"{{{self.scopes}}}{name}" if len(names) > 1 else name)
        names[-1][name] = unique
        return unique

    def _declare_registers(self, text: str, names: list[dict[str, str]], prefix: str) -> None:
        found = _REGISTERS.match(text)
        assert found is not None
        kind = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(found[1], found[1])
        for name in (n.strip() for n in found[2].split(",")):
            self.room.take()
            if (many := re.fullmatch(r"(.+)<(\d+)>", name)) is not None:
                self.room.take(int(many[2]))
                for i in range(int(many[2])):
                    self.registers[self._unique(f"{many[1]}{i}", names, prefix)] = kind
            else:
                self.registers[self._unique(name, names, prefix)] = kind

    def _declare_variable(self, variable: Variable, names: list[dict[str, str]], prefix: str) -> None:
        unique = self._unique(variable.name, names, prefix)
        self.variables[unique] = replace(variable, name=unique)

    def _instruction(
        self, text: str, line: SourceLine | None, names: list[dict[str, str]], call: _Call | None
    ) -> None:
        text = re.sub(r"\s+", " ", text)
        guard = None
        body = text
        if (found := _GUARD.match(text)) is not None:
            register = self._operand(found[2], names, call)
            assert isinstance(register, Register)
            guard, body = Guard(register, bool(found[1])), text[found.end() :]
        operands: tuple[Operand, ...]
        opcode, _, rest = body.partition(" ")
        opcode, *modifiers = opcode.split(".")
        if opcode == "call":
            self._call(rest, line, names, call, guard)
            return
        if opcode == "ret" and call is not None:
            opcode, modifiers, operands = "bra", [], (Label(call.end),)
        elif opcode in ("bra", "brx"):
            prefix = call.prefix if call else ""
            operands = tuple(
                self._operand(part, names, call) if part.startswith("%") else Label(prefix + part)
                for part in map(str.strip, rest.split(","))
            )
        else:
            operands = tuple(self._operand(part, names, call) for part in _OPERAND.findall(rest))
        if opcode in ("ld", "st", "ldu") and "param" in modifiers:
            self._parameter_access(opcode, modifiers, operands, line, text, guard)
            return
        if opcode == "brx":
            table = operands[-1]
            assert isinstance(table, Label)
            operands = (operands[0], *(Label(t) for t in self.tables[table.name]))
        self.code.append(Instruction(opcode, tuple(modifiers), operands, guard, line, text))

    def _parameter_access(
        self,
        opcode: str,
        modifiers: list[str],
        operands: tuple[Operand, ...],
        line: SourceLine | None,
        text: str,
        guard: Guard | None,
    ) -> None:
        """Parameters of the kernel stay loads; those of inlined functions become registers, one an offset."""
        where = operands[1 if opcode.startswith("ld") else 0]
        assert isinstance(where, Address)
        if isinstance(where.base, Register) or (
            isinstance(where.base, Symbol) and where.base.name in self.kernel_parameters
        ):
            self.code.append(Instruction(opcode, tuple(modifiers), operands, guard, line, text))
            return
        assert isinstance(where.base, Symbol)
        kind = modifiers[-1]
        size = DTYPES[kind].itemsize
        data = operands[0 if opcode.startswith("ld") else 1]
        parts = data.parts if isinstance(data, Vector) else (data,)
        for i, part in enumerate(parts):
            if part is None:
                continue
            at = where.offset + where.base.offset + i * size
            name = f"{where.base.name}+{at}"
            stored = self.registers.setdefault(name, f"b{8 * size}")
            if DTYPES[stored].itemsize != size:
                had = DTYPES[stored].itemsize
                raise PtxError(
                    f"{line or ''} a parameter is written in {had}-byte and read in {size}-byte parts.",
                    "Parameters of device functions that were not inlined are kept as whole values.",
                    "removing __noinline__ from the function.",
                )
            register = Register(name, stored)
            pair = (part, register) if opcode.startswith("ld") else (register, part)
            self.code.append(Instruction("mov", (f"b{8 * size}",), pair, guard, line, text))

    def _call(
        self,
        text: str,
        line: SourceLine | None,
        names: list[dict[str, str]],
        call: _Call | None,
        guard: Guard | None,
    ) -> None:
        parts = [p.strip() for p in _OPERAND.findall(text)]
        returns = _names(parts.pop(0)) if parts[0].startswith("(") else []
        name = parts.pop(0)
        arguments = _names(parts.pop(0)) if parts else []
        actual = [self._resolve(a, names, call) for a in arguments]
        results = [self._resolve(r, names, call) for r in returns]
        if name in BUILT_IN_CALLS:
            operands = tuple(Register(f"{a}+0", self.registers[f"{a}+0"]) for a in actual)
            for r in results:
                self.registers.setdefault(f"{r}+0", "b32")
            self.code.append(Instruction(name, (), operands, guard, line, f"call {name}"))
            return
        function = self.functions.get(name)
        if function is None:
            raise PtxError(
                f"{line or 'this kernel'} calls {name}, which has no body here.",
                "Calls through pointers and functions of the device runtime (malloc, launches) are not here.",
                "code that the compiler can inline.",
            )
        self.calls += 1
        prefix = f"{name}#{self.calls}."
        bindings = {formal.name: a for formal, a in zip(function.params, actual, strict=True)}
        bindings |= {formal.name: r for formal, r in zip(function.returns, results, strict=True)}
        inner = _Call(prefix, bindings, f"{prefix}end")
        self.body(function, inner)
        self.labels[inner.end] = len(self.code)

    def _resolve(self, name: str, names: list[dict[str, str]], call: _Call | None) -> str:
        for scope in reversed(names):
            if name in scope:
                return scope[name]
        if call is not None and name in call.bindings:
            return call.bindings[name]
        return name

    def _operand(self, text: str, names: list[dict[str, str]], call: _Call | None) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            parts = [p.strip() for p in text[1:-1].split(",")]
            return Vector(tuple(None if p == "_" else self._operand(p, names, call) for p in parts))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), names, call)
        if text.startswith("!"):
            register = self._operand(text[1:], names, call)
            assert isinstance(register, Register)
            return Negated(register)
        if "|" in text:
            first, second = (
                None if p.strip() == "_" else self._operand(p, names, call) for p in text.split("|")
            )
            assert first is None or isinstance(first, Register)
            assert second is None or isinstance(second, Register)
            return Pair(first, second)
        if (number := _number(text)) is not None:
            return Immediate(number)
        if text == "WARP_SZ":
            return Immediate(32)
        name = self._resolve(text, names, call)
        if name in self.registers:
            return Register(name, self.registers[name])
        if text == "_":
            return Register("_", "b32")
        if (plus := re.fullmatch(rf"({NAME})\s*\+\s*(\d+)", text)) is not None:
            return Symbol(self._resolve(plus[1], names, call), int(plus[2]))
        if text.startswith("%"):
            return Special(text)
        return Symbol(name)

    def _address(self, text: str, names: list[dict[str, str]], call: _Call | None) -> Address:
        base, _, offset = text.partition("+")
        number = _number(offset.strip()) if offset else 0
        operand = self._operand(base, names, call)
        if not isinstance(operand, Register | Symbol | Immediate) or not isinstance(number, int):
            raise PtxError(
                f"the address [{text}] cannot be read.",
                "An address is a register, a variable or a number, plus a number of bytes.",
                "compiling with the options that llmcourse.vgpu uses.",
            )
        return Address(operand, number)


def _names(text: str) -> list[str]:
    return [n.strip() for n in text.strip("()").split(",") if n.strip()]


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each statement: loc, label, open, close or plain."""
    at, end = 0, len(body)
    while at < end:
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield ("open" if body[at] == "{" else "close"), body[at]
            at += 1
        elif _LINE_DIRECTIVE.match(body, at):
            stop = body.find("\n", at)
            stop = end if stop < 0 else stop
            yield "loc", body[at:stop]
            at = stop
        elif (found := _LABEL.match(body, at)) is not None:
            yield "label", found[1]
            at = found.end()
        else:
            stop = body.find(";", at)
            stop = end if stop < 0 else stop
            text = body[at:stop].strip()
            if text:
                yield "plain", text
            at = stop + 1


def _kernel(
    function: _Function,
    functions: dict[str, _Function],
    variables: dict[str, Variable],
    files: dict[int, str],
    room: Room,
) -> Kernel:
    builder = _Builder(functions, variables, files, {p.name: p for p in function.params}, room)
    builder.body(function, None)
    wanted = {o.name for i in builder.code for o in i.operands if isinstance(o, Label)}
    if missing := wanted - builder.labels.keys():
        raise PtxError(
            f"{function.name} branches to {min(missing)[:80]}, which it does not have.",
            "A branch leads to a label of the same function.",
            "compiling the source again: the text was changed.",
        )
    if not builder.code or builder.code[-1].opcode != "ret" or len(builder.code) in builder.labels.values():
        builder.code.append(Instruction("ret", (), (), None, None, "ret"))
    return Kernel(
        function.name,
        function.params,
        builder.variables,
        builder.registers,
        builder.code,
        builder.labels,
        files,
        function.max_threads,
    )
