"""Triton kernels run on a CPU, one program after another, in NumPy: the one file that knows Triton's insides.

Triton brings an interpreter: `InterpreterBuilder` has a NumPy function for every operation that the compiler
would emit. It is switched on for a whole process by an environment variable, before any kernel is defined,
and some of it is wrong: bfloat16 is added as integers and truncated, a carry in a conversion to 8 bits is
lost, an access outside a tensor reads whatever is there. Here its arithmetic is kept, and the rest is done
again:

    chosen per launch     `intercepting` takes the launches of a block of code, and nothing else
    formats               values are arrays of `ml_dtypes`' bfloat16 and float8 formats, and every conversion
                          rounds once, to nearest even, as torch does
    dot                   computed and accumulated in float32 (float64, int32), as tensor cores do
    memory                `_memory`: bounds, alignment, counts
    Python                `_rewrite`: what Triton's compiler means by `if`, `and`, `for`, `=`
    names                 a kernel sees what the compiler would let it see: constexpr globals and no others

Where a GPU differs: float32 `tl.dot` is exact here, and TF32 on a GPU unless input_precision="ieee"; what is
too large for float8e5 becomes infinity here, as in torch, and 57344 on a GPU that converts in hardware (for
float8e4nv all three say 448); a masked load without `other` gives 0 here and is undefined there.

While a kernel runs, Triton's language is patched: its functions find the interpreter by themselves. The
patches ask which thread calls and whether it runs a kernel, so that another thread may compile meanwhile;
they go when the launch ends, however it ends. One launch runs at a time.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from types import FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler.code_generator import CodeGenerator
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner, Config, Heuristics
from triton.runtime.jit import ConstexprFunction, JITFunction, TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from llmcourse.errors import CourseError
from llmcourse.kernels import _math, _rewrite
from llmcourse.kernels._memory import Argument, Index3, Memory, Tally
from llmcourse.vgpu.faults import KernelFault
from llmcourse.vgpu.isa import SourceLine


class LaunchError(CourseError, TypeError):
    """A launch whose grid or arguments Triton would not take."""


# ── number formats ───────────────────────────────────────────────────────────────────────────────

_SMALL = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
    "fp8e4b8": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "fp8e5b16": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_DTYPES: dict[torch.dtype, tl.dtype] = {
    torch.bool: tl.int1,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.uint16: tl.uint16,
    torch.int32: tl.int32,
    torch.uint32: tl.uint32,
    torch.int64: tl.int64,
    torch.uint64: tl.uint64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.float8_e5m2fnuz: tl.float8e5b16,
}
_FORMATS: dict[str, np.dtype] = {
    **_SMALL,
    "int1": np.dtype(bool),
    **{
        name: np.dtype(name)
        for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    },
    **{f"fp{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    """NumPy's dtype for a Triton type: addresses as uint64, small floats in formats of their own."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return _FORMATS["uint64"]
    try:
        return _FORMATS[scalar.name]
    except KeyError:
        raise TypeError(f"the format {scalar.name} has no counterpart on a CPU") from None


def _wide(data: np.ndarray) -> np.ndarray:
    """Values in a format in which NumPy multiplies matrices fast and exactly enough: float32 or float64."""
    if data.dtype.kind in "iub":
        return data.astype(np.float64)
    return data.astype(np.float32) if data.dtype.itemsize < 4 else data


Handle = stock.TensorHandle


def _tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """A block, or a scalar for data without dimensions."""
    dtype = dtype.scalar
    data = np.asarray(data)
    if data.dtype != _np_dtype(dtype):
        data = data.astype(_np_dtype(dtype))
    if not data.shape:
        return tl.tensor(Handle(data.reshape(1), dtype), dtype)
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, list(data.shape)))


# ── the operations ───────────────────────────────────────────────────────────────────────────────


