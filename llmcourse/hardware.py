"""GPUs as numbers: what NVIDIA publishes, and what follows from it.

Three questions have answers on paper, before anything runs.

*How fast at best?* A kernel that does `intensity` FLOPs for each byte it moves runs at no more than
min(peak, intensity × bandwidth): the roofline (Williams, Waterman and Patterson 2009). Left of the ridge,
where the two meet, moving fewer bytes is all that helps.

*How many warps at once?* An SM holds as many blocks as its registers, shared memory, warp slots and block
slots allow, whichever runs out first: occupancy.

*How much must be under way?* Memory answers after a latency; to keep it busy, bandwidth × latency bytes must
have been asked for and not yet come (Little 1961). Occupancy is one way of having them, more loads a thread
another.

    >>> h100 = gpu("H100 SXM")
    >>> roofline(h100, "bf16").ridge                     # FLOPs a byte
    295.3…
    >>> occupancy(h100, threads=256, registers=64, shared=40_000).limited_by
    ('registers',)

Peaks are dense (without 2:4 sparsity) and hold at the boost clock, which a busy chip may not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmcourse.errors import CourseError, UnknownNameError

WARP_SIZE = 32


class LaunchSizeError(CourseError, ValueError):
    """Threads, registers or shared memory that no kernel can have."""


@dataclass(frozen=True)
class Capability:
    """What every GPU of a compute capability has in an SM (NVIDIA, *CUDA C++ Programming Guide* 13.0, 2025,
    table "Technical Specifications per Compute Capability"; allocation units from `cuda_occupancy.h`).

    shared_per_sm, shared_per_block   bytes; the latter what one block may ask for at most
    shared_unit, shared_reserved      a block's shared memory is rounded up to `shared_unit`, after the
                                      driver has added `shared_reserved` of its own
    fp32_lanes                        additions or multiplications of float32 a clock
    """

    name: str
    max_warps: int
    max_blocks: int
    shared_per_sm: int
    shared_per_block: int
    shared_unit: int
    shared_reserved: int
    fp32_lanes: int
    registers: int = 65536
    register_unit: int = 256
    partitions: int = 4
    max_threads_per_block: int = 1024
    max_registers_per_thread: int = 255

    @property
    def max_threads(self) -> int:
        return self.max_warps * WARP_SIZE


def _capability(name: str, warps: int, blocks: int, per_sm: int, per_block: int, lanes: int) -> Capability:
    """Shared memory in KiB. From 8.0 on the driver keeps 1 KiB of each block, and the unit is 128 bytes."""
    new = float(name) >= 8
    unit, reserved = (128, 1024) if new else (256, 0)
    return Capability(name, warps, blocks, per_sm << 10, per_block << 10, unit, reserved, lanes)


CAPABILITIES: dict[str, Capability] = {
    c.name: c
    for c in (
        _capability("7.0", 64, 32, 96, 96, 64),
        _capability("7.5", 32, 16, 64, 64, 64),
        _capability("8.0", 64, 32, 164, 163, 64),
        _capability("8.6", 48, 16, 100, 99, 128),
        _capability("8.9", 48, 24, 100, 99, 128),
        _capability("9.0", 64, 32, 228, 227, 128),
        _capability("10.0", 64, 32, 228, 227, 128),
        _capability("12.0", 48, 24, 100, 99, 128),
    )
}


@dataclass(frozen=True)
class Gpu:
    """One product.

    clock           boost, Hz
    l2, memory      bytes (memory in 10⁹, as data sheets count)
    bandwidth       of its memory, bytes/s
    peak            FLOP/s (operations/s for int8, fp4 as published) by number format, dense; the formats
                    other than fp64 and fp32 on tensor cores
    pcie, nvlink    bytes/s, both directions together, as data sheets count; nvlink 0 where there is none
    source          document and year
    """

    name: str
    capability: Capability
    sms: int
    clock: float
    l2: int
    memory: int
    bandwidth: float
    peak: Mapping[str, float]
    pcie: float
    nvlink: float
    source: str

    @property
    def shared_bandwidth(self) -> float:
        """Bytes/s of shared memory over all SMs: 32 banks of 4 bytes a clock in each."""
        return self.sms * 32 * 4 * self.clock

    @property
    def max_threads(self) -> int:
        """Threads that can be resident at once."""
        return self.sms * self.capability.max_threads


def _gpu(
    name: str,
    capability: str,
    sms: int,
    mhz: float,
    l2_mb: float,
    memory_gb: float,
    gb_per_s: float,
    tera: Mapping[str, float],
    *,
    pcie: float,
    nvlink: float = 0,
    source: str,
) -> Gpu:
    return Gpu(
        name,
        CAPABILITIES[capability],
        sms,
        mhz * 1e6,
        int(l2_mb * (1 << 20)),
        int(memory_gb * 1e9),
        gb_per_s * 1e9,
        {dtype: t * 1e12 for dtype, t in tera.items()},
        pcie * 1e9,
        nvlink * 1e9,
        source,
    )


_A100 = {"fp64": 9.7, "fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312, "int8": 624}
_HOPPER = {
    "fp64": 33.5,
    "fp32": 66.9,
    "tf32": 494.7,
    "fp16": 989.4,
    "bf16": 989.4,
    "fp8": 1978.9,
    "int8": 1978.9,
}
_RTX4090 = {
    "fp64": 1.29,
    "fp32": 82.6,
    "tf32": 82.6,
    "fp16": 165.2,
    "bf16": 165.2,
    "fp8": 330.3,
    "int8": 660.6,
}
_B200 = {
    "fp64": 37,
    "fp32": 75,
    "tf32": 1125,
    "fp16": 2250,
    "bf16": 2250,
    "fp8": 4500,
    "int8": 4500,
    "fp4": 9000,
}

GPUS: dict[str, Gpu] = {
    g.name: g
    for g in (
        _gpu(
            "T4",
            "7.5",
            40,
            1590,
            4,
            16,
            320,
            {"fp64": 0.25, "fp32": 8.1, "fp16": 65, "int8": 130},
            pcie=32,
            source="NVIDIA Turing GPU Architecture whitepaper (2018), NVIDIA T4 datasheet (2019)",
        ),
        _gpu(
            "A10G",
            "8.6",
            80,
            1710,
            6,
            24,
            600,
            {"fp32": 35, "tf32": 35, "fp16": 70, "bf16": 70, "int8": 140},
            pcie=64,
            source="NVIDIA A10G datasheet (2021)",
        ),
        _gpu(
            "A100 40GB",
            "8.0",
            108,
            1410,
            40,
            40,
            1555,
            _A100,
            pcie=64,
            nvlink=600,
            source="NVIDIA A100 Tensor Core GPU Architecture whitepaper (2020), SXM4",
        ),
        _gpu(
            "A100 80GB",
            "8.0",
            108,
            1410,
            40,
            80,
            2039,
            _A100,
            pcie=64,
            nvlink=600,
            source="NVIDIA A100 datasheet (2021), SXM4",
        ),
        _gpu(
            "L4",
            "8.9",
            58,
            2040,
            48,
            24,
            300,
            {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121, "fp8": 242.5, "int8": 242.5},
            pcie=64,
            source="NVIDIA L4 datasheet (2023), halved where it counts sparsity",
        ),
        _gpu(
            "RTX 4090",
            "8.9",
            128,
            2520,
            72,
            24,
            1008,
            _RTX4090,
            pcie=64,
            source="NVIDIA Ada GPU Architecture whitepaper (2022), sums in fp32",
        ),
        _gpu(
            "H100 PCIe",
            "9.0",
            114,
            1755,
            50,
            80,
            2000,
            {"fp64": 25.6, "fp32": 51.2, "tf32": 378, "fp16": 756, "bf16": 756, "fp8": 1513, "int8": 1513},
            pcie=128,
            nvlink=600,
            source="NVIDIA H100 Tensor Core GPU Architecture whitepaper (2022), H100 datasheet (2023)",
        ),
        _gpu(
            "H100 SXM",
            "9.0",
            132,
            1980,
            50,
            80,
            3350,
            _HOPPER,
            pcie=128,
            nvlink=900,
            source="NVIDIA H100 Tensor Core GPU Architecture whitepaper (2022), H100 datasheet (2023)",
        ),
        _gpu(
            "H200",
            "9.0",
            132,
            1980,
            60,
            141,
            4800,
            _HOPPER,
            pcie=128,
            nvlink=900,
            source="NVIDIA H200 datasheet (2023), SXM; L2 as CUDA reports it",
        ),
        _gpu(
            "B200",
            "10.0",
            148,
            1980,
            126,
            180,
            7700,
            _B200,
            pcie=128,
            nvlink=1800,
            source="NVIDIA HGX B200 datasheet (2024), an eighth of the system; Blackwell Tuning Guide (2025)",
        ),
    )
}


def gpu(name: str) -> Gpu:
    """A GPU by its name here ("H100 SXM"), or by what CUDA calls it ("NVIDIA H100 80GB HBM3").

    Raises   UnknownNameError, listing those there are.
    """
    if name in GPUS:
        return GPUS[name]
    words = name.upper().replace("-", " ").split()
    fitting = [g for g in GPUS.values() if all(w in words for w in g.name.upper().split())]
    if not fitting:
        fitting = [g for g in GPUS.values() if g.name.upper().split()[0] in words and _same_kind(g, words)]
    if fitting:
        return fitting[-1]
    raise UnknownNameError(
        f"there is no GPU called {name!r} here.",
        "Each entry holds published figures with their source.",
        f"one of {', '.join(GPUS)}.",
    )


def _same_kind(g: Gpu, words: list[str]) -> bool:
    """CUDA's names say PCIe or the memory (HBM3 is the SXM module), and 40GB or 80GB as one word."""
    kind = g.name.upper().split()[1:]
    if kind == ["SXM"]:
        return "PCIE" not in words
    return all(any(k in w for w in words) for k in kind)


