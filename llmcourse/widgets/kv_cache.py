"""How many sequences fit beside the weights, and how fast a decode step can then be: `plan`, and its picture.

Everything is computed from published sizes and the data sheet of the GPU, nothing is measured. The speed is a
ceiling: the bytes that a step must read, through memory that is never idle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill

import ipywidgets as W
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llmcourse.errors import CourseError, ShapeError, UnknownNameError
from llmcourse.hardware import GPUS, Gpu, gpu
from llmcourse.models.mixers import MIXERS
from llmcourse.models.published import MODELS, Published, published
from llmcourse.widgets.explorable import Explorable, choice

FORMATS: Mapping[str, float] = {"bf16": 2, "fp8": 1, "int4": 0.5 + 2 / 32}
"""Bytes a number; int4 with a 16-bit scale for every 32 numbers."""
USED = 0.9
"""Share of the memory for weights and cache; activations, the runtime and fragments take the rest."""
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
LOOK = {"layout": W.Layout(width="520px"), "style": {"description_width": "150px"}}


class MemoryPlanError(CourseError, ValueError):
    """A model, a context and GPUs that do not fit together."""


@dataclass(frozen=True)
class Plan:
    """A model on GPUs. All bytes are over all GPUs together.

    context       tokens that each sequence may grow to
    memory        bytes that may be used: USED of what the GPUs have
    weights       bytes of weights, copies included
    a_token       bytes of cache that the first token of a sequence takes
    a_sequence    bytes of cache of a sequence of `context` tokens
    batch         sequences that fit
    cache         bytes that they take
    step_weights  bytes of weights that a decode step of the whole batch reads
    step_bytes    the same with the caches, all sequences being full
    seconds       the least time of that step
    beyond        the context is longer than the model was made for
    """

    model: Published
    gpu: Gpu
    gpus: int
    context: int
    cache_format: str
    weight_format: str
    memory: float
    weights: float
    a_token: float
    a_sequence: float
    batch: int
    step_weights: float

    @property
    def cache(self) -> float:
        return self.batch * self.a_sequence

    @property
    def step_bytes(self) -> float:
        return self.step_weights + self.cache

    @property
    def seconds(self) -> float:
        return self.step_bytes / (self.gpus * self.gpu.bandwidth)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch, at best."""
        return self.batch / self.seconds

    @property
    def beyond(self) -> bool:
        return self.context > self.model.config.max_len


def plan(
    model: str | Published,
    on: str | Gpu,
    *,
    context: int,
    cache: str = "bf16",
    weights: str = "bf16",
    gpus: int = 1,
    batch: int | None = None,
) -> Plan:
    """What fits, and how fast a decode step can be.

    model     a name of `llmcourse.models.published`, or a Published of your own
    on        a GPU of `llmcourse.hardware`
    context   tokens a sequence may grow to
    cache, weights    number formats, see FORMATS
    gpus      that share weights and cache; see `copies`
    batch     sequences; None: as many as fit

    Raises UnknownNameError for a name, ShapeError for a size, MemoryPlanError when weights or sequences do
    not fit.
    """
    model = published(model) if isinstance(model, str) else model
    on = gpu(on) if isinstance(on, str) else on
    _check(context, gpus, batch, cache, weights)
    cache_copies, extra = copies(model, gpus)
    itemsize = FORMATS[weights]
    total = (model.n_params + extra) * itemsize
    memory = gpus * on.memory * USED
    if total >= memory:
        raise _too_heavy(model, on, gpus, weights, total)
    a_sequence = model.cache_bytes(context, FORMATS[cache]) * cache_copies
    fits = math.floor((memory - total) / a_sequence)
    wanted = fits if batch is None else batch
    if not 1 <= wanted <= fits:
        raise _too_long(model, on, gpus, context, cache, memory - total, cache_copies, batch, fits)
    # A replicated weight is read by every GPU that holds it.
    step_weights = (model.touched(wanted) + extra) * itemsize
    a_token = model.cache_bytes(1, FORMATS[cache]) * cache_copies
    return Plan(
        model, on, gpus, context, cache, weights, memory, total, a_token, a_sequence, wanted, step_weights
    )


def copies(model: Published, gpus: int) -> tuple[float, int]:
    """What several GPUs hold more than once: copies of the cache, and parameters beyond the model's own.

    Heads are dealt out whole, so with more GPUs than key/value heads some hold the same head. MLA's one
    latent belongs to all heads and cannot be dealt out: there each GPU takes sequences of its own through all
    of attention, whose weights it then needs whole (engines call it data-parallel attention).
    """
    config = model.config
    if config.latent is not None:
        return 1.0, (gpus - 1) * sum(MIXERS[kind].n_params(config) for kind in config.kinds)
    return gpus * math.ceil(config.n_kv_heads / gpus) / config.n_kv_heads, 0