class Builder(stock.InterpreterBuilder):
    """Triton's interpreter with right formats, right NaN rules, and memory that is watched."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch
        # debug: tl.device_assert is checked. Overflow of int32 is not: it wraps, as on a GPU.
        self.options: Any = replace(self.options, debug=True, sanitize_overflow=False)
        # A tensor core takes 16 columns of 16-bit numbers, 32 of 8-bit ones; Triton pads the other sides.
        self.codegen_fns["min_dot_size"] = lambda lhs, rhs: (
            (1, 1, 32) if lhs.scalar.primitive_bitwidth == 8 else (1, 1, 16)
        )

    # constants that the stock builder lacks or refuses

    def get_bf16(self, value: float) -> Any:
        return Handle(np.array([value], np.float32).astype(_SMALL["bf16"]), tl.bfloat16)

    def get_fp32(self, value: float) -> Any:
        return Handle(np.array([value], np.float64).astype(np.float32), tl.float32)

    def get_fp16(self, value: float) -> Any:
        return Handle(np.array([value], np.float64).astype(np.float16), tl.float16)

    def get_all_ones_value(self, type: Any) -> Any:
        dtype = _np_dtype(type)
        return Handle(~np.zeros(1, dtype), type.scalar)

    # memory

    def create_load(self, ptr: Any, *_: Any) -> Any:
        return self._load(ptr, None, None)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *_: Any, **__: Any) -> Any:
        return self._load(ptrs, mask, other)

    def _load(self, ptrs: Any, mask: Any, other: Any) -> Any:
        element = ptrs.get_element_ty()
        dtype = _np_dtype(element)
        data = self.launch.memory.load(ptrs.data, _array(mask), _array(other), dtype)
        return Handle(data, element)

    def create_store(self, ptr: Any, val: Any, *_: Any) -> None:
        self._store(ptr, val, None)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *_: Any) -> None:
        self._store(ptrs, value, mask)

    def _store(self, ptrs: Any, value: Any, mask: Any) -> None:
        values = value.data
        dtype = _np_dtype(ptrs.get_element_ty())
        if values.dtype != dtype:
            values = values.view(dtype) if values.dtype.itemsize == dtype.itemsize else values.astype(dtype)
        self.launch.memory.store(ptrs.data, values, _array(mask))

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        name = rmwOp.name
        data = self.launch.memory.atomic(name, ptr.data, val.data, _array(mask))
        return Handle(data, val.dtype.scalar)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        data = self.launch.memory.compare_and_swap(ptr.data, cmp.data, val.data)
        return Handle(data, cmp.dtype.scalar)

    def create_descriptor_reduce(self, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        ptrs, mask = desc.materialize_pointers(indices)
        self.launch.memory.atomic(kind.name, ptrs.data, value.data, _array(mask))

    # conversions

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        dtype = _np_dtype(dst_type)
        data = src.data
        if data.dtype == dtype:
            return Handle(data, dst_type.scalar)
        if dtype.kind in "iu" and data.dtype.kind not in "iub":
            data = _to_integers(data, dtype)
        elif dtype == _SMALL["fp8e4nv"]:  # has no infinity: what is too large becomes the largest
            data = np.clip(data.astype(np.float32), -448, 448)
        return Handle(data.astype(dtype), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        result = self.cast_impl(src, dst_type)
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            result.data = _toward_zero(src.data, result.data)
        return result

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        data = src.data if src.data.flags.c_contiguous else np.ascontiguousarray(src.data)
        return Handle(data.view(_np_dtype(dst_type)), dst_type.scalar)

    create_int_to_ptr = create_bitcast
    create_ptr_to_int = create_bitcast

    # arithmetic

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        a, b = lhs.data, rhs.data
        if a.dtype == np.bool_ and b.dtype == np.bool_ and op in (np.add, np.subtract, np.multiply):
            out = (op(a.view(np.uint8), b.view(np.uint8)) & 1).astype(np.bool_)  # int1 has one bit
        else:
            out = op(a, b)
        if out.dtype == np.bool_:
            return Handle(out, tl.int1)
        scalar = lhs.dtype.scalar
        if out.dtype != a.dtype:
            out = out.astype(_np_dtype(scalar))
        if scalar.is_floating():
            self.launch.float_ops += out.size
        return Handle(out, scalar)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        scalar = other.dtype.scalar
        return Handle(op(lhs.data, rhs.data, other.data).astype(_np_dtype(scalar), copy=False), scalar)

    def unary_op(self, arg: Any, op: Any) -> Any:
        scalar = arg.dtype.scalar
        out = op(arg.data)
        if scalar.is_floating():
            self.launch.float_ops += out.size
        return Handle(out.astype(arg.data.dtype, copy=False), scalar)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if propagate_nans == ir.PROPAGATE_NAN.NONE:
            return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
        return self.binary_op(self.binary_op(arg, lo, np.maximum), hi, np.minimum)

    def create_ashr(self, lhs: Any, rhs: Any) -> Any:
        signed = np.dtype(f"i{lhs.data.dtype.itemsize}")
        out = lhs.data.view(signed) >> rhs.data.view(signed)
        return Handle(out.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_lshr(self, lhs: Any, rhs: Any) -> Any:
        unsigned = np.dtype(f"u{lhs.data.dtype.itemsize}")
        out = lhs.data.view(unsigned) >> rhs.data.view(unsigned)
        return Handle(out.view(lhs.data.dtype), lhs.dtype.scalar)

    def create_umulhi(self, lhs: Any, rhs: Any) -> Any:
        dtype = lhs.data.dtype
        unsigned = np.dtype(f"u{dtype.itemsize}")
        a, b = lhs.data.view(unsigned), rhs.data.view(unsigned)
        if dtype.itemsize < 8:
            double = np.dtype(f"u{2 * dtype.itemsize}")
            high = (a.astype(double) * b.astype(double)) >> double.type(8 * dtype.itemsize)
        else:
            half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
            a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
            middle = a1 * b0 + (a0 * b0 >> half)
            high = a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half)
        return Handle(high.astype(unsigned).view(dtype), lhs.dtype.scalar)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        dtype = z.data.dtype
        wide = np.float64 if dtype.itemsize < 8 else dtype  # the product of two float32 is exact in float64
        out = (x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)).astype(dtype)
        self.launch.float_ops += 2 * out.size
        return Handle(out, z.dtype.scalar)

    def create_fneg(self, arg: Any) -> Any:
        return self.unary_op(arg, np.negative)

    def create_fabs(self, arg: Any) -> Any:
        return self.unary_op(arg, np.abs)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_erf(self, arg: Any) -> Any:
        return self.unary_op(arg, _math.erf)

    def create_extern_elementwise(
        self, lib: str, path: str, symbol: str, args: Any, ret_type: Any, pure: Any
    ) -> Any:
        function = _math.libdevice(symbol)
        if function is None:
            self.launch.unsupported(f"the library function {symbol}", "the operations of tl.math")
        out = np.asarray(function(*[a.data for a in args]))
        self.launch.float_ops += out.size
        return Handle(out.astype(_np_dtype(ret_type), copy=False), ret_type.scalar)

    def create_inline_asm(self, *_: Any) -> Any:
        self.launch.unsupported("inline assembly", "the same operation in Triton's language, or a GPU")

    # blocks

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        return Handle(np.broadcast_to(arg.data.reshape(()), ret_ty.shape), arg.dtype.scalar)

    def create_unsplat(self, arg: Any) -> Any:
        return Handle(arg.data.reshape(-1)[:1], arg.dtype.scalar)

    def create_histogram(self, data: Any, bins: int, mask: Any) -> Any:
        values = data.data.reshape(-1)
        if mask is not None:
            values = values[mask.data.reshape(-1)]
        values = values[(values >= 0) & (values < bins)]
        return Handle(np.bincount(values, minlength=bins).astype(np.int32), tl.int32)

    def create_dot(self, a: Any, b: Any, d: Any, *_: Any) -> Any:
        lhs, rhs, start = a.data, b.data, d.data
        *batch, m, k = lhs.shape
        self.launch.dot(2 * math.prod(batch) * m * k * rhs.shape[-1])
        product = np.matmul(_wide(lhs), _wide(rhs))
        if start.dtype.kind in "iu":
            out = product.astype(np.int64).astype(start.dtype) + start
        else:
            out = (product + _wide(start)).astype(start.dtype)
        return Handle(out, d.dtype.scalar)

    def create_dot_scaled(self, *_: Any) -> Any:
        self.launch.unsupported("tl.dot_scaled", "tl.dot on operands that the kernel has scaled itself")

    # messages

    def create_assert(self, condition: Any, message: str) -> None:
        if np.all(condition.data):
            return
        failed = np.flatnonzero(~np.broadcast_to(condition.data, condition.data.shape).astype(bool))
        where = f", first at element {int(failed[0])} of its block" if condition.data.size > 1 else ""
        self.launch.memory.fault(
            "assertion",
            f"tl.device_assert failed in {self.launch.program}{where}: {message or 'no message'}.",
            "The kernel itself says that this must not happen. On a GPU the check runs only with "
            "TRITON_DEBUG=1 or debug=True.",
            "tl.device_print of the values that it tests.",
        )

    def create_assume(self, condition: Any) -> None:
        if not np.all(condition.data):
            self.launch.memory.fault(
                "assertion",
                f"tl.assume is false in {self.launch.program}.",
                "The compiler builds on it: the code that it makes would be wrong.",
                "a weaker assumption, or arguments that fulfil it.",
            )


def _array(handle: Any) -> np.ndarray | None:
    """The array behind a handle; some versions pass masks as bare arrays."""
    return handle if handle is None or isinstance(handle, np.ndarray) else handle.data


def _to_integers(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats cut to integers as a GPU does it: what is too large becomes the largest, NaN becomes 0."""
    wide = np.dtype(f"{dtype.kind}{max(4, dtype.itemsize)}")
    limits = np.iinfo(wide)
    x = np.trunc(data.astype(np.float64))
    out = np.where(np.isnan(x), 0.0, np.clip(x, limits.min, limits.max))
    too_large = out >= float(limits.max)  # in float64 the largest int64 is one too many
    return np.where(too_large, limits.max, np.where(too_large, 0.0, out).astype(wide))


