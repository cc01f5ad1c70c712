"""CUDA C++ kernels as Python callables: compiled in front of you, run on a GPU or without one.

    saxpy = cuda.compile(source).kernel
    result = saxpy[blocks, threads](x, y, 2.0, n)

Tensors on a GPU go to the GPU: the kernel is compiled to machine code for that device and launched on torch's
current stream. Tensors on the CPU, and NumPy arrays, go to the PTX machine of this package, which computes
the same values and counts what Nsight Compute would count. Arrays are read and written in place, as in CUDA.

`device()` says which of the two a notebook gets; `torch.rand(n, device=cuda.device())` then runs on both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from llmcourse.vgpu import native, nvrtc
from llmcourse.vgpu.arguments import Argument, as_numpy, bind, is_tensor
from llmcourse.vgpu.compile_error import CompileError
from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.launch import LaunchError, Size, check_launch, place_of, size3
from llmcourse.vgpu.magic import register
from llmcourse.vgpu.memory import ArgumentError
from llmcourse.vgpu.module import Kernel, Module, NoKernelError
from llmcourse.vgpu.result import Result
from llmcourse.vgpu.shown import for_readers

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
    "NoKernelError",
    "Result",
    "array",
    "compile",
    "device",
    "from_ptx",
    "launch",
]

Where = Literal["auto", "machine", "gpu"]


@for_readers
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
        compiled=True,
        lowered=compiled.lowered,
        warnings=compiled.warnings,
        log=compiled.log,
    )


@overload
def from_ptx(ptx: str, name: str, *, source: str = "") -> Kernel: ...
@overload
def from_ptx(ptx: str, name: None = None, *, source: str = "") -> Module: ...
@for_readers
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


@for_readers
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


def _on_machine(
    kernel: Kernel, grid: Size, block: Size, shared: int, bound: Sequence[Argument], check: bool
) -> Run:
    from llmcourse.vgpu import machine

    values = [as_numpy(a.data) if a.is_array else a.data for a in bound]
    names = [a.name for a in bound]
    try:
        return machine.execute(
            kernel.program,
            kernel.module.program,
            grid,
            block,
            values,
            dynamic_shared=shared,
            check=check,
            names=names,
        )
    except KernelFault as fault:
        raise _shown(fault, kernel.module).with_traceback(None) from None


def _shown(fault: KernelFault, module: Module) -> KernelFault:
    """The same fault with the text of the source's line: in a header's code, of the line that called it."""
    line, lines = fault.line, module.source.splitlines()
    while line is not None and line.file != module.name:
        line = line.inlined_at
    if line is not None and 0 < line.line <= len(lines):
        number = line.line
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
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.cpu()
            moved = tensor.new_empty(0, device="cpu")
            host = storages[storage.data_ptr()]
            moved.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
            argument = Argument(argument.name, argument.value, moved, argument.const)
        out.append(argument)
    return out


def _copy_back(copies: Sequence[Argument], bound: Sequence[Argument]) -> None:
    for host, original in zip(copies, bound, strict=True):
        if host.is_array and not original.const:
            _span(original.data.detach()).copy_(_span(host.data))


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from a tensor's first element to its last: a kernel knows no strides and may write there."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))


def _tell_autograd(bound: Sequence[Argument]) -> None:
    """Mark tensors that the kernel may have written, so that autograd notices a saved value that changed."""
    for argument in bound:
        if is_tensor(argument.value) and not argument.const and not argument.value.is_inference():
            from torch.autograd.graph import increment_version

            increment_version(argument.value)


def device() -> str:
    """Where kernels run, for torch's `device=`: "cuda" on a GPU, "cpu" where the machine runs them."""
    return "cuda" if native.available() else "cpu"


def array(data: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new tensor where kernels run, from a list, an array or a tensor on any device."""
    import torch

    return torch.as_tensor(data, dtype=dtype).to(device(), copy=True)


register()  # in a notebook, importing this module makes %%cuda available