def _check(context: int, gpus: int, batch: int | None, *formats: str) -> None:
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError(
                f"{name!r} is not a number format of this planner.",
                "Its formats are those that weights and caches are commonly kept in.",
                f"one of {', '.join(FORMATS)}.",
            )
    for what, value in (("context", context), ("gpus", gpus), ("batch", batch)):
        if value is not None and value < 1:
            raise ShapeError(
                f"{what} = {value}.",
                "A plan is for at least one token of one sequence on one GPU.",
                f"{what} = 1 or more.",
            )


def _too_heavy(model: Published, on: Gpu, gpus: int, weights: str, total: float) -> MemoryPlanError:
    ways = []
    for n in (gpus * 2**i for i in range(1, 6)):
        if (model.n_params + copies(model, n)[1]) * FORMATS[weights] < n * on.memory * USED:
            ways.append(f"{n} GPUs")
            break
    for name, size in FORMATS.items():
        if (model.n_params + copies(model, gpus)[1]) * size < gpus * on.memory * USED:
            ways.append(f"weights in {name}")
            break
    return MemoryPlanError(
        f"the weights of {model.name} take {size_of(total)} in {weights}; {_these(on, gpus)} "
        f"{'has' if gpus == 1 else 'have'} {size_of(gpus * on.memory)}, of which {USED:.0%} can be used.",
        "Every decode step reads the weights, so they must lie in the GPU's memory, with room beside them.",
        f"{' or '.join(ways) or 'a smaller model'}.",
    )


def _too_long(
    model: Published,
    on: Gpu,
    gpus: int,
    context: int,
    cache: str,
    room: float,
    cache_copies: float,
    batch: int | None,
    fits: int,
) -> MemoryPlanError:
    each = size_of(model.cache_bytes(context, FORMATS[cache]) * cache_copies)
    one = "one sequence" if batch is None else f"{batch:,} sequences"
    low, high = 0, context  # the longest context that fits; what is kept never shrinks with it
    while low < high:
        middle = (low + high + 1) // 2
        if model.cache_bytes(middle, FORMATS[cache]) * cache_copies * (batch or 1) <= room:
            low = middle
        else:
            high = middle - 1
    ways = [f"context = {low:,} or less"] if low else ["more GPUs"]
    if fits:
        ways.insert(0, f"batch = {fits:,} or less")
    return MemoryPlanError(
        f"{one} of {context:,} tokens {'does' if batch in (None, 1) else 'do'} not fit: {each} of cache each "
        f"in {cache}, and beside the weights of {model.name} {_these(on, gpus)} leaves {size_of(room)}.",
        "Keys and values of all tokens are kept until a sequence ends.",
        f"{', '.join(ways)}, a smaller cache format, or more GPUs.",
    )


def _these(on: Gpu, gpus: int) -> str:
    return f"{gpus} × {on.name}" if gpus > 1 else on.name


