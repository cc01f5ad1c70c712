"""CUDA C++ kernels as Python callables: compiled in front of you, run on a GPU or without one.

    saxpy = cuda.compile(source).kernel
    result = saxpy[blocks, threads](x, y, 2.0, n)

Tensors on a GPU go to the GPU: the kernel is compiled to machine code for that device and launched on torch's
current stream. Tensors on the CPU, and NumPy arrays, go to the PTX machine of this package, which computes
the same values and counts what Nsight Compute would count. Arrays are read and written in place, as in CUDA.

`device()` says which of the two a notebook gets; `torch.rand(n, device=cuda.device())` then runs on both.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from llmcourse.errors import UnknownNameError
from llmcourse.vgpu import isa, native, nvrtc, signature
from llmcourse.vgpu.arguments import Argument, as_numpy, bind, is_tensor
from llmcourse.vgpu.compile_error import CompileError
from llmcourse.vgpu.diagnostics import Diagnostic
from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.launch import LaunchError, Size, check_launch, place_of, size3
from llmcourse.vgpu.magic import register
from llmcourse.vgpu.memory import ArgumentError
from llmcourse.vgpu.result import Result

if TYPE_CHECKING:
    import torch

    from llmcourse.vgpu.machine import Run

__all__ = [
    "ArgumentError",
    "CompileError",
    "Kernel",
    "KernelFault",
    "LaunchError",
    "Module",
    "Result",
    "array",
    "compile",
    "device",
    "from_ptx",
    "launch",
]

Where = Literal["auto", "machine", "gpu"]


class NoKernelError(UnknownNameError, AttributeError):
    """A kernel that a module does not have."""


def compile(
    source: str,
    arch: nvrtc.Arch = None,
    options: Sequence[str] = (),
    defines: Mapping[str, object] | None = None,
    *,
    names: Sequence[str] = (),
    name: str = nvrtc.SOURCE_NAME,
) -> Module:
    """Compile CUDA C++ to a module of kernels. Needs neither a GPU nor a driver, and takes some 20 ms.

    arch     what the machine pretends to be: "sm_75" (T4), "sm_80" (A100, the default), "sm_90" (H100); on a
             GPU, kernels are compiled for that GPU in any case
    options  NVRTC's, such as "--use_fast_math"; `defines` macros, such as {"TILE": 16}
    names    instances of template kernels: ["copy<float>", "copy<half>"]
    name     what messages call the source

    Raises   CompileError with the lines it is about; MissingPackageError where NVRTC is not (macOS).
    """
    target = nvrtc.normal_arch(arch)
    given = (*options, *nvrtc.define_options(defines))
    compiled = nvrtc.compile_source(source, target, options=given, names=names, name=name)
    return Module(
        compiled.ptx,
        source=source,
        arch=target,
        options=given,
        names=tuple(names),
        name=name,
        lowered=compiled.lowered,
        warnings=compiled.warnings,
        log=compiled.log,
    )


def from_ptx(ptx: str, name: str | None = None, *, source: str = "") -> Kernel | Module:
    """A kernel from PTX text, as `kernel.ptx` gives it; the whole module where `name` is None.

    source   the C++ it came from: with it, arguments have names and types, and counters have lines to show
    """
    target = re.search(r"\.target\s+(\w+)", ptx)
    file = re.search(r'\.file\s+1\s+"([^"]*)"', ptx)
    module = Module(
        ptx, source=source, arch=target[1] if target else "", name=file[1] if file else nvrtc.SOURCE_NAME
    )
    return module if name is None else module[name]


class Module:
    """Compiled CUDA C++: its kernels as attributes (`module.saxpy`) and items (`module["copy<float>"]`).

    source, ptx   the text it came from, and what the machine runs
    arch, options, names, name   how it was compiled
    kernels       by name, in the source's order
    warnings      what the compiler found odd; `log` its own words
    """

    def __init__(
        self,
        ptx: str,
        *,
        source: str = "",
        arch: str = "",
        options: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
        name: str = nvrtc.SOURCE_NAME,
        lowered: Mapping[str, str] | None = None,
        warnings: tuple[Diagnostic, ...] = (),
        log: str = "",
    ) -> None:
        self.ptx, self.source, self.arch, self.options, self.names = ptx, source, arch, options, names
        self.name, self.lowered, self.warnings, self.log = name, dict(lowered or {}), warnings, log
        self.kernels = self._kernels()

    def _kernels(self) -> dict[str, Kernel]:
        spelled = {entry: expression for expression, entry in self.lowered.items()}
        found = {}
        for entry in signature.entries(self.ptx):
            plain, arguments = signature.plain_name(entry.name)
            full = f"{plain}<{', '.join(arguments)}>" if arguments else plain
            label = spelled.get(entry.name, full if full not in found else entry.name)
            found[label] = Kernel(self, label, entry)
        order = {n: i for i, n in enumerate(signature.declared_kernels(self.source))}
        return dict(sorted(found.items(), key=lambda item: order.get(item[1].plain, len(order))))

    @property
    def kernel(self) -> Kernel:
        """The module's only kernel. Raises NoKernelError if there are none or several."""
        if len(self.kernels) == 1:
            return next(iter(self.kernels.values()))
        if self.kernels:
            first = next(iter(self.kernels))
            raise NoKernelError(
                f"this module has {len(self.kernels)} kernels: {', '.join(self.kernels)}.",
                "module.kernel is for sources with a single one.",
                f"module[{first!r}].",
            )
        raise self._none()

    def _none(self) -> NoKernelError:
        templates = re.findall(r"template\s*<[^{};]*?__global__[^(]*?(\w+)\s*\(", self.source)
        if templates:
            return NoKernelError(
                f"this module has no kernel: {templates[0]} is a template.",
                "The compiler makes code for a template only once its arguments are known.",
                f'cuda.compile(source, names=["{templates[0]}<float>"]).',
            )
        return NoKernelError(
            "this module has no kernel.",
            "A function that is launched from Python is marked __global__.",
            "__global__ void name(…) { … }.",
        )

    def __getitem__(self, name: str) -> Kernel:
        if name in self.kernels:
            return self.kernels[name]
        wanted = re.sub(r"\s+", "", name)
        for test in (
            lambda k: re.sub(r"\s+", "", k.name) == wanted or k.entry.name == name,
            lambda k: k.plain == name,
        ):
            matching = [k for k in self.kernels.values() if test(k)]
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise NoKernelError(
                    f"{name} has {len(matching)} instances: {', '.join(k.name for k in matching)}.",
                    "Each instance of a template is a kernel of its own.",
                    f"module[{matching[0].name!r}].",
                )
        if not self.kernels:
            raise self._none()
        raise NoKernelError(
            f"this module has no kernel called {name}.",
            f"It has {', '.join(self.kernels)}.",
            f"module[{next(iter(self.kernels))!r}].",
        )

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or "kernels" not in self.__dict__:
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def __len__(self) -> int:
        return len(self.kernels)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(n for n in self.kernels if n.isidentifier())})

    def __reduce__(self) -> tuple[Any, ...]:
        kept = ("source", "arch", "options", "names", "name", "lowered", "warnings", "log")
        given = {name: getattr(self, name) for name in kept}
        return _rebuild, (self.ptx, given)

    def __repr__(self) -> str:
        return f"<cuda.Module {self.name} for {self.arch}: {', '.join(self.kernels) or 'no kernels'}>"


