"""The values that may pass between a learner's code and its judge: plain data, and nothing that runs.

    None, bool, int, float, complex, str, bytes, list, tuple, dict, NumPy arrays and scalars, torch tensors

A learner's object could compare equal to everything, or answer differently each time it is asked. So
what a function returns is rebuilt here from its numbers, and an object of any other type is refused by
name. Between processes the same values travel as JSON with the arrays' bytes behind it: unpacking them
calls nothing that the sender could choose (pickle would).
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from llmcourse.errors import CourseError

MAX_DEPTH = 40
MAX_INT_BITS = 4096
MAX_ELEMENTS = 2_000_000  # of lists, tuples and dicts, in all
MAX_HEAD_BYTES = 8_000_000  # many small lists in it would take a hundred times that in memory
MAX_BYTES = 256_000_000
MAX_ALIKE = 50  # keys of a dict with the same hash: looking one up compares it with all of them
KINDS = "biufc"  # NumPy's bool, int, unsigned, float, complex
SCALARS = frozenset(t for t in np.sctypeDict.values() if np.dtype(t).kind in KINDS)
TENSORS = {  # torch's, without those that are quantized or smaller than a byte
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
}

CallableId = Callable[[Callable[..., Any]], int]
MakeCallable = Callable[[int], Callable[..., Any]]


class NotPlainError(CourseError, TypeError):
    """A value that cannot be judged, or bytes that hold none."""


def plain(value: Any, where: str = "the result") -> Any:
    """`value` rebuilt from exact built-in types, base NumPy arrays and torch tensors.

    Raises NotPlainError for anything else, naming the type and where it was found.
    """
    return _Rebuild(where).value(value)


class _Rebuild:
    def __init__(self, where: str) -> None:
        self.where, self.elements, self.bytes = where, 0, 0

    def value(self, v: Any, depth: int = 0) -> Any:
        kind = type(v)
        if v is None or kind in (bool, float, complex):
            return v
        if kind in (str, bytes):
            self._load(len(v))
            return v
        if kind is int:
            self._room(v.bit_length(), MAX_INT_BITS)
            return v
        if depth > MAX_DEPTH:
            raise self._refuse(v, f"It is nested more than {MAX_DEPTH} deep.")
        # A namedtuple or a defaultdict is read as what it extends, whatever its own methods say.
        for base in (list, tuple):
            if issubclass(kind, base):
                self._count(base.__len__(v))
                return base([self.value(item, depth + 1) for item in base.__iter__(v)])
        if issubclass(kind, dict):
            self._count(dict.__len__(v))
            return {self._key(k, depth + 1): self.value(item, depth + 1) for k, item in dict.items(v)}
        if kind in SCALARS:
            return v
        if issubclass(kind, np.ndarray):  # not isinstance: that asks the object
            return self._array(v)
        torch = sys.modules.get("torch")
        if torch is not None and issubclass(kind, torch.Tensor):
            return self._tensor(v)
        raise self._refuse(v, "Only numbers, text, lists, tuples, dicts, arrays and tensors can be compared.")

    def _key(self, key: Any, depth: int) -> Any:
        if type(key) in (str, int, bool) or key is None:
            return self.value(key)
        if type(key) is tuple and depth <= MAX_DEPTH:
            self._count(len(key))
            return tuple(self._key(part, depth + 1) for part in key)
        if type(key) in SCALARS and np.dtype(type(key)).kind in "iu":
            return int(key)
        raise self._refuse(key, "It is the key of a dict, and keys can be text, integers or tuples of them.")

    def _array(self, v: Any) -> np.ndarray:
        seen = np.ndarray.view(v, np.ndarray)
        if seen.dtype.kind not in KINDS:
            raise self._refuse(v, f"It is an array of {seen.dtype}, which holds no numbers.")
        self._load(seen.nbytes)
        return np.array(seen, copy=True, subok=False, order="K")

    def _tensor(self, v: Any) -> Any:
        import torch

        with torch.no_grad():
            base = torch.Tensor.detach(v)
            strided = type(base) is torch.Tensor and base.layout == torch.strided
            if not strided or base.is_meta or base.is_nested:
                raise self._refuse(v, "Only ordinary (strided) tensors with data can be compared.")
            if str(base.dtype).removeprefix("torch.") not in TENSORS:
                raise self._refuse(v, f"It is a tensor of {base.dtype}, which can't be compared.")
            self._load(base.numel() * base.element_size())
            return base.to("cpu", copy=True).resolve_conj().resolve_neg()

    def _count(self, more: int) -> None:
        self.elements += more
        self._room(self.elements, MAX_ELEMENTS)

    def _load(self, more: int) -> None:
        self.bytes += more
        self._room(self.bytes, MAX_BYTES)

    def _room(self, size: int, limit: int) -> None:
        if size > limit:
            raise NotPlainError(
                f"{self.where} is too large to be judged ({size:,}, and at most {limit:,} are taken).",
                "A right answer to this exercise is far smaller.",
                "returning only what the exercise asks for.",
            )

    def _refuse(self, v: Any, why: str) -> NotPlainError:
        kind = type(v)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        return NotPlainError(f"{self.where} holds a {name}.", why, "np.asarray(…) on numbers of your own.")


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


# ── between processes ────────────────────────────────────────────────────────────────────────────
# A message is: length of the head (8 bytes), the head (JSON), the buffers one after another.
# In the head every value is a JSON scalar or a list [tag, …].


def pack(message: Any, callable_id: CallableId | None = None) -> bytes:
    """Plain `message` as bytes. A function is sent as a number, where `callable_id` gives it one."""
    buffers: list[bytes] = []
    arrays: dict[int, int] = {}  # an array that is there twice arrives as one: writing to it shows at both

    def keep(data: bytes) -> int:
        buffers.append(data)
        return len(data)

    def head(v: Any) -> Any:
        kind = type(v)
        if v is None or kind in (bool, int, str):
            return v
        if kind is float:
            return v if math.isfinite(v) else ["f", repr(v)]
        if kind is complex:
            return ["c", head(v.real), head(v.imag)]
        if kind is bytes:
            return ["b", keep(v)]
        if kind is list:
            return ["l", *map(head, v)]
        if kind is tuple:
            return ["t", *map(head, v)]
        if kind is dict:
            return ["d", *([head(k), head(item)] for k, item in v.items())]
        if isinstance(v, np.generic):
            return ["n", v.dtype.str, keep(v.tobytes())]
        if isinstance(v, np.ndarray):
            if id(v) in arrays:
                return ["=", arrays[id(v)]]
            arrays[id(v)] = len(arrays)
            return ["a", v.dtype.str, list(v.shape), layout(v), keep(v.tobytes(order="C"))]
        if is_tensor(v):
            raw = as_bytes(v).numpy().tobytes()
            dtype = str(v.dtype).removeprefix("torch.")
            return ["T", dtype, list(v.shape), v.requires_grad, keep(raw), tensor_layout(v)]
        if callable_id is not None and callable(v):
            return ["F", callable_id(v)]
        raise NotPlainError(
            f"a {kind.__name__} cannot be sent.", "Only plain data travels.", "plain(value) first."
        )

    text = json.dumps(head(message), allow_nan=False, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return b"".join([struct.pack("<Q", len(text)), text, *buffers])


def unpack(data: bytes, make_callable: MakeCallable | None = None) -> Any:
    """The message that `pack` made. `data` may come from anybody.

    Raises NotPlainError for bytes that `pack` cannot have made.
    """
    try:
        return _Unpack(data, make_callable).message()
    except NotPlainError:
        raise
    except Exception as error:
        raise _broken(f"{type(error).__name__}: {str(error)[:200]}") from None


class _Unpack:
    def __init__(self, data: bytes, make_callable: MakeCallable | None) -> None:
        (size,) = struct.unpack_from("<Q", data)
        if size > min(len(data) - 8, MAX_HEAD_BYTES):
            raise _broken("the head is cut off, or too large")
        self.data, self.at, self.make_callable = data, 8 + size, make_callable
        self.arrays: list[np.ndarray] = []
        self.again = 0  # bytes of arrays that are there more than once, counted each time
        self.head = json.loads(data[8 : 8 + size].decode("utf-8", "surrogatepass"))

    def message(self) -> Any:
        value = self.value(self.head)
        if self.at != len(self.data):
            raise _broken("there are bytes left over")
        return value

    def take(self, size: int) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self.data) - self.at:
            raise _broken("a buffer is cut off")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, h: Any) -> Any:
        if not isinstance(h, list):
            if isinstance(h, dict):
                raise _broken("a JSON object where none can be")
            return h
        tag, rest = h[0], h[1:]
        match tag:
            case "f":
                return float(rest[0])
            case "c":
                return complex(self.value(rest[0]), self.value(rest[1]))
            case "b":
                return self.take(rest[0])
            case "l":
                return [self.value(item) for item in rest]
            case "t":
                return tuple(self.value(item) for item in rest)
            case "d":
                return self.mapping(rest)
            case "n":
                (scalar,) = self.numbers(*rest)
                return scalar
            case "a":
                self.arrays.append(self.array(*rest))
                return self.arrays[-1]
            case "=" if type(rest[0]) is int and rest[0] >= 0:
                return self.seen(rest[0])
            case "T":
                return self.tensor(*rest)
            case "F" if self.make_callable is not None:
                return self.make_callable(rest[0])
        raise _broken(f"an unknown tag {str(tag)[:20]!r}")

    def mapping(self, pairs: list[list[Any]]) -> dict[Any, Any]:
        """Keys of one hash, which a sender can choose, would take a time that grows with their square."""
        keys = [self.value(k) for k, _ in pairs]
        if max(Counter(map(hash, keys)).values(), default=0) > MAX_ALIKE:
            raise _broken("keys of a dict were chosen to be slow")
        return dict(zip(keys, (self.value(item) for _, item in pairs), strict=True))

    def seen(self, place: int) -> np.ndarray:
        """An array once more. A short list of them would be a large array as soon as it is made one."""
        self.again += self.arrays[place].nbytes + 1
        if self.again > MAX_BYTES:
            raise _broken(f"arrays that are there again, with more than {MAX_BYTES:,} bytes")
        return self.arrays[place]

    def numbers(self, dtype: str, size: int) -> np.ndarray:
        kind = _dtype(dtype)
        if kind.kind == "b":  # a byte that is neither 0 nor 1 would be a bool that equals neither
            return np.frombuffer(self.take(size), np.uint8) != 0
        return np.frombuffer(self.take(size), kind)

    def array(self, dtype: str, shape: list[int], order: str, size: int) -> np.ndarray:
        return laid_out(self.numbers(dtype, size).reshape(_shape(shape)), order)

    def tensor(self, dtype: str, shape: list[int], requires_grad: bool, size: int, order: str = "C") -> Any:
        import torch

        if dtype not in TENSORS:
            raise _broken(f"a tensor of {str(dtype)[:20]!r}")
        kind = getattr(torch, dtype)
        raw = torch.frombuffer(bytearray(self.take(size)), dtype=torch.uint8) if size else torch.empty(0)
        tensor = (raw != 0 if dtype == "bool" else raw.view(kind)) if size else torch.empty(0, dtype=kind)
        return tensor_laid_out(tensor.reshape(_shape(shape)), order).requires_grad_(bool(requires_grad))


def layout(array: np.ndarray) -> str:
    """How an array lies in memory: `C` or `F` contiguous, or with `gaps`."""
    flags = array.flags
    return "C" if flags.c_contiguous else "F" if flags.f_contiguous else "gaps"


def laid_out(array: np.ndarray, order: str) -> np.ndarray:
    """A writable copy of `array` with that layout; `gaps` leaves what `between` gives between elements."""
    if order != "gaps" or array.ndim == 0:
        return np.array(array, order="F" if order == "F" else "C")
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), between(array.dtype), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


ROW_GAP = 3  # elements between the rows of a tensor that lies in `rows`


def as_bytes(tensor: Any) -> Any:
    """A tensor's numbers in C order, as a tensor of bytes."""
    import torch

    # A copy: one element counts as contiguous whatever its stride, and `view` wants a stride of 1.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8)


