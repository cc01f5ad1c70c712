"""Python values → what a kernel's parameters hold, with the mistakes that a GPU would not notice.

A launch hands a kernel bytes. A pointer to float64 where the kernel reads float32, a 2.5 for an int, a tensor
that autograd watches: on a GPU each of these gives wrong numbers in silence. Here each is an error that names
the argument, the kernel's declaration and what to pass instead.
"""

from __future__ import annotations

import ctypes
import numbers
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from llmcourse.vgpu.isa import DTYPES, Variable
from llmcourse.vgpu.memory import ArgumentError
from llmcourse.vgpu.signature import Element, Parameter

if TYPE_CHECKING:
    import torch

POINTER_BYTES = 8


@dataclass(frozen=True)
class Argument:
    """One value for one parameter.

    name   in the source, or arg0, arg1, … where the source is not known
    value  what was passed; `data` what the kernel gets: an array or tensor for a pointer, a NumPy number, or
           bytes for a structure
    const  the kernel declares that it only reads the array
    """

    name: str
    value: Any
    data: Any
    const: bool = False

    @property
    def is_array(self) -> bool:
        return isinstance(self.data, np.ndarray) or is_tensor(self.data)


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a torch tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def bind(
    kernel: str, sizes: Sequence[Variable], declared: Sequence[Parameter] | None, values: Sequence[object]
) -> list[Argument]:
    """Match values to parameters.

    sizes     the parameters as PTX has them; `declared` as the source has them, None where unknown

    Raises   ArgumentError for a wrong number of arguments, and for a value that its parameter cannot take.
    """
    if declared is not None and len(declared) != len(sizes):
        declared = None  # a macro in the declaration: better no check than a wrong one
    if len(values) != len(sizes):
        raise _wrong_count(kernel, sizes, declared, values)
    out = []
    for i, (size, value) in enumerate(zip(sizes, values, strict=True)):
        parameter = declared[i] if declared is not None else None
        out.append(_Slot(kernel, i, size, parameter).take(value))
    return out


def _wrong_count(
    kernel: str, sizes: Sequence[Variable], declared: Sequence[Parameter] | None, values: Sequence[object]
) -> ArgumentError:
    listed = f" ({', '.join(p.text for p in declared)})" if declared else ""
    if len(values) < len(sizes):
        left = [p.text for p in declared[len(values) :]] if declared else []
        fix = f"passing {' and '.join(left)} as well." if left else "passing the missing ones."
    else:
        extra = len(values) - len(sizes)
        which = "argument" if extra == 1 else f"{extra} arguments"
        fix = f"dropping the last {which}; grid and block go into kernel[grid, block]."
    return ArgumentError(
        f"{kernel} takes {_count(len(sizes))}{listed}, and {len(values)} were passed.",
        "A launch copies one value into each parameter, in order.",
        fix,
    )