def _rebuild(ptx: str, given: dict[str, Any]) -> Module:
    return Module(ptx, **given)


class Kernel:
    """One kernel: `kernel[grid, block](x, y, 2.0, n)` launches it.

    name      in the source; `entry` in the PTX
    module    where it comes from; `source`, `ptx`, `options` and `arch` are the module's, as plain strings
    """

    def __init__(self, module: Module, name: str, entry: signature.Entry) -> None:
        self.module, self.name, self.entry = module, name, entry
        self.plain, arguments = signature.plain_name(entry.name)
        if name in module.lowered and "<" in name:
            arguments = [a.strip() for a in name.partition("<")[2].rpartition(">")[0].split(",")]
        macros = [option[2:].partition("=") for option in module.options if option.startswith("-D")]
        self.parameters = signature.parameters(
            module.source, self.plain, arguments or (), {m: text for m, _, text in macros}
        )

    @property
    def source(self) -> str:
        return self.module.source

    @property
    def ptx(self) -> str:
        return self.module.ptx

    @property
    def options(self) -> tuple[str, ...]:
        return self.module.options

    @property
    def arch(self) -> str:
        return self.module.arch

    @cached_property
    def program(self) -> isa.Kernel:
        """The typed instructions that the machine runs. Raises PtxError for PTX that it cannot read."""
        return parsed(self.ptx).kernels[self.entry.name]

    @cached_property
    def static_shared(self) -> int:
        """Bytes of shared memory that the kernel declares."""
        from llmcourse.vgpu.memory import lay_out_shared

        variables = (*parsed(self.ptx).variables.values(), *self.program.variables.values())
        return lay_out_shared([v for v in variables if v.space == "shared"], 0).used

    def resources(self, arch: nvrtc.Arch = None) -> nvrtc.Resources:
        """Registers, shared memory and spills of the machine code for `arch` (the module's if None).

        The assembler (`ptxas`) runs on the CPU: no GPU is needed. Raises LaunchError without a source.
        """
        if not self.source:
            raise LaunchError(
                f"{self.name} was made from PTX alone.",
                "Its resources are known once its C++ source is compiled to machine code.",
                "from_ptx(ptx, name, source=source).",
            )
        module = self.module
        compiled = nvrtc.compile_source(
            self.source,
            arch or self.arch,
            options=self.options,
            names=module.names,
            name=module.name,
            cubin=True,
        )
        return compiled.resources[self.entry.name]

    def __getitem__(self, shape: Any) -> Launcher:
        if not isinstance(shape, tuple) or not 2 <= len(shape) <= 3:
            raise LaunchError(
                f"{self.name}[{shape!r}] says only part of a launch.",
                "A launch needs the number of blocks and the number of threads in each.",
                f"{self.name}[grid, block](…), or [grid, block, shared_bytes].",
            )
        grid, block = size3(shape[0], "grid"), size3(shape[1], "block")
        return Launcher(self, grid, block, operator.index(shape[2]) if len(shape) == 3 else 0)

    def __call__(self, *arguments: object) -> Result:
        raise LaunchError(
            f"{self.name} was called without a grid.",
            "A kernel runs in many threads: the launch says in how many blocks of how many threads.",
            f"{self.name}[blocks, threads](…), for instance {self.name}[(n + 255) // 256, 256](…).",
        )

    def __repr__(self) -> str:
        shown = ", ".join(p.text for p in self.parameters) if self.parameters is not None else "…"
        return f"<kernel {self.name}({shown})>"


