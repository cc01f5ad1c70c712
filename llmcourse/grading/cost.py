"""What a call costs: bytes kept, bytes moved, the largest array, what is left behind.

A right answer can be a bad one: an attention that stores the S × S matrix, a checkpointed block that
still keeps its activations, a cache that never lets go. None of that shows in values or, on small
inputs, in time. It shows in counts, which are the same on every machine:

    with counter("largest_intermediate")() as count:
        y = attention(q, k, v)
    count.values                     # {'largest_intermediate': 4194304, 'peak_bytes': 12582912}

    saved_bytes            kept for torch's backward pass: the most at one time
    saved_bytes_numpy      the same of `llmcourse.autograd`
    largest_intermediate   the largest piece of memory that a torch operation made, and the most alive at once
    launches               torch operations that would launch a kernel, with the bytes they read and write
    leaked_bytes           torch's and NumPy's memory from this block that is alive at its end
    traced_peak_bytes      the most memory that Python and NumPy held above the start
    kernel_bytes           what Triton kernels load and store; kernel_dots, kernels_here (see `cost_triton`)

Every counter takes `arguments=`, the values that the counted function gets; those to which an argument's
memory makes no difference ignore it. Counters nest, each counting its own block. A block that raises has
no values. What a counter changes (hooks, modes, tracing) is as it was after the block, also if it raises.

They measure code that does not hide. Memory that comes from outside torch's operations and NumPy
(`torch.UntypedStorage(n)`, other libraries), work on threads that the block starts itself, and what
happens inside a fused operation or a kernel of one's own are not seen; kernels have counters of their own.
torch is imported only by the counters that need it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Protocol, TypeVar

from llmcourse.errors import CourseError, MissingPackageError, UnknownNameError
from llmcourse.grading.cost_memory import Tally


class CostError(CourseError, RuntimeError):
    """A cost that could not be counted, or a counter whose name is taken."""


@dataclass
class Count:
    """What a block cost: plain integers by name, there once the block has ended."""

    values: dict[str, int] = field(default_factory=dict)


class Counter(Protocol):
    """Starts counting: a context manager around the code that is measured."""

    def __call__(self, *, arguments: Sequence[object] = ()) -> AbstractContextManager[Count]: ...


COUNTERS: dict[str, Counter] = {}
ELSEWHERE = dict.fromkeys(("kernels_here", "kernel_bytes", "kernel_dots"), "llmcourse.grading.cost_triton")
"""Counters whose modules are imported when they are asked for."""

C = TypeVar("C", bound=Counter)


def register(name: str) -> Callable[[C], C]:
    """Decorator: the counter is found as `counter(name)`.

    Raises   CostError if another counter has that name. (The same one may come again: a reloaded module.)
    """

    def add(made: C) -> C:
        known = COUNTERS.get(name)
        if known is not None and _where(known) != _where(made):
            raise CostError(
                f"{_where(made)} and {_where(known)} are both registered as the counter {name!r}.",
                "A check asks for a counter by its name, which must mean one of them.",
                "another name.",
            )
        COUNTERS[name] = made
        return made

    return add


def counter(name: str) -> Counter:
    """The counter of that name.  Raises UnknownNameError, with the names that there are."""
    if name in ELSEWHERE:
        import_module(ELSEWHERE[name])
    try:
        return COUNTERS[name]
    except KeyError:
        raise UnknownNameError(
            f"there is no counter called {name!r}.",
            "A counter is known once the module that registers it has been imported.",
            f"one of {', '.join(sorted({*COUNTERS, *ELSEWHERE}))}.",
        ) from None


@register("saved_bytes")
@contextmanager
def saved_bytes(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Bytes that torch keeps for the backward pass: the most at one time, each storage once.

    saved_bytes            storages that are not an argument's: the price of training
    saved_argument_bytes   storages of the arguments, which are in memory anyway

    A storage counts whole, also where a view of a part was saved: the view keeps all of it alive. Modules
    among the arguments stand for their parameters and buffers. What is saved inside hooks that the block
    sets itself (activation offload, non-reentrant checkpointing) has left torch's own keeping and is not
    counted; `leaked_bytes` around a call whose result is still held sees it all the same.

    Saving through hooks switches off torch's check that nothing saved is changed in place before
    backward uses it. The counter makes that check itself and raises GraphError. torch.func's gradients
    refuse hooks, and so this counter.
    """
    torch = _torch_part()
    count = Count()
    with torch.watch_saved(arguments) as (own, given):
        yield count
    count.values = {"saved_bytes": own.peak, "saved_argument_bytes": given.peak}