def tensor_layout(tensor: Any) -> str:
    """How a torch tensor lies in memory: `C` contiguous, `T` with its last two axes exchanged, `rows` with
    gaps between its rows. Any other arrangement is called `C`, and arrives so."""
    if tensor.ndim < 2 or tensor.is_contiguous():
        return "C"
    if tensor.mT.is_contiguous():
        return "T"
    return "rows" if tensor.stride() == _row_strides(tensor.shape) else "C"


def tensor_laid_out(tensor: Any, order: str) -> Any:
    """A copy of a tensor with that layout; `rows` leaves NaN (the largest integer) in the gaps."""
    import torch

    if order == "T" and tensor.ndim >= 2:
        return tensor.mT.clone(memory_format=torch.contiguous_format).mT
    if order != "rows" or tensor.ndim < 2 or not tensor.numel():
        return tensor.clone(memory_format=torch.contiguous_format)
    kind = tensor.dtype
    gap = math.nan if kind.is_floating_point else True if kind == torch.bool else torch.iinfo(kind).max
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + ROW_GAP), gap, dtype=kind)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def _row_strides(shape: Any) -> tuple[int, ...]:
    strides, step = [1], shape[-1] + ROW_GAP
    for size in reversed(shape[1:-1]):
        strides.append(step)
        step *= size
    return (*([step] if len(shape) > 1 else []), *reversed(strides))


def between(dtype: np.dtype) -> Any:
    """What lies around an array that a learner's function gets: NaN, or the largest integer."""
    if dtype.kind in "fc":
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max


def _shape(sizes: list[int]) -> list[int]:
    if any(type(n) is not int or n < 0 for n in sizes):
        raise _broken("a size is negative or no integer")
    return sizes


def _dtype(text: Any) -> np.dtype:
    dtype = np.dtype(str(text))
    if dtype.kind not in KINDS or dtype.hasobject:
        raise _broken(f"an array of {dtype}")
    return dtype


def _broken(what: str) -> NotPlainError:
    return NotPlainError(
        f"these bytes are no message: {what}.",
        "They were not written by this package, or were cut.",
        "the exchange again with a fresh process.",
    )