class Launcher:
    """A kernel with its grid and block: calling it launches."""

    def __init__(self, kernel: Kernel, grid: Size, block: Size, shared: int) -> None:
        self.kernel, self.grid, self.block, self.shared = kernel, grid, block, shared

    def __call__(
        self, *arguments: object, where: Where = "auto", counters: bool = False, check: bool = True
    ) -> Result:
        """Launch; see `launch`."""
        return launch(
            self.kernel,
            self.grid,
            self.block,
            *arguments,
            shared=self.shared,
            where=where,
            counters=counters,
            check=check,
        )


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *arguments: object,
    shared: int = 0,
    where: Where = "auto",
    counters: bool = False,
    check: bool = True,
) -> Result:
    """Run a kernel: `kernel[grid, block, shared](*arguments)` in one call.

    arguments  one for each parameter: tensors or arrays for pointers (read and written in place; a view is
               its own memory, strides and all), numbers, bytes for structures, None for a null pointer
    shared     bytes of dynamic shared memory a block
    where      "auto": tensors on a GPU on that GPU, all else on the machine. "machine" also runs tensors of
               a GPU on the machine (they are copied there and back); "gpu" accepts nothing else
    counters   on a GPU, also run the machine on copies made before the launch, for the counters
    check      let the machine watch shared memory for races and for reads of what nobody wrote

    Raises   ArgumentError, LaunchError, DeviceError for what cannot be launched; KernelFault for a kernel
             that does something illegal, with its line, block and thread.
    """
    blocks, threads = size3(grid, "grid"), size3(block, "block")
    bound = bind(kernel.name, kernel.entry.parameters, kernel.parameters, arguments)
    place = place_of(kernel.name, bound, where, native.available())
    check_launch(
        kernel.name,
        blocks,
        threads,
        max_threads=kernel.entry.max_threads,
        arch=kernel.arch if place.gpu is None else native.arch_of(place.gpu),
        static_shared=kernel.static_shared if place.gpu is None else 0,
        dynamic_shared=shared,
    )
    run: Run | None = None
    timed: native.NativeRun | None = None
    on_host = _copies(bound) if place.copied or (place.gpu is not None and counters) else bound
    if place.gpu is not None:
        timed = native.launch(kernel, place.gpu, blocks, threads, shared, bound)
    if place.gpu is None or counters:
        run = _on_machine(kernel, blocks, threads, shared, on_host, check)
    if place.copied:
        _copy_back(on_host, bound)
    _tell_autograd(bound)
    printed = timed.printed if timed is not None else run.printed if run is not None else ""
    if printed:
        print(printed, end="")
    return Result(
        kernel,
        blocks,
        threads,
        shared,
        bound,
        counters=run.counters if run is not None else None,
        machine_seconds=run.seconds if run is not None else None,
        native=timed,
        printed=printed,
    )


