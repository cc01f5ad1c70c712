"""Optimizers: what each remembers of the gradients, and the step that it makes of it.

All four share one loop over the parameters and differ in one method, `update`: a parameter w, its gradient g,
and a state that the optimizer keeps for it from step to step.

| | keeps, numbers a parameter | step |
|---|---|---|
| `SGD` | 0, with momentum 1 | −lr·g, or −lr·b with b ← μ·b + g |
| `Adam` | 2 | −lr·m̂ / (√v̂ + ε); weight decay is added to the gradient |
| `AdamW` | 2 | the same; weight decay shrinks the weight itself |
| `LAMB` | 2 | AdamW's direction, made as long as the weight: −lr·‖w‖ · r / ‖r‖ |

m and v are running means of g and g². Both begin at zero, so they are too small at first by a factor that is
known: after t steps the mean's weights add up to 1 − βᵗ. Divided by that they are m̂ and v̂.

States have the names that torch's own optimizers give them, so that a checkpoint of one loads into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmcourse.errors import CourseError

State = dict[str, Any]
Group = dict[str, Any]


class OptimizerError(CourseError, ValueError):
    """A setting or a gradient with which an optimizer cannot step."""


class Stepper(Optimizer):
    """The loop that all optimizers here share. A subclass says what happens to one parameter.

    params   parameters, or groups of them as dictionaries {"params": …, "lr": …}, as torch takes them
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        super().__init__(params, settings)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)  # fills in what the group leaves out
        try:
            check_settings(param_group)
        except OptimizerError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change every parameter that has a gradient, in place. Returns what `closure` returns, if given.

        Raises OptimizerError for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, dense(w.grad), self.state[w], group)
        return loss

    def update(self, w: Tensor, g: Tensor, state: State, group: Group) -> None:
        """Step `w` by its gradient `g`, of the same shape. `state` is empty in the parameter's first step."""
        raise NotImplementedError