def _toward_zero(exact: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The neighbour of `nearest` that is nearer to zero, where rounding went away from zero."""
    x, y = np.abs(exact.astype(np.float64)), np.abs(nearest.astype(np.float64))
    bits = np.ascontiguousarray(nearest).view(f"u{nearest.dtype.itemsize}")
    largest = np.array(ml_dtypes.finfo(nearest.dtype).max, nearest.dtype).view(bits.dtype)
    sign = bits & bits.dtype.type(1 << (8 * bits.itemsize - 1))
    bits = np.where(y > x, bits - bits.dtype.type(1), bits)
    overflown = np.isfinite(x) & ~np.isfinite(y)
    return np.where(overflown, sign | largest, bits).astype(bits.dtype).view(nearest.dtype)


# ── reductions and scans ─────────────────────────────────────────────────────────────────────────


class _BlockInCondition(Exception):
    """A combine function decided by `if` on what is here a whole block."""


def _combine(
    launch: Launch,
    function: Any,
    left: Sequence[np.ndarray],
    right: Sequence[np.ndarray],
    types: Sequence[Any],
) -> list[np.ndarray]:
    """The combine function on many pairs at once; pair by pair if it branches on a value."""
    call = launch.function(function)
    try:
        launch.combining += 1
        out = call(*[_tensor(x, t) for x, t in zip([*left, *right], [*types, *types], strict=True)])
        out = out if isinstance(out, tuple | tl.tuple) else (out,)
        return [
            np.broadcast_to(o.handle.data, left[0].shape).astype(x.dtype)
            for o, x in zip(out, left, strict=True)
        ]
    except _BlockInCondition:
        results = [np.empty_like(x) for x in left]
        for i in np.ndindex(left[0].shape):
            out = call(*[_tensor(x[i], t) for x, t in zip([*left, *right], [*types, *types], strict=True)])
            for result, o in zip(results, out if isinstance(out, tuple | tl.tuple) else (out,), strict=True):
                result[i] = o.handle.data.reshape(())
        return results
    finally:
        launch.combining -= 1


def _reduce(launch: Launch, input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False) -> Any:
    """tl.reduce: neighbours are combined in pairs, then pairs of pairs, as the threads of a warp do."""
    if isinstance(input, tl.tensor):
        return _reduce(launch, (input,), axis, combine_fn, keep_dims)[0]
    axis, keep_dims = _plain(axis), bool(_plain(keep_dims))
    types = [x.dtype for x in input]
    data = [x.handle.data for x in input]
    shape = data[0].shape
    if axis is None:
        data, along = [x.reshape(-1) for x in data], 0
    else:
        along = axis + len(shape) if axis < 0 else axis
    fast = _FAST_REDUCE.get(getattr(combine_fn, "fn", None))
    if fast and len(data) == 1:
        launch.float_ops += data[0].size if types[0].is_floating() else 0
        data = [fast(data[0], along)]
    else:
        data = [np.moveaxis(x, along, -1) for x in data]
        while data[0].shape[-1] > 1:
            data = _combine(
                launch, combine_fn, [x[..., 0::2] for x in data], [x[..., 1::2] for x in data], types
            )
        data = [x[..., 0] for x in data]
    if keep_dims:
        kept = [1] * len(shape) if axis is None else [1 if i == along else s for i, s in enumerate(shape)]
        data = [x.reshape(kept) for x in data]
    return tuple(_tensor(x, t) for x, t in zip(data, types, strict=True))


def _scan(launch: Launch, input: Any, axis: Any, combine_fn: Any, reverse: Any = False) -> Any:
    """tl.associative_scan: distances 1, 2, 4, …, all lanes at once (Hillis and Steele 1986)."""
    if isinstance(input, tl.tensor):
        return _scan(launch, (input,), axis, combine_fn, reverse)[0]
    axis, reverse = _plain(axis), bool(_plain(reverse))
    types = [x.dtype for x in input]
    data = [np.moveaxis(x.handle.data, axis, -1) for x in input]
    if reverse:
        data = [x[..., ::-1] for x in data]
    length = data[0].shape[-1]
    lane = np.arange(length)
    step = 1
    while step < length:
        before = [np.roll(x, step, -1) for x in data]
        both = _combine(launch, combine_fn, before, data, types)
        data = [np.where(lane >= step, new, old) for new, old in zip(both, data, strict=True)]
        step *= 2
    if reverse:
        data = [x[..., ::-1] for x in data]
    data = [np.ascontiguousarray(np.moveaxis(x, -1, axis)) for x in data]
    return tuple(_tensor(x, t) for x, t in zip(data, types, strict=True))


def _sum(x: np.ndarray, axis: int) -> np.ndarray:
    wide = np.float32 if x.dtype.itemsize < 4 and x.dtype.kind not in "iub" else x.dtype
    return np.sum(x, axis=axis, dtype=wide).astype(x.dtype)


_FAST_REDUCE: dict[Any, Callable[[np.ndarray, int], np.ndarray]] = {
    tl.standard._sum_combine.fn: _sum,
    tl.standard._elementwise_max.fn: lambda x, axis: _extreme(x, axis, np.fmax, np.max),
    tl.standard._elementwise_min.fn: lambda x, axis: _extreme(x, axis, np.fmin, np.min),
}


def _extreme(x: np.ndarray, axis: int, of_floats: np.ufunc, of_integers: Any) -> np.ndarray:
    return of_integers(x, axis=axis) if x.dtype.kind in "iub" else of_floats.reduce(x, axis=axis)


def _map_elementwise(launch: Launch, function: Any, *args: Any, pack: Any = 1) -> Any:
    if _plain(pack) != 1:
        launch.unsupported("tl.map_elementwise with pack", "pack=1")
    return launch.function(function)(*args)


def _multiple_of(launch: Launch, input: Any, values: Any) -> Any:
    """A promise to the compiler, which is believed: so it is checked, where it is about one number."""
    wanted = [_plain(v) for v in values] if isinstance(values, list | tuple | tl.tuple) else [_plain(values)]
    if isinstance(input, tl.tensor) and input.handle.data.size == 1 and len(wanted) == 1:
        value = int(input.handle.data.reshape(()))
        if value % wanted[0]:
            launch.memory.fault(
                "assertion",
                f"tl.multiple_of promises a multiple of {wanted[0]} in {launch.program}; "
                f"the value is {value}.",
                "The compiler builds on it: the code that it makes would be wrong.",
                "a promise that holds for all arguments.",
            )
    return input


def _hint(launch: Launch, input: Any, values: Any) -> Any:
    return input


def _static_assert(launch: Launch, cond: Any, msg: Any = "") -> None:
    if not _plain(cond):
        launch.memory.fault(
            "assertion",
            f"tl.static_assert failed in {launch.kernel}: {_plain(msg) or 'no message'}.",
            "The kernel cannot be compiled with these constexpr arguments.",
            "other values of its constexpr arguments.",
        )


def _static_print(launch: Launch, *values: Any, sep: str = " ", end: str = "\n", **_: Any) -> None:
    print(*[_plain(v) for v in values], sep=sep, end=end)


def _plain(value: Any) -> Any:
    """What a constexpr holds."""
    return value.value if isinstance(value, tl.constexpr) else value


# ── one launch ───────────────────────────────────────────────────────────────────────────────────

MOST_TURNS = 1_000_000
"""Iterations of `while` loops in one program after which it is taken to be endless."""


class Launch:
    """One kernel that is running: its memory, its functions, and what Python's statements mean in it."""

    def __init__(self, kernel: Any, *, counting: bool) -> None:
        self.kernel: str = kernel.fn.__name__
        self.file: str = kernel.fn.__code__.co_filename
        self.shown_file = _shown(self.file, self.kernel)
        self.memory = Memory(self.kernel, counting=counting, where=self.where, here=self.here)
        self.counting = counting
        self.float_ops = 0
        self.dot_lines: dict[int, list[int]] = {}
        self.builder = Builder(self)
        self.semantic = TritonSemantic(self.builder)
        self.functions: dict[Any, FunctionType] = {}
        self.combining = 0
        self.turns = 0

    @property
    def program(self) -> str:
        return self.memory._by()

    def where(self) -> SourceLine:
        """The line of the kernel's file that is running; a function from elsewhere is where it is called."""
        frame = sys._getframe(1)
        line, file = 0, self.file
        while frame is not None:
            if frame.f_code.co_filename == file:
                line = frame.f_lineno
                break
            frame = frame.f_back  # type: ignore[assignment]
        return SourceLine(self.shown_file, line)

    def place(self, frames: Iterable[tuple[FrameType, int]]) -> SourceLine:
        """The line of the reader's own code among these frames of a kernel (the innermost last)."""
        calls = [
            (frame.f_code.co_filename, line, frame.f_code.co_name)
            for frame, line in frames
            if _rewrite.NAME in frame.f_globals and not frame.f_globals["__name__"].startswith("triton.")
        ]
        own = [line for file, line, _ in calls if file == self.file]
        at = SourceLine(self.shown_file, own[-1] if own else 0)
        if calls and calls[-1][0] != self.file:
            file, line, function = calls[-1]
            return SourceLine(_shown(file, function), line, inlined_at=at)
        return at

    def here(self) -> SourceLine:
        """The line that is running, of whichever function: what a fault names."""
        frames: list[tuple[FrameType, int]] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        return self.place(reversed(frames))

    def dot(self, flops: int) -> None:
        entry = self.dot_lines.setdefault(self.where().line, [0, 0])
        entry[0] += 1
        entry[1] += flops

    def unsupported(self, what: str, instead: str) -> NoReturn:
        self.memory.fault(
            "unsupported",
            f"{what} in {self.kernel} cannot run on a CPU.",
            "The interpreter has Triton's operations in NumPy, and the mathematical functions of libdevice.",
            f"{instead}.",
        )

    def sources(self) -> list[tuple[int, list[str]]]:
        """(first line, lines) of the functions that ran and are in the kernel's file, in the file's order."""
        here = {fn for fn in self.functions if fn.__code__.co_filename == self.file}
        return sorted((_sources[fn] for fn in here), key=lambda source: source[0])

    # functions

    def function(self, jit: Any) -> FunctionType:
        """The Python function of a `@triton.jit` function, rewritten; the same one throughout a launch."""
        made = self.functions.get(jit.fn)
        if made is None:
            made = self.functions[jit.fn] = self._make(jit)
        return made

    def _make(self, jit: Any) -> FunctionType:
        fn = jit.fn
        code, names = _code(jit)
        scope = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
        namespace: dict[str, Any] = {
            _rewrite.NAME: self,
            "__name__": fn.__module__,
            "__builtins__": {
                **{name: self._resolved(value) for name, value in CodeGenerator.builtin_namespace.items()},
                "min": functools.partial(self._extreme, "minimum", builtins.min),
                "max": functools.partial(self._extreme, "maximum", builtins.max),
            },
        }
        for name in names:
            if name in scope and _visible(scope[name]):
                namespace[name] = self._resolved(_plain(scope[name]))
        made = _rewrite.build(code, namespace, fn)
        if made.__defaults__:
            made.__defaults__ = tuple(map(_plain, made.__defaults__))
        return made

    def _resolved(self, value: Any) -> Any:
        """What a name means while the language is patched; names imported before still mean the old thing."""
        try:
            return _patches.wrapped.get(value, value)
        except TypeError:  # not hashable
            return value

    def _extreme(self, name: str, plain: Any, *args: Any) -> Any:
        if any(isinstance(a, tl.tensor) for a in args):
            return functools.reduce(lambda a, b: getattr(tl, name)(a, b), args)
        return plain(*map(_plain, args))

    # what rewritten code asks for (`_rewrite.Runtime`)

    def assigned(self, value: Any) -> Any:
        if isinstance(value, int | float | tl.constexpr):
            value = self.semantic.to_tensor(value, False)
            return value
        if type(value) is tuple:
            return tuple(map(self.assigned, value))
        return value

    def constant(self, value: Any) -> Any:
        if isinstance(value, tl.tensor):
            raise TypeError("a name annotated as tl.constexpr must be known when the kernel is compiled")
        return _plain(value)

    def truth(self, value: Any) -> bool:
        if type(value).__name__ == "condition":  # tl.condition, in newer versions: a test with hints
            value = value.condition
        if not isinstance(value, tl.tensor):
            return bool(_plain(value))
        if value.handle.data.size != 1:
            if self.combining:
                raise _BlockInCondition
            raise TypeError(
                "a block of several values cannot decide an `if` or `while`: use tl.where, or reduce it"
            )
        return bool(value.handle.data.reshape(-1)[0])

    def again(self, value: Any) -> bool:
        self.turns += 1
        if self.turns > MOST_TURNS:
            self.memory.fault(
                "endless",
                f"a while loop in {self.program} has run {MOST_TURNS:,} times.",
                "Programs run one after another here, so waiting for what a later one does never ends; "
                "a GPU does not promise to run them together either.",
                "a loop that does not wait for other programs, or two launches.",
            )
        return self.truth(value)

    def both(self, *values: Any) -> Any:
        return self._logical("logical_and", False, values)

    def either(self, *values: Any) -> Any:
        return self._logical("logical_or", True, values)

    def _logical(self, name: str, decisive: bool, values: Sequence[Callable[[], Any]]) -> Any:
        tensors: list[Any] = []
        value: Any = None
        for later in values:
            value = later()
            if isinstance(value, tl.tensor):
                tensors.append(value)
            elif bool(_plain(value)) is decisive:
                return value
        return functools.reduce(lambda a, b: getattr(a, name)(b), tensors) if tensors else value

    def negate(self, value: Any) -> Any:
        return value.__not__() if isinstance(value, tl.tensor) else not _plain(value)

    def same(self, left: Any, right: Any) -> bool:
        return _plain(left) is _plain(right)

    def loop(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is tl.static_range:
            values = [*args, *(kwargs[k] for k in ("arg1", "arg2", "step") if k in kwargs)]
            if any(isinstance(v, tl.tensor) for v in values):
                raise TypeError("the bounds of tl.static_range must be constexpr: the loop is unrolled")
            args = tuple(map(_plain, args))
            return self._static(*args, **{k: _plain(v) for k, v in kwargs.items()})
        if function is tl.range or function is builtins.range:
            return self._range(*args, **{k: v for k, v in kwargs.items() if k in ("arg1", "arg2", "step")})
        raise TypeError("a kernel loops over range, tl.range and tl.static_range only")

    @staticmethod
    def _static(arg1: int, arg2: int | None = None, step: int | None = None) -> range:
        return range(arg1, arg2, step or 1) if arg2 is not None else range(0, arg1, step or 1)

    def _range(self, arg1: Any, arg2: Any = None, step: Any = None) -> Iterator[Any]:
        bounds = (0, arg1, 1) if arg2 is None else (arg1, arg2, 1 if step is None else step)
        low, high, by = (self.semantic.to_tensor(b) for b in bounds)
        dtype = functools.reduce(self.semantic.integer_promote_impl, (low.dtype, high.dtype, by.dtype))
        kind = _np_dtype(dtype)
        for i in range(*(int(t.handle.data.reshape(())) for t in (low, high, by))):
            yield tl.tensor(Handle(np.array([i], kind), dtype), dtype)

    def check(self, test: Any, message: Any = "") -> None:
        if isinstance(test, tl.tensor):
            tl.device_assert(test, _plain(message))
        else:
            _static_assert(self, test, message)

    def method(self, owner: Any, name: str) -> Any:
        found = getattr(owner, name)
        return functools.partial(found, owner) if isinstance(owner, tl.tensor) and _is_jit(found) else found

    def static(self, function: Any) -> Any:
        replacement = {tl.static_assert: _static_assert, tl.static_print: _static_print}.get(function)
        return functools.partial(replacement, self) if replacement else function

    def value_of(self, owner: Any) -> Any:
        return owner.value if hasattr(owner, "value") else owner

    def refuse(self, what: str) -> NoReturn:
        raise TypeError(f"Triton does not compile Python's {what.lower()}")


def _shown(file: str, function: str) -> str:
    """A file's name as readers know it; a notebook's cells are files with numbers for names."""
    cell = "ipykernel" in file or file.startswith("<ipython")
    return f"cell of {function}" if cell else os.path.basename(file)


_codes: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_sources: weakref.WeakKeyDictionary[Any, tuple[int, list[str]]] = weakref.WeakKeyDictionary()


def _code(jit: Any) -> Any:
    """The rewritten code of a function, from the source that it was defined with, and the names in it."""
    fn = jit.fn
    found = _codes.get(fn)
    if found is None:
        lines, first = getattr(jit, "raw_src", None), getattr(jit, "starting_line_number", None)
        if lines is None or first is None:
            lines, first = inspect.getsourcelines(fn)
        file = fn.__code__.co_filename
        found = _codes[fn] = _rewrite.rewrite(list(lines), first, file, _jit_methods(), _syntax())
        _sources[fn] = first, list(lines)
    return found


@functools.cache
def _jit_methods() -> frozenset[str]:
    return frozenset(name for name, value in vars(tl.tensor).items() if _is_jit(value))


@functools.cache
def _syntax() -> frozenset[str]:
    return frozenset(name.removeprefix("visit_") for name in dir(CodeGenerator) if name.startswith("visit_"))


def _is_jit(value: Any) -> bool:
    return isinstance(value, JITFunction | stock.InterpretedFunction)


def _visible(value: Any) -> bool:
    """Whether Triton's compiler lets a kernel see this global."""
    return (
        isinstance(value, ModuleType | ConstexprFunction | tl.dtype | tl.constexpr)
        or _is_jit(value)
        or getattr(value, "__triton_builtin__", False)
        or getattr(value, "__triton_aggregate__", False)
        or str(getattr(value, "__module__", "")).startswith("triton.")
        or (isinstance(value, tuple) and hasattr(value, "_fields"))
        or bool(triton.knobs.compilation.allow_non_constexpr_globals)
    )


# ── the language, patched ────────────────────────────────────────────────────────────────────────


class _Running(threading.local):
    launch: Launch | None = None


_running = _Running()
_LOCK = threading.RLock()
_MISSING = object()


class _Patches:
    """Triton's language while a kernel is interpreted: its functions find the interpreter by themselves."""

    def __init__(self) -> None:
        self.depth = 0
        self.undo: list[tuple[Any, str, Any]] = []
        self.wrapped: dict[Any, Any] = {}
        self.plan: list[tuple[Any, str, Any]] = []
        self.modules: frozenset[str] = frozenset()

    def enter(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        loaded = frozenset(name for name in sys.modules if name.startswith("triton.language"))
        if loaded != self.modules:
            self._prepare(loaded)
        try:
            for owner, name, value in self.plan:
                self.undo.append((owner, name, vars(owner).get(name, _MISSING)))
                setattr(owner, name, value)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        self.depth -= 1
        if self.depth:
            return
        while self.undo:
            owner, name, value = self.undo.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def _prepare(self, loaded: frozenset[str]) -> None:
        modules = [sys.modules[name] for name in sorted(loaded)]
        self.wrapped, self.plan = {}, []
        replaced = {
            tl.core.reduce: _reduce,
            tl.core.associative_scan: _scan,
            getattr(tl.core, "map_elementwise", None): _map_elementwise,
            tl.core.multiple_of: _multiple_of,
            tl.core.max_contiguous: _hint,
            tl.core.max_constancy: _hint,
        }

        def wrap(function: Any) -> Any:
            if function not in self.wrapped:
                self.wrapped[function] = _wrap(function, replaced.get(function))
            return self.wrapped[function]

        classes: dict[type, None] = {}
        for module in modules:
            for name, value in list(vars(module).items()):
                if tl.core.is_builtin(value) and inspect.isfunction(value):
                    self.plan.append((module, name, wrap(value)))
                elif isinstance(value, type) and value.__module__.startswith("triton.language"):
                    classes[value] = None
        for cls in classes:
            for name, value in list(vars(cls).items()):
                if tl.core.is_builtin(value) and inspect.isfunction(value):
                    self.plan.append((cls, name, wrap(value)))
        self._link_libdevice(wrap)
        self.plan += [
            (tl.tensor, "T", property(_transpose)),
            (tl.dtype, "to_ir", _to_ir(tl.dtype.to_ir)),
            (stock, "_get_np_dtype", _np_dtype),
            (JITFunction, "__call__", _called(JITFunction.__call__)),
            (stock.InterpretedFunction, "__call__", _called(stock.InterpretedFunction.__call__)),
        ]
        self.modules = loaded

    def _link_libdevice(self, wrap: Callable[[Any], Any]) -> None:
        """`triton.language.extra.libdevice` is a list of names that a compiler fills in: CUDA's, here."""
        general = sys.modules.get("triton.language.extra.libdevice")
        cuda = sys.modules.get("triton.language.extra.cuda.libdevice")
        if general is None or cuda is None:
            return
        for name, value in list(vars(general).items()):
            target = vars(cuda).get(name)
            if inspect.isfunction(value) and tl.core.is_builtin(target):
                self.wrapped[value] = wrap(target)
                self.plan.append((general, name, self.wrapped[value]))


_patches = _Patches()


def _wrap(function: Any, replacement: Any) -> Any:
    """A function of the language that takes the running launch's interpreter if it is given none."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        launch = _running.launch
        if launch is not None:
            given = kwargs.get("_semantic")
            if given is None or given is launch.semantic:
                if replacement is not None:
                    kwargs.pop("_semantic", None)
                    kwargs.pop("_generator", None)
                    return replacement(launch, *args, **kwargs)
                kwargs["_semantic"] = launch.semantic
        return function(*args, **kwargs)

    return call


def _called(original: Any) -> Any:
    """A `@triton.jit` function called from a kernel."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = _running.launch
        if launch is None:
            return original(self, *args, **kwargs)
        return launch.function(self)(*args, **kwargs)

    return __call__


def _to_ir(original: Any) -> Any:
    """Types stay as they are for the interpreter, which tells signed integers from unsigned ones."""

    def to_ir(self: Any, builder: Any) -> Any:
        return self if isinstance(builder, Builder) else original(self, builder)

    return to_ir


def _transpose(self: Any) -> Any:
    launch = _running.launch
    assert launch is not None, "transposed outside of a kernel"
    return tl.trans(self)


# ── arguments ────────────────────────────────────────────────────────────────────────────────────


class _Arguments:
    """Turns what a launch is given into what its kernel sees, and copies a GPU's memory there and back."""

    here = "cpu"

    def __init__(self, launch: Launch, bounds: str) -> None:
        self.launch, self.bounds = launch, bounds
        self.copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage, list[Argument]]] = {}

    def convert(self, name: str, value: Any, *, constexpr: bool, specialize: bool, annotation: str) -> Any:
        if constexpr or value is None or isinstance(value, str):
            return _plain(value)
        if isinstance(value, bool):
            return _tensor(np.array(value), tl.int1)
        if isinstance(value, int):
            return self._integer(value, specialize, annotation)
        if isinstance(value, float):
            dtype = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp64": tl.float64}.get(annotation, tl.float32)
            return _tensor(np.array(value, np.float64), dtype)
        if isinstance(value, torch.Tensor | TensorWrapper):
            return self._pointer(name, value)
        if isinstance(value, TensorDescriptor):
            return self._descriptor(name, value)
        if isinstance(value, tuple):
            made = [
                self.convert(f"{name}[{i}]", v, constexpr=False, specialize=specialize, annotation="")
                for i, v in enumerate(value)
            ]
            return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
        if isinstance(value, tl.dtype | tl.constexpr) or _is_jit(value):
            return _plain(value)
        raise LaunchError(
            f"{self.launch.kernel} got {name} = {value!r:.80}, a {type(value).__name__}.",
            "A kernel takes torch tensors, tensor descriptors and numbers, and anything for tl.constexpr.",
            f"torch.as_tensor({name}), or annotate the parameter as tl.constexpr.",
        )

    def _integer(self, value: int, specialize: bool, annotation: str) -> Any:
        named = {"i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"}
        if annotation in named:
            return _tensor(
                np.array(value).astype(f"{annotation[0]}{int(annotation[1:]) // 8}"), _named(annotation)
            )
        if value == 1 and specialize:
            return 1  # Triton compiles a kernel of its own for arguments that are 1
        if not -(2**63) <= value < 2**64:
            raise LaunchError(
                f"{self.launch.kernel} got the integer {value}.",
                "A kernel's integers have 64 bits at most.",
                "a smaller one.",
            )
        dtype = tl.int32 if -(2**31) <= value < 2**31 else tl.int64 if value < 2**63 else tl.uint64
        return _tensor(np.array(value, _np_dtype(dtype)), dtype)

    def _pointer(self, name: str, value: Any) -> Any:
        tensor = value.base if isinstance(value, TensorWrapper) else value
        dtype = value.dtype if isinstance(value, TensorWrapper) else _DTYPES.get(value.dtype)
        if dtype is None or tensor.layout is not torch.strided or tensor.is_meta:
            raise LaunchError(
                f"{self.launch.kernel} got {name}, a tensor of {tensor.dtype} "
                f"({tensor.layout}, {tensor.device}).",
                "A kernel reads strided memory of real numbers, integers and booleans.",
                "a dense tensor of such a format (torch.view_as_real for complex numbers).",
            )
        address = self.launch.memory.add(self._argument(name, tensor))
        pointer = tl.pointer_type(dtype)
        return tl.tensor(Handle(np.array([address], np.uint64), pointer), pointer)

    def _argument(self, name: str, tensor: torch.Tensor) -> Argument:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        host = storage
        if tensor.device.type != self.here:
            if key not in self.copies:
                copy = torch.UntypedStorage(storage.nbytes())
                copy.copy_(storage)
                self.copies[key] = (storage, copy, [])
            host = self.copies[key][1]
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        reach = (
            sum(int((s - 1) * stride) for s, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        )
        low, high = (start, start + reach * size) if tensor.numel() else (start, start)
        if self.bounds == "storage":
            low, high = 0, host.nbytes()
        made = Argument(name, _bytes(host), start, low, high, size, tuple(tensor.shape), key)
        if key in self.copies:
            self.copies[key][2].append(made)
        return made

    def _descriptor(self, name: str, value: TensorDescriptor) -> Any:
        made = self.launch.semantic.make_tensor_descriptor(
            base=self._pointer(name, value.base),
            shape=[self._integer(s, False, "") for s in value.shape],
            strides=[
                *[self._integer(s, False, "i64") for s in value.strides[:-1]],
                tl.constexpr(value.strides[-1]),
            ],
            block_shape=[tl.constexpr(b) for b in value.block_shape],
            padding_option=value.padding,
        )
        if getattr(value, "round_f32_to_tf32", False):
            made.handle.round_f32_to_tf32 = True
        return made

    def copy_back(self) -> None:
        for device, host, arguments in self.copies.values():
            if any(argument.written for argument in arguments):
                device.copy_(host)


def _named(annotation: str) -> Any:
    return getattr(
        tl,
        annotation.replace("u", "uint").replace("i", "int")
        if annotation[0] == "u"
        else f"int{annotation[1:]}",
    )


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """A CPU storage as an array of its bytes, without a copy."""
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


# ── running ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Result:
    """What one launch was and did."""

    kernel: Any
    name: str
    grid: Index3
    file: str
    constants: dict[str, Any]
    tallies: dict[tuple[int, str, str], Tally]
    unique: dict[str, dict[str, tuple[int, int]]]
    dots: dict[int, list[int]]
    float_ops: int
    arguments: tuple[str, ...]
    seconds: float
    counted: bool
    sources: list[tuple[int, list[str]]]


_OPTIONS = {
    "num_warps",
    "num_stages",
    "num_ctas",
    "maxnreg",
    "debug",
    "grid",
    "warmup",
    "stream",
    "instrumentation_mode",
}


@functools.cache
def _options() -> frozenset[str]:
    """Keyword arguments that are for the compiler."""
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return frozenset(_OPTIONS)
    return frozenset(_OPTIONS | {f.name for f in fields(CUDAOptions)})


def run(
    kernel: Any, args: Sequence[Any], kwargs: dict[str, Any], grid: Any, *, counting: bool, bounds: str
) -> Result:
    """Run one `@triton.jit` function over its grid."""
    if getattr(kernel, "is_gluon", lambda: False)():
        raise LaunchError(
            f"{kernel.fn.__name__} is written in Gluon.",
            "Gluon names a GPU's own instructions and memories, which the interpreter does not have.",
            "running it on a GPU; llmcourse.kernels.compile_report does not take it either.",
        )
    signature = inspect.signature(kernel.fn)
    given = {k: v for k, v in kwargs.items() if k in signature.parameters}
    strange = [k for k in kwargs if k not in given and k not in _options()]
    try:
        if strange:
            raise TypeError(f"got an unexpected argument {strange[0]!r}")
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise LaunchError(
            f"{kernel.fn.__name__}: {error}.",
            f"Its parameters are {', '.join(signature.parameters)}.",
            "each of them once, by position or by name.",
        ) from None
    bound.apply_defaults()
    for hook in getattr(kernel, "pre_run_hooks", ()):
        hook(*args, **kwargs)
    shape = _grid(kernel.fn.__name__, grid(dict(bound.arguments)) if callable(grid) else grid)
    with _LOCK:
        return _locked(kernel, signature, bound.arguments, shape, counting, bounds)


def _locked(
    kernel: Any,
    signature: inspect.Signature,
    values: dict[str, Any],
    grid: Index3,
    counting: bool,
    bounds: str,
) -> Result:
    launch = Launch(kernel, counting=counting)
    fixed = [_parameter(kernel, i, name) for i, name in enumerate(signature.parameters)]
    outer, _running.launch = _running.launch, launch
    _patches.enter()
    started = time.perf_counter()
    try:
        arguments = _Arguments(launch, bounds)
        with np.errstate(all="ignore"):
            made, constants = {}, {}
            for name, constexpr, specialize, annotation in fixed:
                made[name] = arguments.convert(
                    name, values[name], constexpr=constexpr, specialize=specialize, annotation=annotation
                )
                if constexpr:
                    constants[name] = made[name]
            _programs(launch, kernel, made, grid)
        arguments.copy_back()
    finally:
        _patches.leave()
        _running.launch = outer
    memory = launch.memory
    return Result(
        kernel,
        launch.kernel,
        grid,
        launch.file,
        constants,
        memory.tallies,
        memory.unique() if counting else {},
        launch.dot_lines,
        launch.float_ops,
        tuple(argument.name for argument in memory.arguments.values()),
        time.perf_counter() - started,
        counting,
        launch.sources(),
    )


def _parameter(kernel: Any, position: int, name: str) -> tuple[str, bool, bool, str]:
    """(name, is constexpr, may be specialised, annotated type) of a parameter."""
    annotation = str(inspect.signature(kernel.fn).parameters[name].annotation)
    fixed = getattr(kernel, "do_not_specialize", None) or ()
    return name, "constexpr" in annotation, not (name in fixed or position in fixed), annotation.strip("\"'")


def _programs(launch: Launch, kernel: Any, arguments: dict[str, Any], grid: Index3) -> None:
    function = launch.function(kernel)
    builder, memory = launch.builder, launch.memory
    builder.set_grid_dim(*grid)
    try:
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    builder.grid_idx = memory.program = (x, y, z)
                    launch.turns = 0
                    function(**arguments)
    except KernelFault:
        raise
    except Exception as error:
        raise _explained(launch, kernel, error) from error


def _explained(launch: Launch, kernel: Any, error: Exception) -> KernelFault:
    """An exception of Triton's language as a fault at the kernel's line."""
    frames: list[tuple[FrameType, int]] = []
    step = error.__traceback__
    while step is not None:
        frames.append((step.tb_frame, step.tb_lineno))
        step = step.tb_next
    at = launch.place(frames)
    if isinstance(error, NameError) and error.name in frames[-1][0].f_builtins | kernel.fn.__globals__:
        return KernelFault(
            "invalid",
            f"{launch.kernel} uses the global {error.name}, which is no tl.constexpr.",
            "Triton compiles a kernel once and keeps it; a global that may change is not part of it.",
            f"{error.name} = tl.constexpr(…), or a parameter of the kernel.",
            line=at,
            block=launch.memory.program,
        )
    text = str(error) or type(error).__name__
    return KernelFault(
        "invalid",
        f"{launch.kernel} stopped in {launch.program}: {text.rstrip('.')}.",
        f"Triton's language raised {type(error).__name__} here, as its compiler would.",
        "what the message asks for, at the line that it names.",
        line=at,
        block=launch.memory.program,
    )


def _grid(kernel: str, grid: Any) -> Index3:
    """Three sizes, checked against the limits of a GPU."""
    sizes = tuple(grid) if isinstance(grid, tuple | list | torch.Size) else None
    if sizes is None or not 1 <= len(sizes) <= 3 or not all(hasattr(s, "__index__") for s in sizes):
        raise LaunchError(
            f"{kernel} got the grid {grid!r}.",
            "A grid is a tuple of one to three whole numbers, or a function that gives one.",
            f"{kernel}[(n,)](…).",
        )
    x, y, z = (*(s.__index__() for s in sizes), 1, 1)[:3]
    if min(x, y, z) < 0 or x >= 2**31 or max(y, z) > 65535:
        raise LaunchError(
            f"{kernel} got the grid {(x, y, z)}.",
            "A GPU takes up to 2,147,483,647 programs along the first axis and 65,535 along the others.",
            "the large number on axis 0.",
        )
    return x, y, z


# ── intercepted launches ─────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Block:
    """A block of code whose launches are interpreted.

    config   of autotuned kernels: a `triton.Config`, its position, or None for the first that is not pruned
    """

    counting: bool
    bounds: str = "tensor"
    config: Any = None
    thread: int = field(default_factory=threading.get_ident)
    results: list[Result] = field(default_factory=list)


_blocks: list[Block] = []
_unpatch: list[tuple[Any, Any]] = []


@contextmanager
def intercepting(block: Block) -> Iterator[Block]:
    """Launches of this block of code run here. Blocks nest; each sees all launches inside it.

    A launch on a thread that has opened no block itself (autograd's, for a backward pass on a GPU) belongs to
    every block that is open.
    """
    with _LOCK:
        if not _blocks:
            for cls, make in (
                (JITFunction, _jit_run),
                (stock.InterpretedFunction, _jit_run),
                (Autotuner, _tuned_run),
            ):
                _unpatch.append((cls, cls.run))
                cls.run = make(cls.run)
        _blocks.append(block)
    try:
        yield block
    finally:
        with _LOCK:
            _blocks.remove(block)
            while not _blocks and _unpatch:
                cls, original = _unpatch.pop()
                cls.run = original


def open_blocks() -> list[Block]:
    """The blocks that a launch on this thread belongs to, the innermost last."""
    mine = [block for block in _blocks if block.thread == threading.get_ident()]
    return mine or list(_blocks)


def _jit_run(original: Any) -> Any:
    @functools.wraps(original)
    def run_here(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        blocks = open_blocks()
        if not blocks:
            return original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if warmup:
            return None
        counting = any(block.counting for block in blocks)
        result = run(self, args, kwargs, grid, counting=counting, bounds=blocks[-1].bounds)
        for block in blocks:
            block.results.append(result)
        return None

    return run_here


def _tuned_run(original: Any) -> Any:
    @functools.wraps(original)
    def run_here(self: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = open_blocks()
        if not blocks:
            return original(self, *args, **kwargs)
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        try:
            config = _config(
                self, kwargs, next((b.config for b in reversed(blocks) if b.config is not None), None)
            )
            tuned = {k: v for k, v in config.all_kwargs().items() if v is not None}
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **tuned})
            return self.fn.run(*args, **{**kwargs, **tuned})
        finally:
            self.nargs = None

    return run_here


def _config(tuner: Any, kwargs: dict[str, Any], wanted: Any) -> Config:
    name = tuner.base_fn.__name__
    if isinstance(wanted, Config):
        return wanted
    if wanted is not None:
        try:
            return tuner.configs[wanted]
        except (IndexError, TypeError):
            raise LaunchError(
                f"{name} was asked for its configuration {wanted!r}.",
                f"It is autotuned over {len(tuner.configs)} configurations, numbered from 0.",
                "one of those numbers, or a triton.Config.",
            ) from None
    return next(iter(tuner.prune_configs(kwargs)))


def is_kernel(value: Any) -> bool:
    """Whether `value[grid](…)` is a launch."""
    return isinstance(value, JITFunction | stock.InterpretedFunction | Autotuner | Heuristics)
