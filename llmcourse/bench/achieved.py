"""What the kernels of chapter 05 reach of their ceilings: measured on this GPU, or from the record of one.

    memory = achieved.memory_bound("cuda")       GB/s, beside a copy's
    products = achieved.products("cpu")          TFLOP/s, beside cuBLAS's; no GPU: the newest record

A few shapes of `llmcourse bench kernels` and `llmcourse bench matmul`, by the same functions, without the
peers that take long to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.bench.records import describe_device, recorded, versions
from llmcourse.errors import UnknownNameError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmcourse.notebook import Table

SHAPES = {
    "vector_add forward": ("134217728", "bfloat16"),
    "softmax forward": ("16384×8192", "bfloat16"),
    "rms_norm forward": ("16384×8192", "bfloat16"),
    "layer_norm forward": ("16384×8192", "bfloat16"),
    "add_rms_norm forward": ("16384×8192", "bfloat16"),
    "swiglu forward": (None, "bfloat16"),
}
"""(shape, format) shown of each case; None: its first."""

CASES = ("vector_add", "softmax", "rms_norm layer_norm", "add_rms_norm", "swiglu")
WHO = ("ours", "ours, CUDA C++", "compile", "eager", "naive")
BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#E69F00", "#999999"
COLOURS = {"ours": BLUE, "ours, CUDA C++": SKY, "compile": ORANGE, "eager": GREY, "naive": "#DDDDDD"}
SQUARE = 8192


@dataclass(frozen=True)
class Achieved:
    """Rates in one unit, and the rate that limits them.

    what     the operation that a row is about, in the rows' order
    rows     (what, who, rate, rate / ceiling)
    ceiling  the rate of the device's own copy, or of cuBLAS
    unit     GB/s or TFLOP/s
    caption  which device, and when
    """

    rows: tuple[tuple[str, str, float, float], ...]
    ceiling: float
    ceiling_name: str
    unit: str
    caption: str

    def share(self, what: str, who: str) -> float:
        """Rate over ceiling of one row. Raises UnknownNameError."""
        for row in self.rows:
            if row[:2] == (what, who):
                return row[3]
        raise UnknownNameError(
            f"nothing was measured of {what!r} by {who!r}.",
            "There are " + ", ".join(f"{a} by {b}" for a, b, *_ in self.rows) + ".",
            "one of these.",
        )

    def table(self) -> Table:
        """A line for each operation, a column for each who: `rate (share of the ceiling)`."""
        from llmcourse.notebook import Table

        found = {(what, who): (rate, share) for what, who, rate, share in self.rows}
        names, columns = dict.fromkeys(r[0] for r in self.rows), dict.fromkeys(r[1] for r in self.rows)

        def cell(what: str, who: str) -> str:
            if (what, who) not in found:
                return "–"
            rate, share = found[what, who]
            return f"{rate:,.0f} ({share:.0%})"

        lines = [[what, *(cell(what, who) for who in columns)] for what in names]
        note = f"{self.unit}, and of {self.ceiling_name} ({self.ceiling:,.0f} {self.unit}); {self.caption}"
        return Table(["", *columns], lines, note)

    def draw(self, axes: Axes) -> None:
        """Bars for each operation, one for each who; the ceiling as a dashed line."""
        place, ticks = 0.0, []
        for what in dict.fromkeys(row[0] for row in self.rows):
            bars = sorted((r for r in self.rows if r[0] == what), key=lambda r: list(COLOURS).index(r[1]))
            for i, (_, who, rate, _) in enumerate(bars):
                axes.barh(place + i, rate, color=COLOURS[who], height=0.85, label=who)
            ticks.append(place + (len(bars) - 1) / 2)
            place += len(bars) + 0.7
        axes.axvline(self.ceiling, color="black", linestyle="--", linewidth=1)
        axes.set_yticks(ticks, dict.fromkeys(row[0] for row in self.rows))
        axes.set(xlabel=f"{self.unit}; dashed: {self.ceiling_name}")
        axes.invert_yaxis()
        handles, labels = axes.get_legend_handles_labels()
        legend = {label: handle for handle, label in zip(handles, labels, strict=True)}
        if len(legend) > 1:
            axes.legend(
                list(legend.values()),
                list(legend),
                loc="upper center",
                bbox_to_anchor=(0.5, -0.13),
                ncols=len(legend),
                fontsize=8,
                frameon=False,
            )


def memory_bound(device: str, *, folder: Path | None = None) -> Achieved:
    """GB/s of the memory-bound kernels, bytes that must be moved over time; the ceiling is a large copy.

    device   "cuda" measures here, about 20 s; anything else reads the newest record of an H100 in `folder`
    Raises   UnknownNameError where there is no record.
    """
    if device == "cuda":
        from llmcourse.bench.ceilings import copy_bandwidth

        ceiling = copy_bandwidth("cuda") / 1e9
        results, caption = list(_measured_kernels(ceiling)), _caption_here()
    else:
        record = recorded("kernels", device="H100", folder=folder)
        results, caption = record.results, record.caption
        ceiling = record.row(name="ceiling: copy")["gb_per_s"]
    rows, shapes = [], dict(SHAPES)
    for row in results:
        name = row["name"]
        if name not in shapes or row["who"] not in WHO:
            continue
        shape, dtype = shapes[name]
        if shape is None:
            shapes[name] = row["shape"], dtype
        elif row["shape"] != shape:
            continue
        if row["dtype"] == dtype:
            rate = row["gb_per_s"]
            rows.append((name.removesuffix(" forward"), row["who"], rate, rate / ceiling))
    return Achieved(tuple(rows), ceiling, "a large copy", "GB/s", caption)


def _measured_kernels(ceiling: float) -> Iterator[dict[str, Any]]:
    import torch

    from llmcourse.bench.kernel_cases import MAKERS
    from llmcourse.bench.kernels import measure_case

    wanted = dict(SHAPES)
    for maker in CASES:
        for case in MAKERS[maker]():
            name = f"{case.kernel} {case.direction}"
            shape, dtype = wanted.get(name, ("", ""))
            if shape in (None, case.shape) and str(case.dtype) == f"torch.{dtype}":
                del wanted[name]
                case.functions.pop("compile", None)
                yield from measure_case(case, ceiling * 1e9)
            del case
            torch.cuda.empty_cache()


def products(device: str, *, folder: Path | None = None) -> Achieved:
    """TFLOP/s of the matmul ladder in 16 bits at 8192³, NT; the ceiling is cuBLAS in the same run.

    device   "cuda" measures here; anything else reads the newest record of an H100 in `folder`
    Raises   UnknownNameError where there is no record.
    """
    if device == "cuda":
        results, caption = _measured_products(), _caption_here()
    else:
        record = recorded("matmul", device="H100", folder=folder)
        results = [r for r in record.results if (r.get("m"), r.get("dtype")) == (SQUARE, "bf16")]
        caption = record.caption
    found = {r["kernel"]: r["tflops"] for r in results if r["layout"] == "NT"}
    peer = found.pop("torch.matmul")
    rows = [(rung, "ours", rate, rate / peer) for rung, rate in found.items()]
    return Achieved(tuple(rows), peer, "cuBLAS", "TFLOP/s", caption)


def _measured_products() -> Sequence[dict[str, Any]]:
    import torch

    from llmcourse.bench.matmul import LADDER, compare

    capability = torch.cuda.get_device_capability()
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    rungs = LADDER if capability >= (9, 0) else LADDER[:2]  # descriptors pay from Hopper on
    return compare(SQUARE, SQUARE, SQUARE, dtype, "NT", rungs)


def _caption_here() -> str:
    return f"measured here on {describe_device('cuda')['name']}, torch {versions()['torch']}"