def size_of(nbytes: float) -> str:
    """Bytes in the unit that suits them, decimal as on data sheets."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.3g} {unit}"
    return f"{nbytes:,.0f} B"


# ------------------------------------------------------------------------------------------- the picture


def kv_cache_explorer(
    model: str = "Llama-3-8B",
    on: str = "H100 SXM",
    *,
    context: int = 8192,
    cache: str = "bf16",
    weights: str = "bf16",
    gpus: int = 1,
) -> Explorable:
    """Choose model, GPU, context and number formats; see what fills the memory and what the batch is worth.

    context   a power of two from 256 to 1,048,576
    """

    def draw(model: str, on: str, context: int, cache: str, weights: str, gpus: int) -> Figure:
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        try:
            found = plan(model, on, context=context, cache=cache, weights=weights, gpus=gpus)
        except MemoryPlanError as error:
            _draw_error(figure.subplots(), error)
            return figure
        grid = figure.add_gridspec(2, 2, height_ratios=[1, 2.6])
        _draw_memory(figure.add_subplot(grid[0, :]), found)
        _draw_batches(figure.add_subplot(grid[1, 0]), found)
        _draw_speed(figure.add_subplot(grid[1, 1]), found)
        figure.suptitle(
            f"{model} on {_these(found.gpu, gpus)}: {found.a_token:,.0f} bytes of cache a token, "
            f"{_sequences(found.batch)} of {context:,} tokens, at best {found.tokens_per_s:,.0f} tokens/s",
            fontsize=10,
        )
        return figure

    lengths = [2**i for i in range(8, 21)]
    return Explorable(
        draw,
        "Lengthen the context or pick another model: the batch that fits falls as the cache of a sequence "
        "grows, and with it the tokens that a step's reading of the weights is shared by.",
        model=choice(list(MODELS), published(model).name, "model", **LOOK),
        on=choice(list(GPUS), gpu(on).name, "GPU", **LOOK),
        gpus=choice([1, 2, 4, 8, 16, 32], gpus, "GPUs", **LOOK),
        context=choice([(f"{n:,}", n) for n in lengths], context, "context, tokens", **LOOK),
        cache=choice(list(FORMATS), cache, "cache format", **LOOK),
        weights=choice(list(FORMATS), weights, "weight format", **LOOK),
    )


def _sequences(n: int) -> str:
    return f"{n:,} sequence{'' if n == 1 else 's'}"


def _draw_error(axes: Axes, error: CourseError) -> None:
    axes.axis("off")
    axes.set_title("This does not fit:", color=ORANGE, loc="left", fontsize=13)
    parts = (error.what, error.why, f"Try {error.fix}")
    text = "\n\n".join(fill(part, 88) for part in parts)
    axes.text(0, 0.95, text, fontsize=11, va="top", linespacing=1.4, transform=axes.transAxes)


def _draw_memory(axes: Axes, found: Plan) -> None:
    """One bar, the memory of all GPUs: weights, sequences with a line between each, and what is held back."""
    whole = found.gpus * found.gpu.memory
    axes.barh(0, found.weights, color=BLUE)
    axes.barh(0, found.cache, left=found.weights, color=GREEN)
    axes.barh(0, whole - found.memory, left=found.memory, color=GREY, hatch="//")
    if found.batch <= 200:
        edges = found.weights + found.a_sequence * np.arange(1, found.batch)
        axes.vlines(edges, -0.4, 0.4, color="white", lw=0.6)
    labels = [
        (0.0, f"weights {size_of(found.weights)}", BLUE),
        (1 / 3, f"cache {found.batch:,} × {size_of(found.a_sequence)} ({found.cache / whole:.0%})", GREEN),
        (1.0, f"held back {size_of(whole - found.memory)}", "#666666"),
    ]
    for x, text, colour in labels:
        side = "right" if x == 1.0 else "left"
        axes.text(x, 1.08, text, color=colour, fontsize=9, ha=side, transform=axes.transAxes)
    axes.set_xlim(0, whole)
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, whole, 5), [size_of(x) if x else "0" for x in np.linspace(0, whole, 5)])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_batches(axes: Axes, found: Plan) -> None:
    """Sequences that fit against context, for each format of the cache."""
    contexts = np.array([2**i for i in range(8, 21)])
    room = found.memory - found.weights
    share, _ = copies(found.model, found.gpus)
    for (name, size), style in zip(FORMATS.items(), ("-", "--", ":"), strict=True):
        each = np.array([found.model.cache_bytes(int(n), size) for n in contexts]) * share
        fits = np.floor(room / each)
        chosen = name == found.cache_format
        axes.plot(
            contexts,
            np.where(fits >= 1, fits, np.nan),
            style,
            color=GREEN if chosen else "#777777",
            label=name,
        )
    axes.plot([found.context], [found.batch], "o", color=ORANGE, markersize=9)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="context, tokens", ylabel="sequences that fit")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xticks(contexts[::3], [f"{n // 1024}k" if n >= 1024 else str(n) for n in contexts[::3]])
    axes.legend(title="cache format", fontsize=8, title_fontsize=8)
    if found.beyond:
        note = f"made for {found.model.config.max_len:,} tokens"
        axes.text(0.02, 0.03, note, transform=axes.transAxes, fontsize=8, color=ORANGE)
    _tidy(axes)


def _draw_speed(axes: Axes, found: Plan) -> None:
    """Tokens a second at best against batch, up to the batch that fits."""
    batches = np.unique(np.geomspace(1, found.batch, 60).astype(int))
    plans = [
        plan(
            found.model,
            found.gpu,
            context=found.context,
            cache=found.cache_format,
            weights=found.weight_format,
            gpus=found.gpus,
            batch=int(b),
        )
        for b in batches
    ]
    axes.plot(batches, [p.tokens_per_s for p in plans], color=BLUE)
    axes.plot([found.batch], [found.tokens_per_s], "o", color=ORANGE, markersize=9)
    axes.set(xlabel="sequences in a decode step", ylabel="tokens/s at best")
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("log")
        _plain_numbers(axis)
    if found.batch == 1:  # one point has no range of its own
        axes.set_xticks([1], ["1"])
        axes.set(xlim=(0.5, 2), ylim=(found.tokens_per_s / 2, found.tokens_per_s * 2))
    weights, cache = size_of(found.step_weights), size_of(found.cache)
    text = f"a step reads\n{weights} of weights\n{cache} of cache\n{found.seconds * 1e3:,.3g} ms at least"
    axes.text(0.97, 0.05, text, transform=axes.transAxes, fontsize=8, ha="right", color="#333333")
    _tidy(axes)


def _plain_numbers(axis: Axis) -> None:
    """Ticks as plain numbers, as many a decade as there is room for."""
    low, high = axis.get_view_interval()
    steps = {8.0: (1, 2, 3, 4, 5, 6, 8), 300.0: (1, 2, 5)}
    subs = next((subs for ratio, subs in steps.items() if high / low < ratio), (1,))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.3g}" if x < 100 else f"{x:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _tidy(axes: Axes) -> None:
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
