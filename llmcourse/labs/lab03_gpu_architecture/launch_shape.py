"""Exercise `launch_shape`: how many blocks an SM holds, and with how many a kernel is launched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.hardware import CAPABILITIES, Capability, occupancy
from llmcourse.labs.rungs import sm

launch_shape = Exercise(
    "launch_shape",
    title="How many blocks?",
    arguments=("n", "threads", "registers", "shared", "gpu"),
    shapes=(
        "n          elements of the array; threads a block, registers a thread, shared bytes a",
        "           block: what the kernel needs",
        "gpu        dict: sms, and of each SM max_warps, max_blocks, registers, register_unit,",
        "           partitions, shared, shared_unit, shared_reserved",
        "rules      a block takes whole warps of 32 threads. A warp's registers are rounded up",
        "           to register_unit and lie in one of the SM's equal partitions. A block's",
        "           shared memory is shared + shared_reserved, rounded up to shared_unit",
        "returns    (blocks_per_sm, grid): the blocks that an SM holds at once, and the blocks",
        "           of a grid-stride launch: no more than are resident on the whole GPU at once,",
        "           nor than n elements need. Both are 0 if a block does not fit",
    ),
    formula="blocks_per_sm = min over the four resources;  grid = min(⌈n / threads⌉, sms · blocks_per_sm)",
    difficulty=3,
    importance=4,
    minutes=30,
    points=5,
    hints=(
        "An SM of the A100 has 64 warp slots, 32 block slots, 65,536 registers and 164 KiB of shared "
        "memory. A block has 96 threads of 40 registers and takes no shared memory. How many blocks fit by "
        "each of the four alone? Which of the four is used up first?",
        "Each resource gives a number of blocks by itself; the smallest holds. Count in warps: 48 threads "
        "take 2 warp slots, and the registers of 2 warps. For registers, first see how many warps one "
        "partition holds, then how many warps the SM holds, then how many blocks that makes. A resource of "
        "which the kernel takes nothing sets no limit.",
        "up = lambda a, unit: -(-a // unit) * unit. warps = -(-threads // 32). One warp takes w = "
        "up(registers * 32, register_unit); warps of an SM by registers: registers_of_the_SM // partitions "
        "// w * partitions. Shared: a block takes up(shared + shared_reserved, shared_unit). Then min(-(-n "
        "// threads), sms * blocks_per_sm).",
    ),
)

Gpu = Mapping[str, int]


def expected(n: int, threads: int, registers: int, shared: int, c: Capability, sms: int) -> tuple[int, int]:
    """By the package's own calculator, which is held against what CUDA answers on a GPU."""
    blocks = occupancy(c, threads, registers, shared).blocks
    return blocks, min(-(-n // threads), sms * blocks)


def _agree(t: Trial, c: Capability, threads: int, registers: int = 0, shared: int = 0, n: int = -1) -> None:
    """Both results for `n` elements, the blocks of an SM alone where no `n` is given."""
    sms, asked = t.size(2, 132), 10**9 if n < 0 else n
    got = t.pair(t.call(asked, threads, registers, shared, sm(c, sms)), 2, "a pair (blocks_per_sm, grid)")
    right = expected(asked, threads, registers, shared, c, sms)
    t.equal(got[0], right[0], "blocks_per_sm")
    if n >= 0:
        t.equal(got[1], right[1], "grid")


def _any(t: Trial) -> Capability:
    return list(CAPABILITIES.values())[t.size(0, len(CAPABILITIES) - 1)]


@launch_shape.check("warp slots and block slots, where the kernel takes nothing else")
def slots(t: Trial) -> None:
    for threads in (1024, 256, 72, 33, 32, 1, 200, t.size(2, 1024)):
        _agree(t, CAPABILITIES["8.0"], threads)
    for c in CAPABILITIES.values():
        _agree(t, c, t.size(1, 1024))


@launch_shape.check("registers, in whole units and in one partition for each warp")
def by_registers(t: Trial) -> None:
    for threads, registers in ((256, 64), (256, 33), (32, 80), (64, 112), (200, 104), (1024, 64)):
        _agree(t, CAPABILITIES["9.0"], threads, registers)
    for _ in range(6):
        _agree(t, _any(t), t.size(32, 512), t.size(40, 120))


@launch_shape.check("shared memory, with what the driver keeps and in whole units")
def by_shared(t: Trial) -> None:
    for name in ("8.0", "7.5", "9.0", "8.6"):
        c = CAPABILITIES[name]
        for share in (3, 7, 11):  # sizes that would fit so often, but for the rounding or the driver's part
            room = c.shared_per_sm // share
            _agree(t, c, 32, 16, room // c.shared_unit * c.shared_unit)
            _agree(t, c, 32, 16, room - c.shared_reserved)
        _agree(t, c, 32 * t.size(1, 6), 32, t.size(1, 50_000))


@launch_shape.check("the grid has the blocks that n elements need, and no more than are resident at once")
def grid(t: Trial) -> None:
    c = CAPABILITIES["8.0"]
    for n in (1, 256, 257, 256 * 3, 0, t.size(1, 2_000), 10**7):
        _agree(t, c, 256, 32, 0, n)
    _agree(t, c, 100, 40, 5_000, t.size(1, 100_000))


@launch_shape.check("a block that does not fit: no blocks, no grid")
def impossible(t: Trial) -> None:
    for threads, registers in ((1024, 65), (1024, 255), (800, 96), (544, 112)):
        _agree(t, CAPABILITIES["9.0"], threads, registers, 0, t.size(1, 10**6))


def _up(a: int, unit: int) -> int:
    return -(-a // unit) * unit


def _solved(n: int, threads: int, registers: int, shared: int, gpu: Gpu, **wrong: Any) -> tuple[int, int]:
    """The rules, each of which a mistake can replace by its own."""
    warps = wrong.get("warps", lambda: -(-threads // 32))()
    limits = {
        "warps": gpu["max_warps"] // max(1, warps),
        "blocks": gpu["max_blocks"],
        "registers": wrong.get("by_registers", _by_registers)(threads, warps, registers, gpu),
        "shared": wrong.get("by_shared", _by_shared)(shared, gpu),
    }
    blocks = wrong.get("together", lambda limits: min(limits.values()))(limits)
    return blocks, wrong.get("grid", lambda need, room: min(need, room))(
        -(-n // threads), gpu["sms"] * blocks
    )


def _by_registers(threads: int, warps: int, registers: int, gpu: Gpu) -> int:
    a_warp = _up(32 * registers, gpu["register_unit"])
    if not a_warp:
        return gpu["max_blocks"]
    return gpu["registers"] // gpu["partitions"] // a_warp * gpu["partitions"] // warps


def _by_shared(shared: int, gpu: Gpu) -> int:
    a_block = _up(shared + gpu["shared_reserved"], gpu["shared_unit"])
    return gpu["shared"] // a_block if a_block else gpu["max_blocks"]


@launch_shape.mistake(
    says="the threads that do not fill a warp are not counted: threads // 32",
    tries="-(-threads // 32): 48 threads take two warps, half of one stays empty.",
    caught_by="slots",
)
def whole_warps_only(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, gpu, warps=lambda: max(1, threads // 32))


@launch_shape.mistake(
    says="threads are counted, not warps: a partial warp takes a whole slot",
    tries="max_warps // ⌈threads / 32⌉.",
    caught_by="slots",
)
def by_threads(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    def together(limits: dict[str, int]) -> int:
        return min((limits | {"warps": gpu["max_warps"] * 32 // threads}).values())

    return _solved(n, threads, registers, shared, gpu, together=together)


@launch_shape.mistake(
    says="the limit on the number of blocks is forgotten",
    tries="max_blocks: small blocks run out of block slots before they run out of warps.",
    caught_by="slots",
)
def no_block_slots(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    free = {"max_blocks": 10**9}
    return _solved(n, threads, registers, shared, {**gpu, **free})


@launch_shape.mistake(
    says="the resource that allows the most blocks is taken, not the one that allows the fewest",
    tries="min: the first resource that runs out sets the limit.",
    caught_by="slots",
)
def most_generous(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, gpu, together=lambda limits: max(limits.values()))


@launch_shape.mistake(
    says="a resource of which the kernel takes nothing is divided by",
    tries="no limit where registers or shared memory come to 0.",
    caught_by="slots",
)
def divided_by_nothing(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(
        n,
        threads,
        registers,
        shared,
        gpu,
        by_registers=lambda threads, warps, r, gpu: gpu["registers"] // (r * 32 * warps),
    )


@launch_shape.mistake(
    says="a warp's registers are not rounded up to the unit of allocation",
    tries="rounding registers · 32 up to register_unit, for one warp.",
    caught_by="by_registers",
)
def exact_registers(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, {**gpu, "register_unit": 1})


@launch_shape.mistake(
    says="registers are counted by thread, and a warp has those of 32, also where it is not full",
    tries="registers for whole warps, rounded up to register_unit for each.",
    caught_by="by_registers",
)
def registers_by_thread(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    def by_registers(threads: int, warps: int, registers: int, gpu: Gpu) -> int:
        return gpu["registers"] // (registers * threads) if registers else gpu["max_blocks"]

    return _solved(n, threads, registers, shared, gpu, by_registers=by_registers)


@launch_shape.mistake(
    says="the registers are taken for one file: a warp's must lie in one partition",
    tries="how many warps fit into registers // partitions, times the partitions.",
    caught_by="by_registers",
)
def one_file(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, {**gpu, "partitions": 1})


@launch_shape.mistake(
    says="the driver's share of each block's shared memory is forgotten",
    tries="shared + shared_reserved, then rounding up.",
    caught_by="by_shared",
)
def nothing_reserved(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, {**gpu, "shared_reserved": 0})


@launch_shape.mistake(
    says="shared memory is not rounded up to its unit",
    tries="rounding shared + shared_reserved up to shared_unit.",
    caught_by="by_shared",
)
def exact_shared(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, {**gpu, "shared_unit": 1})


@launch_shape.mistake(
    says="the number of blocks is rounded down: the last elements get no thread",
    tries="⌈n / threads⌉, in integers -(-n // threads).",
    caught_by="grid",
)
def rounded_down(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    blocks, room = _solved(10**12, threads, registers, shared, gpu)
    return blocks, min(n // threads, room)


@launch_shape.mistake(
    says="the grid always fills the GPU, also for a few elements",
    tries="the smaller of ⌈n / threads⌉ and sms · blocks_per_sm.",
    caught_by="grid",
)
def always_full(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, gpu, grid=lambda need, room: room)


@launch_shape.mistake(
    says="the grid has a block for every piece of the array, however many wait",
    tries="at most sms · blocks_per_sm: a grid-stride loop takes care of the rest.",
    caught_by="grid",
)
def one_block_a_piece(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, gpu, grid=lambda need, room: need)


@launch_shape.mistake(
    says="at least one block is said to fit, also where none does",
    tries="0 blocks for a block whose warps need more registers than there are.",
    caught_by="impossible",
)
def at_least_one(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return _solved(n, threads, registers, shared, gpu, together=lambda limits: max(1, min(limits.values())))


@launch_shape.alternative("adding blocks until one does not fit")
def one_after_another(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    warps = (threads + 31) // 32
    a_warp = -(-32 * registers // gpu["register_unit"]) * gpu["register_unit"]
    a_block = -(-(shared + gpu["shared_reserved"]) // gpu["shared_unit"]) * gpu["shared_unit"]
    a_partition = gpu["registers"] // gpu["partitions"]
    slots = (
        gpu["max_warps"] if not a_warp else min(gpu["max_warps"], a_partition // a_warp * gpu["partitions"])
    )
    blocks = 0
    while (
        blocks < gpu["max_blocks"]
        and (blocks + 1) * warps <= slots
        and (blocks + 1) * a_block <= gpu["shared"]
    ):
        blocks += 1
    return blocks, min((n + threads - 1) // threads, blocks * gpu["sms"])


@launch_shape.alternative("the limits as a table, the result as a list")
def by_table(n: int, threads: int, registers: int, shared: int, gpu: Gpu) -> Any:
    return list(_solved(n, threads, registers, shared, gpu))