class SGD(Stepper):
    """w ← w − lr·b,  b ← μ·b + g (the first b is g); Polyak 1964.

    nesterov       looks one step ahead: g + μ·b in place of b (Sutskever et al. 2013)
    weight_decay   adds λ·w to the gradient; without momentum that is the same as shrinking w by lr·λ
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, **settings, dampening=0.0)  # what torch's needs to load a checkpoint of this

    def update(self, w: Tensor, g: Tensor, state: State, group: Group) -> None:
        g = g.add(w, alpha=group["weight_decay"]) if group["weight_decay"] else g
        if mu := group["momentum"]:
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = g.clone()
            else:
                state["momentum_buffer"].mul_(mu).add_(g)
            b = state["momentum_buffer"]
            g = g.add(b, alpha=mu) if group["nesterov"] else b
        w.sub_(g, alpha=group["lr"])


class Adam(Stepper):
    """w ← w − lr·m̂ / (√v̂ + ε) (Kingma & Ba 2015, arXiv:1412.6980).

    betas          how much of m and of v a step keeps: the mean reaches back about 1 / (1 − β) steps
    eps            in the denominator, outside of the root: where v̂ is far below ε², the step vanishes
    weight_decay   adds λ·w to the gradient, before the means are taken: L2 regularisation. It is divided by
                   √v̂ with the rest, so that weights with large gradients hardly decay (see `AdamW`).
    """

    decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, w: Tensor, g: Tensor, state: State, group: Group) -> None:
        if decay := group["weight_decay"]:
            if self.decoupled:
                w.mul_(1 - group["lr"] * decay)
            else:
                g = g.add(w, alpha=decay)
        m, v, t = moments(state, g, *group["betas"])
        beta1, beta2 = group["betas"]
        root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
        w.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**t))


class AdamW(Adam):
    """Adam whose weight decay shrinks the weight by lr·λ, whatever its gradients are.

    Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class LAMB(Stepper):
    """Steps as long as the weights they change: w ← w − lr·φ(‖w‖) / ‖u‖ · u,  u = m̂ / (√v̂ + ε) + λ·w.

    You et al. 2020, arXiv:1904.00962, algorithm 2; a "layer" is a tensor. φ(‖w‖) / ‖u‖ is the *trust ratio*,
    kept in the state as `trust_ratio`. Where ‖w‖ or ‖u‖ is 0 it is 1: a bias that begins at 0 could never
    move otherwise.

    bounds   φ(z) = min(max(z, low), high); φ(z) = z unless given
    adapt    a group with adapt=False steps by u itself, as is usual for norms' gains and biases
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bounds: tuple[float, float] | None = None,
        adapt: bool = True,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bounds=bounds, adapt=adapt
        )

    def update(self, w: Tensor, g: Tensor, state: State, group: Group) -> None:
        beta1, beta2 = group["betas"]
        m, v, t = moments(state, g, beta1, beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
        u = (m / (1 - beta1**t)).div_(root).add_(w, alpha=group["weight_decay"])
        state["trust_ratio"] = trust_ratio(w, u, group["bounds"]) if group["adapt"] else u.new_ones(())
        w.sub_(u * state["trust_ratio"], alpha=group["lr"])


def moments(state: State, g: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor, int]:
    """m ← β₁·m + (1 − β₁)·g,  v ← β₂·v + (1 − β₂)·g²,  t ← t + 1, kept in `state`. Returns (m, v, t)."""
    if not state:
        state["step"] = torch.zeros(())  # a tensor on the CPU, as in torch's checkpoints
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
    state["step"] += 1
    m = state["exp_avg"].lerp_(g, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m, v, int(state["step"])


def trust_ratio(w: Tensor, u: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """φ(‖w‖) / ‖u‖, a number; 1 where either norm is 0. On a GPU nobody waits for it."""
    size, length = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
    phi = size.clamp(*bounds) if bounds else size
    return torch.where((size > 0) & (length > 0), phi / length, torch.ones_like(phi))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps from step to step; 0 before its first."""
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in kept)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[Group]:
    """Two groups of a model's parameters: matrices, which decay, and norms and biases, which do not.

    A gain of 0 or a bias of 0 is no simpler a layer, so nothing should pull them there.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in wanted if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in wanted if p.dim() <= 1], "weight_decay": 0.0},
    ]


def dense(g: Tensor) -> Tensor:
    """`g`, unless it is sparse."""
    if g.is_sparse:
        raise OptimizerError(
            f"a sparse gradient, of shape {tuple(g.shape)}.",
            "Running means have a number for every parameter, and change also where the gradient is zero.",
            "nn.Embedding(…, sparse=False), or g.to_dense().",
        )
    return g


def check_settings(group: Group) -> None:
    """Raise OptimizerError for a setting outside of its range."""
    named = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    named |= {name: group[name] for name in ("eps", "momentum") if name in group}
    for name, value in named.items():
        if not value >= 0 or math.isinf(value):
            raise OptimizerError(
                f"{name} = {value}.",
                "A negative or infinite number makes every step one away from the goal, or no number at all.",
                f"{name} of 0 or more.",
            )
    for i, beta in enumerate(group.get("betas", ()), start=1):
        if not 0 <= beta < 1:
            raise OptimizerError(
                f"beta {i} is {beta}.",
                "It is the share of a running mean that a step keeps: with 1, no gradient would ever enter.",
                "0.9 for the first and 0.95 to 0.999 for the second.",
            )
    if group.get("nesterov") and not group["momentum"]:
        raise OptimizerError(
            "nesterov=True with momentum 0.",
            "Looking ahead means a step of momentum ahead.",
            "momentum=0.9.",
        )
    bounds = group.get("bounds")
    if bounds is not None and not 0 <= bounds[0] <= bounds[1]:
        raise OptimizerError(
            f"bounds = {bounds}.",
            "They are the least and the greatest length of a weight that LAMB's steps follow.",
            "bounds=(0.0, 10.0).",
        )
