"""A kernel that lasts as long as it is told: what a program's `Kernel` is on a real GPU.

Each block holds 1024 threads and watches the GPU's nanosecond clock until its time has passed; it reads
and writes no memory. With 1024 threads, two blocks fill an SM of an H100 (2048 threads), so a kernel's
share of the GPU is exact to one of 264 slots.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from llmcourse.errors import DeviceError

THREADS = 1024
SOURCE = r"""
__device__ unsigned long long nanoseconds() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
extern "C" __global__ void __launch_bounds__(1024) spin(unsigned long long ns) {
    if (threadIdx.x == 0) {
        unsigned long long start = nanoseconds();
        while (nanoseconds() - start < ns) { }
    }
    __syncthreads();
}
"""


@dataclass
class Spin:
    """The compiled kernel on this machine's GPU. `slots` is how many of its blocks run at once."""

    function: Any
    slots: int

    @classmethod
    def compile(cls) -> Spin:
        """Compile for the current GPU. Raises DeviceError where there is none."""
        from llmcourse.models.loading import resolve_device

        resolve_device("cuda")
        from cuda.bindings import driver, nvrtc

        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context, the primary one, current
        major, minor = torch.cuda.get_device_capability()
        program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"spin.cu", 0, [], []))
        options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        module = _checked(driver.cuModuleLoadData(cubin))
        function = _checked(driver.cuModuleGetFunction(module, b"spin"))
        blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, 0))
        made = cls(function, blocks * torch.cuda.get_device_properties(0).multi_processor_count)
        made.launcher(1, 1.0, 0)()  # loaded on its first launch, which must not fall into a capture
        torch.cuda.synchronize()
        return made

    def launcher(self, us: float, share: float, stream: int) -> Any:
        """A function without arguments that launches the kernel; its arguments are packed once, here."""
        from cuda.bindings import driver

        launch, function = driver.cuLaunchKernel, self.function
        grid = max(1, round(share * self.slots))
        value = ctypes.c_uint64(round(us * 1e3))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        address = ctypes.addressof(pointers)

        def call(keep: Any = (value, pointers)) -> None:
            (status,) = launch(function, grid, 1, 1, THREADS, 1, 1, 0, stream, address, 0)
            if status:
                raise RuntimeError(f"the launch failed: {status}")

        return call


def blocking_stream() -> Any:
    """A stream that waits for the legacy default stream, and it for them: torch's own streams do not."""
    from cuda.bindings import driver

    stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_DEFAULT))
    return torch.cuda.ExternalStream(int(stream))


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise DeviceError(
            f"the CUDA driver answered {status}.",
            "The kernel that keeps a GPU busy for a given time could not be prepared.",
            "`llmcourse doctor`, which checks the driver, NVRTC and cuda-bindings.",
        )
    return values[0] if len(values) == 1 else tuple(values)
