"""What a Triton kernel moves and computes, counted on a CPU: bytes, sectors, FLOPs, by line and by argument.

    c = count(softmax_kernel)[(rows,)](x, out, x.stride(0), n, BLOCK=1024)     one launch
    c.load_bytes, c.store_bytes                                                 262144, 262144
    c.args["x"].load_sectors, c.lines[14].load_bytes
    c.annotated()                                                the source, with counts beside it

    with counting() as c:                                        every launch of a block of code
        y = softmax(x)                                           (a wrapper that launches kernels)
    c.bytes, len(c), c.kernels["softmax_kernel"].bytes

    interpreted(kernel)[grid](…);   with interpreting(): …       run, without counting

The kernel runs in Triton's interpreter, on the tensors that it is given, and leaves its results in them.
Tensors on a GPU are copied to the host and back, so that a cell counts the same everywhere. Accesses outside
a tensor, misaligned accesses, failed assertions and endless loops raise `KernelFault` with line, program and
index.

The counters, of which `Counts`, each of its lines and each of its arguments have all

    load_ops        tl.load operations that ran; one covers a whole block, in one program
    load_bytes      what they asked for: lanes whose mask is set × element size; a masked lane costs nothing
    load_sectors    different 32-byte sectors in each operation, summed: what is fetched if an operation
                    fetches each sector once and nothing stays in a cache
    load_unique_bytes, load_unique_sectors
                    different bytes, and sectors, over the whole launch: what must come from memory at least
                    once. (Of arguments and of the launch; a line has none.)
    store_…, atomic_…   the same; an atomic operation counts once, though it reads and writes
    dot_ops, dot_flops  of tl.dot: 2·M·N·K
    float_ops       element operations on floats, coarsely. It depends on Triton's version, which composes
                    functions differently: never grade on it. (Of the launch only.)
    bytes           load_bytes + store_bytes + atomic_bytes
    unique_bytes    their unique parts

All but float_ops depend on the kernel and its arguments only, not on version or machine. Sectors are counted
as if every storage began on a 512-byte boundary, which is how torch allocates on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from llmcourse.errors import CourseError, MissingPackageError
from llmcourse.notebook import Table

if TYPE_CHECKING:
    from llmcourse.kernels._interpreter import Result
    from llmcourse.kernels.annotated import Annotated

Bounds = Literal["tensor", "storage"]

KINDS = ("load", "store", "atomic")
COUNTERS = (
    *(f"{kind}_{what}" for kind in KINDS for what in ("ops", "bytes", "sectors")),
    *(f"{kind}_unique_{what}" for kind in KINDS for what in ("bytes", "sectors")),
    "dot_ops",
    "dot_flops",
    "float_ops",
)


class NotAKernelError(CourseError, TypeError):
    """Something that cannot be launched was to be counted."""


class Counters(Mapping[str, int]):
    """Counters by name, as items and as attributes; those that were not touched are 0."""

    def __init__(self, values: Mapping[str, int] | None = None) -> None:
        self._values = dict.fromkeys(COUNTERS, 0)
        self._add(values or {})

    def _add(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            self._values[name] += value

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no counter {name!r}; there are {', '.join(self._values)}") from None

    @property
    def bytes(self) -> int:
        """Bytes asked for: loaded, stored and atomically changed."""
        return sum(self._values[f"{kind}_bytes"] for kind in KINDS)

    @property
    def unique_bytes(self) -> int:
        """Different bytes, of loads, of stores and of atomics."""
        return sum(self._values[f"{kind}_unique_bytes"] for kind in KINDS)

    @property
    def sectors(self) -> int:
        return sum(self._values[f"{kind}_sectors"] for kind in KINDS)

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{k}={v:,}' for k, v in self._values.items() if v) or 'nothing'})"


@dataclass(frozen=True, repr=False)
class Counts:
    """One launch of one kernel. Counters of the whole launch are attributes: `c.load_bytes`.

    grid       programs along the three axes
    constants  its tl.constexpr arguments
    total      all programs together
    lines      by line of the kernel's file; a function from another file counts on the line that calls it
    args       by parameter; a tensor descriptor's under the parameter that brings it
    seconds    that the interpreter took
    sources    (first line, lines) of the functions of the kernel's file that ran
    """

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    total: Counters
    lines: dict[int, Counters]
    args: dict[str, Counters]
    seconds: float
    sources: Sequence[tuple[int, Sequence[str]]] = ()

    if TYPE_CHECKING:  # the counters of `total`

        def __getattr__(self, name: str) -> int: ...
    else:

        def __getattr__(self, name: str) -> int:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.total, name)

    @property
    def programs(self) -> int:
        """Programs that ran."""
        x, y, z = self.grid
        return x * y * z

    def annotated(self, columns: Sequence[str] | None = None, *, heat: str = "bytes") -> Annotated:
        """The kernel's source, each line with what it moved and computed, as a heat map (HTML in Jupyter).

        columns   names from `annotated.COLUMNS`; None for those that hold something
        heat      the column that shades the lines
        """
        from llmcourse.kernels.annotated import Annotated

        return Annotated(self, columns=columns, heat=heat)

    def table(self) -> Table:
        """Bytes, sectors and unique bytes of each argument and direction."""
        rows = [
            (
                name,
                kind,
                c[f"{kind}_ops"],
                c[f"{kind}_bytes"],
                c[f"{kind}_sectors"],
                c[f"{kind}_unique_bytes"],
            )
            for name, c in {**self.args, "all": self.total}.items()
            for kind in KINDS
            if c[f"{kind}_ops"]
        ]
        return Table(
            ("argument", "", "operations", "bytes", "sectors", "unique bytes"), rows, self.headline()
        )

    def headline(self) -> str:
        """Kernel, grid and FLOPs in one line."""
        grid = " × ".join(str(n) for n in self.grid if n != 1) or "1"
        dots = f", {self.total.dot_flops:,} FLOPs in tl.dot" if self.total.dot_ops else ""
        return f"{self.kernel}: {grid} program{'s' if self.programs != 1 else ''}{dots}"

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class Launches(Sequence[Counts]):
    """The launches of a `counting()` block in order. Sums over all of them are attributes: `c.load_bytes`.

    Unique bytes are summed launch by launch: nothing is taken to stay in a cache from one kernel to the next.
    """

    def __init__(self) -> None:
        self._launches: list[Counts] = []

    def __getitem__(self, i: Any) -> Any:
        return self._launches[i]

    def __len__(self) -> int:
        return len(self._launches)

    @property
    def total(self) -> Counters:
        return _sum(c.total for c in self._launches)

    @property
    def kernels(self) -> dict[str, Counters]:
        """Sums over the launches of each kernel, by its name."""
        names = dict.fromkeys(c.kernel for c in self._launches)
        return {name: _sum(c.total for c in self._launches if c.kernel == name) for name in names}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...
    else:

        def __getattr__(self, name: str) -> int:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.total, name)

    def table(self) -> Table:
        """A line for each launch, and their sum."""
        rows: list[tuple[Any, ...]] = [
            (c.kernel, c.programs, c.load_bytes, c.store_bytes, c.atomic_bytes, c.unique_bytes, c.dot_flops)
            for c in self._launches
        ]
        t = self.total
        programs = sum(c.programs for c in self._launches)
        rows.append(
            ("all", programs, t.load_bytes, t.store_bytes, t.atomic_bytes, t.unique_bytes, t.dot_flops)
        )
        heads = (
            "kernel",
            "programs",
            "loaded bytes",
            "stored bytes",
            "atomic bytes",
            "unique bytes",
            "dot FLOPs",
        )
        return Table(heads, rows)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class _Launcher:
    """Stands in the place of a kernel: `launcher[grid](…)`."""

    def __init__(self, kernel: Any, *, config: Any = None, bounds: Bounds = "tensor") -> None:
        name = type(self).__name__
        if not _triton(name).is_kernel(kernel):
            raise NotAKernelError(
                f"{getattr(kernel, '__name__', kernel)!r} is no Triton kernel.",
                f"{name}(kernel)[grid](…) stands in the place of kernel[grid](…).",
                "`with counting() as c:` around a call of a function that launches kernels.",
            )
        self.kernel, self.config, self.bounds = kernel, config, bounds


class count(_Launcher):
    """`count(kernel)[grid](*args, **kwargs)`: launch the kernel here, and get its `Counts`.

    kernel   of `@triton.jit`, `@triton.autotune` or `@triton.heuristics`
    config   for an autotuned kernel: a `triton.Config` or its position; the first that pruning leaves if None
    bounds   "tensor": from the tensor's first to its last element, so that a view may not be left;
             "storage": all of the memory that it is a view of, as on a GPU

    Raises   KernelFault for what the kernel does wrong, LaunchError for wrong arguments or grid,
             MissingPackageError without Triton.
    """

    def __getitem__(self, grid: Any) -> Callable[..., Counts]:
        def launch(*args: Any, **kwargs: Any) -> Counts:
            with counting(config=self.config, bounds=self.bounds) as launches:
                self.kernel[grid](*args, **kwargs)
            return launches[-1]

        return launch


class interpreted(_Launcher):
    """`interpreted(kernel)[grid](*args, **kwargs)`: launch the kernel here, checked but not counted.

    kernel, config, bounds   as for `count`
    """

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with interpreting(config=self.config, bounds=self.bounds):
                self.kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def counting(*, config: Any = None, bounds: Bounds = "tensor") -> Iterator[Launches]:
    """Every Triton launch of this block runs here and is counted: `with counting() as c: y = softmax(x)`.

    Blocks nest: a launch counts in each block around it; the innermost block's `config` and `bounds` hold.
    A block sees the launches of its own thread, and those of threads that opened no block themselves
    (autograd's). The counts are there once the block has ended, also if it raised.

    config, bounds   as for `count`
    """
    interpreter = _triton("counting")
    launches = Launches()
    block = interpreter.Block(True, bounds, config)
    try:
        with interpreter.intercepting(block):
            yield launches
    finally:
        launches._launches.extend(map(_counts, block.results))


@contextmanager
def interpreting(*, config: Any = None, bounds: Bounds = "tensor") -> Iterator[None]:
    """Every Triton launch of this block runs here. Also a decorator: `@interpreting()`."""
    interpreter = _triton("interpreting")
    with interpreter.intercepting(interpreter.Block(False, bounds, config)):
        yield


def is_interpreting() -> bool:
    """Whether a launch would run here now: what a wrapper asks before it takes a CPU tensor to a kernel."""
    interpreter = sys.modules.get("llmcourse.kernels._interpreter")
    return bool(interpreter and interpreter.open_blocks())


def _counts(result: Result) -> Counts:
    lines: dict[int, Counters] = {}
    args = {name: Counters() for name in result.arguments}
    total = Counters({"float_ops": result.float_ops})
    for (line, argument, kind), tally in result.tallies.items():
        values = {f"{kind}_ops": tally.ops, f"{kind}_bytes": tally.bytes, f"{kind}_sectors": tally.sectors}
        for counters in (total, lines.setdefault(line, Counters()), args.get(argument)):
            if counters is not None:
                counters._add(values)
    for line, (ops, flops) in result.dots.items():
        for counters in (total, lines.setdefault(line, Counters())):
            counters._add({"dot_ops": ops, "dot_flops": flops})
    for kind, areas in result.unique.items():
        for argument, (size, sectors) in areas.items():
            counters = total if argument == "" else args[argument]
            counters._add({f"{kind}_unique_bytes": size, f"{kind}_unique_sectors": sectors})
    return Counts(
        result.name,
        result.grid,
        result.constants,
        total,
        dict(sorted(lines.items())),
        args,
        result.seconds,
        result.sources,
    )


def _sum(parts: Any) -> Counters:
    total = Counters()
    for part in parts:
        total._add(part)
    return total


def _triton(what: str) -> ModuleType:
    try:
        from llmcourse.kernels import _interpreter
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise MissingPackageError(
            f"{what} needs Triton, which is not installed.",
            "Kernels run in Triton's own interpreter; its wheels are for Linux.",
            "a Linux machine, WSL 2 or Colab. (vgpu runs CUDA C++ kernels on any machine.)",
        ) from error
    return _interpreter
