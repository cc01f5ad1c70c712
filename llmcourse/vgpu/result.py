"""What a launch gave: arrays, counters or time, what it printed, and its source with counters beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcourse.errors import CourseError
from llmcourse.vgpu.arguments import Argument
from llmcourse.vgpu.counters import NCU_NAMES, Counters
from llmcourse.vgpu.shown import for_readers

if TYPE_CHECKING:
    from llmcourse.notebook import Table
    from llmcourse.vgpu.annotate import Annotated
    from llmcourse.vgpu.launch import Size
    from llmcourse.vgpu.module import Kernel
    from llmcourse.vgpu.native import NativeRun


class NoCountersError(CourseError, RuntimeError):
    """Counters of a launch that ran on a GPU, where nothing counts."""


class Result:
    """One launch.

    kernel, grid, block, shared   what was launched; sizes as (x, y, z), shared memory in bytes
    arrays     the arrays that were passed, by parameter name: the kernel has written into them
    where      "machine" or "gpu"
    counters   the machine's `Counters`; None after a launch on a GPU, unless counters=True was asked for
    printed    what the kernel's printf wrote
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Size,
        block: Size,
        shared: int,
        bound: Sequence[Argument],
        *,
        counters: Counters | None = None,
        machine_seconds: float | None = None,
        native: NativeRun | None = None,
        printed: str = "",
    ) -> None:
        self.kernel, self.grid, self.block, self.shared = kernel, grid, block, shared
        self.arrays: dict[str, Any] = {a.name: a.value for a in bound if a.is_array}
        self.counters, self.machine_seconds, self.printed = counters, machine_seconds, printed
        self._native = native

    @property
    def where(self) -> str:
        return "machine" if self._native is None else "gpu"

    @property
    def seconds(self) -> float | None:
        """Device time between two events around the launch; None on the machine, which is no clock of a GPU.

        Reading it waits for the kernel. A single launch is a rough measure: `llmcourse.bench` repeats,
        warms up and reports a median.
        """
        return None if self._native is None else self._native.seconds()

    @property
    def milliseconds(self) -> float | None:
        """`seconds` in milliseconds."""
        seconds = self.seconds
        return None if seconds is None else 1e3 * seconds

    @for_readers
    def annotated(
        self, columns: Sequence[str] | None = None, *, heat: str | None = None, whole: bool | None = None
    ) -> Annotated:
        """The source with counters beside each line, the hottest lines shaded; HTML in Jupyter, else text.

        columns   names from `annotate.COLUMNS` or of any counter; None for those that say something here
        heat      the column that is shaded; None for the first
        whole     False leaves out stretches of lines without counters; None does in a source of over 40 lines

        Raises   NoCountersError after a launch on a GPU without counters=True.
        """
        from llmcourse.vgpu.annotate import Annotated

        counters = self._need_counters()
        title = f"{self.kernel.name}[{_short(self.grid)}, {_short(self.block)}]"
        return Annotated(self.kernel.source, counters, columns=columns, heat=heat, whole=whole, title=title)

    @for_readers
    def table(self, *, zeros: bool = False) -> Table:
        """All totals, under our names and under Nsight Compute's. `zeros` also shows what did not occur."""
        from llmcourse.notebook import Table

        counters = self._need_counters()
        rows: list[tuple[str, Any, str]] = [
            (name.replace("_", " "), count, NCU_NAMES.get(name, ""))
            for name, count in counters.total.items()
            if count or zeros
        ]
        ratios = {
            "global load sectors per request": counters.global_load_sectors_per_request,
            "global store sectors per request": counters.global_store_sectors_per_request,
            "active threads per instruction": counters.active_threads,
        }
        metric = {"active threads per instruction": "smsp__thread_inst_executed_per_inst_executed.ratio"}
        rows += [(n, float(v), metric.get(n, "")) for n, v in ratios.items() if v or zeros]
        return Table(["counter", "total", "Nsight Compute"], rows)

    def _need_counters(self) -> Counters:
        if self.counters is None:
            raise NoCountersError(
                f"{self.kernel.name} ran on a GPU, which keeps no counters for each line.",
                "The machine can run the same launch on copies of the arrays, and count.",
                f"{self.kernel.name}[grid, block](…, counters=True).",
            )
        return self.counters

    def __repr__(self) -> str:
        head = f"{self.kernel.name}[{_short(self.grid)}, {_short(self.block)}]"
        if self._native is not None:
            seconds = self.seconds
            took = "" if seconds is None else f": {1e6 * seconds:,.1f} µs"
            text = f"{head} on {self._native.device}{took}"
        else:
            text = f"{head} on the PTX machine"
        return text + (f"\n{_summary(self.counters)}" if self.counters is not None else "")


def _summary(counters: Counters) -> str:
    """The counts that are read first, in two or three lines."""
    total = counters.total
    out = [
        f"  {_count(total['instructions'], 'warp instruction')}, "
        f"{counters.active_threads:.1f} of 32 threads active on average"
    ]
    for kind in ("load", "store"):
        requests = total[f"global_{kind}_requests"]
        if requests:
            sectors = total[f"global_{kind}_sectors"]
            out.append(
                f"  global {kind}s: {_count(requests, 'request')}, {_count(sectors, 'sector')} "
                f"({sectors / requests:.2f} a request), {total[f'global_{kind}_bytes']:,} bytes asked for"
            )
    shared = sum(total[f"shared_{k}_requests"] for k in ("load", "store", "atomic"))
    if shared:
        conflicts = _count(counters.bank_conflicts, "bank conflict")
        out.append(f"  shared memory: {_count(shared, 'request')}, {conflicts}")
    return "\n".join(out)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _short(size: Size) -> str:
    x, y, z = size
    return f"({x}, {y}, {z})" if z != 1 else f"({x}, {y})" if y != 1 else f"{x}"
