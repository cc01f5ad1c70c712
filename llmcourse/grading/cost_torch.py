"""Watching torch: what it saves for backward, what its operations allocate, read and write.

Two of torch's own doors are used. `saved_tensors_hooks` hands over every tensor that an operation keeps
for its backward pass. A dispatch mode sees every ATen operation below autograd, in the forward and in
the backward pass, after composite operations have been taken apart (a linear layer is a transpose, which
is a view, and a matrix product). Operations are seen where they run, so a backward pass on a GPU's own
threads is seen too.

This module imports torch. Import it inside a function.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmcourse.errors import GraphError
from llmcourse.grading.cost_memory import Memory, Tally

# Operations that make memory and leave it as it is, or a CPU number that a kernel takes as a parameter.
NOT_LAUNCHED = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::scalar_tensor",
}
# Operations that write in place what does not depend on what was there.
OVERWRITES = {
    "aten::bernoulli_",
    "aten::cauchy_",
    "aten::copy_",
    "aten::exponential_",
    "aten::fill_",
    "aten::geometric_",
    "aten::log_normal_",
    "aten::normal_",
    "aten::random_",
    "aten::uniform_",
    "aten::zero_",
}


def storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The memory that a tensor stands on: one storage, or one for each part of a sparse tensor."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        return []
    return [part.untyped_storage() for part in parts]


def address(storage: torch.UntypedStorage) -> int:
    """Where a storage lies; for one without data (meta, empty) a negative number of its own."""
    return storage.data_ptr() or -storage._cdata


# ── saved for backward ───────────────────────────────────────────────────────────────────────────


class _Watch:
    def __init__(self, arguments: Sequence[object]) -> None:
        self.arguments, self.own, self.given = Memory(arguments), Tally(), Tally()


_watching: list[_Watch] = []  # torch calls only the innermost hooks: they report to every open block


class _Kept:
    """What a graph holds in place of a tensor that it saves. It dies when the graph lets go."""

    __slots__ = ("holds", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # an operation's own output would hold the operation: a cycle
        self.version = tensor._version
        self.holds: list[tuple[Tally, int]] = []
        for storage in storages(tensor):
            where = address(storage)
            for watch in _watching:
                tally = watch.given if where in watch.arguments else watch.own
                tally.hold(where, storage.nbytes())
                self.holds.append((tally, where))

    def __del__(self) -> None:
        for tally, where in self.holds:
            tally.drop(where)

    def unpack(self) -> torch.Tensor:
        shape, now = list(self.tensor.shape), self.tensor._version
        if now != self.version:
            raise GraphError(
                f"a tensor of shape {shape}, saved for the backward pass, has been modified by an in-place "
                f"operation: saved at version {self.version}, it is now at {now}.",
                "Its gradient would be computed from numbers that are no longer there.",
                "the operation that makes a new tensor (y = y + 1) in place of the one that writes (y += 1).",
            )
        return self.tensor


@contextmanager
def watch_saved(arguments: Sequence[object]) -> Iterator[tuple[Tally, Tally]]:
    """Follow what operations of this block save: (memory of its own, memory of the arguments)."""
    watch = _Watch(arguments)
    _watching.append(watch)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_Kept, _Kept.unpack):
            yield watch.own, watch.given
    finally:
        _watching.remove(watch)


# ── operations ───────────────────────────────────────────────────────────────────────────────────


class Operations(TorchDispatchMode):
    """Calls `saw` after every ATen operation of the block."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping the compiler imports it, at the first operation: seconds, inside the block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            with self:  # in inference mode composite operations come whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self.saw(func, args, kwargs, out)
        return out

    def saw(self, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        raise NotImplementedError


class Births(Operations):
    """The storages that operations of the block make, from birth to death.

    largest   the largest of them, in bytes
    memory    how much of it is alive, now and at most
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.memory = 0, Tally()
        self._born: dict[int, weakref.ref] = {}

    def saw(self, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        # `torch.tensor([…])` makes its memory before the dispatcher is reached, and lifts it;
        # `from_numpy` does the same with NumPy's memory, which cannot be resized.
        lifted = func._schema.name == "aten::lift_fresh"
        old = set() if lifted else {s._cdata for s in _storages_in((args, kwargs))}
        for storage in _storages_in(out):
            key, nbytes = storage._cdata, storage.nbytes()
            known = self._born.get(key)
            if known is not None and known() is not None:
                self.memory.resize(key, nbytes)
            elif key in old or (lifted and not storage.resizable()):
                continue
            else:
                # A storage's Python object lives as long as its memory, whoever holds that, graphs included.
                self._born[key] = weakref.ref(storage, partial(_died, self.memory, key))
                self.memory.hold(key, nbytes)
            self.largest = max(self.largest, nbytes)


def _died(memory: Tally, key: int, _: weakref.ref) -> None:
    memory.drop(key)


class Launches(Operations):
    """Operations that would launch a kernel, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read = self.written = 0

    def saw(self, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        name = func._schema.name
        if name in NOT_LAUNCHED or torch.Tag.inplace_view in func.tags:
            return
        inputs, changed, replaced = [], [], []
        for argument, value in _bound(func, args, kwargs):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            tensors = _tensors_in(value)
            if writes:
                changed += tensors
            if writes and (argument.is_out or name in OVERWRITES):
                replaced += tensors
            else:
                inputs += tensors
        old = {s._cdata for t in (*inputs, *replaced) for s in storages(t)}
        made = [t for t in _tensors_in(out) if any(s._cdata not in old for s in storages(t))]
        written = _bytes([*changed, *made])
        if written:
            self.launches += 1
            self.read += _bytes(inputs)
            self.written += written


def _bound(func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The operation's declared arguments with the values that they got."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]
        elif position < len(args) and not argument.kwarg_only:
            yield argument, args[position]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storages_in(value: Any) -> list[torch.UntypedStorage]:
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found += storages(leaf)
        elif isinstance(leaf, torch.UntypedStorage):
            found.append(leaf)
    return found


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes that reading these takes, each of them once: a dimension of stride 0 is one element."""
    total, seen = 0, set()
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            total += sum(s.nbytes() for s in storages(tensor))
            continue
        what = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if what in seen:
            continue
        seen.add(what)
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride or not size else 1
        # Overlapping windows show the same elements again.
        total += min(elements * tensor.element_size(), tensor.untyped_storage().nbytes())
    return total
