"""Exercise `dequant_gemv`: a vector times 4-bit weights that are never written out."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.perform import Call
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import TRAFFIC, at_minimum, run, tensor
from llmcourse.kernels.language import tl, triton
from llmcourse.labs import late_torch as torch

dequant_gemv = Exercise(
    "dequant_gemv",
    title="A product that reads four bits a weight",
    arguments=("x", "packed", "scale", "zero", "group", "rows"),
    shapes=(
        "x         float32, float16 or bfloat16 tensor [K], contiguous",
        "packed    uint8 [N, K/2], contiguous, as `pack_int4` packs: byte b of a row holds q[2b] in its low",
        "          four bits and q[2b + 1] in its high four",
        "scale     float32 [N, K/group], zero the same, contiguous",
        "group     weights that share a scale and a zero: a power of 2 from 4, divides K",
        "rows      a power of 2: rows of weights that a program takes; N is any number",
        "returns   [N] in x's format, summed in float32",
        "cost      packed, scale and zero are read once, x once by each of ⌈N / rows⌉ programs; the result",
        "          is written once; no weight is written anywhere",
    ),
    formula="y[n] = Σ_g scale[n, g] · Σ_{k in group g} (q[n, k] − zero[n, g]) · x[k]",
    difficulty=4,
    importance=5,
    minutes=45,
    points=8,
    hints=(
        "How many bytes is a group of 32 weights, and which elements of x meet its low halves, which its "
        "high halves? How often would a scale be read if every weight fetched its own?",
        "A program takes `rows` rows and walks along K group by group. A group is a tile [rows, group/2] of "
        "bytes: packed & 15 are its even columns, packed >> 4 its odd ones. Of x it needs the elements 2b "
        "and 2b + 1, two loads of group/2 each; of scale and zero one number a row. A mask says which rows "
        "exist. Convert to float32 before you subtract, and sum in float32.",
        "r = tl.program_id(0) * ROWS + tl.arange(0, ROWS); b = tl.arange(0, HALF); for g in range(0, G): p = "
        "tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0); s "
        "= tl.load(scale + r * G + g, mask=r < N, other=0.0), z likewise; at = x + 2 * (g * HALF + b); even "
        "= tl.load(at).to(tl.float32), odd from at + 1; low = (p & 15).to(tl.float32) - z[:, None], high "
        "from p >> 4; acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1).",
    ),
)


def expected(drawn: tuple[Any, ...], group: int) -> np.ndarray:
    """The product in float64, by weights that are written out."""
    x, packed, scale, zero = drawn
    bytes_ = packed.numpy()
    codes = np.stack((bytes_ & 15, bytes_ >> 4), axis=-1).reshape(len(bytes_), -1).astype(np.float64)
    s, z = (np.repeat(part.double().numpy(), group, axis=1) for part in (scale, zero))
    return ((codes - z) * s) @ x.double().numpy()


def draw(t: Trial, n: int, groups: int, group: int, dtype: str = "float32") -> tuple[Any, ...]:
    """(x, packed, scale, zero): all 16 codes and zeros occur, scales differ by factors."""
    packed = torch.from_numpy(t.integers(0, 256, n, groups * group // 2).astype(np.uint8))
    scale = torch.from_numpy(2.0 ** t.integers(-3, 3, n, groups) * t.integers(5, 9, n, groups) / 8).float()
    zero = torch.from_numpy(t.integers(0, 16, n, groups)).float()
    return tensor(t, groups * group, dtype=dtype), packed, scale, zero


def _agree(
    t: Trial,
    drawn: tuple[Any, ...],
    group: int,
    rows: int,
    what: str = "",
    watch: Any = (),
    **tolerance: float,
) -> Call:
    call = run(t, *drawn, group, rows, watch=watch)
    t.close(call.value, expected(drawn, group), what, **tolerance)
    return call


@dequant_gemv.check("one group: low and high halves meet the even and odd elements of x")
def one_group(t: Trial) -> None:
    x, packed, scale, zero = draw(t, 4, 1, 8)
    scale[:], zero[:] = 1.0, 0.0
    _agree(t, (x, packed, scale, zero), 8, 4)


@dequant_gemv.check("the zero is subtracted from the code, and the difference scaled")
def scaled(t: Trial) -> None:
    _agree(t, draw(t, 4, 1, 16), 16, 4)


@dequant_gemv.check("every group has its own scale and zero")
def many_groups(t: Trial) -> None:
    _agree(t, draw(t, 4, t.odd(3, 5), 8), 8, 4)
    _agree(t, draw(t, 4, 2, 32), 32, 2)


@dequant_gemv.check("any number of rows")
def edges(t: Trial) -> None:
    _agree(t, draw(t, t.odd(5, 11), 2, 8), 8, 4)
    _agree(t, draw(t, 1, 1, 4), 4, 8)


@dequant_gemv.check("float16 and bfloat16 come and go, float32 sums")
def formats(t: Trial) -> None:
    for dtype, rtol in (("float16", 2e-3), ("bfloat16", 8e-3)):
        drawn = draw(t, 3, 2, 16, dtype)
        got = run(t, *drawn, 16, 4).value
        t.equal(str(getattr(got, "dtype", "none")).removeprefix("torch."), dtype, "number format")
        t.close(got, expected(drawn, 16), rtol=rtol)
    # Sums beyond 65,504 on the way, of which little is left at the end.
    x, packed, scale, zero = draw(t, 3, 4, 16, "float16")
    x[:32], x[32:], packed[:], scale[:], zero[:] = 300.0, -299.0, 0xFF, 1.0, 0.0
    _agree(t, (x, packed, scale, zero), 16, 4, "with partial sums of 144,000", rtol=2e-3)


@dequant_gemv.check("codes, scales and zeros are read once, x once a program, the result is written once")
def traffic(t: Trial) -> None:
    n, groups, group, rows = t.odd(5, 11), t.odd(2, 4), 16, 4
    drawn = draw(t, n, groups, group, "float16")
    call = _agree(t, drawn, group, rows, watch=TRAFFIC, rtol=2e-3)
    x, packed, scale, zero = drawn
    programs = -(-n // rows)
    at_minimum(
        call,
        loads=packed.nbytes + scale.nbytes + zero.nbytes + programs * x.nbytes,
        stores=n * x.itemsize,
        reads=f"packed ({packed.nbytes:,}), scale and zero ({scale.nbytes:,} each) once, x ({x.nbytes:,}) "
        f"once by each of {programs} programs",
        writes=f"{n} elements once",
    )


def launched(
    kernel: Any, x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int, *, dtype: Any = None
) -> Any:
    """The wrapper that most solutions have: `rows` rows a program."""
    n, groups = scale.shape
    y = torch.empty(n, dtype=dtype or x.dtype, device=x.device)
    kernel[(-(-n // rows),)](x, packed, scale, zero, y, n, groups, ROWS=rows, HALF=group // 2)
    return y


@triton.jit
def right_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def high_first_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p >> 4).to(tl.float32) - z[:, None]
        high = (p & 15).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="the halves of a byte have changed places: the high one was taken for the even column",
    tries="packed & 15 for column 2b, packed >> 4 for column 2b + 1.",
    caught_by="one_group",
)
def high_first(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(high_first_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def halves_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        first = tl.load(x + 2 * g * HALF + b).to(tl.float32)
        second = tl.load(x + 2 * g * HALF + HALF + b).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * first[None, :] + high * second[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="low halves meet the first half of the group's x, high halves the second: but they are neighbours",
    tries="x[2b] for packed & 15, x[2b + 1] for packed >> 4.",
    caught_by="one_group",
)
def halves_of_x(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(halves_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def signed_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        p = p.to(tl.int8, bitcast=True)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="the bytes are taken as signed: >> 4 copies the sign, and high codes of 8 and more turn negative",
    tries="packed as it comes, uint8, whose >> brings zeros; or & 15 after the shift.",
    caught_by="one_group",
)
def signed_bytes(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(signed_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def fixed_zero_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32)
        high = (p >> 4).to(tl.float32)
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="the zero is left out: the codes are multiplied as they are",
    tries="(q − zero) · scale.",
    caught_by="scaled",
)
def no_zero(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(fixed_zero_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def unscaled_zero_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)[:, None]
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)[:, None]
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) * s - z
        high = (p >> 4).to(tl.float32) * s - z
        acc += tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="q · scale − zero: the zero is a code and is scaled like one",
    tries="(q − zero) · scale.",
    caught_by="scaled",
)
def zero_not_scaled(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(unscaled_zero_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def first_scale_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    s = tl.load(scale + r * G, mask=r < N, other=0.0)
    z = tl.load(zero + r * G, mask=r < N, other=0.0)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="the first group's scale and zero serve the whole row",
    tries="scale + r · G + g, inside the loop over groups.",
    caught_by="many_groups",
)
def first_scale(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(first_scale_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def last_group_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc = s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="each group replaces the sum: only the last one counts",
    tries="acc += …",
    caught_by="many_groups",
)
def last_group_only(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(last_group_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def unmasked_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :])
        s = tl.load(scale + r * G + g)
        z = tl.load(zero + r * G + g)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="the loads have no mask: the last program reads rows that do not exist",
    tries="mask=r[:, None] < N for packed, mask=r < N for scale and zero.",
    caught_by="edges",
)
def unmasked(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(unmasked_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def store_unmasked_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty))


@dequant_gemv.mistake(
    says="the store has no mask: the last program writes past the end of the result",
    tries="mask=r < N in tl.store.",
    caught_by="edges",
)
def store_unmasked(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(store_unmasked_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def half_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, HALF)
    acc = tl.zeros((ROWS,), y.dtype.element_ty)
    for g in range(0, G):
        p = tl.load(packed + r[:, None] * (G * HALF) + g * HALF + b[None, :], mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even = tl.load(x + 2 * (g * HALF + b)).to(tl.float32)
        odd = tl.load(x + 2 * (g * HALF + b) + 1).to(tl.float32)
        low = (p & 15).to(tl.float32) - z[:, None]
        high = (p >> 4).to(tl.float32) - z[:, None]
        acc += (s * tl.sum(low * even[None, :] + high * odd[None, :], axis=1)).to(y.dtype.element_ty)
    tl.store(y + r, acc, mask=r < N)


@dequant_gemv.mistake(
    says="the sum has the format of x: in float16 it overflows at 65,504, and each group rounds",
    tries="tl.zeros((ROWS,), tl.float32), converted once, at the store.",
    caught_by="formats",
)
def half_accumulator(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(half_kernel, x, packed, scale, zero, group, rows)


@dequant_gemv.mistake(
    says="the result is float32, whatever came in",
    tries="torch.empty(N, dtype=x.dtype, device=x.device).",
    caught_by="formats",
)
def widened(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(right_kernel, x, packed, scale, zero, group, rows, dtype=torch.float32)


@triton.jit
def scale_each_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        b = g * HALF + tl.arange(0, HALF)[None, :]
        p = tl.load(packed + r * (G * HALF) + b, mask=r < N, other=0)
        s = tl.load(scale + r * G + b // HALF, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + b // HALF, mask=r < N, other=0.0)
        even = tl.load(x + 2 * b).to(tl.float32)
        odd = tl.load(x + 2 * b + 1).to(tl.float32)
        low = ((p & 15).to(tl.float32) - z) * s
        high = ((p >> 4).to(tl.float32) - z) * s
        acc += tl.sum(low * even + high * odd, axis=1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + row, acc.to(y.dtype.element_ty), mask=row < N)


@dequant_gemv.mistake(
    says="every byte fetches the scale and the zero of its group again",
    tries="one scale and one zero a row of the tile: tl.load(scale + r * G + g), [ROWS], then [:, None].",
    caught_by="traffic",
)
def scale_each(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(scale_each_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def twice_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, 2 * HALF)
    acc = tl.zeros((ROWS,), tl.float32)
    for g in range(0, G):
        at = packed + r[:, None] * (G * HALF) + g * HALF + k[None, :] // 2
        p = tl.load(at, mask=r[:, None] < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        v = tl.load(x + 2 * g * HALF + k).to(tl.float32)
        q = ((p >> (k % 2 * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32) - z[:, None]
        acc += s * tl.sum(q * v[None, :], axis=1)
    tl.store(y + r, acc.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.mistake(
    says="every weight fetches its byte: each byte is read twice",
    tries="a tile [ROWS, group/2] of bytes, of which & 15 and >> 4 make two.",
    caught_by="traffic",
)
def bytes_twice(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(twice_kernel, x, packed, scale, zero, group, rows)


@dequant_gemv.mistake(
    says="a program takes one row, whatever was asked for: x is read again for each of them",
    tries="rows of weights a program, and ⌈N / rows⌉ programs.",
    caught_by="traffic",
)
def one_row(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(right_kernel, x, packed, scale, zero, group, 1)


@dequant_gemv.mistake(
    says="torch writes the weights out first: that moves more bytes than weights in 16 bits would",
    tries="packed as it is into the kernel; & 15 and >> 4 after the load.",
    caught_by="traffic",
)
def written_out(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).float()
    weight = (codes - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    return (weight @ x.float()).to(x.dtype)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@triton.jit
def separate_zero_kernel(x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    acc = tl.zeros((ROWS, HALF), tl.float32)
    share = tl.zeros((ROWS, 1), tl.float32)
    for g in range(0, G):
        b = g * HALF + tl.arange(0, HALF)[None, :]
        p = tl.load(packed + r * (G * HALF) + b, mask=r < N, other=0)
        s = tl.load(scale + r * G + g, mask=r < N, other=0.0)
        z = tl.load(zero + r * G + g, mask=r < N, other=0.0)
        even, odd = tl.load(x + 2 * b).to(tl.float32), tl.load(x + 2 * b + 1).to(tl.float32)
        acc += s * ((p & 15).to(tl.float32) * even + (p >> 4).to(tl.float32) * odd)
        share += s * z * tl.sum(even + odd, axis=1)[:, None]
    total = tl.sum(acc, axis=1)[:, None] - share
    tl.store(y + r, total.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.alternative("the zeros' share apart, as zero · Σ x, and one sum at the end")
def zero_apart(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(separate_zero_kernel, x, packed, scale, zero, group, rows)


@triton.jit
def whole_rows_kernel(
    x, packed, scale, zero, y, N, G, ROWS: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g, b = tl.arange(0, GROUPS), tl.arange(0, HALF)
    some = (r[:, None] < N) & (g[None, :] < G)
    place = g[:, None] * HALF + b[None, :]
    p = tl.load(packed + r[:, None, None] * (G * HALF) + place[None, :, :], mask=some[:, :, None], other=0)
    s = tl.load(scale + r[:, None] * G + g[None, :], mask=some, other=0.0)
    z = tl.load(zero + r[:, None] * G + g[None, :], mask=some, other=0.0)[:, :, None]
    known = (g < G)[:, None]
    even = tl.load(x + 2 * place, mask=known, other=0.0).to(tl.float32)[None, :, :]
    odd = tl.load(x + 2 * place + 1, mask=known, other=0.0).to(tl.float32)[None, :, :]
    part = ((p & 15).to(tl.float32) - z) * even + ((p >> 4).to(tl.float32) - z) * odd
    total = tl.sum(s * tl.sum(part, axis=2), axis=1)
    tl.store(y + r, total.to(y.dtype.element_ty), mask=r < N)


@dequant_gemv.alternative("whole rows at once, a tile of [rows, groups, group/2] bytes")
def whole_rows(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    n, groups = scale.shape
    y = torch.empty(n, dtype=x.dtype, device=x.device)
    most = 1 << (groups - 1).bit_length()
    whole_rows_kernel[(-(-n // rows),)](
        x, packed, scale, zero, y, n, groups, ROWS=rows, HALF=group // 2, GROUPS=most
    )
    return y


@dequant_gemv.alternative("group by group, rows in a mask, one sum a group")
def by_groups(x: Any, packed: Any, scale: Any, zero: Any, group: int, rows: int) -> Any:
    return launched(right_kernel, x, packed, scale, zero, group, rows)