@register("saved_bytes_numpy")
@contextmanager
def saved_bytes_numpy(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Bytes that `llmcourse.autograd` keeps for the backward pass: the most at one time, each buffer once.

    saved_bytes_numpy, saved_argument_bytes_numpy   as for `saved_bytes`
    """
    try:
        from llmcourse.grading.cost_autograd import watch_saved
    except ImportError as error:
        raise _missing("saved_bytes_numpy", "llmcourse.autograd") from error
    count = Count()
    with watch_saved(arguments) as (own, given):
        yield count
    count.values = {"saved_bytes_numpy": own.peak, "saved_argument_bytes_numpy": given.peak}


@register("largest_intermediate")
@contextmanager
def largest_intermediate(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Memory made by torch's operations, forward and backward, in bytes.

    largest_intermediate   the largest single storage, results included
    peak_bytes             the most that was alive at one time

    Views make no memory, so that an expanded or transposed argument costs nothing. Scratch memory inside
    one operation is not seen: a fused attention counts with its results only, which is its point.
    """
    count = Count()
    with _torch_part().Births() as born:
        yield count
    count.values = {"largest_intermediate": born.largest, "peak_bytes": born.memory.peak}


@register("launches")
@contextmanager
def launches(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Torch operations that would launch a kernel on a GPU, under a coarse model of one kernel each.

    launches        operations that fill new memory or write in place; views, shape changes, uninitialised
                    memory and results that are Python numbers (`item`) do not count
    bytes_read      of each launch's tensor inputs, each input once; a broadcast dimension counts one element
    bytes_written   of its outputs

    The model knows no cache and no kernel's insides: an operation that takes several kernels counts one,
    a gather counts its whole table as read, and what one operation wrote the next reads again. That is
    what unfused elementwise code does on a GPU when tensors outgrow the cache; for exact traffic, count
    inside the kernels.
    """
    count = Count()
    with _torch_part().Launches() as seen:
        yield count
    count.values = {"launches": seen.launches, "bytes_read": seen.read, "bytes_written": seen.written}


@register("leaked_bytes")
@contextmanager
def leaked_bytes(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """Memory that came into being in the block and is alive at its end, in bytes.

    leaked_bytes   storages that torch's operations made, and NumPy's arrays, after a garbage collection

    Drop the function's result inside the block to see what the function left behind elsewhere. With the
    result held, the count is all that the call keeps alive: the result, and whatever stands behind it for
    the backward pass, however it was saved. Gradients that arrived in leaves are counted too.

    torch's part is counted if torch was imported before the block.
    """
    from llmcourse.grading.cost_traced import numpy_memory

    count = Count()
    births = _torch_part().Births() if sys.modules.get("torch") else None
    with numpy_memory() as arrays, births or nullcontext():
        tensors = births.memory if births else Tally()
        yield count
        if tensors.held or arrays():
            gc.collect()
        leaked = tensors.held + arrays()
    count.values = {"leaked_bytes": leaked}


@register("traced_peak_bytes")
@contextmanager
def traced_peak_bytes(*, arguments: Sequence[object] = ()) -> Iterator[Count]:
    """The most that Python and NumPy had allocated at one time, above what they had at the start.

    traced_peak_bytes   as `tracemalloc` sees it: arrays to the byte, and every Python object with them
                        (a few kilobytes of noise). torch's memory is not in it: see `peak_bytes`.
    """
    from llmcourse.grading.cost_traced import peak_memory

    count = Count()
    with peak_memory() as peak:
        yield count
        highest = peak()
    count.values = {"traced_peak_bytes": highest}


def _torch_part() -> ModuleType:
    try:
        from llmcourse.grading import cost_torch
    except ImportError as error:
        raise _missing("this counter", "torch") from error
    return cost_torch


def _missing(what: str, package: str) -> MissingPackageError:
    return MissingPackageError(
        f"{what} needs {package}, which cannot be imported here.",
        "It counts that package's own operations. Labs whose point is to do without hide it.",
        "traced_peak_bytes or leaked_bytes, which need NumPy only.",
    )


def _where(made: Counter) -> str:
    return f"{getattr(made, '__module__', '?')}.{getattr(made, '__qualname__', made)}"
