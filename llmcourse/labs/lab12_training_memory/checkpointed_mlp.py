"""Exercise `checkpointed_mlp`: feed-forward layers that keep their inputs and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch

checkpointed_mlp = Exercise(
    "checkpointed_mlp",
    title="A checkpointed stack of layers",
    arguments=("x", "gate_up", "down"),
    shapes=(
        "x        float32 tensor [N, E]: N tokens",
        "gate_up  tensor [L, 2F, E] and down [L, E, F]: the weights of L layers, one after another",
        "returns  tensor [N, E], differentiable in x, gate_up and down",
        "cost     kept for backward, arguments aside: the inputs of layers 2 … L, N·E numbers each, and,",
        "         once the backward pass runs, the inside of one layer (4·N·F numbers, a few of N·E)",
    ),
    formula="in each layer: gate, up = halves of rms(x) @ gate_up.T;  x ← x + (silu(gate) · up) @ down.T;   "
    "rms(x) = x / √(mean of x² + 1e-5)",
    difficulty=4,
    importance=5,
    minutes=40,
    points=7,
    hints=(
        "Autograd keeps what operations ask it to keep while it records. What if a layer runs without being "
        "recorded? What must then be there when its gradient is asked for, and what can be computed from "
        "that? "
        "(torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5) is the norm.)",
        "A torch.autograd.Function: its forward is not recorded, so run the layer there and save x and "
        "the two "
        "weights only. Its backward detaches what was saved, asks for gradients of all three, runs the layer "
        "again under torch.enable_grad(), and sends the gradient that came in through the fresh graph. "
        "Apply it "
        "once for each layer: once around all of them would bring all back to life together.",
        "class Layer(torch.autograd.Function): forward(ctx, x, a, b): ctx.save_for_backward(x, a, b); return "
        "layer(x, a, b). backward(ctx, g): parts = [t.detach().requires_grad_() for t in "
        "ctx.saved_tensors]; with "
        "torch.enable_grad(): y = layer(*parts); return torch.autograd.grad(y, parts, g). Then for a, b in "
        "zip(gate_up, down): x = Layer.apply(x, a, b).",
    ),
)


def _draw(t: Trial, tokens: int, width: int, inner: int, layers: int) -> tuple[Any, Any, Any]:
    x = tensor(t, tokens, width)
    gate_up = tensor(t, layers, 2 * inner, width, scale=1.5 * width**-0.5)
    return x, gate_up, tensor(t, layers, width, inner, scale=inner**-0.5)


def expected(x: Any, gate_up: Any, down: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output, and gradients of its sum, in float64 by plain autograd."""
    parts = [p.detach().double().requires_grad_() for p in (x, gate_up, down)]
    with torch.enable_grad():
        y = _plain(*parts)
        y.sum().backward()
    return y.detach().numpy(), [p.grad.numpy() for p in parts]


def _agree(t: Trial, *sizes: int, watch: tuple[str, ...] = ()) -> Any:
    args = _draw(t, *sizes)
    call = t.perform(*args, grads=True, watch=watch)
    y, gradients = expected(*args)
    t.close(call.value, y, "the output", rtol=1e-4)
    grads = call.grads or (None,) * 3
    for name, got, want in zip(("x", "gate_up", "down"), grads, gradients, strict=True):
        t.holds(got is not None, f"no gradient reached {name}")
        t.close(got, want, f"the gradient of {name}", rtol=2e-4)
    t.unchanged()
    return call


@checkpointed_mlp.check("one layer: output and gradients")
def one_layer(t: Trial) -> None:
    _agree(t, t.odd(3, 9), t.size(3, 6), t.odd(5, 9), 1)


@checkpointed_mlp.check("several layers: each gradient goes through the layers behind it")
def several(t: Trial) -> None:
    _agree(t, t.odd(3, 9), t.size(3, 6), t.odd(5, 9), t.size(2, 4))
    _agree(t, 1, 2, 3, 3)


@checkpointed_mlp.check("kept for backward: the layers' inputs, and one layer's inside when its turn comes")
def saved(t: Trial) -> None:
    tokens, width, inner, layers = 128, 8, 48, 8
    call = _agree(t, tokens, width, inner, layers, watch=("saved_bytes",))
    inside = 4 * tokens * (4 * inner + 4 * width)
    t.at_most(
        call.costs["saved_bytes"],
        1.25 * (4 * tokens * width * layers + inside),
        f"bytes kept for backward at one time besides the arguments ({layers} layers, the inside of one is "
        f"{inside:,} bytes)",
        "running each layer unrecorded, saving its input and weights, and computing the rest in backward.",
    )


