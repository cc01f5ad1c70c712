"""The points of the mixers whose work grows with the sequence's length, not with its square.

The package's linear attention takes leading dimensions that broadcast (a group of query heads shares a
key/value head) and knows three forms by name; a learner's functions know heads [B, H, S, D]. The adapters lay
the dimensions side by side, and put the form where the package looks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmcourse.plug.kernels import MODELS, tensor
from llmcourse.plug.point import LearnersCode, Point, register

if TYPE_CHECKING:
    from torch import Tensor

    from llmcourse.models.hyena import HyenaState
    from llmcourse.models.linear_attention import Memory
    from llmcourse.models.long_filter import ModalFilter
    from llmcourse.models.step import Step

Form = Callable[..., "tuple[Tensor, Memory]"]
FORMS = (f"{MODELS}.linear_attention:FORMS",)


# ── long convolutions ────────────────────────────────────────────────────────────────────────────────


def causal_fft_conv(code: LearnersCode) -> Callable[[Tensor, Tensor], Tensor]:
    def fft_conv(u: Tensor, h: Tensor) -> Tensor:
        flat = u.reshape(-1, *u.shape[-2:])
        y = tensor(code, code(flat, h), u, tuple(flat.shape), "the result")
        return y.view(u.shape)

    return fft_conv


def modal_step(code: LearnersCode) -> Callable[..., Tensor]:
    from llmcourse.models.long_filter import ModalFilter

    own = ModalFilter.convolve

    def convolve(self: ModalFilter, u: Tensor, step: Step, state: HyenaState | None) -> Tensor:
        import torch

        if state is None or u.shape[-1] > 1:
            return own(self, u, step, state)
        before = torch.view_as_complex(state.modes)
        token = u[..., 0].to(before.real.dtype)
        results = code(before.clone(), token, self.poles().exp(), self.residues())
        y, after = code.parts(results, ("y", "modes"))
        tensor(code, y, token, tuple(token.shape), "y")
        state.modes.copy_(torch.view_as_real(tensor(code, after, before, tuple(before.shape), "modes")))
        return y[..., None].to(u.dtype)

    return convolve


# ── linear attention ─────────────────────────────────────────────────────────────────────────────────


def _form(name: str, make: Callable[[LearnersCode, Form], Form]) -> Callable[[LearnersCode], dict[str, Form]]:
    """A stand-in for the table of forms, in which `name` is the learner's."""

    def stand_in(code: LearnersCode) -> dict[str, Form]:
        from llmcourse.models import linear_attention

        forms: dict[str, Any] = dict(linear_attention.FORMS)
        return forms | {name: make(code, forms[name])}

    return stand_in


class _Heads:
    """q, k, v and the memory, their leading dimensions side by side as heads of one sequence; and back."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None) -> None:
        import torch

        from llmcourse.models.linear_attention import empty_memory

        memory = memory or empty_memory(q, k, v)
        self.kind, self.own = memory.s.dtype, k.shape[:-2]
        self.lead = torch.broadcast_shapes(q.shape[:-2], self.own)
        self.q, self.k, self.v = (self._flat(x.to(self.kind), 2) for x in (q, k, v))
        self.state, self.total = self._flat(memory.s, 2), self._flat(memory.z, 1)
        self.out = (*self.lead, q.shape[-2], v.shape[-1])

    def _flat(self, x: Tensor, inner: int) -> Tensor:
        rest = x.shape[-inner:]
        return x.expand(*self.lead, *rest).reshape(1, -1, *rest).clone()

    def back(self, code: LearnersCode, y: Tensor, state: Tensor, total: Tensor, dtype: Any) -> Any:
        """(y, Memory) in the package's shapes. Heads that share a key have the same sums: one is kept."""
        from llmcourse.models.linear_attention import Memory

        y = tensor(code, y, self.v, tuple(self.v.shape), "y")
        sums = []
        for name, value, like in (("state", state, self.state), ("total", total, self.total)):
            whole = tensor(code, value, like, tuple(like.shape), name).reshape(*self.lead, *like.shape[2:])
            for axis, size in enumerate(self.own):
                whole = whole.narrow(axis, 0, size)
            sums.append(whole)
        return y.reshape(self.out).to(dtype), Memory(*sums)


