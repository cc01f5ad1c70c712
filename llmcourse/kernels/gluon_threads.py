"""Gluon kernels without a GPU: every group of warps a thread, every barrier a real one.

A warp-specialised kernel is a small concurrent program. Its mistakes are those of concurrent programs: a wait
for the wrong phase (it hangs, or reads what has not come), a block given back before its last reader has
finished. Here such a kernel runs on a CPU as one thread for each group of warps, and whatever is asynchronous
on the GPU takes place as late and in as odd an order as it may:

    copies     a destination holds NaN from the request until the copy, and copies end in random order
    products   are computed when they are issued and again when they are waited for; had an operand changed in
               between, the two would differ, and `RaceError` says so. Who reads a result before it has waited
               for it gets the same error
    barriers   count arrivals and bytes and have phases, as mbarriers do; a wait of many seconds is a
               `DeadlockError` that says who waits for what

Only what `flash_hopper.py` uses of Gluon is here. Layouts mean nothing: which thread of a group holds what is
the compiler's affair, and values do not depend on it. The functions of a kernel run as they stand, with these
names in place of Gluon's.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llmcourse.errors import CourseError

PATIENCE = 20.0  # seconds


class RaceError(CourseError, RuntimeError):
    """Something was read or overwritten while an asynchronous operation used it."""


class DeadlockError(CourseError, RuntimeError):
    """A barrier that nobody completes."""


class Tile(Tensor):
    """A distributed tensor; `x.type.layout` is asked for by kernels, and means nothing here."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


def tile(x: Tensor) -> Tile:
    return x.as_subclass(Tile)


class Barrier:
    """An mbarrier: a phase ends when all its arrivals and all announced bytes have come."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.count, self.pending, self.bytes, self.phase = machine, 0, 0, 0, 0

    def start(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, nbytes: int) -> None:
        with self.machine.changed:
            self.pending -= arrivals
            self.bytes += nbytes
            if self.pending < 0:
                raise RaceError(
                    f"more than {self.count} arrivals in one phase of a barrier.",
                    "Each phase ends with the arrivals that the barrier was made for.",
                    "one arrival of each group for each block.",
                )
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                self.machine.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.machine.changed:
            done = self.machine.changed.wait_for(
                lambda: self.machine.failed or self.phase != parity, timeout=PATIENCE
            )
            if self.machine.failed:
                raise _Stopped
            if not done:
                raise DeadlockError(
                    f"{threading.current_thread().name} has waited for phase {parity} of a barrier.",
                    f"It is in phase {self.phase}, with {self.pending} of {self.count} arrivals to come.",
                    "a count of arrivals, and of phases, that producer and consumers share.",
                )


class _Stopped(Exception):
    """Another thread of the program has failed."""


class Barriers:
    """An array of barriers; one of shape [1] is itself the barrier."""

    def __init__(self, machine: Machine, shape: Sequence[int]) -> None:
        self.shape = list(shape)
        self.members = [Barrier(machine) for _ in range(self.shape[0])]

    def index(self, i: int) -> Barrier:
        return self.members[i]


class Shared:
    """A block of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Descriptor:
    """A tensor of [B, H, S, D] and the block of it that a copy moves."""

    def __init__(self, base: Tensor, block_shape: Sequence[int]) -> None:
        self.base, self.dtype, self.layout = base, base.dtype, None
        self.block_type = SimpleNamespace(shape=list(block_shape))

    def part(self, at: Sequence[int]) -> tuple[slice, ...]:
        """Where a block lies in the tensor, clipped at its edges."""
        sizes = zip(at, self.block_type.shape, self.base.shape, strict=True)
        return tuple(slice(min(i, n), min(i + size, n)) for i, size, n in sizes)