# --------------------------------------------------------------------------------------------- roofline


@dataclass(frozen=True)
class Roofline:
    """The two limits of a kernel: `peak` FLOP/s and `bandwidth` bytes/s."""

    name: str
    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on the arithmetic is the limit."""
        return self.peak / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """FLOP/s at best for a kernel of `intensity` FLOPs a byte."""
        return min(self.peak, intensity * self.bandwidth)

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for that much arithmetic and traffic, if they overlap fully."""
        return max(flops / self.peak, nbytes / self.bandwidth)

    def bound(self, intensity: float) -> str:
        """ "memory" left of the ridge, else "compute"."""
        return "memory" if intensity < self.ridge else "compute"


def roofline(of: Gpu | str, dtype: str = "fp32", *, level: str = "dram") -> Roofline:
    """The roofline of a GPU for a number format.

    level   "dram" (the memory's bandwidth) or "shared" (shared memory's)

    Raises  UnknownNameError for a format that the GPU has no units for.
    """
    of = gpu(of) if isinstance(of, str) else of
    if dtype not in of.peak:
        raise UnknownNameError(
            f"there is no {dtype} peak for the {of.name}.",
            "Data sheets give a peak only for formats that the chip has units for.",
            f"one of {', '.join(of.peak)}.",
        )
    bandwidths = {"dram": of.bandwidth, "shared": of.shared_bandwidth}
    if level not in bandwidths:
        raise UnknownNameError(
            f"there is no memory level called {level!r}.",
            "Published are the bandwidth of the memory and of shared memory.",
            f"one of {', '.join(bandwidths)}.",
        )
    return Roofline(f"{of.name} {dtype}", of.peak[dtype], bandwidths[level])


