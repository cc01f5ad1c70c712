"""What benchmark `flash` measures: attentions of given sizes, and who computes them.

A batch has about 16,384 tokens and a head count that makes 2,048 columns, whatever the length and head dim:
the published way to compare lengths. A peer that this machine or this PyTorch does not have is a reason in
words, not an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse.kernels import flash_hopper
from llmcourse.kernels.attention_reference import reference
from llmcourse.kernels.flash_attention import attention, attention_varlen
from llmcourse.kernels.flash_cost import flops
from llmcourse.kernels.flash_hopper import SCHEDULES, Schedule
from llmcourse.kernels.flash_plan import Plan, Tiles, plan_for

Function = Callable[[], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
TOKENS, COLUMNS = 16_384, 2048
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
HEAD_DIMS = (64, 128)
BACK_ENDS = {
    "FlashAttention-2": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "memory-efficient": "EFFICIENT_ATTENTION",
}
"""PyTorch's own, by their names in `torch.nn.attention.SDPBackend`."""


@dataclass(frozen=True)
class Case:
    """group: forward, backward, gqa, small, window, varlen; `lengths` of packed sequences only there."""

    group: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = True
    window: int = 0
    backward: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def flops(self) -> int:
        """Of visible pairs."""
        if self.lengths:
            return sum(
                flops(1, self.heads, n, n, self.head_dim, causal=self.causal, backward=self.backward)
                for n in self.lengths
            )
        return flops(
            self.batch,
            self.heads,
            self.length,
            self.length,
            self.head_dim,
            causal=self.causal,
            window=self.window,
            backward=self.backward,
        )

    @property
    def name(self) -> str:
        words = [self.group, f"D{self.head_dim}", f"S{self.length}"]
        words += [f"{self.heads}/{self.kv_heads} heads"] if self.heads != self.kv_heads else []
        words += ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window else []
        words += ["backward"] if self.backward and self.group != "backward" else []
        return " ".join(words)