class Pointer:
    """An address, or a tile of them."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)


class Product:
    """A matrix product on its way."""

    type = SimpleNamespace(layout=None)

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        if isinstance(acc, Product):
            raise RaceError(
                "a product's accumulator is that of a product under way.",
                "Products of different shape may overtake one another.",
                "warpgroup_mma_wait before the next product.",
            )
        self.a, self.b, self.acc, self.use_acc = a, b, acc.clone(), use_acc
        self.value, self.done = self.compute(), False

    def compute(self) -> Tensor:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        product = a.float() @ self.b.data.float()
        return self.acc + product if self.use_acc else product

    def finish(self) -> None:
        self.done = True
        if not torch.equal(self.compute().nan_to_num(7.5), self.value.nan_to_num(7.5)):
            raise RaceError(
                "a product's operand changed while it was being multiplied.",
                "A WGMMA reads shared memory until it has been waited for.",
                "release the block after warpgroup_mma_wait.",
            )


class Machine:
    """One program (thread block): its threads, its copies under way."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.changed = threading.Condition()
        self.failed = False
        self.copies: list[Callable[[], None]] = []
        self.random = random.Random(seed)
        self.local = threading.local()

    def run(self, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """A thread for each job, and one for the copy engine, until all jobs have ended."""
        errors: list[Exception] = []

        def work(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                with torch.no_grad():
                    function(*arguments)
            except Exception as error:
                with self.changed:
                    if not isinstance(error, _Stopped):
                        errors.append(error)
                    self.failed = True
                    self.changed.notify_all()

        ended = threading.Event()
        threads = [
            threading.Thread(target=work, args=job, name=f"group {i} of warps", daemon=True)
            for i, job in enumerate(jobs)
        ]
        engine = threading.Thread(target=self._copy, args=(ended,), daemon=True)
        for thread in (*threads, engine):
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        with self.changed:
            self.changed.notify_all()
        engine.join()
        if errors:
            raise errors[0]

    def _copy(self, ended: threading.Event) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.copies or ended.is_set(), timeout=PATIENCE)
                if not self.copies:
                    return
                copy = self.copies.pop(self.random.randrange(len(self.copies)))
            copy()

    # ------------------------------------------------------------------------------- what Gluon offers

    def language(self) -> SimpleNamespace:
        def pick(name: str) -> Callable[..., Any]:
            def either(a: Any, b: Any) -> Any:
                if isinstance(a, Tensor) or isinstance(b, Tensor):
                    return getattr(torch, name)(torch.as_tensor(a), torch.as_tensor(b))
                return max(a, b) if name == "maximum" else min(a, b)

            return either

        def where(condition: Tensor, yes: Any, no: Any) -> Tensor:
            return tile(torch.where(condition, yes, no))

        def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
            return tile(torch.full(list(shape), value, dtype=dtype))

        def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
            if dtype == torch.int64:
                return Barrier(self) if len(shape) == 1 else Barriers(self, shape)
            return Shared(torch.full(list(shape), torch.nan, dtype=dtype))

        def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
            pointer.base.view(-1)[pointer.offset[mask]] = value[mask].to(pointer.base.dtype)

        return SimpleNamespace(
            constexpr=object,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            to_tensor=lambda value: value,
            static_range=range,
            minimum=pick("minimum"),
            maximum=pick("maximum"),
            where=where,
            full=full,
            zeros=lambda shape, dtype, layout=None: full(shape, 0.0, dtype),
            arange=lambda start, end, layout=None: tile(torch.arange(start, end)),
            max=lambda x, axis: tile(x.amax(axis)),
            sum=lambda x, axis: tile(x.sum(axis)),
            exp2=torch.exp2,
            log2=torch.log2,
            cast=lambda x, dtype: x,
            convert_layout=lambda x, layout: x,
            inline_asm_elementwise=lambda asm, constraints, args, **_: args[0],
            allocate_shared_memory=allocate,
            store=store,
            warp_specialize=lambda jobs, warps, registers: self.run(jobs),
            float32=torch.float32,
            int32=torch.int32,
            int64=torch.int64,
            NVMMADistributedLayout=lambda *_: None,
            DotOperandLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
        )

    def copies_by_name(self) -> dict[str, Callable[..., None]]:
        """The copy engine: from memory, and to it."""

        def load(descriptor: Descriptor, at: Sequence[int], barrier: Barrier, result: Shared) -> None:
            with self.changed:
                result.data.fill_(torch.nan)

                def copy() -> None:
                    part = descriptor.base[descriptor.part(at)]
                    result.data.zero_()
                    result.data[tuple(slice(n) for n in part.shape)] = part
                    barrier.change(0, -result.data.nbytes)

                self.copies.append(copy)
                self.changed.notify_all()

        def save(descriptor: Descriptor, at: Sequence[int], source: Shared) -> None:
            def copy() -> None:
                place = descriptor.base[descriptor.part(at)]
                place.copy_(source.data[tuple(slice(n) for n in place.shape)])

            self._own("stores").append(copy)

        return {"copy_in": load, "copy_out": save}

    def hopper(self) -> SimpleNamespace:
        def store_wait(pending: int) -> None:
            stores = self._own("stores")
            while len(stores) > pending:
                stores.pop(0)()

        def multiply(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
            product = Product(a, b, acc, use_acc)
            self._own("products").append(product)
            return product

        def wait(pending: int, results: Sequence[Any]) -> Any:
            products = self._own("products")
            while len(products) > pending:
                products.pop(0).finish()
            if not all(x.done for x in results if isinstance(x, Product)):
                raise RaceError(
                    "a product's result was read while the product was under way.",
                    f"The wait left {pending} products unfinished, and this is one of them.",
                    "products end in the order of their issue: wait for fewer pending ones.",
                )
            values = [tile(x.value) if isinstance(x, Product) else x for x in results]
            return values[0] if len(values) == 1 else tuple(values)

        return SimpleNamespace(
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.start(count),
                wait=lambda barrier, phase: barrier.wait(int(phase)),
                arrive=lambda barrier, count=1: barrier.change(count, 0),
                expect=lambda barrier, nbytes: barrier.change(1, nbytes),
            ),
            tma=SimpleNamespace(store_wait=store_wait),
            warpgroup_mma=multiply,
            warpgroup_mma_wait=wait,
            fence_async_shared=lambda: None,
        )

    def _own(self, name: str) -> list[Any]:
        """A list of this thread's."""
        if not hasattr(self.local, name):
            setattr(self.local, name, [])
        found: list[Any] = getattr(self.local, name)
        return found


def run(kernel: Any, programs: int, *arguments: Any, seed: int = 0, **constants: Any) -> None:
    """Run all programs of a Gluon kernel, one after another.

    kernel      the `@gluon.jit` function; it and those it calls are taken from its module
    arguments   `Descriptor`s, `Pointer`s and numbers
    Raises      RaceError, DeadlockError
    """
    function = kernel.fn
    for program in range(programs):
        machine = Machine(program, programs, seed + program)
        names = dict(function.__globals__)
        names |= {"gl": machine.language(), "hopper": machine.hopper(), **machine.copies_by_name()}
        for name, value in list(names.items()):
            inner = getattr(value, "fn", None)
            if isinstance(inner, types.FunctionType) and inner.__module__ == function.__module__:
                names[name] = types.FunctionType(inner.__code__, names, name, inner.__defaults__)
        names[function.__name__](*arguments, **constants)