def bytes_in_flight(bandwidth: float, latency: float) -> float:
    """Bytes that must be under way to sustain `bandwidth` (bytes/s) at `latency` (s): Little's law."""
    return bandwidth * latency


def loads_per_thread(of: Gpu, latency: float, threads_per_sm: int, nbytes: int = 4) -> float:
    """Loads of `nbytes` that each resident thread must have under way to keep the memory busy."""
    return bytes_in_flight(of.bandwidth, latency) / (of.sms * threads_per_sm * nbytes)


# -------------------------------------------------------------------------------------------- occupancy


@dataclass(frozen=True)
class Occupancy:
    """How many blocks of a kernel an SM holds.

    limits      blocks that each resource alone would allow: warps, blocks, registers, shared memory
    limited_by  the resources whose limit is the smallest
    fraction    resident warps of those that the SM has room for
    """

    blocks: int
    warps: int
    fraction: float
    limits: Mapping[str, int]
    limited_by: tuple[str, ...]


def occupancy(of: Gpu | Capability | str, threads: int, registers: int, shared: int = 0) -> Occupancy:
    """Resident blocks and warps of an SM, by the published rules of allocation.

    of          a GPU, or a compute capability ("8.0")
    threads     a block
    registers   a thread, as the compiler reports them
    shared      bytes a block, static and dynamic together

    Registers go to warps in units of 256, from one of four equal files; shared memory to blocks in units of
    128 bytes (256 before 8.0), with 1 KiB more for the driver from 8.0 on. Zero blocks means that the kernel
    cannot be launched. The SM's split of L1 and shared memory is taken to give shared memory all it can.

    Raises  LaunchSizeError for a block or a register count outside what CUDA allows.
    """
    c = _capability_of(of)
    _check_sizes(c, threads, registers, shared)
    warps = -(-threads // WARP_SIZE)
    limits = {
        "warps": c.max_warps // warps,
        "blocks": c.max_blocks,
        "registers": _by_registers(c, warps, registers),
        "shared memory": _by_shared(c, shared),
    }
    blocks = min(limits.values())
    limited = tuple(name for name, limit in limits.items() if limit == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / c.max_warps, limits, limited)


def _by_registers(c: Capability, warps: int, registers: int) -> int:
    a_warp = _round_up(registers * WARP_SIZE, c.register_unit)
    if not a_warp:
        return c.max_blocks
    # A launch is checked as if every partition held as many warps of the block as the fullest one.
    if a_warp * _round_up(warps, c.partitions) > c.registers:
        return 0
    return c.registers // c.partitions // a_warp * c.partitions // warps


def _by_shared(c: Capability, shared: int) -> int:
    if shared > c.shared_per_block:
        return 0
    a_block = _round_up(shared + c.shared_reserved, c.shared_unit)
    return c.shared_per_sm // a_block if a_block else c.max_blocks


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _capability_of(of: Gpu | Capability | str) -> Capability:
    if isinstance(of, Gpu):
        return of.capability
    if isinstance(of, Capability):
        return of
    return CAPABILITIES[of] if of in CAPABILITIES else gpu(of).capability


def _check_sizes(c: Capability, threads: int, registers: int, shared: int) -> None:
    if not 1 <= threads <= c.max_threads_per_block:
        raise LaunchSizeError(
            f"a block of {threads} threads was asked for.",
            f"A block has 1 to {c.max_threads_per_block} threads.",
            "more blocks of at most 1024 threads; 128 to 256 suit most kernels.",
        )
    if not 0 <= registers <= c.max_registers_per_thread:
        raise LaunchSizeError(
            f"{registers} registers a thread were given.",
            f"A thread has at most {c.max_registers_per_thread}; the compiler spills the rest to memory.",
            "the count that the compiler reports.",
        )
    if shared < 0:
        raise LaunchSizeError(
            f"{shared} bytes of shared memory were given.",
            "A size is not negative.",
            "0 for a kernel without shared memory.",
        )
