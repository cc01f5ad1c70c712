"""Calls of a learner's function that launches Triton kernels, and what may be asked of their traffic.

    @softmax.check("x is read once, y is written once, nothing else moves")
    def traffic(t: Trial) -> None:
        x = t.tensor(5, 100)
        call = run(t, x, watch=TRAFFIC)
        at_minimum(call, loads=x.nbytes, stores=x.nbytes, what="x")

Every call runs in Triton's interpreter, on a machine with a GPU too. A fault of a kernel (an access outside
of a tensor, a name that Triton does not have) becomes a Mismatch that names the line, and is part of what a
named mistake is recognised by: a load outside is another mistake than a store outside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmcourse.grading.compare import Mismatch
from llmcourse.grading.perform import Call, Failure
from llmcourse.grading.plain import tensor_laid_out
from llmcourse.grading.trial import RaisedError, Trial

if TYPE_CHECKING:
    from torch import Tensor

TRAFFIC = ("kernel_bytes", "launches")
DOTS = ("kernel_bytes", "kernel_dots", "launches")

_PLACE = re.compile(r"^[^\n]*?:(\d+): ")
_FAULT = re.compile(r"(load|store|atomic) (?:of|by) ")
_STUB = re.compile(r"name 'NotImplementedError' is not defined|does not compile Python's raise")


def tensor(t: Trial, *shape: int, dtype: str = "float32", scale: float = 1.0, order: str = "C") -> Tensor:
    """Normal random numbers as a torch tensor; `order` "rows" leaves gaps between rows, "T" transposes."""
    import torch

    numbers = torch.from_numpy(t.normal(*shape, scale=scale)).to(getattr(torch, dtype))
    return tensor_laid_out(numbers, order)


def run(t: Trial, *args: Any, watch: Sequence[str] = ()) -> Call:
    """Call the judged function, its kernels interpreted.

    watch   costs that this check is about (`TRAFFIC`, `DOTS`)

    Raises   RaisedError, Mismatch for a fault of a kernel.
    """
    try:
        return t.perform(*args, watch=("kernels_here", *watch))
    except RaisedError as error:
        if error.failure.kind != "KernelFault":
            raise
        call, told = error.call, _told(error.failure)
        call.error = told
        if told.kind == "NotImplementedError":
            raise RaisedError(call) from None
        raise _mismatch(told) from None


def result(t: Trial, *args: Any) -> Any:
    """The value of `run`."""
    return run(t, *args).value


def at_minimum(call: Call, *, loads: int, stores: int, reads: str, writes: str) -> None:
    """The kernels load and store these numbers of bytes and no more, and torch computes nothing beside them.

    reads, writes   what the bytes are, for the message
    """
    costs = call.costs
    if costs["launches"]:
        raise Mismatch(
            f"beside the kernel, torch runs {costs['launches']} operation{'s' * (costs['launches'] > 1)}, "
            f"reading {costs['bytes_read']:,} bytes and writing {costs['bytes_written']:,}",
            tries="one launch that does it all; torch.empty for results, strides where x is not contiguous.",
        )
    for name, have, want, what in (
        ("loaded", costs["kernel_load_bytes"], loads, reads),
        ("stored", costs["kernel_store_bytes"], stores, writes),
        ("changed atomically", costs["kernel_atomic_bytes"], 0, "no atomics"),
    ):
        if have > want:
            raise Mismatch(f"{have:,} bytes are {name}, expected {want:,}: {what}")


def _told(failure: Failure) -> Failure:
    """A kernel's fault with a kind of its own."""
    if _STUB.search(failure.message):  # a kernel's body is still the lab's `raise NotImplementedError`
        return replace(failure, kind="NotImplementedError", message="not implemented yet")
    found = _FAULT.match(_PLACE.sub("", failure.message))
    return replace(failure, kind=f"{found[1]} outside" if found else failure.kind)


def _mismatch(failure: Failure) -> Mismatch:
    """What and why as the text, with the line that it happened in; what to try as such."""
    what, _, rest = failure.message.partition("\n")
    why, _, fix = rest.strip().rpartition("\n")
    if place := _PLACE.match(what):
        line, what = int(place[1]), what[place.end() :]
        source = failure.source.strip() if line == failure.line else ""
        what = f"line {line}: {source}\n{what}" if source else f"line {line}: {what}"
    return Mismatch(f"{what}\n{why.strip()}".strip(), tries=fix.strip().removeprefix("Try "))
