"""What the compiler made of a Triton kernel, for GPUs that are not here.

    compile_report(softmax_kernel, x, out, x.stride(0), n, BLOCK=1024, num_warps=8)

    target  registers  spills  shared bytes  tensor cores  128-bit loads  …
    ──────  ─────────  ──────  ────────────  ────────────  ─────────────
    sm_75          32       0            32             –              2
    sm_80          …

Triton carries its own compiler down to machine code (LLVM, NVIDIA's ptxas) and NVIDIA's disassembler, so
that neither a GPU nor a CUDA toolkit is needed. What can be read from the machine code

    registers       of a thread; their number limits how many warps an SM holds
    spills          bytes of registers that did not fit and go to local memory and back: never by intention
    shared          bytes of shared memory of one program
    tensor cores    HMMA (16-bit; also TF32), IMMA (8-bit integers), QMMA (8-bit floats), HGMMA, IGMMA, QGMMA
                    (the same on Hopper, for a group of four warps), DMMA (float64)
    wide loads      how many bits a load instruction takes for each thread: 128 is the most
    cp.async        LDGSTS: from global to shared memory past the registers (sm_80 on)
    TMA             UTMALDG, UTMASTG: whole tiles by the copy engine of an SM (sm_90 on)

The argument types are those of a launch: pointers by the tensor's format, and, as a launch finds out too,
whether addresses and integers are multiples of 16, without which a load cannot be wide. Where no tensor is
at hand, write the type: "*bf16:16" is a pointer to bfloat16 that is a multiple of 16, "i32:16", "fp32".
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse.errors import CourseError, MissingPackageError, UnknownNameError
from llmcourse.notebook import Table

CAPABILITIES = (75, 80, 90)
"""T4, A100 and H100."""

SHARED_LIMIT = {70: 98304, 75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448}
"""Most shared memory of one program in bytes, by compute capability (CUDA C++ Programming Guide, table of
technical specifications: maximum shared memory per thread block)."""

_TYPES = {
    "bool": "i1",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "uint64": "u64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2fnuz": "fp8e5b16",
}
_SCALAR = re.compile(r"(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16)")
_TENSOR_CORES = re.compile(r"[HIQD]G?MMA|[UBO]MMA|TCGEN05|UTC[HQIO]MMA")


class SignatureError(CourseError, TypeError):
    """Arguments from which the types of a kernel's parameters do not follow."""