@lru_cache(maxsize=64)
def parsed(ptx: str) -> isa.Module:
    from llmcourse.vgpu.ptx import parse

    return parse(ptx)


def _on_machine(
    kernel: Kernel, grid: Size, block: Size, shared: int, bound: Sequence[Argument], check: bool
) -> Run:
    from llmcourse.vgpu import machine

    values = [as_numpy(a.data) if a.is_array else a.data for a in bound]
    names = [a.name for a in bound]
    try:
        return machine.execute(
            kernel.program,
            parsed(kernel.ptx),
            grid,
            block,
            values,
            dynamic_shared=shared,
            check=check,
            names=names,
        )
    except KernelFault as fault:
        raise _shown(fault, kernel.source).with_traceback(None) from None


def _shown(fault: KernelFault, source: str) -> KernelFault:
    """The same fault with the text of its line."""
    lines = source.splitlines()
    if fault.line is not None and 0 < fault.line.line <= len(lines):
        number = fault.line.line
        fault.what += f"\n    {number} │ {lines[number - 1].strip()}"
        fault.args = (f"{fault.what}\n  {fault.why}\n  Try {fault.fix}",)
    return fault


def _copies(bound: Sequence[Argument]) -> list[Argument]:
    """The arguments with their tensors on the CPU: same strides and offsets, and shared where they share."""
    storages: dict[int, Any] = {}
    out = []
    for argument in bound:
        if is_tensor(argument.data):
            tensor = argument.data.detach()
            storage = tensor.untyped_storage()
            host = storages.setdefault(storage.data_ptr(), None) or storage.cpu()
            storages[storage.data_ptr()] = host
            moved = tensor.new_empty(0, device="cpu")
            moved.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
            argument = Argument(argument.name, argument.value, moved, argument.const)
        out.append(argument)
    return out


def _copy_back(copies: Sequence[Argument], bound: Sequence[Argument]) -> None:
    for host, original in zip(copies, bound, strict=True):
        if host.is_array and not original.const:
            original.data.detach().copy_(host.data)


def _tell_autograd(bound: Sequence[Argument]) -> None:
    """Mark tensors that the kernel may have written, so that autograd notices a saved value that changed."""
    for argument in bound:
        if is_tensor(argument.value) and not argument.const and not argument.value.is_inference():
            from torch.autograd.graph import increment_version

            increment_version(argument.value)


def device() -> str:
    """ "cuda" where kernels run on a GPU, "cpu" where the machine runs them: for torch's `device=`."""
    return "cuda" if native.available() else "cpu"


def array(data: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new tensor where kernels run, from a list, an array or a tensor on any device."""
    import torch

    return torch.as_tensor(data, dtype=dtype).to(device(), copy=True)


register()  # in a notebook, importing this module makes %%cuda available