@checkpointed_mlp.check("no layer's inside is alive anywhere else")
def peak(t: Trial) -> None:
    tokens, width, inner, layers = 128, 8, 48, 10
    call = _agree(t, tokens, width, inner, layers, watch=("largest_intermediate",))
    inside = 4 * tokens * (4 * inner + 4 * width)
    weights = 4 * 3 * layers * width * inner
    t.at_most(
        call.costs["peak_bytes"],
        3.5 * inside + 2 * weights,
        f"bytes alive at one time, forward and backward (the inside of one layer: {inside:,})",
        "keeping nothing but what goes through ctx.save_for_backward: x and the two weights.",
    )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def _halves(x: Any, gate_up: Any) -> Any:
    return (torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5) @ gate_up.T).chunk(2, dim=-1)


def _layer(x: Any, gate_up: Any, down: Any) -> Any:
    gate, up = _halves(x, gate_up)
    return x + (torch.nn.functional.silu(gate) * up) @ down.T


def _plain(x: Any, gate_up: Any, down: Any) -> Any:
    for a, b in zip(gate_up, down, strict=True):
        x = _layer(x, a, b)
    return x


def _function(backward: Any, keep: Any = None, layer: Any = _layer) -> Any:
    """A Function for one layer. `keep(ctx, x, a, b)` keeps what `backward(ctx, gradient)` needs."""

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, a: Any, b: Any) -> Any:
            (keep or _save)(ctx, x, a, b)
            return layer(x, a, b)

    Layer.backward = staticmethod(backward)
    return Layer


def _save(ctx: Any, x: Any, a: Any, b: Any) -> None:
    ctx.save_for_backward(x, a, b)


def _stack(function: Any, x: Any, gate_up: Any, down: Any) -> Any:
    for a, b in zip(gate_up, down, strict=True):
        x = function.apply(x, a, b)
    return x


def _again(ctx: Any, g: Any) -> Any:
    parts = [p.detach().requires_grad_() for p in ctx.saved_tensors]
    with torch.enable_grad():
        y = _layer(*parts)
    return torch.autograd.grad(y, parts, g)


@checkpointed_mlp.mistake(
    says="nothing is checkpointed: autograd keeps the inside of every layer",
    tries="a torch.autograd.Function for each layer, whose forward is not recorded.",
    caught_by="saved",
)
def plain(x: Any, gate_up: Any, down: Any) -> Any:
    return _plain(x, gate_up, down)