def _parallel(code: LearnersCode, own: Form) -> Form:
    def parallel(q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        if memory is not None and bool(memory.z.any()):
            return own(q, k, v, memory)  # the table knows these tokens only
        heads = _Heads(q, k, v, memory)
        y = code(heads.q, heads.k, heads.v)
        state, total = heads.k.mT @ heads.v, heads.k.sum(-2)
        return heads.back(code, y, state, total, v.dtype)

    return parallel


def _recurrent(code: LearnersCode, own: Form) -> Form:
    def recurrent(q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        import torch

        heads = _Heads(q, k, v, memory)
        state, total, out = heads.state, heads.total, []
        for t in range(q.shape[-2]):
            token = (x[:, :, t] for x in (heads.q, heads.k, heads.v))
            y, state, total = code.parts(code(state, total, *token), ("y", "state", "total"))
            out.append(tensor(code, y, heads.v, tuple(heads.v[:, :, t].shape), "y"))
        return heads.back(code, torch.stack(out, dim=2), state, total, v.dtype)

    return recurrent


def _chunked(code: LearnersCode, own: Form) -> Form:
    from llmcourse.models.linear_attention import CHUNK

    def chunked(
        q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None, *, chunk: int = CHUNK
    ) -> tuple[Tensor, Memory]:
        heads = _Heads(q, k, v, memory)
        results = code(heads.q, heads.k, heads.v, heads.state, heads.total, chunk)
        y, state, total = code.parts(results, ("y", "state", "total"))
        return heads.back(code, y, state, total, v.dtype)

    return chunked


# ── selective state space ────────────────────────────────────────────────────────────────────────────


def selective_scan(code: LearnersCode) -> Callable[..., tuple[Tensor, Tensor]]:
    def selective_scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None = None, **how: Any
    ) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], *A.shape) if h is None else h.clone()
        y, after = code.parts(code(x, dt, A, B, C, h), ("y", "h"))
        return (
            tensor(code, y, x, tuple(x.shape), "y"),
            tensor(code, after, h, (x.shape[0], *A.shape), "h"),
        )

    return selective_scan


_POINTS: tuple[tuple[str, tuple[str, ...], str, str, tuple[str, ...], Any], ...] = (
    (
        "causal_fft_conv",
        ("u", "h"),
        "tensor",
        "The causal convolution of u [B, C, S] with each channel's filter h [C, K].",
        (f"{MODELS}.fft_conv:fft_conv", f"{MODELS}.long_filter:fft_conv"),
        causal_fft_conv,
    ),
    (
        "modal_step",
        ("modes", "u", "poles", "residues"),
        "(y, modes)",
        "One token u [B, C] of the convolution with Re Σ residue · poleᵗ, from modes [B, C, N].",
        (f"{MODELS}.long_filter:ModalFilter.convolve",),
        modal_step,
    ),
    (
        "linear_attention_parallel",
        ("q", "k", "v"),
        "tensor",
        "Causal linear attention of features q, k [B, H, S, D] and v [B, H, S, Dv], by the table of weights.",
        FORMS,
        _form("parallel", _parallel),
    ),
    (
        "linear_attention_step",
        ("state", "total", "q", "k", "v"),
        "(y, state, total)",
        "One token q, k [B, H, D], v [B, H, Dv] of it, from state [B, H, D, Dv] and total [B, H, D].",
        FORMS,
        _form("recurrent", _recurrent),
    ),
    (
        "linear_attention_chunked",
        ("q", "k", "v", "state", "total", "chunk"),
        "(y, state, total)",
        "Many tokens of it behind those of state and total, `chunk` at a time.",
        FORMS,
        _form("chunked", _chunked),
    ),
    (
        "selective_scan",
        ("x", "dt", "A", "B", "C", "h"),
        "(y, h)",
        "h ← exp(Δ·A)·h + Δ·B·x and y = C·h, for x, dt [B, S, E], A [E, N], B, C [B, S, N], h [B, E, N].",
        (f"{MODELS}.ssm:selective_scan",),
        selective_scan,
    ),
)

for _point in _POINTS:
    register(Point(*_point))
