"""Launch the corpus on a GPU through CUDA's driver interface, each case once, in order.

Nothing else runs on the GPU in this process, so that the n-th kernel that a profiler sees is the n-th case.
Arrays are allocated one by one: the driver aligns each to 512 bytes, as the PTX machine does.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmcourse.errors import DeviceError
from llmcourse.vgpu.corpus.cases import Case
from llmcourse.vgpu.memory import ALIGN
from llmcourse.vgpu.nvrtc import Compiled, compile_source


def build(source: str, arch: str, name: str, options: Sequence[str] = ()) -> Compiled:
    """PTX and cubin with the machine's own options; a toolkit's headers where the wheels lack some."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    extra = [f"-I{folder}" for folder in dict.fromkeys(folders) if folder.is_dir()]
    return compile_source(source, arch, name=name, cubin=True, options=(*options, *extra))


def checksum(arguments: Sequence[Any]) -> int:
    """Of the values given to a kernel: two machines that compare counters must have the same data."""
    total = 0
    for argument in arguments:
        total = zlib.crc32(np.ascontiguousarray(argument).tobytes(), total)
    return total


class Gpu:
    """The first GPU, through `cuda.bindings.driver`; every call raises DeviceError when CUDA refuses."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.device))

    def call(self, function: str, *arguments: Any) -> Any:
        """The answer of a driver function: a value, a tuple of values, or None."""
        result, *values = getattr(self.driver, function)(*arguments)
        if result != self.driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(
                f"{function} answered {result.name}.",
                "CUDA refused the call or found a fault of an earlier kernel.",
                "compute-sanitizer, which names the faulty access.",
            )
        return values[0] if len(values) == 1 else tuple(values) or None

    @property
    def arch(self) -> str:
        names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
        return "sm_" + "".join(str(self.attribute(name)) for name in names)

    def attribute(self, name: str) -> int:
        which = getattr(self.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", which, self.device))

    def attributes(self) -> dict[str, int]:
        """Every attribute that this driver and this binding both know, by its name without the prefix."""
        prefix, found = "CU_DEVICE_ATTRIBUTE_", {}
        for name in dir(self.driver.CUdevice_attribute):
            if not name.startswith(prefix):
                continue
            try:
                found[name.removeprefix(prefix)] = self.attribute(name.removeprefix(prefix))
            except DeviceError:
                continue
        return found

    def function(self, cubin: bytes, kernel: str) -> Any:
        return self.call("cuModuleGetFunction", self.call("cuModuleLoadData", cubin), kernel.encode())

    def function_attribute(self, function: Any, name: str) -> int:
        which = getattr(self.driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(self.call("cuFuncGetAttribute", which, function))

    def allow_shared(self, function: Any, dynamic: int) -> None:
        """Let a kernel ask for `dynamic` bytes of shared memory; above 48 KiB it must be said."""
        which = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", function, which, dynamic)

    def launch(self, function: Any, case: Case, arguments: Sequence[Any]) -> None:
        """Run one case; arrays in `arguments` are overwritten with what the kernel left."""
        places: list[tuple[Any, np.ndarray]] = []
        slots: list[np.ndarray] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous, case.name
                pointer = self.call("cuMemAlloc", argument.nbytes)
                assert int(pointer) % ALIGN == 0, "the counters assume the driver's alignment"
                self.call("cuMemcpyHtoD", pointer, argument.ctypes.data, argument.nbytes)
                places.append((pointer, argument))
                slots.append(np.array([int(pointer)], np.uint64))
            else:
                slots.append(np.array([argument]))
        table = np.array([slot.ctypes.data for slot in slots], np.uint64)
        if case.dynamic_shared > 48 << 10:
            self.allow_shared(function, case.dynamic_shared)
        sizes = (*case.grid, *case.block, case.dynamic_shared)
        self.call("cuLaunchKernel", function, *sizes, 0, table.ctypes.data, 0)
        self.call("cuCtxSynchronize")
        for pointer, argument in places:
            self.call("cuMemcpyDtoH", argument.ctypes.data, pointer, argument.nbytes)
            self.call("cuMemFree", pointer)


def run_cases(cases: Sequence[Case], cubins: Path, done: Callable[[dict[str, Any]], None]) -> None:
    """Launch each case once and tell `done` what came: name, checksum of the arguments, `wrong` or None."""
    gpu = Gpu()
    functions: dict[tuple[str, str], Any] = {}
    for case in cases:
        key = (case.file, case.kernel)
        if key not in functions:
            cubin = (cubins / case.file).with_suffix(".cubin").read_bytes()
            functions[key] = gpu.function(cubin, case.kernel)
        before, arguments = case.arguments(), case.arguments()
        gpu.launch(functions[key], case, arguments)
        row = {"name": case.name, "arguments": checksum(before), "wrong": case.wrong(before, arguments)}
        registers, local = (
            gpu.function_attribute(functions[key], name) for name in ("NUM_REGS", "LOCAL_SIZE_BYTES")
        )
        done({**row, "registers": registers, "local_bytes": local})
