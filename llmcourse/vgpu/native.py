"""The same kernels on a GPU: a cubin for the device, launched through `cuda.core` on torch's current stream.

Machine code is made by NVRTC from the C++ source for the very GPU at hand, loaded once for each device, and
launched beside torch's own kernels: on the stream that torch uses at that moment, so that nothing has to wait
for anything else. Two events around the launch give the device's time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmcourse.errors import DeviceError, MissingPackageError
from llmcourse.vgpu import nvrtc
from llmcourse.vgpu.arguments import Argument
from llmcourse.vgpu.faults import KernelFault

if TYPE_CHECKING:
    from llmcourse.vgpu.launch import Size
    from llmcourse.vgpu.module import Kernel, Module

OLDEST = (7, 5)
"""NVRTC 13 compiles for compute capability 7.5 and newer."""
PLAIN_SHARED = 48 << 10
"""Bytes of dynamic shared memory that a launch gets without asking for more."""


@dataclass
class NativeRun:
    """A launch on a GPU: on which, what it printed, and how to wait for its time."""

    device: str
    printed: str
    kernel: str
    events: tuple[Any, Any] | None = field(repr=False, default=None)

    def seconds(self) -> float | None:
        """Device time, after waiting for the kernel. None for a launch that was captured in a CUDA graph.

        Raises   KernelFault if the kernel did something illegal: CUDA tells no more than that.
        """
        if self.events is None:
            return None
        start, end = self.events
        with _explained(self.kernel):
            end.synchronize()
            return start.elapsed_time(end) / 1e3


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether kernels can run on a GPU: torch sees one that is new enough, and cuda.core is installed."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False  # no driver; found out without importing torch, which takes seconds
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability() < OLDEST:
        return False
    try:
        core()
    except MissingPackageError:
        return False
    return True


def arch_of(gpu: int) -> str:
    """sm_90 for an H100."""
    import torch

    major, minor = torch.cuda.get_device_capability(gpu)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def core() -> ModuleType:
    """cuda.core, wherever this version keeps it. Raises MissingPackageError."""
    for name in ("cuda.core", "cuda.core.experimental"):
        try:
            found = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(found, "launch"):
            return found
    raise MissingPackageError(
        "kernels cannot be launched on the GPU: cuda.core is not installed.",
        "It is NVIDIA's package that loads and launches compiled kernels.",
        'pip install cuda-core, or where="machine".',
    )


def launch(
    kernel: Kernel, gpu: int, grid: Size, block: Size, shared: int, bound: Sequence[Argument]
) -> NativeRun:
    """Launch on torch's current stream of GPU `gpu`; returns without waiting, unless the kernel prints."""
    import torch

    cuda = core()
    with torch.cuda.device(gpu):
        torch.cuda.current_stream()  # makes the context, where nothing has yet
        loaded = _loaded(kernel, gpu)
        if shared > PLAIN_SHARED:
            _allow_shared(loaded, gpu, shared)
        values = [_value(a) for a in bound]
        stream = _stream(cuda, torch.cuda.current_stream().cuda_stream)
        start: Callable[[], None]
        if any(isinstance(v, bytes) for v in values):
            start = lambda: _launch_with_structures(loaded, grid, block, shared, stream, values)  # noqa: E731
        else:
            config = cuda.LaunchConfig(grid=grid, block=block, shmem_size=shared)
            start = lambda: cuda.launch(stream, config, loaded, *values)  # noqa: E731
        capturing = torch.cuda.is_current_stream_capturing()
        events = None if capturing else tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        printed = _Printed()
        with _explained(kernel.name), _printf(printed, kernel, capturing):
            if events:
                events[0].record()
            start()
            if events:
                events[1].record()
    return NativeRun(
        torch.cuda.get_device_name(gpu),
        printed.text,
        kernel.name,
        events,  # type: ignore[arg-type]
    )


_CODES: WeakKeyDictionary[Module, dict[int, Any]] = WeakKeyDictionary()
"""The machine code of each module, by device, for as long as the module lives."""


def _code(module: Module, gpu: int) -> Any:
    """A module's machine code on a device, as cuda.core's ObjectCode; loaded once."""
    codes = _CODES.setdefault(module, {})
    if gpu not in codes:
        cuda = core()
        cuda.Device(gpu).set_current()  # torch's own (primary) context
        if module.compiled:
            own = arch_of(gpu)
            arch = module.arch if module.arch[:-1] == own else own  # keeps the a of sm_90a
            compiled = nvrtc.compile_source(
                module.source, arch, options=module.options, names=module.names, name=module.name, cubin=True
            )
            codes[gpu] = cuda.ObjectCode.from_cubin(compiled.cubin)
        else:
            codes[gpu] = cuda.ObjectCode.from_ptx(module.ptx.encode())
        for name, data in module.values.items():
            write_variable(module, gpu, name, data)
    return codes[gpu]


_KERNELS: WeakKeyDictionary[Kernel, dict[int, Any]] = WeakKeyDictionary()


