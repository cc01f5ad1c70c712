"""Exercise `parallel_linear`: one layer on W workers, cut by its outputs or by its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmcourse.grading.compare import describe
from llmcourse.grading.exercise import Exercise
from llmcourse.grading.trial import Trial
from llmcourse.grading.triton_trial import tensor
from llmcourse.labs import late_torch as torch
from llmcourse.labs.lab13_distributed_training.workers import Workers

parallel_linear = Exercise(
    "parallel_linear",
    title="A linear layer on W workers",
    arguments=("cut", "rank", "world_size", "x", "weight", "bias", "grad", "all_reduce"),
    shapes=(
        "cut         'column': worker r owns the r-th of W equal blocks of outputs (rows of weight)",
        "            'row': worker r owns the r-th of W equal blocks of inputs (columns of weight)",
        "rank        this worker's number r;  world_size  W, which divides the dimension that is cut",
        "weight      tensor [N, K], of the whole layer; bias [N], of the whole layer",
        "x           column: [B, K], whole;            row: [B, K / W], this worker's inputs",
        "grad        ∂loss/∂y; column: [B, N / W];     row: [B, N], whole",
        "all_reduce  all_reduce(numbers) → the sum over all workers, a new tensor of the same shape",
        "returns     (y, grad_x, grad_weight), all that this worker has of them:",
        "            y       column: [B, N / W], its outputs;   row: [B, N], whole and the same everywhere",
        "            grad_x  column: [B, K], whole;             row: [B, K / W], of its inputs",
        "            grad_weight, of the block of weight that it owns",
        "cost        one all_reduce in all: of B·K numbers (column) or of B·N (row)",
    ),
    formula="y = x Wᵀ + b;   grad_x = grad W;   grad_W = gradᵀ x",
    difficulty=3,
    importance=5,
    minutes=30,
    points=6,
    hints=(
        "Write the layer as a sum over inputs k. If a worker owns some outputs, can it compute them alone? "
        "If it owns some inputs? And the same question for grad_x, which is a sum over outputs.",
        "Column: outputs are complete at once, no communication; but grad_x sums over all outputs, so it is "
        "all-reduced. Row: every worker has a partial sum of all outputs, so y is all-reduced; grad_x of its "
        "own inputs is complete. A bias must be added once: by its block (column), after the sum (row).",
        "w = weight.chunk(world_size, dim=0)[rank] for 'column' (dim=1 for 'row'). Column: y = x @ w.T + "
        "bias.chunk(world_size)[rank]; grad_x = all_reduce(grad @ w). Row: y = all_reduce(x @ w.T) + bias; "
        "grad_x = grad @ w. Both: grad_weight = grad.T @ x.",
    ),
)


def expected(
    cut: str, rank: int, world_size: int, x: Any, weight: Any, bias: Any, grad: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What worker `rank` has, cut from the whole layer in float64. x [B, K] and grad [B, N] are whole."""
    x, weight, bias, grad = (a.double().numpy() for a in (x, weight, bias, grad))
    y, grad_x, grad_w = x @ weight.T + bias, grad @ weight, grad.T @ x
    if cut == "column":
        n = weight.shape[0] // world_size
        own = slice(rank * n, (rank + 1) * n)
        return y[:, own], grad_x, grad_w[own]
    k = weight.shape[1] // world_size
    own = slice(rank * k, (rank + 1) * k)
    return y, grad_x[:, own], grad_w[:, own]


def _run(t: Trial, cut: str, world_size: int) -> tuple[Workers, list[Any], tuple[Any, ...]]:
    batch, k, n = t.odd(3, 7), world_size * t.size(2, 3), world_size * t.size(4, 5)
    x, weight, bias, grad = tensor(t, batch, k), tensor(t, n, k), tensor(t, n), tensor(t, batch, n)

    def arguments(rank: int) -> tuple[Any, ...]:
        mine = x if cut == "column" else x.chunk(world_size, 1)[rank].contiguous()
        its = grad.chunk(world_size, 1)[rank].contiguous() if cut == "column" else grad
        return cut, rank, world_size, mine, weight, bias, its

    workers = Workers(t, world_size, limit=8)
    got = workers.run(arguments, ring=False)
    return workers, got, (x, weight, bias, grad)


def _part(t: Trial, cut: str, part: int, name: str) -> None:
    for world_size in (2, 3, 4):
        _, got, whole = _run(t, cut, world_size)
        for rank, result in enumerate(got):
            value = t.pair(result, 3, "(y, grad_x, grad_weight)")[part]
            want = expected(cut, rank, world_size, *whole)[part]
            t.close(value, want, f"{name} of worker {rank}", rtol=1e-5)