@checkpointed_mlp.mistake(
    says="one checkpoint stands around the whole stack: going backward, all layers are alive at once",
    tries="one for each layer.",
    caught_by="saved",
)
def all_at_once(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        parts = [p.detach().requires_grad_() for p in ctx.saved_tensors]
        with torch.enable_grad():
            y = _plain(*parts)
        return torch.autograd.grad(y, parts, g)

    return _function(again, layer=_plain).apply(x, gate_up, down)


@checkpointed_mlp.mistake(
    says="what is inside the layer is saved with its input, so nothing is gained",
    tries="ctx.save_for_backward(x, a, b) and nothing else: backward can compute the rest.",
    caught_by="saved",
)
def saves_inside(x: Any, gate_up: Any, down: Any) -> Any:
    def keep(ctx: Any, x: Any, a: Any, b: Any) -> None:
        gate, up = _halves(x, a)
        ctx.save_for_backward(x, a, b, gate, torch.nn.functional.silu(gate) * up)

    def again(ctx: Any, g: Any) -> Any:
        x, a, b, *_ = ctx.saved_tensors
        parts = [p.detach().requires_grad_() for p in (x, a, b)]
        with torch.enable_grad():
            y = _layer(*parts)
        return torch.autograd.grad(y, parts, g)

    return _stack(_function(again, keep), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the inside of each layer hangs on ctx as an attribute: no hook sees it, and it is alive all "
    "the same",
    tries="ctx.save_for_backward(x, a, b) and nothing else: backward can compute the rest.",
    caught_by="peak",
)
def hangs_on_ctx(x: Any, gate_up: Any, down: Any) -> Any:
    def keep(ctx: Any, x: Any, a: Any, b: Any) -> None:
        ctx.save_for_backward(x, a, b)
        gate, up = _halves(x, a)
        ctx.inside = [gate, up, torch.nn.functional.silu(gate), torch.nn.functional.silu(gate) * up]

    return _stack(_function(_again, keep), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the layer runs again without being recorded, and there is no graph to go backward through",
    tries="with torch.enable_grad(): around it; a Function's backward does not record by itself.",
    caught_by="one_layer",
)
def not_recorded(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        parts = [p.detach().requires_grad_() for p in ctx.saved_tensors]
        return torch.autograd.grad(_layer(*parts), parts, g)

    return _stack(_function(again), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the gradient that comes in is not used: each layer goes backward as if it were the last",
    tries="torch.autograd.grad(y, parts, g): g is what the layers behind this one ask.",
    caught_by="several",
)
def ones_in(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        parts = [p.detach().requires_grad_() for p in ctx.saved_tensors]
        with torch.enable_grad():
            y = _layer(*parts)
        return torch.autograd.grad(y, parts, torch.ones_like(g))

    return _stack(_function(again), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="no gradient goes on to x: the layers before this one never learn",
    tries="requires_grad_() on the detached x as well, and its gradient as the first result.",
    caught_by="one_layer",
)
def no_gradient_of_x(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        return None, *_again(ctx, g)[1:]

    return _stack(_function(again), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the weights get no gradient",
    tries="the gradients of both weights as the second and third result of backward.",
    caught_by="one_layer",
)
def no_gradient_of_weights(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        return _again(ctx, g)[0], None, None

    return _stack(_function(again), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the weights' gradients arrive twice: .backward() adds them through the weights' own graph, and "
    "they "
    "are returned as well",
    tries="detaching all three saved tensors before the layer runs again.",
    caught_by="one_layer",
)
def counted_twice(x: Any, gate_up: Any, down: Any) -> Any:
    def again(ctx: Any, g: Any) -> Any:
        x, a, b = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = _layer(x, a, b)
        weights = torch.autograd.grad(y, (a, b), g, retain_graph=True)
        torch.autograd.backward(y, g)
        return x.grad, *weights

    return _stack(_function(again), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="gate and up are exchanged",
    tries="silu of the first half of x @ gate_up.T.",
    caught_by="one_layer",
)
def exchanged(x: Any, gate_up: Any, down: Any) -> Any:
    f = gate_up.shape[1] // 2
    return _stack(_function(_again), x, torch.cat((gate_up[:, f:], gate_up[:, :f]), dim=1), down)


@checkpointed_mlp.mistake(
    says="the sigmoid of gate stands where silu(gate) = gate · sigmoid(gate) should",
    tries="torch.nn.functional.silu.",
    caught_by="one_layer",
)
def sigmoid(x: Any, gate_up: Any, down: Any) -> Any:
    def layer(x: Any, a: Any, b: Any) -> Any:
        gate, up = _halves(x, a)
        return x + (torch.sigmoid(gate) * up) @ b.T

    def again(ctx: Any, g: Any) -> Any:
        parts = [p.detach().requires_grad_() for p in ctx.saved_tensors]
        with torch.enable_grad():
            y = layer(*parts)
        return torch.autograd.grad(y, parts, g)

    return _stack(_function(again, layer=layer), x, gate_up, down)


@checkpointed_mlp.mistake(
    says="the values are right and nothing can go backward: the layers ran under torch.no_grad()",
    tries="a Function: it is itself recorded, with its own backward.",
    caught_by="one_layer",
)
def under_no_grad(x: Any, gate_up: Any, down: Any) -> Any:
    with torch.no_grad():
        return _plain(x, gate_up, down)


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@checkpointed_mlp.alternative("a Function that runs the layer again")
def recomputed(x: Any, gate_up: Any, down: Any) -> Any:
    return _stack(_function(_again), x, gate_up, down)


@checkpointed_mlp.alternative("torch.utils.checkpoint")
def of_torch(x: Any, gate_up: Any, down: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    for a, b in zip(gate_up, down, strict=True):
        x = checkpoint(_layer, x, a, b, use_reentrant=False)
    return x


@checkpointed_mlp.alternative("the derivative by hand, no second recording")
def derived(x: Any, gate_up: Any, down: Any) -> Any:
    def backward(ctx: Any, g: Any) -> Any:
        x, a, b = ctx.saved_tensors
        root = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        normed = x * root
        gate, up = (normed @ a.T).chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        product = g @ b
        grad_down = g.T @ (gate * s * up)
        h = torch.cat((product * up * s * (1 + gate * (1 - s)), product * gate * s), dim=-1)
        d = h @ a
        return g + root * (d - normed * (d * normed).mean(-1, keepdim=True)), h.T @ normed, grad_down

    return _stack(_function(backward), x, gate_up, down)
