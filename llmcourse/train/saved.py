"""What a forward pass keeps for the backward pass, tensor by tensor.

An operation whose gradient needs a number from the forward pass keeps the tensor that holds it: a product
keeps its other factor, exp its own result, an addition nothing. PyTorch hands every such tensor to
`torch.autograd.graph.saved_tensors_hooks` at the moment it is kept. Listening there gives the exact bill:

    with saved_tensors(model) as saved:
        loss = cross_entropy(model, batch)
    saved.bytes, saved.table()

A storage counts once, however many operations keep it and however many views of it they keep; and it counts
whole, because a view of a part keeps all of it alive. Weights are kept too but are in memory anyway: they
are counted apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcourse.notebook import Table


@dataclass(frozen=True)
class Kept:
    """One storage that is kept: the first tensor seen on it, and the operation that made that."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    made_by: str


@dataclass
class Saved:
    """The storages kept for backward: `tensors` made on the way, and bytes of those that were there before.

    calls   tensors handed over in all, of which several may share a storage
    """

    tensors: list[Kept] = field(default_factory=list)
    given_bytes: int = 0
    calls: int = 0

    @property
    def bytes(self) -> int:
        """Bytes made by the forward pass and kept: the price of training over inference."""
        return sum(kept.nbytes for kept in self.tensors)

    def table(self, most: int = 8) -> Table:
        """Storages of one shape and maker together, the largest groups first."""
        groups: dict[tuple[str, str, str], list[int]] = {}
        for kept in self.tensors:
            dtype = str(kept.dtype).removeprefix("torch.")
            groups.setdefault((kept.made_by, str(list(kept.shape)), dtype), []).append(kept.nbytes)
        ordered = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
        rows = [(*what, len(sizes), sum(sizes)) for what, sizes in ordered[:most]]
        rest = sum(sum(sizes) for _, sizes in ordered[most:])
        note = f"and {rest:,} bytes in {len(ordered) - most} smaller groups" if rest else ""
        return Table(["made by", "shape", "format", "how many", "bytes"], rows, note)


@contextmanager
def saved_tensors(*given: nn.Module | Tensor) -> Iterator[Saved]:
    """Count what operations inside the `with` keep for backward.

    given   modules and tensors that are in memory anyway: what is kept of them goes to `given_bytes`

    What a backward pass inside the `with` computes and keeps again is added. Tensors kept inside hooks
    that the block itself sets (offload, torch's non-reentrant checkpoint) go to those hooks and are not
    seen here. torch's check that nothing kept is overwritten is off inside.
    """
    saved = Saved()
    known = {_key(t) for t in _tensors(given)}
    # Not held: that would keep alive what a recomputed piece keeps in passing. So an address can come again.
    seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.calls += 1
        key = _key(tensor)
        if key not in seen or seen[key]() is None:
            seen[key] = weakref.ref(tensor.untyped_storage())
            nbytes = tensor.untyped_storage().nbytes()
            if key in known:
                saved.given_bytes += nbytes
            else:
                maker = type(tensor.grad_fn).__name__.removesuffix("Backward0") if tensor.grad_fn else "–"
                saved.tensors.append(Kept(tuple(tensor.shape), tensor.dtype, nbytes, maker))
        return tensor.detach()  # an operation that keeps its own output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _tensors(given: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for value in given:
        if isinstance(value, Tensor):
            yield value
        else:
            yield from value.parameters()
            yield from value.buffers()


def _key(tensor: Tensor) -> int:
    """The storage under a tensor, by its address; a storage without memory (meta) by its object."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -id(storage)
