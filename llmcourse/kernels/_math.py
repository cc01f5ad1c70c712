"""Mathematical functions of CUDA's device library, by their symbols, on NumPy arrays.

Triton's `libdevice.tanh(x)` is a call of the symbol `__nv_tanhf`. A CPU has no such library, but torch has
the functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch

Function = Callable[..., np.ndarray]


def _torch(function: Callable[..., torch.Tensor]) -> Function:
    def call(*arrays: np.ndarray) -> np.ndarray:
        return function(*[torch.from_numpy(np.array(a)) for a in arrays]).numpy()

    return call


erf = _torch(torch.erf)
"""The error function, in the array's own format (float32 or float64)."""


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    width = 8 * x.dtype.itemsize
    exact = _bits(x).astype(object)
    return np.array([width - int(v).bit_length() for v in exact.reshape(-1)], np.int32).reshape(x.shape)


def _first_set(x: np.ndarray) -> np.ndarray:
    exact = _bits(x).astype(object)
    return np.array([(int(v) & -int(v)).bit_length() for v in exact.reshape(-1)], np.int32).reshape(x.shape)


def _reverse(x: np.ndarray) -> np.ndarray:
    width = 8 * x.dtype.itemsize
    exact = [int(f"{int(v):0{width}b}"[::-1], 2) for v in _bits(x).astype(object).reshape(-1)]
    return np.array(exact, f"u{x.dtype.itemsize}").reshape(x.shape).view(x.dtype)


def _round_half_away(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.floor(np.abs(x) + x.dtype.type(0.5)), x)


_SAME = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "cbrt", "sin", "cos", "tan"),
    *("sinh", "cosh", "tanh", "floor", "ceil", "trunc", "rint", "copysign", "hypot", "fmod"),
    *("fmin", "fmax", "isnan", "isinf", "signbit", "nextafter", "ldexp", "fabs"),
)
_ARC = ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")

_FUNCTIONS: dict[str, Function] = {
    **{name: getattr(np, name) for name in _SAME},
    **{f"a{name}": getattr(np, f"arc{name}") for name in _ARC},
    **{name: _torch(getattr(torch.special, name)) for name in ("erfc", "erfinv", "erfcx")},
    "erf": erf,
    "lgamma": _torch(torch.lgamma),
    "tgamma": _torch(
        lambda x: torch.exp(torch.lgamma(x)) * torch.where((x < 0) & (x.floor() % 2 != 0), -1, 1)
    ),
    "j0": _torch(torch.special.bessel_j0),
    "j1": _torch(torch.special.bessel_j1),
    "y0": _torch(torch.special.bessel_y0),
    "y1": _torch(torch.special.bessel_y1),
    "normcdf": _torch(torch.special.ndtr),
    "normcdfinv": _torch(torch.special.ndtri),
    "cyl_bessel_i0": _torch(torch.special.i0),
    "cyl_bessel_i1": _torch(torch.special.i1),
    "exp10": lambda x: np.power(x.dtype.type(10), x),
    "sinpi": lambda x: np.sin(np.pi * x.astype(np.float64)),
    "cospi": lambda x: np.cos(np.pi * x.astype(np.float64)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcbrt": lambda x: 1 / np.cbrt(x),
    "pow": np.power,
    "powi": np.power,
    "fma": lambda x, y, z: x.astype(np.float64) * y + z,
    "fdim": lambda x, y: np.maximum(x - y, 0),
    "remainder": lambda x, y: x - y * np.rint(x / y),
    "abs": np.abs,
    "nearbyint": np.rint,
    "round": _round_half_away,
    "llrint": np.rint,
    "llround": _round_half_away,
    "lrint": np.rint,
    "finite": np.isfinite,
    "isfinite": np.isfinite,
    "ilogb": lambda x: np.frexp(x)[1] - 1,
    "logb": lambda x: np.frexp(x)[1] - 1,
    "saturate": lambda x: np.clip(np.nan_to_num(x, nan=0.0), 0, 1),
    "fdivide": np.divide,
    "div": np.divide,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "rcp": lambda x: 1 / x,
    "max": np.maximum,
    "min": np.minimum,
    "popc": lambda x: np.bitwise_count(_bits(x)),
    "clz": _leading_zeros,
    "ffs": _first_set,
    "brev": _reverse,
}


def libdevice(symbol: str) -> Function | None:
    """The function of a symbol such as `__nv_tanhf`; None if there is none here.

    Fast variants are as exact as the others. Variants that round up, down or toward zero are not provided.
    """
    name = symbol.removeprefix("__nv_")
    if rounded := re.fullmatch(r"[fd](add|sub|mul|div|rcp|sqrt|rsqrt)_rn", name):
        name = rounded[1]
    name = name.removeprefix("fast_").removesuffix("_rn")
    tries = (name, name.removesuffix("f"), name.removesuffix("d"), name.removesuffix("ll"))
    return next((_FUNCTIONS[t] for t in tries if t in _FUNCTIONS), None)
