"""ZeRO: data parallel training without keeping everything on every rank.

With Adam in float32 each of P parameters takes 16 bytes: 4 for itself, 4 for its gradient, 8 for the two
moments. Plain data parallel keeps all 16 on each of n ranks. But a rank needs the moments only to update, and
if it updates only the n-th part of the parameters, it needs only the n-th part of the moments (Rajbhandari et
al. 2020, arXiv:1910.02054):

| | parameters | gradients | moments | bytes sent a step, in units of (n−1)/n·4P |
|---|---|---|---|---|
| data parallel | 4P | 4P | 8P | 2: all-reduce of gradients |
| stage 1 | 4P | 4P | 8P/n | 2: reduce-scatter of gradients, all-gather of updated parameters |
| stage 2 | 4P | 4P/n | 8P/n | 2: the same, but gradients leave during backward and are freed |
| stage 3 | 4P/n | 4P/n | 8P/n | 3: parameters are gathered for forward and again for backward |

An all-reduce *is* a reduce-scatter followed by an all-gather; stages 1 and 2 put the update between the two,
which costs nothing. Stage 3 (PyTorch's FSDP) pays half as much again, and needs a whole copy of only one
or two units (blocks) at a time.

A **unit** is a set of parameters that is gathered and reduced together: each block is one, and what is left
(embedding, last norm, head) is the root, which is gathered first and given up last. The parameters of a unit
are views of one flat buffer, cut into n equal shards; the optimizer works on this rank's shard, as if it were
the model. So the optimizer must treat each element by itself: SGD and Adam do, LAMB with its norms per layer
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.errors import GraphError, ShapeError
from llmcourse.train.parallel.collectives import Wire, Work
from llmcourse.train.parallel.data_parallel import copy_from_rank_0

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


class Unit:
    """Parameters that are gathered and reduced together.

    flat        [n·k], all of them side by side, padded with zeros; each parameter is a view of it
    shard       [k], this rank's part; under stages 1 and 2 a view of `flat`, under stage 3 a copy
    gradient    [k], the mean gradient of this rank's part, None before there is one
    pieces      views of `shard`, one for each parameter that reaches into it: what the optimizer updates
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], wire: Wire, *, sharded: bool) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.wire, self.sharded = wire, sharded
        first = self.parameters[0]
        if any(p.dtype != first.dtype or p.device != first.device for p in self.parameters):
            raise ShapeError(
                "a unit has parameters of several types or devices.",
                "They share one buffer.",
                "model.to(one type and device).",
            )
        sizes = [p.numel() for p in self.parameters]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.length = -(-sum(sizes) // wire.size)
        self.flat = torch.zeros(self.length * wire.size, dtype=first.dtype, device=first.device)
        mine = slice(wire.rank * self.length, (wire.rank + 1) * self.length)
        for p, view in zip(self.parameters, self.views(self.flat), strict=True):
            view.copy_(p.detach())
            p.data = view
        self.shard = self.flat[mine].clone() if sharded else self.flat[mine]
        self.gradient: Tensor | None = None
        self.pieces = self._pieces(mine.start, mine.stop)
        self.present, self.gathering, self.in_backward = True, None, False
        self.missing = set(range(len(self.parameters)))
        if sharded:
            self.drop()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's place in a flat buffer, in its shape."""
        return [
            flat[start : start + p.numel()].view(p.shape)
            for start, p in zip(self.starts, self.parameters, strict=True)
        ]

    def _pieces(self, start: int, stop: int) -> list[tuple[str, nn.Parameter, slice]]:
        pieces = []
        for name, p, at in zip(self.names, self.parameters, self.starts, strict=True):
            low, high = max(at, start), min(at + p.numel(), stop)
            if low < high:
                here = slice(low - start, high - start)
                pieces.append((name, nn.Parameter(self.shard[here]), here))
        return pieces

    # ── parameters ───────────────────────────────────────────────────────────────────────────────

    def start_gather(self) -> None:
        """Begin to bring all shards into `flat`, unless they are there or on their way."""
        if self.present or self.gathering is not None:
            return
        self.flat.untyped_storage().resize_(self.flat.nbytes)
        self.gathering = self.wire.all_gather(self.flat, self.shard, async_op=True)

    def gather(self) -> None:
        """The whole parameters are there when this returns."""
        self.start_gather()
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering, self.present = None, True

    def drop(self) -> None:
        """Free the whole parameters, where they are sharded and there. What autograd saved for backward are
        views of the same memory: they become valid again when it is gathered again."""
        if self.gathering is not None:
            self.gather()  # nothing may still be written into what is freed
        if self.sharded:
            self.flat.untyped_storage().resize_(0)
        self.present = not self.sharded

    gathering: Work | None

    # ── gradients ────────────────────────────────────────────────────────────────────────────────

    def flat_gradient(self) -> Tensor:
        """All gradients of the unit side by side, divided by the number of ranks; `.grad` is given up."""
        whole = torch.empty(self.length * self.wire.size, dtype=self.shard.dtype, device=self.shard.device)
        for p, view in zip(self.parameters, self.views(whole), strict=True):
            if p.grad is None:
                view.zero_()
            else:
                torch.div(p.grad, self.wire.size, out=view)
                p.grad = None
        whole[self.starts[-1] + self.parameters[-1].numel() :].zero_()
        return whole


class Zero:
    """Trains `model` with its optimizer's state (stage 1), gradients (2) and parameters (3) sharded.

    make_optimizer   of an iterable of parameter groups: `lambda groups: AdamW(groups, lr=3e-3)`
    stage            1, 2 or 3
    units            modules that are gathered and reduced as one (default: the elements of the model's
                     `nn.ModuleList`s); all other parameters form the root unit
    prefetch         stage 3: gather the next unit while this one computes
    group_of         (name, parameter) → options of its parameter group, such as {"weight_decay": 0.0}

    The weights of rank 0 are copied to all ranks at the start. Call the object like the model, then
    `loss.backward()`, then `step()`, which also clears the gradients. Several backward passes before a step
    add up.
    """

    def __init__(
        self,
        model: nn.Module,
        wire: Wire,
        make_optimizer: MakeOptimizer,
        *,
        stage: int,
        units: Sequence[nn.Module] | None = None,
        prefetch: bool = True,
        group_of: Callable[[str, nn.Parameter], dict[str, Any]] | None = None,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ShapeError(
                f"stage {stage}.",
                "Stage 1 shards the optimizer's state, 2 gradients too, 3 parameters too.",
                "1, 2 or 3; DataParallel shards nothing.",
            )
        self.model, self.wire, self.stage, self.prefetch = model, wire, stage, prefetch
        copy_from_rank_0(model, wire)
        modules = list(units) if units is not None else list(_blocks(model))
        with torch.no_grad():
            self.units = self._make_units(modules)
        groups = []
        for unit in self.units:
            shapes = dict(zip(unit.names, unit.parameters, strict=True))
            for name, piece, _ in unit.pieces:
                groups.append({"params": [piece], **(group_of(name, shapes[name]) if group_of else {})})
        # A rank may hold nothing but padding; an optimizer wants at least one parameter.
        self.optimizer = make_optimizer(groups or [{"params": [nn.Parameter(torch.zeros(1))]}])
        self._reducing: tuple[Unit, Tensor, Tensor, Work] | None = None
        self._add_hooks()

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.model(*args, **kwargs)

    def _make_units(self, modules: Sequence[nn.Module]) -> list[Unit]:
        """The root first, then one unit a module; a parameter that two modules share belongs to the root."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise GraphError(
                f"no weight of this {type(self.model).__name__} wants a gradient.",
                "There is nothing to train.",
                "model.requires_grad_(True).",
            )
        owner: dict[int, int] = {}
        for i, module in enumerate(modules, 1):
            for p in module.parameters():
                owner[id(p)] = i if id(p) not in owner else 0
        parts: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(len(modules) + 1)]
        for name, p in named:
            parts[owner.get(id(p), 0)].append((name, p))
        kept = [(m, part) for m, part in zip([self.model, *modules], parts, strict=True) if part]
        self._modules = [module for module, _ in kept]
        return [Unit(part, self.wire, sharded=self.stage == 3) for _, part in kept]

    # ── forward and backward ─────────────────────────────────────────────────────────────────────

    def _add_hooks(self) -> None:
        for i, (unit, module) in enumerate(zip(self.units, self._modules, strict=True)):
            if self.stage > 1:
                for j, p in enumerate(unit.parameters):
                    p.register_post_accumulate_grad_hook(self._gradient_hook(unit, j))
            if self.stage == 3:
                module.register_forward_pre_hook(self._before_forward(i))
                module.register_forward_hook(self._after_forward(i))

    def _before_forward(self, i: int) -> Callable[..., None]:
        def gather(*_: object) -> None:
            unit = self.units[i]
            unit.gather()
            if not unit.in_backward:  # else it is recomputed for a backward pass, which goes the other way
                self._start_gather(i + 1)

        return gather

    def _after_forward(self, i: int) -> Callable[..., None]:
        unit, root = self.units[i], self._modules[i] is self.model

        def before_backward(_: Tensor) -> None:
            unit.in_backward = True
            unit.gather()
            if i > 0 and self._modules[i - 1] is not self.model:
                self._start_gather(i - 1)

        def give_up(_module: nn.Module, _inputs: object, output: object) -> None:
            if unit.in_backward:
                return
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(before_backward)
            if not (root and torch.is_grad_enabled()):  # backward begins with the root
                unit.drop()

        return give_up

    def _start_gather(self, i: int) -> None:
        if self.prefetch and i < len(self.units):
            self.units[i].start_gather()

    def _gradient_hook(self, unit: Unit, j: int) -> Callable[[Tensor], None]:
        def gradient_is_there(_: Tensor) -> None:
            unit.missing.discard(j)
            if not unit.missing:
                self._reduce(unit)
                if self.stage == 3:  # a node that needs a weight also makes its gradient: all have run
                    unit.drop()

        return gradient_is_there

    def _reduce(self, unit: Unit) -> None:
        """Send a unit's gradients off; at most one unit is on its way, so that memory stays bounded."""
        self._finish_reducing()
        unit.missing = set(range(len(unit.parameters)))
        unit.in_backward = False
        whole = unit.flat_gradient()
        mine = torch.empty_like(unit.shard)
        work = self.wire.reduce_scatter(mine, whole, async_op=True)
        self._reducing = (unit, whole, mine, work)

    def _finish_reducing(self) -> None:
        if self._reducing is None:
            return
        unit, _, mine, work = self._reducing
        self._reducing = None
        work.wait()
        unit.gradient = mine if unit.gradient is None else unit.gradient.add_(mine)

    # ── the update ───────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def step(self, *, clip: float | None = None) -> None:
        """Update this rank's shards with the mean gradient, and share what was updated.

        clip   the largest norm that the gradient of the whole model may have
        """
        for unit in reversed(self.units):
            begun = 0 < len(unit.missing) < len(unit.parameters)  # some parameters took no part in the loss
            if self.stage == 1 or begun or (unit.gradient is None and not self._is_reducing(unit)):
                self._reduce(unit)
            unit.drop()  # what was gathered, and took no part in the backward pass
        self._finish_reducing()
        if clip is not None:
            self._clip(clip)
        for unit in self.units:
            assert unit.gradient is not None
            for _, piece, here in unit.pieces:
                piece.grad = unit.gradient[here]
        self.optimizer.step()
        for unit in self.units:
            unit.gradient = None
            for _, piece, _ in unit.pieces:
                piece.grad = None
        if self.stage < 3:
            for work in [self.wire.all_gather(u.flat, u.shard, async_op=True) for u in self.units]:
                work.wait()

    def _is_reducing(self, unit: Unit) -> bool:
        return self._reducing is not None and self._reducing[0] is unit

    def _clip(self, most: float) -> None:
        gradients = [u.gradient for u in self.units if u.gradient is not None]
        square = torch.stack([g.square().sum() for g in gradients]).sum()
        self.wire.all_reduce(square)
        scale = (most / (square.sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            gradient *= scale

    # ── looking at it ────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all its parameters on this rank, to be evaluated or saved."""
        away = [unit for unit in self.units if not unit.present]
        for unit in away:
            unit.gather()
        try:
            yield self.model
        finally:
            for unit in away:
                unit.drop()

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds at this moment: parameters, gradients, and the optimizer's tensors.

        Between backward and step these are the gradients that the step needs: what is on its way has arrived.
        """
        self._finish_reducing()
        held = {"parameters": 0, "gradients": 0, "optimizer": 0}
        for unit in self.units:
            held["parameters"] += unit.flat.untyped_storage().nbytes() + unit.shard.nbytes * unit.sharded
            held["gradients"] += sum(p.grad.nbytes for p in unit.parameters if p.grad is not None)
            held["gradients"] += 0 if unit.gradient is None else unit.gradient.nbytes
        for state in self.optimizer.state.values():
            held["optimizer"] += sum(t.nbytes for t in state.values() if torch.is_tensor(t) and t.dim())
        return held


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost `nn.ModuleList`s."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