@parallel_linear.check("column: each worker's outputs are its block of the whole layer's")
def column_outputs(t: Trial) -> None:
    _part(t, "column", 0, "y")


@parallel_linear.check("row: every worker has the whole layer's outputs")
def row_outputs(t: Trial) -> None:
    _part(t, "row", 0, "y")


@parallel_linear.check("column: the inputs' gradient is that of the whole layer")
def column_grad(t: Trial) -> None:
    _part(t, "column", 1, "grad_x")


@parallel_linear.check("row: each worker has its inputs' gradient")
def row_grad(t: Trial) -> None:
    _part(t, "row", 1, "grad_x")


@parallel_linear.check("each worker has the gradient of its block of the weight")
def weight_grad(t: Trial) -> None:
    for cut in ("column", "row"):
        _part(t, cut, 2, f"{cut}: grad_weight")


@parallel_linear.check("one all_reduce a layer, forward and backward together, no larger than it must be")
def traffic(t: Trial) -> None:
    for cut in ("column", "row"):
        for world_size in (2, 4):
            workers, _, (x, _, _, grad) = _run(t, cut, world_size)
            for rank, sent in enumerate(workers.sent):
                t.at_most(
                    sent.messages,
                    1,
                    f"{cut}: calls of all_reduce by worker {rank}",
                    "what a worker can compute alone, alone: outputs (column), inputs' gradients (row).",
                )
                most = x if cut == "column" else grad
                t.at_most(
                    sent.nbytes,
                    most.nbytes,
                    f"{cut}: bytes given to all_reduce by worker {rank} ({describe(most)} is enough)",
                    "grad_x (column) or y without the bias (row).",
                )


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────


def layer(
    cut: Any,
    rank: Any,
    world_size: Any,
    x: Any,
    weight: Any,
    bias: Any,
    grad: Any,
    all_reduce: Any,
    *,
    forward: Any = None,
    backward: Any = None,
    blocks: Any = None,
    early_bias: bool = False,
) -> tuple[Any, Any, Any]:
    """The right layer, and what can be wrong with it: `forward` and `backward` are used in place of
    all_reduce for each cut."""
    column = cut == "column"
    take = blocks or (lambda whole, dim: whole.chunk(world_size, dim)[rank])
    w = take(weight, 0 if column else 1)
    b = take(bias, 0) if column else bias
    reduce_y = (forward or {}).get(cut, (lambda y: y) if column else all_reduce)
    reduce_x = (backward or {}).get(cut, all_reduce if column else (lambda g: g))
    y = reduce_y(x @ w.T + b) if early_bias else reduce_y(x @ w.T) + b
    return y, reduce_x(grad @ w), grad.T @ x


def _same(numbers: Any) -> Any:
    return numbers


@parallel_linear.mistake(
    says="every worker adds the bias before the sum: it counts W times",
    tries="all_reduce(x @ w.T) + bias in the row layer.",
    caught_by="row_outputs",
)
def bias_everywhere(*args: Any) -> Any:
    return layer(*args, early_bias=True)


@parallel_linear.mistake(
    says="the row layer's partial sums stay partial",
    tries="all_reduce(x @ w.T): each worker has seen only its inputs.",
    caught_by="row_outputs",
)
def not_summed(*args: Any) -> Any:
    return layer(*args, forward={"row": _same})


@parallel_linear.mistake(
    says="the column layer's outputs are summed over the workers, though each has different ones",
    tries="no all_reduce of y where workers own outputs.",
    caught_by="column_outputs",
)
def outputs_summed(*args: Any) -> Any:
    return layer(*args, forward={"column": args[-1]})


@parallel_linear.mistake(
    says="the column layer's grad_x misses the other workers' outputs",
    tries="all_reduce(grad @ w): x went to every worker, so gradients come back from every one.",
    caught_by="column_grad",
)
def grad_not_summed(*args: Any) -> Any:
    return layer(*args, backward={"column": _same})


@parallel_linear.mistake(
    says="the row layer's grad_x is summed over the workers, though each has different inputs",
    tries="grad @ w alone where workers own inputs.",
    caught_by="row_grad",
)
def inputs_grad_summed(*args: Any) -> Any:
    return layer(*args, backward={"row": args[-1]})


@parallel_linear.mistake(
    says="sums are divided by the number of workers",
    tries="all_reduce's sum as it is: the parts of one sum are not averaged.",
    caught_by="row_outputs",
)
def averaged(*args: Any) -> Any:
    cut, rank, world_size, x, weight, bias, grad, all_reduce = args
    return layer(cut, rank, world_size, x, weight, bias, grad, lambda n: all_reduce(n) / world_size)


