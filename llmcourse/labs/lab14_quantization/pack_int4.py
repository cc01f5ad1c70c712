"""Exercise `pack_int4`: weights in groups, 16 levels a group, two weights in a byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

LEVELS = 16
SLACK = 1e-4  # of a step: what float32 may add to half a step

pack_int4 = Exercise(
    "pack_int4",
    title="Sixteen levels a group, two weights a byte",
    arguments=("weight", "group"),
    shapes=(
        "weight   float32 tensor [N, K]",
        "group    int: so many neighbours of a row share one scale and one zero; even, and divides K",
        "returns  (packed, scale, zero)",
        "packed   uint8 [N, K/2]: byte b of a row holds q[2b] in its low four bits and q[2b + 1] in its high",
        "         four; each q is 0 … 15",
        "scale    float32 [N, K/group], positive: one fifteenth of the group's range, which reaches from",
        "         its smallest to its largest weight and always holds 0; any number above 0 where all are 0",
        "zero     [N, K/group], whole numbers 0 … 15: the code that stands for 0",
    ),
    formula="lo = min(group, 0), hi = max(group, 0), scale = (hi − lo) / 15, zero = round(−lo / scale), "
    "q = clamp(round(w / scale) + zero, 0, 15);   read back: (q − zero) · scale",
    difficulty=2,
    importance=5,
    minutes=30,
    points=5,
    hints=(
        "Write down one group: 4 weights, −0.3, 0.1, 0.2, 1.2. What are lo, hi and the scale? Which code "
        "does 0 get, and is it a whole number before you round? Why must it be one?",
        "weight.view(N, K // group, group) has the groups as its last axis, and amin and amax along it "
        "give one number a group. Clamp lo to at most 0 and hi to at least 0. A group of zeros has a "
        "range of 0: replace its scale before you divide by it. With the codes as uint8 [N, K], q[:, "
        "0::2] and q[:, 1::2] are what goes into the low and the high bits.",
        "w = weight.view(N, -1, group); lo = w.amin(-1, keepdim=True).clamp(max=0); hi = w.amax(-1, "
        "keepdim=True).clamp(min=0); scale = (hi - lo) / 15; scale = torch.where(scale > 0, scale, 1.0); "
        "zero = torch.round(-lo / scale); q = (torch.round(w / scale) + zero).clamp(0, "
        "15).to(torch.uint8).view(N, K); packed = q[:, 0::2] | (q[:, 1::2] << 4); return packed, "
        "scale[..., 0], zero[..., 0].",
    ),
)


def ranges(weight: Any, group: int) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of every group [N, K/group], in float64."""
    w = weight.double().numpy()
    w = w.reshape(w.shape[0], -1, group)
    return np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Codes [N, K] of bytes [N, K/2]."""
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], -1)


def read_back(packed: Any, scale: Any, zero: Any, group: int) -> np.ndarray:
    """The weights that the three stand for, in float64 [N, K]."""
    codes = unpacked(np.asarray(packed)).astype(np.float64)
    each = [np.repeat(np.asarray(part, dtype=np.float64), group, axis=1) for part in (scale, zero)]
    return (codes - each[1]) * each[0]


def _agree(t: Trial, weight: Any, group: int) -> tuple[np.ndarray, Any]:
    """The weights as they come back. Shapes, formats, scale and zero are judged on the way."""
    (n, k), (lo, hi) = weight.shape, ranges(weight, group)
    packed, scale, zero = t.pair(t.call(weight, group), 3, "(packed, scale, zero)")
    for name, part, shape in (
        ("packed", packed, (n, k // 2)),
        ("scale", scale, lo.shape),
        ("zero", zero, lo.shape),
    ):
        t.equal(tuple(getattr(part, "shape", ())), shape, f"shape of {name}")
    t.equal(str(packed.dtype).removeprefix("torch."), "uint8", "number format of packed")
    t.holds("float32" in str(scale.dtype), f"scale is {scale.dtype}, expected float32")
    sizes, zeros = np.asarray(scale, dtype=np.float64), np.asarray(zero, dtype=np.float64)
    t.holds(bool(np.isfinite(sizes).all() and (sizes > 0).all()), "a scale is not a positive, finite number")
    step = (hi - lo) / (LEVELS - 1)
    t.close(np.where(step > 0, sizes, 0.0), step, "scale", rtol=1e-5)
    whole = np.isfinite(zeros).all() and (zeros == np.round(zeros)).all()
    t.holds(bool(whole), "a zero is not a whole number: 0 itself would not come back as 0")
    t.holds(bool(((zeros >= 0) & (zeros < LEVELS)).all()), "a zero lies outside of 0 … 15")
    return read_back(packed, scale, zero, group), (packed, scale, zero)


def _within_half(t: Trial, weight: Any, group: int) -> None:
    got, (_, scale, _) = _agree(t, weight, group)
    w = weight.double().numpy()
    step = np.repeat(np.asarray(scale, dtype=np.float64), group, axis=1)
    far = np.abs(got - w) > (0.5 + SLACK) * step + 1e-12
    if far.any():
        r, c = (int(i) for i in np.argwhere(far)[0])
        t.holds(
            False,
            f"weight [{r}, {c}] = {w[r, c]:.5g} is read back as {got[r, c]:.5g}: "
            f"{abs(got - w)[r, c] / step[r, c]:.2f} steps away, expected at most 0.5 "
            f"(and {int(far.sum()) - 1} more of {far.size})",
        )
    t.close(got[w == 0], w[w == 0], "weights that are 0", atol=0.0)


def _on_grid(t: Trial, rows: int, group: int) -> tuple[Any, np.ndarray]:
    """Multiples of a power of two, with both ends of a range of 16 among them; and their codes."""
    zero, step = t.size(1, 14), 2.0 ** -t.size(1, 6)
    codes = t.integers(0, LEVELS, rows, group)
    codes[:, 0], codes[:, -1] = 0, LEVELS - 1
    codes[:, 1 : group - 1] = np.where(codes[:, 1 : group - 1] == 0, 1, codes[:, 1 : group - 1])
    return torch.from_numpy(((codes - zero) * step).astype(np.float32)), codes


def _both_signs(weight: Any, group: int) -> Any:
    """`weight` with a negative and a positive number in every group."""
    weight[:, 0::group] = -weight[:, 0::group].abs()
    weight[:, 1::group] = weight[:, 1::group].abs()
    return weight


@pack_int4.check("weights that lie on 16 levels come back exactly, each in its place")
def exact(t: Trial) -> None:
    weight, _ = _on_grid(t, t.odd(3, 7), 2 * t.odd(3, 7))
    got, _ = _agree(t, weight, weight.shape[1])
    t.close(got, weight.double().numpy(), "the weights read back", atol=1e-9)


@pack_int4.check("each group of each row has a scale of its own")
def groups(t: Trial) -> None:
    n, group, many = t.odd(3, 7), 2 * t.odd(2, 6), t.odd(3, 5)
    parts = [_on_grid(t, n, group)[0] for _ in range(many)]
    weight = torch.cat(parts, dim=1) * torch.from_numpy(2.0 ** t.integers(-3, 4, n, 1)).float()
    got, _ = _agree(t, weight, group)
    t.close(got, weight.double().numpy(), "the weights read back", atol=1e-9)


@pack_int4.check("any weight comes back to within half a step")
def half_step(t: Trial) -> None:
    for rows, group, many in ((t.odd(3, 7), 2 * t.odd(4, 9), t.odd(3, 5)), (1, 2, 1), (5, 32, 3)):
        _within_half(t, _both_signs(tensor(t, rows, group * many) + 0.3, group), group)
    _within_half(t, _both_signs(tensor(t, 5, 64, order="T"), 32)[:, : t.size(1, 2) * 32], 32)


@pack_int4.check("a group of one sign: its range reaches to 0")
def one_sided(t: Trial) -> None:
    for sign in (1, -1):
        _within_half(t, sign * (tensor(t, t.odd(3, 5), 24).abs() + 0.5), 8)


@pack_int4.check("a range as wide to the left as to the right: no code leaves 0 … 15")
def ends(t: Trial) -> None:
    weight = tensor(t, t.odd(3, 5), 24, scale=0.2).clamp(-1, 1)
    weight[:, 0::4], weight[:, 1::4] = 7.5 / 4, -7.5 / 4
    weight[:, 2::8] = 0
    _within_half(t, weight, 8)


@pack_int4.check("a group of zeros comes back as zeros")
def zeros(t: Trial) -> None:
    weight = tensor(t, 3, 24)
    weight[1, 8:16] = 0
    _within_half(t, weight, 8)


@pack_int4.check("the weight is left as it was")
def untouched(t: Trial) -> None:
    _agree(t, tensor(t, 3, 24), 8)
    t.unchanged()


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────


def _grouped(weight: Any, group: int) -> Any:
    return weight.reshape(weight.shape[0], -1, group)


def _range(w: Any) -> tuple[Any, Any]:
    return w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)


def _scale(lo: Any, hi: Any, steps: int = LEVELS - 1) -> Any:
    scale = (hi - lo) / steps
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(w: Any, scale: Any, zero: Any) -> Any:
    return (torch.round(w / scale) + zero).clamp(0, LEVELS - 1)


def _pack(q: Any, shape: Any) -> Any:
    q = q.to(torch.uint8).reshape(shape)
    return q[:, 0::2] | (q[:, 1::2] << 4)


def _right(weight: Any, group: int) -> tuple[Any, Any, Any]:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    zero = torch.round(-lo / scale)
    return _codes(w, scale, zero).to(torch.uint8).reshape(weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="the first weight of a pair stands in the high four bits",
    tries="q[:, 0::2] | (q[:, 1::2] << 4).",
    caught_by="exact",
)
def high_first(weight: Any, group: int) -> Any:
    q, scale, zero = _right(weight, group)
    return (q[:, 0::2] << 4) | q[:, 1::2], scale, zero


@pack_int4.mistake(
    says="a byte holds weights k and k + K/2, not two neighbours",
    tries="q[:, 0::2] and q[:, 1::2].",
    caught_by="exact",
)
def halves(weight: Any, group: int) -> Any:
    q, scale, zero = _right(weight, group)
    half = q.shape[1] // 2
    return q[:, :half] | (q[:, half:] << 4), scale, zero


@pack_int4.mistake(
    says="the range is divided by 16: 16 levels have 15 steps between them",
    tries="(hi − lo) / 15.",
    caught_by="exact",
)
def sixteen_steps(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi, LEVELS)
    zero = torch.round(-lo / scale)
    return _pack(_codes(w, scale, zero), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="the range is taken as symmetric, largest magnitude / 7: a part of the codes is never used",
    tries="lo and hi, and a zero that lies where 0 lies between them.",
    caught_by="exact",
)
def symmetric(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    top = w.abs().amax(-1, keepdim=True) / 7
    scale = torch.where(top > 0, top, torch.ones_like(top))
    zero = torch.full_like(scale, 8)
    return _pack(_codes(w, scale, zero), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="the codes are not shifted by zero: those of negative weights wrap around",
    tries="round(w / scale) + zero.",
    caught_by="exact",
)
def not_shifted(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    q = torch.round(w / scale).to(torch.int32) & 15
    return _pack(q, weight.shape), scale[..., 0], torch.round(-lo / scale)[..., 0]


@pack_int4.mistake(
    says="the codes are counted from lo and zero is left at 0: everything is shifted by lo",
    tries="zero = round(−lo / scale), returned as well.",
    caught_by="exact",
)
def zero_forgotten(weight: Any, group: int) -> Any:
    q, scale, zero = _right(weight, group)
    return _pack(q, weight.shape), scale, torch.zeros_like(zero)


@pack_int4.mistake(
    says="one scale serves a whole row",
    tries="weight.view(N, K // group, group), and the range along the last axis.",
    caught_by="groups",
)
def one_a_row(weight: Any, group: int) -> Any:
    q, scale, zero = _right(weight, weight.shape[1])
    many = weight.shape[1] // group
    return _pack(q, weight.shape), scale.repeat(1, many), zero.repeat(1, many)


@pack_int4.mistake(
    says="one scale serves the whole matrix",
    tries="a range for each group of each row: amin and amax along the last axis alone.",
    caught_by="groups",
)
def one_for_all(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = w.min().clamp(max=0), w.max().clamp(min=0)
    scale = _scale(lo, hi).expand(w.shape[:2]) * 1.0
    zero = torch.round(-lo / scale)
    return _pack(_codes(w, scale[..., None], zero[..., None]), weight.shape), scale, zero


@pack_int4.mistake(
    says="a group takes every (K/group)-th weight of a row, not neighbours",
    tries="weight.view(N, K // group, group): the group is the last axis.",
    caught_by="groups",
)
def strided_groups(weight: Any, group: int) -> Any:
    n, k = weight.shape
    w = weight.reshape(n, group, k // group).transpose(1, 2)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    zero = torch.round(-lo / scale)
    return _pack(_codes(w, scale, zero).transpose(1, 2), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="codes are cut off, not rounded: weights end up to a whole step too low",
    tries="torch.round(w / scale).",
    caught_by="half_step",
)
def cut_off(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    zero = torch.round(-lo / scale)
    q = (torch.floor(w / scale) + zero).clamp(0, LEVELS - 1)
    return _pack(q, weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="zero is not rounded: no code stands for 0",
    tries="torch.round(−lo / scale), before it is added.",
    caught_by="half_step",
)
def zero_between(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    zero = -lo / scale
    return _pack(torch.round(w / scale + zero).clamp(0, 15), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="the range of a group of one sign does not reach to 0, and its zero lies outside of the codes",
    tries="lo.clamp(max=0) and hi.clamp(min=0).",
    caught_by="one_sided",
)
def range_without_zero(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = _scale(lo, hi)
    zero = torch.round(-lo / scale)
    return _pack(_codes(w, scale, zero), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="a code of 16 is not clamped: it spills into the neighbour's four bits",
    tries=".clamp(0, 15) after zero is added.",
    caught_by="ends",
)
def not_clamped(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = _scale(lo, hi)
    zero = torch.round(-lo / scale)
    return _pack(torch.round(w / scale) + zero, weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="a group of zeros has a range of 0, and is divided by it",
    tries="torch.where(scale > 0, scale, 1.0).",
    caught_by="zeros",
)
def divided_by_zero(weight: Any, group: int) -> Any:
    w = _grouped(weight, group)
    lo, hi = _range(w)
    scale = (hi - lo) / (LEVELS - 1)
    zero = torch.round(-lo / scale)
    return _pack(_codes(w, scale, zero), weight.shape), scale[..., 0], zero[..., 0]


@pack_int4.mistake(
    says="the weight is divided in place: it is the caller's",
    tries="weight / scale, which makes a new tensor, in place of weight.div_(scale).",
    caught_by="untouched",
)
def in_place(weight: Any, group: int) -> Any:
    q, scale, zero = _right(weight, group)
    weight.div_(scale.repeat_interleave(group, dim=1))
    return _pack(q, weight.shape), scale, zero


# ── other right solutions ────────────────────────────────────────────────────────────────────────────


@pack_int4.alternative("counted from lo: q = round(w / scale − rounded lo / scale), packed by a product")
def from_lo(weight: Any, group: int) -> Any:
    n, k = weight.shape
    w = weight.reshape(-1, group)
    lo, hi = w.min(1).values.clamp(max=0), w.max(1).values.clamp(min=0)
    scale = torch.clamp((hi - lo) / 15, min=1e-30)
    zero = (-lo / scale).round()
    q = (w / scale[:, None] + zero[:, None]).round().clamp(0, 15).reshape(n, k // 2, 2)
    return (
        (q @ torch.tensor([1.0, 16.0])).to(torch.uint8),
        scale.view(n, -1),
        zero.view(n, -1).to(torch.uint8),
    )


@pack_int4.alternative("by torch's own fake quantization, codes taken from what it returns")
def by_torch(weight: Any, group: int) -> Any:
    n = weight.shape[0]
    w = weight.reshape(-1, group).contiguous()
    lo, hi = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = torch.where(hi > lo, (hi - lo) / 15, torch.ones_like(hi))
    zero = torch.round(-lo / scale).to(torch.int32)
    back = torch.fake_quantize_per_channel_affine(w, scale, zero, 0, 0, 15)
    q = (torch.round(back / scale[:, None]) + zero[:, None]).to(torch.uint8).view(weight.shape)
    return q[:, ::2] + 16 * q[:, 1::2], scale.view(n, -1), zero.view(n, -1)


@pack_int4.alternative("a loop over the groups")
def group_by_group(weight: Any, group: int) -> Any:
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.int64)
    scale, zero = torch.empty(n, k // group), torch.empty(n, k // group, dtype=torch.int64)
    for g in range(k // group):
        part = weight[:, g * group : (g + 1) * group]
        lo, hi = _range(part)
        s = _scale(lo, hi)
        z = torch.round(-lo / s)
        q[:, g * group : (g + 1) * group] = _codes(part, s, z).long()
        scale[:, g], zero[:, g] = s[:, 0], z[:, 0].long()
    pairs = q.view(n, k // 2, 2)
    return (pairs[..., 0] + pairs[..., 1] * 16).to(torch.uint8), scale, zero