def cases(*, tokens: int = TOKENS, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Case]:
    """All of them; fewer tokens and other lengths for a try on a CPU."""
    for backward in (False, True):
        group = "backward" if backward else "forward"
        for head_dim in HEAD_DIMS:
            heads = max(1, COLUMNS * tokens // TOKENS // head_dim)
            for causal in (True, False):
                for length in lengths:
                    sizes = (max(1, tokens // length), heads, heads, length, head_dim)
                    yield Case(group, *sizes, causal, backward=backward)
    heads, kv_heads = (32, 8) if tokens == TOKENS else (4, 1)
    for length in lengths[len(lengths) // 2 : -1]:  # 4k and 8k
        for backward in (False, True):
            yield Case("gqa", max(1, tokens // length), heads, kv_heads, length, 128, backward=backward)
    # One sequence of SmolLM2-135M and of Llama 3 8B: too few tiles for all multiprocessors, or just enough.
    for few, shared, head_dim in (
        ((9, 3, 64), (32, 8, 128)) if tokens == TOKENS else ((3, 1, 64), (4, 1, 128))
    ):
        for length in (lengths[0] // 2, lengths[1]):
            yield Case("small", 1, few, shared, length, head_dim)
    for window in (lengths[0], lengths[2]) if len(lengths) > 2 else (lengths[0] // 2,):
        for backward in (False, True):
            yield Case("window", 1, kv_heads * 2, kv_heads * 2, lengths[-1], 128, True, window, backward)
    g = torch.Generator().manual_seed(0)
    packed = (torch.rand(16, generator=g).square() * tokens / 4).int().clamp(min=1)
    for backward in (False, True):
        sizes = (len(packed), kv_heads * 2, kv_heads * 2, int(packed.max()), 128)
        yield Case("varlen", *sizes, backward=backward, lengths=tuple(packed.tolist()))


@dataclass
class Inputs:
    """Random q, k, v and the gradient of o; packed where the case is."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
        def random(heads: int) -> Tensor:
            shape = (
                (sum(case.lengths), heads, case.head_dim)
                if case.lengths
                else (case.batch, heads, case.length, case.head_dim)
            )
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=case.backward)

        cu = None
        if case.lengths:
            ends = torch.tensor((0, *case.lengths), device=device)
            cu = ends.cumsum(0).int()
        q, k, v = random(case.heads), random(case.kv_heads), random(case.kv_heads)
        return cls(q, k, v, random(case.heads).detach(), cu)


def call(case: Case, x: Inputs, peer: Peer) -> Function:
    """Forward, or the backward of one forward."""
    if not case.backward:
        return lambda: peer(x.q, x.k, x.v)
    o = peer(x.q, x.k, x.v)
    return lambda: torch.autograd.grad(o, (x.q, x.k, x.v), x.do, retain_graph=True)  # type: ignore[return-value]


# who computes


Chosen = Mapping[str, Tiles | Schedule]
"""Choices of a sweep (`flash_sweep.best_of`), by kernel, head dim and rung, in place of the shipped ones."""


def plans(case: Case, dtype: torch.dtype, capability: int, chosen: Chosen) -> dict[str, Plan | Schedule]:
    """The plans of the rungs that a case can run on a GPU (90: Hopper), by our rungs' names."""
    found: dict[str, Plan | Schedule] = {}
    where = f"D{case.head_dim}" + (" causal" if case.causal else "")
    for rung in ("pointer", "descriptor"):
        plan = plan_for(
            case.head_dim,
            dtype,
            capability,
            causal=case.causal,
            window=case.window,
            descriptors=rung == "descriptor",
        )
        swept = {} if case.window else chosen  # a sweep has no windows
        best = {kernel: swept.get(f"{kernel} {where} {rung}") for kernel in Plan._fields}
        plan = plan._replace(**{kernel: tiles for kernel, tiles in best.items() if tiles})  # type: ignore[arg-type]
        if plan.forward.rung == rung:
            found[f"ours: {rung}"] = plan
    if capability == 90 and not case.backward and not case.window and not case.lengths:
        schedule = chosen.get(f"hopper {where} hopper", SCHEDULES[case.head_dim, case.causal])
        assert isinstance(schedule, Schedule)
        found["ours: hopper"] = schedule
    return found


def ours(
    case: Case, x: Inputs, *, interpret: bool = False, chosen: Chosen | None = None
) -> dict[str, tuple[Peer, str]]:
    """The rungs of our ladder that this case has, by name, each with its plan as text."""
    causal, window = case.causal, case.window or None
    if x.cu_seqlens is not None:
        cu, longest = x.cu_seqlens, max(case.lengths)

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_varlen(  # type: ignore[return-value]
                q, k, v, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal, interpret=interpret
            )

        return {"ours: pointer": (packed, "")}

    def planned(plan: Plan | None) -> Peer:
        return lambda q, k, v: attention(  # type: ignore[return-value]
            q, k, v, causal=causal, window=window, plan=plan, interpret=interpret
        )

    def by_hand(schedule: Schedule | None) -> Peer:
        return lambda q, k, v: flash_hopper.forward(
            q, k, v, causal=causal, plan=schedule, interpret=interpret
        )[0]

    if interpret:
        found = {"ours: pointer": (planned(None), "")}
        if not case.backward and not case.window:
            found["ours: hopper"] = (by_hand(None), "")
    else:
        major, minor = torch.cuda.get_device_capability()
        found = {
            name: (by_hand(plan) if isinstance(plan, Schedule) else planned(plan), str(plan))
            for name, plan in plans(case, x.q.dtype, 10 * major + minor, chosen or {}).items()
        }
    if flash_hopper.unsupported(x.q, x.k, x.v, interpret=interpret):
        found.pop("ours: hopper", None)
    return found


def peers(case: Case, x: Inputs, *, flex: bool = True) -> dict[str, Peer]:
    """PyTorch's back-ends, and flex_attention compiled; each may fail when it is called."""
    if case.lengths:
        return {"FlashAttention-2 varlen": packed_peer(case, x)}
    found: dict[str, Peer] = {}
    if case.window:
        found["FlashAttention-2 varlen"] = packed_peer(case, x)
    else:
        for name, backend in BACK_ENDS.items():
            if not x.q.is_cuda and backend != "FLASH_ATTENTION":
                continue
            found[name] = backend_peer(case, backend)
    if flex and x.q.is_cuda:
        found["flex_attention"] = flex_peer(case, x)
    return found


def backend_peer(case: Case, backend: str) -> Peer:
    """scaled_dot_product_attention with one back-end and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            grouped = case.heads != case.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

    return peer


def flex_peer(case: Case, x: Inputs) -> Peer:
    """flex_attention under torch.compile, with a block mask, which skips the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = case.window or case.length

    def sees(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return (q_index >= k_index) & (q_index - k_index < window)

    mask: Any = None
    if case.causal:
        mask = create_block_mask(sees, None, None, case.length, case.length, device=x.q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


def packed_peer(case: Case, x: Inputs) -> Peer:
    """FlashAttention-2 on packed sequences (torch.nn.attention.varlen), which also has a sliding window."""
    from torch.nn.attention.varlen import varlen_attn

    if x.cu_seqlens is None:
        ends = torch.arange(0, case.batch + 1, device=x.q.device, dtype=torch.int32) * case.length
    else:
        ends = x.cu_seqlens
    longest = max(case.lengths, default=case.length)
    options: dict[str, Any] = {}
    if "window_size" in inspect.signature(varlen_attn).parameters:
        left = case.window - 1 if case.window else -1
        options["window_size"] = (left, 0) if case.causal else (-1, -1)
    elif case.window:
        raise NotImplementedError("this PyTorch's varlen_attn has no window")
    else:
        options["is_causal"] = case.causal

    attend: Any = varlen_attn

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.cu_seqlens is not None:
            return attend(q, k, v, ends, ends, longest, longest, **options)
        flat = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v))  # batch 1: a view
        o = attend(*flat, ends, ends, longest, longest, **options)
        return o.unflatten(0, (case.batch, case.length)).transpose(1, 2)

    return peer


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as its formula reads, in q's format: with whose memory that of others is compared."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


# right or wrong


def exact(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """(o,) or (dq, dk, dv) in float64, of the first key head of the first sequence and its query heads."""
    parts = [part(case, x, y).detach().double().requires_grad_(case.backward) for y in (x.q, x.k, x.v)]
    o, _ = reference(*parts, causal=case.causal, window=case.window)
    if not case.backward:
        return (o,)
    return torch.autograd.grad(o, parts, part(case, x, x.do).double())


def part(case: Case, x: Inputs, y: Tensor) -> Tensor:
    """The first key head of the first sequence, with its query heads, of a tensor as q or k: [1, h, S, D]."""
    group = case.heads // case.kv_heads if y.shape[-3 if not case.lengths else -2] == case.heads else 1
    if case.lengths:
        return y[: case.lengths[0], :group].transpose(0, 1).unsqueeze(0)
    return y[:1, :group]


def error_of(case: Case, x: Inputs, found: Any, right: tuple[Tensor, ...]) -> float:
    """‖found − exact‖ / ‖exact‖, of several results the worst; forward also of each query by itself.

    Under a causal mask the first queries have outputs many times larger than the last, and would hide them.
    Gradients of single queries or keys can be all but zero (the first query has one key, and its weight is 1
    whatever the scores are), so that they are not looked at one by one.
    """
    tensors = found if isinstance(found, tuple) else (found,)
    errors = []
    for y, r in zip(tensors, right, strict=True):
        wrong = part(case, x, y.detach()).double() - r
        errors.append(float(wrong.norm() / r.norm()))
        if not case.backward:
            errors.append(float((wrong.norm(dim=-1) / r.norm(dim=-1)).max()))
    return max(errors) if all(e == e for e in errors) else float("nan")