def _loaded(kernel: Kernel, gpu: int) -> Any:
    """A kernel on a device, as cuda.core's Kernel."""
    loaded = _KERNELS.setdefault(kernel, {})
    if gpu not in loaded:
        code = _code(kernel.module, gpu)
        try:
            loaded[gpu] = code.get_kernel(kernel.entry.name)  # loads the module, where nothing has yet
        except Exception as error:
            made = ".".join(map(str, nvrtc.version()))
            raise DeviceError(
                f"the GPU's driver does not load code made by CUDA {made}: {str(error).splitlines()[0]}.",
                "A driver runs code of its own CUDA version and of older ones (nvidia-smi names it).",
                'a newer driver, cuda-bindings and nvidia-cuda-nvrtc of its version, or where="machine".',
            ) from error
    return loaded[gpu]


def write_variable(module: Module, gpu: int, name: str, data: bytes) -> None:
    """Copy bytes into a module's variable, in the order of torch's current stream."""
    import torch

    driver = _driver()
    with torch.cuda.device(gpu):
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        library = driver.CUlibrary(_handle(_code(module, gpu)))
        error, address, _ = driver.cuLibraryGetGlobal(library, name.encode())
        _checked((error,))
        _checked(driver.cuMemcpyHtoDAsync(address, data, len(data), stream))
        torch.cuda.current_stream().synchronize()  # `data` must stay until it is copied


def write_loaded(module: Module, name: str, data: bytes) -> None:
    """Copy bytes into a module's variable wherever its code is loaded."""
    for gpu in _CODES.get(module, {}):
        write_variable(module, gpu, name, data)


def _value(argument: Argument) -> Any:
    """An address as int, a number as NumPy's, a structure as bytes: the forms that a launch takes."""
    if argument.is_array:
        return int(argument.data.data_ptr())
    return argument.data


def _stream(cuda: ModuleType, handle: int) -> Any:
    if handle == 0 and hasattr(cuda, "LEGACY_DEFAULT_STREAM"):
        return cuda.LEGACY_DEFAULT_STREAM
    return cuda.Stream.from_handle(handle)


def _driver() -> ModuleType:
    return importlib.import_module("cuda.bindings.driver")


def _checked(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"the CUDA driver answered {result[0].name}")


def _handle(loaded: Any) -> int:
    return int(loaded.handle if hasattr(loaded, "handle") else loaded._handle)


def _allow_shared(loaded: Any, gpu: int, shared: int) -> None:
    """More than 48 KiB a block has to be asked for, kernel by kernel; cuda.core has no call for it."""
    driver = _driver()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    kernel, device = driver.CUkernel(_handle(loaded)), driver.CUdevice(gpu)
    _checked(driver.cuKernelSetAttribute(attribute, shared, kernel, device))


def _launch_with_structures(
    loaded: Any, grid: Size, block: Size, shared: int, stream: Any, values: Sequence[Any]
) -> None:
    """The driver's own launch: cuda.core's has no form for structures passed by value."""
    driver = _driver()
    raw = [v if isinstance(v, bytes) else _raw(v) for v in values]
    # 16-byte aligned copies: the driver reads each parameter with its own alignment.
    held = [ctypes.create_string_buffer(data, len(data) + 16) for data in raw]
    addresses = [-(-ctypes.addressof(h) // 16) * 16 for h in held]
    for data, address in zip(raw, addresses, strict=True):
        ctypes.memmove(address, data, len(data))
    pointers = (ctypes.c_void_p * len(addresses))(*addresses)
    _checked(
        driver.cuLaunchKernel(
            driver.CUfunction(_handle(loaded)),  # a CUkernel is accepted in its place
            *grid,
            *block,
            shared,
            driver.CUstream(int(stream.handle)),
            ctypes.addressof(pointers),
            0,
        )
    )


def _raw(value: Any) -> bytes:
    return value.to_bytes(8, "little") if isinstance(value, int) else value.tobytes()


@contextlib.contextmanager
def _explained(kernel: str) -> Iterator[None]:
    """CUDA's errors in three parts. After one of these the process's GPU context is lost."""
    try:
        yield
    except Exception as error:  # torch and cuda.core each raise a class of their own
        said = (str(error).splitlines() or [""])[0]
        words = ("illegal", "misaligned", "assert", "launch failure", "launch_failed")
        lost = any(w in said.lower() for w in words)
        if not lost:
            raise
        raise KernelFault(
            "misaligned" if "misaligned" in said.lower() else "out of bounds",
            f"{kernel} was stopped by the GPU: {said}.",
            "A GPU names neither line nor thread, and the process can launch nothing more on it.",
            "restarting the kernel, and the same launch on CPU tensors: the machine names both.",
        ) from error


@dataclass
class _Printed:
    text: str = ""


@contextlib.contextmanager
def _printf(into: _Printed, kernel: Kernel, capturing: bool) -> Iterator[None]:
    """Catch what the kernel's printf writes: the driver writes it to the process's standard output when the
    device is waited for, past Python and past Jupyter."""
    if capturing or "vprintf" not in kernel.ptx:
        yield
        return
    import torch

    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    torch.cuda.synchronize()
    sys.stdout.flush()
    libc.fflush(None)
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
            torch.cuda.synchronize()
        finally:
            libc.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            into.text = file.read().decode(errors="replace")
