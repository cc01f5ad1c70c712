"""The machine's arithmetic beside a GPU's, instruction by instruction and bit by bit.

Each instruction becomes a PTX kernel of its own that loads its sources, does it once a lane and stores the
results; the driver assembles it. The same bits go through `compile_alu`. What IEEE 754 or PTX defines has to
agree in every bit (any NaN equals any NaN); of the approximate functions the distance is measured, in units
in the last place.

    python tests/gpu/alu_on_hardware.py FOLDER      writes FOLDER/alu.json and prints what differs
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "vgpu"))
from alu_reference import BF16, F16, F32, F64, Format, compiled, floats, from_bits, grid, integers

from llmcourse.vgpu.alu import CARRY
from llmcourse.vgpu.isa import DTYPES, Register

LANES = 4096
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
REGISTERS = {"f16": "%rs", "bf16": "%rs", "f32": "%f", "f64": "%fd", "16": "%rs", "32": "%r", "64": "%rd"}


@dataclass(frozen=True)
class Case:
    """An instruction, what its sources hold and what its result is.

    sources   f32, f16x2, u32, pred, small (shift amounts), … one for each source register
    result    the float format of the result, "" for bits
    approximate   hardware may differ by some units in the last place
    """

    text: str
    sources: tuple[str, ...]
    result: str = ""
    approximate: bool = False


@dataclass
class Outcome:
    lanes: int
    different: int
    units: int
    """The largest distance in units in the last place of a float result; 2⁶² if only one side is a number."""
    apart: float = 0.0
    """The largest difference of a float result, relative beyond 1: |a − b| / max(1, |b|)."""
    examples: list[dict[str, str]] = field(default_factory=list)


def register(type_: str) -> str:
    type_ = {"small": "u32", "fns": "s32", "s8": "s16", "u8": "u16"}.get(type_, type_)
    if type_ == "pred":
        return "%p"
    if type_.endswith("x2"):
        return "%rs" if type_.startswith("e") else "%r"
    return REGISTERS.get(type_) or REGISTERS[type_[1:]]


def case(opcode: str, result: str, *sources: str, number: str = "", approximate: bool = False) -> Case:
    names = [f"{register(t)}{i + 1}" for i, t in enumerate(sources)]
    target = f"{register(result)}0"
    return Case(f"{opcode} " + ", ".join([target, *names]), sources, number, approximate)


def integer_cases() -> Iterator[Case]:
    for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        for opcode in ("add", "sub", "mul.lo", "mul.hi", "div", "rem", "min", "max"):
            yield case(f"{opcode}.{t}", t, t, t)
        for opcode in ("mad.lo", "mad.hi", "sad"):
            yield case(f"{opcode}.{t}", t, t, t, t)
        if t[0] == "s":
            yield case(f"neg.{t}", t, t)
            yield case(f"abs.{t}", t, t)
        yield case(f"shr.{t}", t, t, "small")
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            yield case(f"setp.{name}.{t}", "pred", t, t)
    for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        yield case(f"mul.wide.{t}", wide, t, t)
        yield case(f"mad.wide.{t}", wide, t, t, wide)
    for opcode in ("mul24.lo", "mul24.hi"):
        yield case(f"{opcode}.s32", "s32", "s32", "s32")
        yield case(f"{opcode}.u32", "u32", "u32", "u32")
    for opcode in ("add.sat", "sub.sat", "min.relu", "max.relu"):
        yield case(f"{opcode}.s32", "s32", "s32", "s32")
    yield case("mad.hi.sat.s32", "s32", "s32", "s32", "s32")
    yield case("mad24.hi.s32", "s32", "s32", "s32", "s32")
    for bits in (32, 64):
        u = f"u{bits}"
        for opcode in ("add.cc", "sub.cc"):
            yield case(f"{opcode}.{u}", u, u, u)
        for opcode in ("addc", "addc.cc", "subc", "subc.cc"):
            yield case(f"{opcode}.{u}", u, u, u)
        for opcode in ("mad.lo.cc", "mad.hi.cc", "madc.lo", "madc.hi", "madc.hi.cc", "madc.lo.cc"):
            yield case(f"{opcode}.{u}", u, u, u, u)
    for a, b in product(("s32", "u32"), repeat=2):
        yield case(f"dp4a.{a}.{b}", "u32", "u32", "u32", "u32")
        yield case(f"dp2a.lo.{a}.{b}", "u32", "u32", "u32", "u32")
        yield case(f"dp2a.hi.{a}.{b}", "u32", "u32", "u32", "u32")
    for opcode in ("add", "min", "max"):
        yield case(f"{opcode}.u16x2", "u32", "u32", "u32")
        yield case(f"{opcode}.s16x2", "u32", "u32", "u32")
    yield case("max.s16x2.relu", "u32", "u32", "u32")
    for name in ("vadd4", "vsub4", "vavrg4", "vabsdiff4", "vmin4", "vmax4", "vabsdiff2"):
        for t in ("s32", "u32"):
            yield case(f"{name}.{t}.{t}.{t}", "u32", "u32", "u32", "u32")
        yield case(f"{name}.u32.u32.u32.add", "u32", "u32", "u32", "u32")
    yield case("vadd4.s32.s32.s32.sat", "u32", "u32", "u32", "u32")


def bit_cases() -> Iterator[Case]:
    for bits in ("b16", "b32", "b64"):
        for opcode in ("and", "or", "xor"):
            yield case(f"{opcode}.{bits}", bits, bits, bits)
        yield case(f"not.{bits}", bits, bits)
        yield case(f"cnot.{bits}", bits, bits)
        yield case(f"shl.{bits}", bits, bits, "small")
    for bits in ("b32", "b64"):
        yield case(f"popc.{bits}", "u32", bits)
        yield case(f"clz.{bits}", "u32", bits)
        yield case(f"brev.{bits}", bits, bits)
        yield case(f"bfi.{bits}", bits, bits, bits, "small", "small")
    for t in ("u32", "s32", "u64", "s64"):
        yield case(f"bfe.{t}", t, t, "small", "small")
        yield case(f"bfind.{t}", "u32", t)
        yield case(f"bfind.shiftamt.{t}", "u32", t)
    for opcode in ("shf.l.clamp", "shf.l.wrap", "shf.r.clamp", "shf.r.wrap"):
        yield case(f"{opcode}.b32", "b32", "b32", "b32", "small")
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield case(f"prmt.b32{mode}", "b32", "b32", "b32", "b32")
    for mode in ("clamp", "wrap"):
        yield case(f"bmsk.{mode}.b32", "b32", "small", "small")
        yield case(f"szext.{mode}.s32", "s32", "s32", "small")
        yield case(f"szext.{mode}.u32", "u32", "u32", "small")
    yield case("fns.b32", "b32", "b32", "small", "fns")
    for table in (0x96, 0xE8, 0x1B, 0x40, 0xFE, 0x2D):
        plain = case("lop3.b32", "b32", "b32", "b32", "b32")
        yield Case(f"{plain.text}, {table}", plain.sources)


def float_cases() -> Iterator[Case]:
    modes = (".rn", ".rz", ".rm", ".rp")
    for t, suffix in (("f32", ""), ("f32", ".ftz"), ("f64", "")):
        for mode in modes:
            for opcode in ("add", "sub", "mul", "div"):
                yield case(f"{opcode}{mode}{suffix}.{t}", t, t, t, number=t)
            yield case(f"fma{mode}{suffix}.{t}", t, t, t, t, number=t)
            yield case(f"rcp{mode}{suffix}.{t}", t, t, number=t)
            yield case(f"sqrt{mode}{suffix}.{t}", t, t, number=t)
        for opcode in ("min", "max"):
            yield case(f"{opcode}{suffix}.{t}", t, t, t, number=t)
        for opcode in ("abs", "neg"):
            yield case(f"{opcode}{suffix}.{t}", t, t, number=t)
        for name in (
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "equ",
            "neu",
            "ltu",
            "leu",
            "gtu",
            "geu",
            "num",
            "nan",
        ):
            yield case(f"setp.{name}{suffix}.{t}", "pred", t, t)
    for t in ("f32", "f64"):
        yield case(f"copysign.{t}", t, t, t, number=t)
        for name in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
            yield case(f"testp.{name}.{t}", "pred", t)
        yield case(f"selp.{t}", t, t, t, "pred", number=t)
    yield case("add.sat.f32", "f32", "f32", "f32", number="f32")
    yield case("fma.rn.sat.f32", "f32", "f32", "f32", "f32", number="f32")
    yield case("max.NaN.f32", "f32", "f32", "f32", number="f32")
    yield case("min.xorsign.abs.f32", "f32", "f32", "f32", number="f32")
    yield case("slct.b32.s32", "b32", "b32", "b32", "s32")
    yield case("slct.b32.f32", "b32", "b32", "b32", "f32")
    yield case("set.lt.u32.f32", "u32", "f32", "f32")
    yield case("set.geu.f32.f32", "f32", "f32", "f32", number="f32")
    for opcode in ("ex2", "lg2", "sin", "cos", "rcp", "rsqrt", "sqrt"):
        for suffix in ("", ".ftz"):
            yield case(f"{opcode}.approx{suffix}.f32", "f32", "f32", number="f32", approximate=True)
    yield case("tanh.approx.f32", "f32", "f32", number="f32", approximate=True)
    for opcode in ("div.approx", "div.approx.ftz", "div.full", "div.full.ftz"):
        yield case(f"{opcode}.f32", "f32", "f32", "f32", number="f32", approximate=True)
    for opcode in ("rcp.approx.ftz", "rsqrt.approx.ftz", "rsqrt.approx"):
        yield case(f"{opcode}.f64", "f64", "f64", number="f64", approximate=True)


def half_cases() -> Iterator[Case]:
    for t in ("f16", "bf16", "f16x2", "bf16x2"):
        for opcode in ("add", "sub", "mul", "min", "max", "min.NaN", "max.NaN"):
            yield case(f"{opcode}.{t}", t, t, t, number=t)
        for opcode in ("fma.rn", "fma.rn.relu"):
            yield case(f"{opcode}.{t}", t, t, t, t, number=t)
        for opcode in ("abs", "neg"):
            yield case(f"{opcode}.{t}", t, t, number=t)
        yield case(f"tanh.approx.{t}", t, t, number=t, approximate=True)
        ftz = ".ftz" if t.startswith("b") else ""
        yield case(f"ex2.approx{ftz}.{t}", t, t, number=t, approximate=True)
        yield case(f"set.lt.{t}.{t}", t, t, t, number=t)
    for t in ("f16", "f16x2"):
        for opcode in ("add.sat", "mul.sat", "add.ftz", "mul.ftz"):
            yield case(f"{opcode}.{t}", t, t, t, number=t)
        yield case(f"fma.rn.sat.{t}", t, t, t, t, number=t)
    for t in ("f16", "bf16"):
        for name in ("eq", "ne", "lt", "geu", "nan"):
            yield case(f"setp.{name}.{t}", "pred", t, t)
        yield case(f"set.lt.u32.{t}", "u32", t, t)
        yield case(f"set.lt.u32.{t}x2", "u32", f"{t}x2", f"{t}x2")


def conversion_cases() -> Iterator[Case]:
    integers_ = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    for a, b in product(integers_, repeat=2):
        if a != b:
            yield case(f"cvt.{a}.{b}", a, b)
        if int(a[1:]) < int(b[1:]) or (a[1:] == b[1:] and a != b) or (a[0] == "u" and b[0] == "s"):
            yield case(f"cvt.sat.{a}.{b}", a, b)
    for a, b in product(integers_, FORMATS):
        if b == "bf16" and a in ("s8", "u8"):
            continue  # the assembler wants a register of its own kind for these
        for mode in ("rni", "rzi", "rmi", "rpi"):
            yield case(f"cvt.{mode}.{a}.{b}", a, b)
        for mode in ("rn", "rz", "rm", "rp"):
            yield case(f"cvt.{mode}.{b}.{a}", b, a, number=b)
    for t in FORMATS:
        for mode in ("rni", "rzi", "rmi", "rpi"):
            yield case(f"cvt.{mode}.{t}.{t}", t, t, number=t)
    for mode in ("rn", "rz", "rm", "rp"):
        for a, b in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("bf16", "f64")):
            yield case(f"cvt.{mode}.{a}.{b}", a, b, number=a)
    for a, b in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")):
        yield case(f"cvt.{a}.{b}", a, b, number=a)
    yield case("cvt.rn.bf16.f16", "bf16", "f16", number="bf16")
    yield case("cvt.rn.f16.bf16", "f16", "bf16", number="f16")
    yield case("cvt.rzi.ftz.s32.f32", "s32", "f32")
    yield case("cvt.sat.f32.f32", "f32", "f32", number="f32")
    yield case("cvt.ftz.f64.f32", "f64", "f32", number="f64")
    yield case("cvt.rn.ftz.f32.f64", "f32", "f64", number="f32")
    for t in ("f16", "bf16"):
        for how in ("rn", "rz", "rn.relu"):
            yield case(f"cvt.{how}.{t}.f32", t, "f32", number=t)
            yield case(f"cvt.{how}.{t}x2.f32", f"{t}x2", "f32", "f32", number=f"{t}x2")
    for how in ("rna", "rn", "rz", "rn.relu"):
        yield case(f"cvt.{how}.tf32.f32", "b32", "f32", number="f32")
    for t in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            yield case(f"cvt.rn.satfinite{relu}.{t}.f32", t, "f32", "f32")
            yield case(f"cvt.rn.satfinite{relu}.{t}.f16x2", t, "f16x2")
            yield case(f"cvt.rn{relu}.f16x2.{t}", "f16x2", t, number="f16x2")
    for t in ("s16", "u16"):
        yield case(f"cvt.pack.sat.{t}.s32", "u32", "s32", "s32")
    for t in ("s8", "u8", "s4", "u4", "s2", "u2"):
        yield case(f"cvt.pack.sat.{t}.s32.b32", "u32", "s32", "s32", "b32")


def cases() -> list[Case]:
    found = [*integer_cases(), *bit_cases(), *float_cases(), *half_cases(), *conversion_cases()]
    return list({c.text: c for c in found}.values())


# ---- what goes in


def column(type_: str, seed: int) -> list[int]:
    if type_ == "pred":
        return [0, 1]
    if type_ == "small":
        return [*range(40), 63, 64, 65, 255, 256, 300, 2**31, 2**32 - 1]
    if type_ == "fns":
        return [*range(-33, 34), 1000, -(2**31)]
    if type_ in FORMATS:
        return floats(FORMATS[type_], 400, seed)
    if type_ in ("f16x2", "bf16x2"):
        one = floats(FORMATS[type_[:-2]], 400, seed)
        return [low | high << 16 for low, high in zip(one, one[7:] + one[:7], strict=True)]
    if type_ in ("e4m3x2", "e5m2x2"):
        return [low | (low * 37 + 11) % 256 << 8 for low in range(256)]
    return integers(max(16, int(type_[1:])), 400, seed)


def inputs(one: Case) -> list[np.ndarray]:
    """The bits of each source register, in order; a carry comes last."""
    sources = [s for s in compiled(one.text).sources if isinstance(s, Register)]
    kinds = [*one.sources, *(["pred"] * (len(sources) - len(one.sources)))]
    columns = grid(*(column(t, i) for i, t in enumerate(kinds)), most=LANES)
    return [from_bits(c, DTYPES[s.type]) for c, s in zip(columns, sources, strict=True)]


# ---- the kernel

LOADS = {"b16": "b16", "b32": "b32", "b64": "b64", "f32": "f32", "f64": "f64"}


def kernel(one: Case) -> str:
    """PTX of `k(pointer of each source, pointer of each result)`, one lane a thread of a single block row."""
    alu = compiled(one.text)
    sources = [s for s in alu.sources if isinstance(s, Register)]
    results = [d for d in alu.destinations if d is not None]
    names = [f"p{i}" for i in range(len(sources) + len(results))]
    body = [
        "mov.u32 %i, %ctaid.x;",
        "mad.lo.u32 %i, %i, 128, 0;",
        "mov.u32 %t, %tid.x;",
        "add.u32 %i, %i, %t;",
    ]
    for place, (name, reg) in enumerate(zip(names, [*sources, *results], strict=True)):
        size = DTYPES[reg.type].itemsize
        body += [f"ld.param.u64 %a{place}, [{name}];", f"mad.wide.u32 %a{place}, %i, {size}, %a{place};"]
    for place, reg in enumerate(sources):
        if reg.type == "pred":
            body += [f"ld.global.u8 %h, [%a{place}];"]
            if reg == CARRY:
                body += ["cvt.u32.u16 %t, %h;", "add.cc.u32 %t, %t, 0xFFFFFFFF;"]
            else:
                body += [f"setp.ne.u16 {reg.name}, %h, 0;"]
        else:
            body += [f"ld.global.{LOADS[reg.type]} {reg.name}, [%a{place}];"]
    body += [f"{one.text};"]
    for place, reg in enumerate(results, len(sources)):
        if reg == CARRY:
            body += ["addc.u32 %t, 0, 0;", "cvt.u16.u32 %h, %t;", f"st.global.u8 [%a{place}], %h;"]
        elif reg.type == "pred":
            body += [f"selp.u16 %h, 1, 0, {reg.name};", f"st.global.u8 [%a{place}], %h;"]
        else:
            body += [f"st.global.{LOADS[reg.type]} [%a{place}], {reg.name};"]
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    return (
        ".version 8.5\n.target sm_90\n.address_size 64\n"
        f".visible .entry k({parameters})\n{{\n"
        "    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;\n"
        "    .reg .f32 %f<9>; .reg .f64 %fd<9>; .reg .b32 %i, %t; .reg .b16 %h; .reg .b64 %a<9>;\n    "
        + "\n    ".join(body)
        + "\n    ret;\n}\n"
    )


class Gpu:
    """Assemble and run kernels through the driver, in the context that PyTorch uses."""

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        self.torch, self.driver = torch, driver
        torch.zeros(1, device="cuda")
        self.name = torch.cuda.get_device_name()

    def ask(self, answer: tuple) -> object:
        code, *rest = answer
        if int(code) != 0:
            raise RuntimeError(f"the driver answered {code}")
        return rest[0] if rest else None

    def run(self, one: Case, values: list[np.ndarray]) -> list[np.ndarray]:
        count = -(-len(values[0]) // 128) * 128
        results = [d for d in compiled(one.text).destinations if d is not None]
        module = self.ask(self.driver.cuModuleLoadData(kernel(one).encode() + b"\0"))
        function = self.ask(self.driver.cuModuleGetFunction(module, b"k"))
        buffers = []
        for value in values:
            padded = np.zeros(count, value.dtype)
            padded[: len(value)] = value
            buffers.append(self.torch.from_numpy(padded.view(np.uint8)).cuda())
        for reg in results:
            size = count * DTYPES[reg.type].itemsize
            buffers.append(self.torch.zeros(size, dtype=self.torch.uint8, device="cuda"))
        pointers = tuple(b.data_ptr() for b in buffers)
        arguments = (pointers, (ctypes.c_void_p,) * len(pointers))
        stream = self.torch.cuda.current_stream().cuda_stream
        self.ask(self.driver.cuLaunchKernel(function, count // 128, 1, 1, 128, 1, 1, 0, stream, arguments, 0))
        self.torch.cuda.synchronize()
        out = [
            b.cpu().numpy().view(DTYPES[reg.type])[: len(values[0])]
            for b, reg in zip(buffers[len(values) :], results, strict=True)
        ]
        self.ask(self.driver.cuModuleUnload(module))
        return out


# ---- what comes out


def machine(one: Case, values: list[np.ndarray]) -> list[np.ndarray]:
    alu = compiled(one.text)
    with np.errstate(all="ignore"):
        results = alu.apply(*values)
    results = results if isinstance(results, tuple) else (results,)
    return [r for r, d in zip(results, alu.destinations, strict=True) if d is not None]


def compared(
    one: Case, values: list[np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]
) -> Outcome:
    different = np.zeros(len(values[0]), bool)
    units, apart = 0, 0.0
    for mine, other in zip(ours, theirs, strict=True):
        a, b = (np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (mine, other))
        unequal = a != b
        if one.result and mine.dtype.kind != "b":
            f = FORMATS[one.result.removesuffix("x2")]
            for shift in (0, 16) if one.result.endswith("x2") else (0,):
                here, there = _part(a, f, shift), _part(b, f, shift)
                both_nan = np.array([f.is_nan(x) and f.is_nan(y) for x, y in zip(here, there, strict=True)])
                at = [i for i in np.flatnonzero(unequal) if here[i] != there[i] and not both_nan[i]]
                unequal_here = np.zeros(len(a), bool)
                unequal_here[at] = True
                different |= unequal_here
                units = max([units, *(_distance(f, here[i], there[i]) for i in at)])
                apart = max([apart, *(_apart(f, here[i], there[i]) for i in at)])
        else:
            different |= unequal
    outcome = Outcome(len(values[0]), int(different.sum()), units, apart)
    for lane in np.flatnonzero(different)[:4]:
        outcome.examples.append(
            {
                "sources": " ".join(_hex(v[lane]) for v in values),
                "machine": " ".join(_hex(r[lane]) for r in ours),
                "gpu": " ".join(_hex(r[lane]) for r in theirs),
            }
        )
    return outcome


def _part(bits: np.ndarray, f: Format, shift: int) -> list[int]:
    return [int(x) >> shift & ((1 << f.bits) - 1) for x in bits]


def _distance(f: Format, a: int, b: int) -> int:
    if f.is_nan(a) or f.is_nan(b) or f.is_infinite(a) or f.is_infinite(b):
        return 1 << 62
    return abs(_ordered(f, a) - _ordered(f, b))


def _apart(f: Format, a: int, b: int) -> float:
    if any(f.is_nan(x) or f.is_infinite(x) for x in (a, b)):
        return float("inf")
    return float(abs(f.value(a) - f.value(b)) / max(1, abs(f.value(b))))


def _ordered(f: Format, bits: int) -> int:
    size = bits & ~f.sign
    return -size if f.negative(bits) else size


def _hex(value: np.generic) -> str:
    return hex(int(np.asarray(value).view(f"u{value.dtype.itemsize}")))


def compare_all(run) -> dict[str, Outcome | str]:
    """Every case through `run(case, values)`; what cannot be assembled is reported as text."""
    out: dict[str, Outcome | str] = {}
    for one in cases():
        values = inputs(one)
        try:
            theirs = run(one, values)
        except RuntimeError as error:
            out[one.text] = str(error)
            continue
        out[one.text] = compared(one, values, machine(one, values), theirs)
    return out


def main(folder: str) -> None:
    gpu = Gpu()
    outcomes = compare_all(gpu.run)
    approximate = {c.text for c in cases() if c.approximate}
    report = {
        "device": gpu.name,
        "driver": int(gpu.ask(gpu.driver.cuDriverGetVersion())),
        "instructions": {t: o if isinstance(o, str) else asdict(o) for t, o in outcomes.items()},
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "alu.json").write_text(json.dumps(report, indent=1))
    exact = [t for t in outcomes if t not in approximate]
    wrong = [t for t in exact if isinstance(outcomes[t], str) or outcomes[t].different]
    print(f"{len(exact) - len(wrong)} of {len(exact)} exact instructions agree in every bit of every lane")
    for text in [*wrong, *(t for t in outcomes if t in approximate)]:
        print(text, outcomes[text])


if __name__ == "__main__":
    main(sys.argv[1])
