"""Numbers against a float64 reference, and the first place where they differ.

The tolerance follows the number format: rounding a right answer once in float32 leaves 6·10⁻⁸ of it,
and a sum of n terms about √n times that. NaN is no wildcard: it equals only a NaN that was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import islice
from typing import Any

import numpy as np

from llmcourse.grading.plain import is_tensor

RTOL = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


class Mismatch(Exception):
    """A property that does not hold: what came and what was expected, without the circumstances."""

    def __init__(self, text: str, *, tries: str = "") -> None:
        super().__init__(text)
        self.text, self.tries = text, tries


def as_array(value: Any) -> np.ndarray:
    """Numbers as an array (of float64 where NumPy lacks their format); Mismatch for what holds none."""
    try:
        array = np.asarray(_to_numpy(value))
    except ValueError:
        raise Mismatch(f"the result is a ragged {type(value).__name__}, expected an array") from None
    if array.dtype.kind not in "biufc":
        raise Mismatch(f"the result is {describe(value)}, expected numbers")
    return array


def _to_numpy(value: Any) -> Any:
    """`value` with NumPy arrays for its tensors."""
    if is_tensor(value):
        try:
            return value.detach().numpy()
        except TypeError:  # bfloat16 and float8
            return value.detach().double().numpy()
    return [_to_numpy(v) for v in value] if isinstance(value, list | tuple) else value


def close(got: Any, expected: Any, *, rtol: float | None = None, atol: float | None = None) -> None:
    """Raise Mismatch unless `got` has the shape of `expected` and its values.

    rtol   default: by `got`'s number format; atol: default rtol times the largest expected magnitude
    """
    want = np.asarray(_to_numpy(expected))
    if got is None and expected is not None:
        raise Mismatch("the result is None, expected an array: is a `return` missing?")
    have = as_array(got)
    if have.shape != want.shape:
        raise Mismatch(f"the result has shape {have.shape}, expected {want.shape}")
    if want.size == 0:
        return
    finite = np.abs(want[np.isfinite(want)]) if want.dtype.kind in "fc" else np.abs(want)
    rtol = (
        RTOL.get(str(got.dtype).removeprefix("torch.") if is_tensor(got) else str(have.dtype), 1e-9)
        if rtol is None
        else rtol
    )
    atol = rtol * float(finite.max(initial=0.0)) if atol is None else atol
    wide = have.astype(np.complex128 if "c" in (have.dtype.kind, want.dtype.kind) else np.float64)
    with np.errstate(all="ignore"):
        right = np.isclose(wide, want, rtol=rtol, atol=atol, equal_nan=True)
    if right.all():
        return
    first = tuple(int(i) for i in np.argwhere(~right)[0])
    more = int((~right).sum()) - 1
    count = f", and at {more} more of {right.size} places" if more else ""
    place = f"first difference at {place_of(first)}: " if first else ""
    raise Mismatch(f"{place}{number(have[first])}, expected {number(want[first])}{count}")


def equal(got: Any, expected: Any) -> None:
    """Raise Mismatch unless `got` is `expected`: exact values, lists and tuples alike."""
    if not _same(got, expected):
        raise Mismatch(f"{describe(got)}, expected {describe(expected)}")


def same_outcome(a: Any, b: Any) -> bool:
    """Whether two results are the same for the purpose of recognising a mistake."""
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and a == b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_outcome(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) or isinstance(b, dict):
        return (
            isinstance(a, dict)
            and isinstance(b, dict)
            and a.keys() == b.keys()
            and all(same_outcome(v, b[k]) for k, v in a.items())
        )
    try:
        x, y = as_array(a), as_array(b)
    except Mismatch:
        return False
    with np.errstate(all="ignore"):
        scale = float(np.abs(y[np.isfinite(y)]).max(initial=0.0)) if y.size else 0.0
        return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))


def number(value: Any) -> str:
    """A number as a reader wants it: 0.412, 3, nan, 1.2e-07."""
    v = value.item() if hasattr(value, "item") else value
    return f"{v:.6g}" if isinstance(v, float | complex) else str(v)


def place_of(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]"


def describe(value: Any, depth: int = 0) -> str:
    """A value in one short line: arrays by shape and number format, small ones by their numbers."""
    if is_tensor(value) or isinstance(value, np.ndarray):
        if isinstance(value, np.ndarray) and 0 < value.size <= 6:
            return " ".join(np.array2string(value, precision=4, separator=", ").split())
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.generic):
        return number(value)
    if isinstance(value, tuple | list | dict) and len(value) and depth == 3:
        return "…"
    if isinstance(value, tuple | list):
        inside = _listed(value, lambda v: describe(v, depth + 1))
        inside += "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict):
        return "{" + _listed(value.items(), lambda kv: f"{kv[0]!r}: {describe(kv[1], depth + 1)}") + "}"
    if callable(value):
        return getattr(value, "says", "") or "a function"
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else text[:77] + "…"


def _listed(items: Collection[Any], one: Callable[[Any], str]) -> str:
    return ", ".join([*map(one, islice(items, 8)), *(["…"] if len(items) > 8 else [])])


def _same(a: Any, b: Any) -> bool:
    a, b = (_to_numpy(v) if is_tensor(v) else v for v in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray | np.generic) or isinstance(b, np.ndarray | np.generic):
        if not all(isinstance(v, np.ndarray | np.generic | int | float | bool) for v in (a, b)):
            return False
        return np.shape(a) == np.shape(b) and bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return type(a) is type(b) and bool(a == b)