def _count(n: int) -> str:
    return f"{n or 'no'} argument{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class _Slot:
    """A parameter that waits for its value."""

    kernel: str
    index: int
    size: Variable
    declared: Parameter | None

    @property
    def name(self) -> str:
        return self.declared.name if self.declared and self.declared.name else f"arg{self.index}"

    @property
    def what(self) -> str:
        shown = f" ({self.declared.text})" if self.declared else ""
        return f"argument {self.index + 1} of {self.kernel}{shown}"

    @property
    def element(self) -> Element | None:
        return self.declared.element if self.declared else None

    @property
    def could_be_pointer(self) -> bool:
        if self.declared is not None:
            return self.declared.pointer
        return self.size.size == POINTER_BYTES and self.size.type in ("u64", "b64", "s64")

    def take(self, value: Any) -> Argument:
        const = bool(self.declared and self.declared.const)
        array = isinstance(value, np.ndarray) or is_tensor(value)
        if array and self.could_be_pointer:
            return Argument(self.name, value, self._array(value), const)
        if array and value.ndim == 0:
            return Argument(self.name, value, self._number(value.item()), const)
        if array:
            raise ArgumentError(
                f"{self.what} is a value, and an array of shape {list(value.shape)} was passed.",
                "Only a pointer parameter takes an array.",
                "a number, or a parameter declared as a pointer.",
            )
        if value is None and self.could_be_pointer:
            return Argument(self.name, value, np.uint64(0), const)
        if self.declared is not None and self.declared.pointer:
            raise ArgumentError(
                f"{self.what} is a pointer, and {_short(value)} was passed.",
                "A pointer parameter takes an array; the kernel reads and writes its memory in place.",
                f"a torch tensor or NumPy array{_suggested(self.element)}.",
            )
        return Argument(self.name, value, self._number(value), const)

    def _array(self, value: Any) -> Any:
        if is_tensor(value):
            self._check_tensor(value)
            dtype, size = str(value.dtype).removeprefix("torch."), value.element_size()
        else:
            if value.dtype.hasobject or not value.dtype.isnative:
                raise ArgumentError(
                    f"{self.what} has dtype {value.dtype}.",
                    "A kernel reads plain numbers in the machine's own byte order.",
                    "array.astype(np.float32), for instance.",
                )
            dtype, size = value.dtype.name, value.dtype.itemsize
        if self.element is not None and not _fits(self.element, dtype, size):
            want = str(self.element)
            module = "torch" if is_tensor(value) else "np" if hasattr(np, want) else "ml_dtypes"
            fix = f"{self.name}.{'to' if is_tensor(value) else 'astype'}({module}.{want})"
            raise ArgumentError(
                f"{self.what} points to {want}, and an array of {dtype} was passed.",
                f"The kernel would read the bytes of {dtype} numbers as {want}: nothing converts them.",
                f"{fix}, or another type in the kernel.",
            )
        return value

    def _check_tensor(self, tensor: torch.Tensor) -> None:
        torch = sys.modules["torch"]
        if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda"):
            sparse = tensor.layout is not torch.strided
            where = f"a tensor of layout {tensor.layout}" if sparse else f"on device {tensor.device}"
            raise ArgumentError(
                f"{self.what} is {where}.",
                "A kernel gets the address of ordinary memory, of the CPU or of an NVIDIA GPU.",
                "x.to_dense() or x.cpu().",
            )
        watched = tensor.requires_grad and torch.is_grad_enabled()
        if watched and not (self.declared and self.declared.const):
            raise ArgumentError(
                f"{self.what} is a tensor that requires gradients.",
                "Autograd does not see what a kernel writes: the gradients would belong to other values.",
                f"{self.name}.detach(), or const in the declaration if the kernel only reads it.",
            )

    def _number(self, value: Any) -> np.generic | bytes:
        """A NumPy number of the parameter's size, or the bytes of a structure."""
        element, size = self.element, self.size.size
        if isinstance(value, ctypes.Structure | ctypes.Array | np.void | bytes | bytearray | memoryview):
            return self._structure(memoryview(value).tobytes())  # type: ignore[arg-type]
        if element is not None and element.nbytes != size:
            element = None
        if element is not None and element.count > 1:
            if not isinstance(value, tuple | list) or len(value) != element.count:
                raise ArgumentError(
                    f"{self.what} holds {element.count} numbers, and {_short(value)} was passed.",
                    "A vector type travels as one value of several numbers.",
                    f"a tuple of {element.count} numbers.",
                )
            single = Element(element.kind, element.size)
            return b"".join(np.asarray(self._convert(v, single)).tobytes() for v in value)
        if element is None and self.size.type == "b8":
            raise ArgumentError(
                f"{self.what} is a structure of {size} bytes, and {_short(value)} was passed.",
                "Python does not know the structure's fields, nor where the compiler put them.",
                f"struct.pack(…), a ctypes.Structure or a NumPy structured scalar of {size} bytes.",
            )
        if element is None:
            dtype = DTYPES[self.size.type]
            element = Element({"f": "f"}.get(dtype.kind, "u"), dtype.itemsize)
            signed = dtype.kind != "f"  # PTX says u32 for int and unsigned alike
        else:
            signed = False
        number = self._convert(value, element, signed)
        if self.size.type == "b8":
            return np.asarray(number).tobytes()
        return np.frombuffer(np.asarray(number).tobytes(), DTYPES[self.size.type])[0]

    def _structure(self, data: bytes) -> bytes:
        if len(data) != self.size.size:
            raise ArgumentError(
                f"{self.what} has {self.size.size} bytes, and {len(data)} were passed.",
                "C++ pads a structure so that each field starts at a multiple of its size.",
                "struct.pack with x for each byte of padding, or a ctypes.Structure, which pads alike.",
            )
        return data

    def _convert(self, value: Any, element: Element, either_sign: bool = False) -> np.generic:
        """A Python or NumPy number as the element's type, unless it would change its value."""
        if not isinstance(value, numbers.Real | np.generic) or isinstance(value, np.void):
            raise ArgumentError(
                f"{self.what} is a number, and {_short(value)} was passed.",
                "A parameter that is no pointer takes one number.",
                "a Python number, or a NumPy one.",
            )
        if element.kind in ("i", "u", "?"):
            return self._integer(value, element, either_sign)
        number = float(value)
        largest = {2: 65504.0, 4: float(np.finfo(np.float32).max), 8: float(np.finfo(np.float64).max)}
        if element.kind == "f" and abs(number) > largest[element.size] and abs(number) != float("inf"):
            raise ArgumentError(
                f"{self.what} cannot hold {number:g}: the largest {element} is {largest[element.size]:g}.",
                "A larger number would become infinite.",
                "a smaller number, float('inf') if infinity is meant, or double in the kernel.",
            )
        with np.errstate(all="ignore"):
            return _bfloat16(number) if element.kind == "b" else _float_dtype(element).type(number)

    def _integer(self, value: Any, element: Element, either_sign: bool) -> np.generic:
        if not isinstance(value, numbers.Integral | np.bool_):
            whole = int(value) if float(value).is_integer() else None
            raise ArgumentError(
                f"{self.what} is an integer, and {_short(value)} was passed.",
                "A float is not cut to an integer in silence; in Python, / always gives a float.",
                f"int({value}), or // instead of /."
                if whole is not None
                else "// instead of /, or round(x).",
            )
        bits = 1 if element.kind == "?" else 8 * element.size
        low = -(1 << bits - 1) if element.kind == "i" or either_sign else 0
        high = (1 << bits - (element.kind == "i")) - 1
        if not low <= int(value) <= high:
            raise ArgumentError(
                f"{self.what} cannot hold {int(value):,}.",
                f"{8 * element.size} bits hold {low:,} to {high:,}.",
                "a wider type in the kernel, such as long long." if element.size < 8 else "a smaller number.",
            )
        code = "i" if element.kind == "i" else "u"
        raw = (int(value) & ((1 << 8 * element.size) - 1)).to_bytes(element.size, "little")
        return np.frombuffer(raw, f"{code}{element.size}")[0]