@parallel_linear.mistake(
    says="every W-th row or column is taken, not a block of neighbours",
    tries="weight.chunk(world_size, dim)[rank].",
    caught_by="column_outputs",
)
def interleaved(*args: Any) -> Any:
    rank, world_size = args[1], args[2]
    return layer(*args, blocks=lambda whole, dim: whole.movedim(dim, 0)[rank::world_size].movedim(0, dim))


@parallel_linear.mistake(
    says="every worker takes the first block",
    tries="block `rank`.",
    caught_by="column_outputs",
)
def first_block(*args: Any) -> Any:
    return layer(*args, blocks=lambda whole, dim: whole.chunk(args[2], dim)[0])


@parallel_linear.mistake(
    says="the column layer's outputs have no bias: it is added in the row layer only",
    tries="bias.chunk(world_size)[rank] in the column layer.",
    caught_by="column_outputs",
)
def column_without_bias(cut: Any, *args: Any) -> Any:
    y, grad_x, grad_w = layer(cut, *args)
    rank, world_size, bias = args[0], args[1], args[4]
    return (y - bias.chunk(world_size)[rank] if cut == "column" else y), grad_x, grad_w


@parallel_linear.mistake(
    says="only worker 0 adds the bias, after the sum: the others' outputs miss it",
    tries="bias on every worker after all_reduce (or on one of them before it).",
    caught_by="row_outputs",
)
def bias_on_one(cut: Any, *args: Any) -> Any:
    y, grad_x, grad_w = layer(cut, *args)
    return (y - args[4] if cut == "row" and args[0] else y), grad_x, grad_w


@parallel_linear.mistake(
    says="grad_weight is transposed",
    tries="grad.T @ x, of the shape of the block.",
    caught_by="weight_grad",
)
def weight_grad_transposed(*args: Any) -> Any:
    y, grad_x, grad_w = layer(*args)
    return y, grad_x, grad_w.T


@parallel_linear.mistake(
    says="grad_weight is summed over the workers, though each owns another block",
    tries="grad.T @ x alone.",
    caught_by="weight_grad",
)
def weight_grad_summed(*args: Any) -> Any:
    y, grad_x, grad_w = layer(*args)
    return y, grad_x, args[-1](grad_w)


@parallel_linear.mistake(
    says="the row layer puts its inputs and gradients together: two all_reduces for one",
    tries="one all_reduce a layer: of grad_x (column), of y (row).",
    caught_by="traffic",
)
def gathered(
    cut: Any, rank: Any, world_size: Any, x: Any, weight: Any, bias: Any, grad: Any, all_reduce: Any
) -> Any:
    if cut == "column":
        return layer(cut, rank, world_size, x, weight, bias, grad, all_reduce)
    size = x.shape[1]
    whole = x.new_zeros(len(x), size * world_size)
    whole[:, rank * size : (rank + 1) * size] = x
    y = all_reduce(whole) @ weight.T + bias
    w = weight[:, rank * size : (rank + 1) * size]
    return y, all_reduce(grad / world_size) @ w, grad.T @ x


# ── other right solutions ────────────────────────────────────────────────────────────────────────


@parallel_linear.alternative("gradients by torch.autograd")
def by_autograd(
    cut: Any, rank: Any, world_size: Any, x: Any, weight: Any, bias: Any, grad: Any, all_reduce: Any
) -> Any:
    column = cut == "column"
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        w = weight.chunk(world_size, 0 if column else 1)[rank].detach().clone().requires_grad_()
        part = torch.nn.functional.linear(x, w)
        part.backward(grad)
    if column:
        return part.detach() + bias.chunk(world_size)[rank], all_reduce(x.grad), w.grad
    return all_reduce(part.detach()) + bias, x.grad, w.grad


@parallel_linear.alternative("blocks by slices, products by einsum, the bias on worker 0 before the sum")
def by_einsum(
    cut: Any, rank: Any, world_size: Any, x: Any, weight: Any, bias: Any, grad: Any, all_reduce: Any
) -> Any:
    size = weight.shape[0 if cut == "column" else 1] // world_size
    own = slice(rank * size, rank * size + size)
    w = weight[own] if cut == "column" else weight[:, own]
    y, grad_x = torch.einsum("bk,nk->bn", x, w), torch.einsum("bn,nk->bk", grad, w)
    if cut == "column":
        y, grad_x = y + bias[own], all_reduce(grad_x)
    else:
        y = all_reduce(y + bias if rank == 0 else y)
    return [y, grad_x, torch.einsum("bn,bk->nk", grad, x)]
