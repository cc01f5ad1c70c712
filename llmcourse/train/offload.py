"""Activation offload: what the backward pass needs waits in host memory.

The forward pass fills the GPU's memory from the first block to the last, and the backward pass empties it
from the last to the first: what the first block kept lies there unused the longest. Hooks on saved tensors
move each one out as it is kept, and back when its gradient is computed. Nothing is computed twice; the price
is the bus between them, some 25 to 55 GB/s for PCIe 4 or 5 with 16 lanes, against terabytes a second of the
GPU's own memory.

Copies leave on a stream of their own, from pinned memory, so that the forward pass does not wait for them.
`torch.autograd.graph.save_on_cpu` is torch's form of this, and copies on the stream that computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.errors import ShapeError


@dataclass
class Traffic:
    """Bytes that left, bytes that came back, and bytes of tensors that stayed where they were."""

    out: int = 0
    back: int = 0
    stayed: int = 0


@dataclass
class _Host:
    """A storage's bytes in host memory, and when its copy is complete."""

    bytes: Tensor
    left: torch.cuda.Event | None


@dataclass
class _Away:
    """A tensor that is in host memory, and how it lay on its storage."""

    host: _Host
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


@contextmanager
def offload(*stays: nn.Module | Tensor, least: int = 1 << 16) -> Iterator[Traffic]:
    """Keep in host memory what operations inside the `with` save for backward.

    stays   modules and tensors that are not moved: weights, above all
    least   storages of fewer bytes stay: a copy costs some microseconds whatever its size

    A storage that several operations keep leaves once. It comes back, on the stream that computes, each time
    one of them is differentiated. Nothing saved may be changed in place before. On a CPU the copies are made
    all the same (host to host), so that bytes can be counted and results compared.
    """
    if least < 0:
        raise ShapeError(f"least = {least} bytes.", "It is a size.", "least = 0 to move everything.")
    traffic = Traffic()
    fixed = {t.untyped_storage().data_ptr() for s in stays for t in _tensors_of(s)}
    gone: dict[tuple[int, int], tuple[weakref.ref[torch.UntypedStorage], _Host]] = {}
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def pack(tensor: Tensor) -> _Away | Tensor:
        storage = tensor.untyped_storage()
        nbytes, key = storage.nbytes(), (storage.data_ptr(), tensor._version)
        if key[0] in fixed or nbytes < least or tensor.layout is not torch.strided:
            traffic.stayed += nbytes
            return tensor.detach()
        known = gone.get(key)
        if known is None or known[0]() is None:  # a later storage can lie at the same address
            known = gone[key] = weakref.ref(storage), _leave(storage, tensor.device, stream)
            traffic.out += nbytes
        return _Away(
            known[1], tensor.device, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        )

    def unpack(kept: _Away | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        host = kept.host
        if host.left is not None:
            torch.cuda.current_stream(kept.device).wait_event(host.left)
        back = torch.empty(host.bytes.shape, dtype=torch.uint8, device=kept.device)
        back.copy_(host.bytes, non_blocking=host.left is not None)
        traffic.back += back.nbytes
        return back.view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield traffic
    finally:
        gone.clear()


def _leave(storage: torch.UntypedStorage, device: torch.device, stream: torch.cuda.Stream | None) -> _Host:
    flat = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # type: ignore[call-overload]
    if device.type != "cuda" or stream is None:
        return _Host(flat.clone(), None)
    host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host.copy_(flat, non_blocking=True)
        left = torch.cuda.Event()
        left.record(stream)
    flat.record_stream(stream)  # its memory is given out again only after the copy
    return _Host(host, left)


def _tensors_of(value: nn.Module | Tensor) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        yield from value.parameters()
        yield from value.buffers()
