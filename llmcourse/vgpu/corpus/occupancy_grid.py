"""How many blocks fit on an SM in CUDA's own words, over a grid of registers, shared memory and block sizes.

`llmcourse.hardware.occupancy` computes the same from the published rules; the record tells whether rightly.
"""

from __future__ import annotations

from typing import Any

from llmcourse.vgpu.corpus.device import Gpu, build

LIVE = (1, 8, 12, 20, 28, 40, 52, 60, 76, 92, 108, 124, 140, 170, 210, 240)
"""Values that a kernel keeps in registers at once; the count of registers it takes is asked of the driver."""

THREADS = (32, 64, 96, 128, 192, 256, 288, 384, 512, 640, 768, 1024)
DYNAMIC = (0, 100, 1024, 3000, 8192, 12_345, 20_000, 40_000, 65_536, 100_000, 115_712, 232_448)
STATIC = (0, 4, 5000)

_SOURCE = """
template <int LIVE>
__device__ void hold(const float* in, float* out) {
    float v[LIVE];
#pragma unroll
    for (int i = 0; i < LIVE; i++) v[i] = in[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LIVE; i++) out[i * 1024 + threadIdx.x] = v[i] + v[(i * 7 + 1) % LIVE];
}
"""


def source() -> str:
    """Kernels hold_N_S: N values in registers, S bytes of static shared memory."""
    text = _SOURCE
    for live in LIVE:
        for static in STATIC:
            use = f"__shared__ volatile char s[{static}]; s[threadIdx.x % {static}] = 1;" if static else ""
            text += (
                f'extern "C" __global__ void hold_{live}_{static}(const float* in, float* out) '
                f"{{ {use} hold<{live}>(in, out); }}\n"
            )
    return text


def rows(gpu: Gpu) -> list[dict[str, Any]]:
    """First the device's attributes, then one row for each combination (a third of them: they add little)."""
    cubin = build(source(), gpu.arch, "hold.cu").cubin
    found: list[dict[str, Any]] = [{"name": "attributes", **gpu.attributes()}]
    limit = gpu.attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
    number = 0
    for live in LIVE:
        for static in STATIC:
            function = gpu.function(cubin, f"hold_{live}_{static}")
            taken = gpu.function_attribute(function, "SHARED_SIZE_BYTES")
            gpu.allow_shared(function, limit - taken)
            kernel = {
                "registers": gpu.function_attribute(function, "NUM_REGS"),
                "static": taken,
                "max_threads": gpu.function_attribute(function, "MAX_THREADS_PER_BLOCK"),
            }
            for threads in THREADS:
                for dynamic in DYNAMIC:
                    number += 1
                    if number % 5 and (static or dynamic):
                        continue
                    if threads > kernel["max_threads"] or dynamic + taken > limit:
                        continue
                    blocks = gpu.call(
                        "cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, dynamic
                    )
                    row = {"threads": threads, "dynamic": dynamic, "blocks": int(blocks)}
                    found.append({"name": "blocks", **kernel, **row})
    return found