def _float_dtype(element: Element) -> np.dtype:
    if element.kind == "f":
        return np.dtype(f"f{element.size}")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[element.kind]))


def _bfloat16(number: float) -> np.uint16:
    """The bits of a number in bfloat16: a float32 cut in half, rounded to the nearest, ties to even."""
    bits = int(np.float32(number).view(np.uint32))
    if number != number:
        return np.uint16(0x7FFF)
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _fits(element: Element, dtype: str, size: int) -> bool:
    """Whether an array of this dtype may stand behind a pointer to these elements. Unknown dtypes may."""
    known = {"bfloat16": "b", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "bool": "?"}
    found = re.fullmatch(r"(float|u?int|complex)\d+", dtype)
    kind = known.get(dtype) or (
        {"float": "f", "int": "i", "uint": "u", "complex": "c"}[found[1]] if found else ""
    )
    if not kind:
        return True
    if kind == "c":
        return element.kind == "f" and element.count == 2 and element.nbytes == size
    if element.size != size:
        return False
    integers = ("i", "u", "?")
    if element.kind in integers:
        return kind in integers
    # NumPy has neither bfloat16 nor fp8: their raw bits as unsigned integers are the usual stand-in.
    return kind == element.kind or (kind == "u" and element.kind != "f")


def _suggested(element: Element | None) -> str:
    return f" of {element}" if element else ""


def _short(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '…'} ({type(value).__name__})"


def as_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """The same memory as a NumPy array; formats that NumPy lacks as unsigned integers of their size."""
    if not is_tensor(array):
        return array  # type: ignore[return-value]
    torch = sys.modules["torch"]
    tensor = array.detach()
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()])
    return tensor.numpy()