@dataclass(frozen=True)
class Signature:
    """The types that a kernel is compiled for.

    types       Triton's name of each parameter's type; "constexpr" for constants
    constants   their values
    multiples   parameters whose address or value is a multiple of 16
    """

    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    multiples: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Target:
    """One kernel, compiled for one compute capability.

    error          why it cannot be compiled for this target, in one line; None if it was. Then all else is 0
    ptx_target     such as "sm_90a"
    registers      of a thread
    shared_bytes   of a program
    stack_bytes    of a thread: local arrays, and spills
    spill_store_bytes, spill_load_bytes   of a thread, written and read back
    opcodes        how often each instruction occurs in the code, with its modifiers: "LDG.E.128"
    warps          of a program
    """

    capability: int
    error: str | None = None
    ptx_target: str = ""
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter, repr=False)
    warps: int = 0
    seconds: float = 0.0

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def spills(self) -> int:
        """Bytes that a thread spills: written and read."""
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def fits(self) -> bool:
        """Whether the program's shared memory is at most what this GPU has for one."""
        limit = SHARED_LIMIT.get(self.capability)
        return self.error is None and (limit is None or self.shared_bytes <= limit)

    def count(self, opcode: str, *modifiers: str) -> int:
        """Instructions of this opcode with all these modifiers: `count("LDG", "128")`."""
        wanted = set(modifiers)
        return sum(
            n for name, n in self.opcodes.items() if _split(name)[0] == opcode and wanted <= _split(name)[1]
        )

    @property
    def tensor_core_opcodes(self) -> dict[str, int]:
        """Tensor-core instructions by opcode: {"HMMA": 16}."""
        found: Counter[str] = Counter()
        for name, n in self.opcodes.items():
            opcode = _split(name)[0]
            if _TENSOR_CORES.fullmatch(opcode):
                found[opcode] += n
        return dict(found)

    @property
    def tensor_cores(self) -> int:
        """Tensor-core instructions. 0 means that tl.dot became multiplications and additions one by one."""
        return sum(self.tensor_core_opcodes.values())

    @property
    def load_widths(self) -> dict[int, int]:
        """How many global loads there are of each width in bits for a thread: {128: 4}."""
        return self._widths("LDG")

    @property
    def store_widths(self) -> dict[int, int]:
        """How many global stores there are of each width in bits."""
        return self._widths("STG")

    def _widths(self, opcode: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for name, n in self.opcodes.items():
            head, modifiers = _split(name)
            if head == opcode:
                size = next((bits for word, bits in _WIDTHS.items() if word in modifiers), 32)
                found[size] += n
        return dict(sorted(found.items()))

    @property
    def cp_async(self) -> int:
        return self.count("LDGSTS")

    @property
    def tma(self) -> int:
        """Tile copies by the tensor memory accelerator, loads and stores."""
        return sum(self.count(opcode) for opcode in ("UTMALDG", "UTMASTG", "UTMAREDG"))


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class CompileReport:
    """A kernel's targets by compute capability: `report[90].registers`. Displays as a table."""

    def __init__(self, kernel: str, targets: Sequence[Target], signature: Signature) -> None:
        self.kernel, self.targets, self.signature = kernel, tuple(targets), signature

    def __getitem__(self, capability: int) -> Target:
        for target in self.targets:
            if target.capability == capability:
                return target
        raise UnknownNameError(
            f"{self.kernel} was not compiled for compute capability {capability}.",
            f"This report has {', '.join(str(t.capability) for t in self.targets)}.",
            f"compile_report(…, capabilities=({capability},)).",
        )

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def compiled(self) -> list[Target]:
        """The targets for which it could be compiled."""
        return [t for t in self.targets if t.error is None]

    @property
    def spills(self) -> int:
        """Bytes spilled by a thread, the most of all targets."""
        return max((t.spills for t in self.compiled), default=0)

    def table(self) -> Table:
        """A row for each target, and a note for each that failed or does not fit."""
        heads = ("target", "registers", "spilled bytes", "shared bytes", "tensor cores", "loads (bits)")
        rows = [
            (
                t.ptx_target,
                t.registers,
                t.spills,
                t.shared_bytes,
                _listed(t.tensor_core_opcodes),
                _listed(t.load_widths),
                t.cp_async,
                t.tma,
                t.instructions,
            )
            for t in self.compiled
        ]
        notes = [f"sm_{t.capability}: {t.error}" for t in self.targets if t.error]
        notes += [
            f"{t.ptx_target}: {t.shared_bytes:,} bytes of shared memory where a program can have "
            f"{SHARED_LIMIT[t.capability]:,}: it cannot be launched"
            for t in self.compiled
            if not t.fits
        ]
        return Table((*heads, "cp.async", "TMA", "instructions"), rows, "\n".join([self._title(), *notes]))

    def _title(self) -> str:
        chosen = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.signature.constants.items())
        warps = next((f"{t.warps} warps" for t in self.compiled), "")
        return f"{self.kernel}({', '.join(part for part in (chosen, warps) if part)})"

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def compile_report(
    kernel: Any,
    *args: Any,
    signature: Signature | None = None,
    capabilities: Sequence[int] = CAPABILITIES,
    num_warps: int | None = None,
    num_stages: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> CompileReport:
    """Compile a kernel for GPUs and read registers, memory and instructions from the machine code.

    kernel         of `@triton.jit`, `@triton.autotune`, `@triton.heuristics` or `@gluon.jit`
    args, kwargs   what it would be launched with: tensors (of any device, also "meta"), numbers, constants;
                   or type names. Compiler options (num_ctas, maxnreg) too
    signature      in place of args and kwargs: what `signature_of` gives
    config         of an autotuned kernel: a `triton.Config` or its position; the first if None
    num_warps, num_stages   4 and 3 if neither they nor the configuration say so

    A target that the kernel cannot be compiled for is reported with its reason, and no error.
    Compiling takes between 0.1 and a few seconds a target, and is remembered on disk.

    Raises   SignatureError, MissingPackageError without Triton.
    """
    triton = _triton()
    _tools()
    function, chosen = _unwrap(kernel, config)
    values = {**chosen, **kwargs}
    if signature is None:
        signature = signature_of(kernel, *args, config=config, **kwargs)
    options = {k: v for k, v in values.items() if k not in signature.types and v is not None}
    options.update({k: v for k, v in (("num_warps", num_warps), ("num_stages", num_stages)) if v is not None})
    source = _source(function, signature)
    targets = [_compiled(triton, source, capability, options) for capability in capabilities]
    return CompileReport(function.fn.__name__, targets, signature)


def signature_of(kernel: Any, *args: Any, config: Any = None, **kwargs: Any) -> Signature:
    """The types that a launch with these arguments compiles the kernel for.

    An integer 1 becomes a constant, as in a launch; None too.

    Raises   SignatureError if an argument is missing, unknown or of no type that a kernel takes.
    """
    function, chosen = _unwrap(kernel, config)
    parameters = inspect.signature(function.fn).parameters
    given = {k: v for k, v in {**chosen, **kwargs}.items() if k in parameters}
    try:
        bound = inspect.signature(function.fn).bind_partial(*args, **given)
    except TypeError as error:
        raise SignatureError(
            f"{function.fn.__name__}: {error}.",
            f"Its parameters are {', '.join(parameters)}.",
            "each of them once.",
        ) from None
    bound.apply_defaults()
    for name, heuristic in _heuristics(kernel).items():
        bound.arguments[name] = heuristic(dict(bound.arguments))
    missing = [name for name in parameters if name not in bound.arguments]
    if missing:
        raise SignatureError(
            f"{function.fn.__name__} needs {', '.join(missing)} too.",
            "The compiler must know the type of every parameter, and the value of every constant.",
            f"{missing[0]}=…, a tensor, a number or the name of a type.",
        )
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples: set[str] = set()
    for i, (name, parameter) in enumerate(parameters.items()):
        value, annotation = bound.arguments[name], str(parameter.annotation).strip("\"'")
        free = i in (function.do_not_specialize or ()) or name in (function.do_not_specialize or ())
        constant = "constexpr" in annotation or value is None or callable(value)
        if constant or (type(value) is int and value == 1 and not free and not _SCALAR.fullmatch(annotation)):
            types[name], constants[name] = "constexpr", value
            continue
        kind, multiple = _type(function.fn.__name__, name, value)
        types[name] = annotation if _SCALAR.fullmatch(annotation) else kind
        if multiple and not free:
            multiples.add(name)
    return Signature(types, constants, frozenset(multiples))


def _type(kernel: str, name: str, value: Any) -> tuple[str, bool]:
    """(Triton's type, whether it is a multiple of 16) of an argument or a written type."""
    if isinstance(value, str):
        kind, _, multiple = value.partition(":")
        bare = kind.removeprefix("*").removeprefix("k")
        if (
            bare in _TYPES.values() or _SCALAR.fullmatch(kind) or kind.startswith("tensordesc<")
        ) and multiple in (
            "",
            "16",
        ):
            return kind, bool(multiple)
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        wide = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return wide, value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if hasattr(value, "block_shape") and hasattr(value, "base"):
        shape = ", ".join(map(str, value.block_shape))
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # in Gluon, how a tile lies
        return f"tensordesc<{_TYPES[str(value.base.dtype).removeprefix('torch.')]}[{shape}]{layout}>", False
    dtype = _TYPES.get(
        str(getattr(value, "dtype", "")).removeprefix("torch."), str(getattr(value, "dtype", ""))
    )
    if dtype in _TYPES.values():
        base = getattr(value, "base", value)
        offset = base.storage_offset() * base.element_size() if hasattr(base, "storage_offset") else 0
        return f"*{dtype}", offset % 16 == 0
    raise SignatureError(
        f"{kernel} got {name} = {value!r:.60}, whose type is not known.",
        "It is no tensor and no number, nor the name of a type.",
        'a tensor, a number, or a type such as "*bf16:16", "i32:16", "fp32".',
    )


def _unwrap(kernel: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The `@triton.jit` function inside, and what its autotuner would add."""
    chosen: dict[str, Any] = {}
    while not hasattr(kernel, "params"):
        if hasattr(kernel, "configs"):
            one = config if hasattr(config, "all_kwargs") else kernel.configs[config or 0]
            chosen.update(one.all_kwargs())
        if not hasattr(kernel, "fn"):
            raise SignatureError(
                f"{getattr(kernel, '__name__', kernel)!r} is no Triton kernel.",
                "What is compiled is a function of @triton.jit, also under autotune or heuristics.",
                "the kernel itself, not the function that launches it.",
            )
        kernel = kernel.fn
    return kernel, chosen


def _heuristics(kernel: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while not hasattr(kernel, "params"):
        if isinstance(getattr(kernel, "values", None), dict):
            found.update(kernel.values)
        kernel = kernel.fn
    return found


def _source(function: Any, signature: Signature) -> Any:
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    names = list(signature.types)
    return ASTSource(
        function,
        signature.types,
        constexprs={(names.index(name),): value for name, value in signature.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in signature.multiples},
    )


def _compiled(triton: Any, source: Any, capability: int, options: dict[str, Any]) -> Target:
    from triton.backends.compiler import GPUTarget

    started = time.perf_counter()
    said: list[str] = []
    try:
        with _caught(said):
            kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    except Exception as error:  # the compiler's many ways to say no; none is this function's own
        return Target(capability, error=_reason(error, *said), seconds=time.perf_counter() - started)
    ptx = kernel.asm["ptx"]
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)
    name = target[1] if target else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        registers, stack = _resources(_tool("cuobjdump", "-res-usage", str(cubin)))
        opcodes = _opcodes(_tool("cuobjdump", "-sass", str(cubin)))
        spills = (0, 0)
        if stack or any(_split(name)[0] in ("LDL", "STL") for name in opcodes):
            spills = _spills(Path(folder, "kernel.ptx"), ptx, name, registers)
    return Target(
        capability,
        None,
        name,
        registers,
        int(kernel.metadata.shared),
        stack,
        *spills,
        opcodes,
        int(kernel.metadata.num_warps),
        time.perf_counter() - started,
    )


@contextmanager
def _caught(said: list[str]) -> Iterator[None]:
    """Keep what the compiler prints, from Python and from C++: all of its input, when it fails."""
    with tempfile.TemporaryFile() as file:
        own = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            with redirect_stdout(io.StringIO()):
                yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def _reason(error: Exception, said: str = "") -> str:
    """The line of a compiler's message that says why.

    said   what the compiler's C++ part printed
    """
    text = str(error)
    if found := re.search(r"Assertion `(.*)' failed|LLVM ERROR: (.*)", said):
        return f"the compiler gave up: {found[1] or found[2]}"[:300]
    if found := re.search(r"ValueError\(['\"](type fp8\w+ not supported)[^\"]*", text):
        kind = re.search(r"fp8\w+", found[1])
        return f"{kind[0] if kind else 'fp8'} does not exist on this GPU"
    if found := re.search(r"error\s*:\s*(Feature .*? requires .*)", text):
        return f"ptxas: {found[1].strip()}"
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _tool(name: str, *arguments: str) -> str:
    """What one of Triton's NVIDIA tools prints. cuobjdump finds nvdisasm on the search path."""
    folder = _tools()
    path = os.pathsep.join((str(folder), os.environ.get("PATH", "")))
    done = subprocess.run(
        [str(folder / name), *arguments], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise SystemError(f"{name} failed with status {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout + done.stderr


@functools.cache
def _tools() -> Path:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [name for name in ("cuobjdump", "nvdisasm", "ptxas") if not (folder / name).exists()]
    if missing:
        raise MissingPackageError(
            f"this Triton has no {', '.join(missing)}.",
            "They come in Triton's wheel; one that was built otherwise may leave them out.",
            "pip install --force-reinstall triton.",
        )
    return folder


def _resources(text: str) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel in a cubin."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise SystemError(f"cuobjdump printed no resource usage: {text[:300]!r}")
    return int(found[1]), int(found[2])


def _opcodes(text: str) -> Counter[str]:
    """Instructions of a disassembly, with their modifiers; padding after the last one left out."""
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.M)
    return Counter(name for name in lines if name != "NOP")


def _split(name: str) -> tuple[str, set[str]]:
    opcode, *modifiers = name.split(".")
    return opcode, set(modifiers)


def _spills(file: Path, ptx: str, target: str, registers: int) -> tuple[int, int]:
    """(bytes stored, bytes loaded) by spills, which only ptxas says.

    It is run again with the options that Triton gives it. They differ among Triton's versions; the right ones
    lead to as many registers as the cubin has.
    """
    file.write_text(ptx)
    tool = "ptxas-blackwell" if int(re.sub(r"\D", "", target)) >= 100 else "ptxas"
    answers: list[tuple[int, int, int]] = []
    for extra in (["--regAllocOptLevel=2"], []):
        try:
            text = _tool(
                tool, "-lineinfo", "-v", *extra, f"--gpu-name={target}", str(file), "-o", f"{file}.o"
            )
        except SystemError:
            continue  # an older ptxas does not know the option
        used = re.search(r"Used (\d+) registers", text)
        bytes_ = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if used and bytes_:
            answers.append((int(used[1]), int(bytes_[1]), int(bytes_[2])))
            if answers[-1][0] == registers:
                break
    if not answers:
        raise SystemError("ptxas did not say what it spills")
    return answers[-1][1:]


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{n} × {name}" for name, n in counts.items()) or "–"


def _triton() -> Any:
    try:
        import triton
        import triton.compiler
    except ImportError as error:
        raise MissingPackageError(
            "compile_report needs Triton, which is not installed.",
            "Triton's wheel holds the compiler and NVIDIA's tools; it is made for Linux.",
            "a Linux machine, WSL 2 or Colab.",
        ) from error
    return triton
