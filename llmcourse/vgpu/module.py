"""Compiled CUDA C++ as Python objects: a `Module` of `Kernel`s, each with its C++, PTX and parameters."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcourse.errors import UnknownNameError
from llmcourse.vgpu import isa, native, nvrtc, signature
from llmcourse.vgpu.arguments import as_numpy, is_tensor
from llmcourse.vgpu.diagnostics import Diagnostic
from llmcourse.vgpu.launch import LaunchError, size3
from llmcourse.vgpu.memory import ArgumentError
from llmcourse.vgpu.shown import for_readers

if TYPE_CHECKING:
    from llmcourse.vgpu.cuda import Launcher
    from llmcourse.vgpu.result import Result


class NoKernelError(UnknownNameError, AttributeError):
    """A kernel that a module does not have."""


class Module:
    """Compiled CUDA C++: its kernels as attributes (`module.saxpy`) and items (`module["copy<float>"]`).

    source, ptx   the text it came from, and what the machine runs
    arch, options, names, name   how it was compiled
    compiled      made from the source: it can be compiled again, for a GPU. Else the PTX is all there is
    kernels       by name, in the source's order
    values        bytes of the variables that were set, by name
    warnings      what the compiler found odd; `log` its own words
    """

    def __init__(
        self,
        ptx: str,
        *,
        source: str = "",
        arch: str = "",
        options: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
        name: str = nvrtc.SOURCE_NAME,
        compiled: bool = False,
        lowered: Mapping[str, str] | None = None,
        warnings: tuple[Diagnostic, ...] = (),
        log: str = "",
    ) -> None:
        self.ptx, self.source, self.arch, self.options, self.names = ptx, source, arch, options, names
        self.name, self.lowered, self.warnings, self.log = name, dict(lowered or {}), warnings, log
        self.compiled = compiled
        self.values: dict[str, bytes] = {}
        self.kernels = self._kernels()

    def _kernels(self) -> dict[str, Kernel]:
        spelled = {entry: expression for expression, entry in self.lowered.items()}
        found = {}
        for entry in signature.entries(self.ptx):
            plain, arguments = signature.plain_name(entry.name)
            full = f"{plain}<{', '.join(arguments)}>" if arguments else plain
            label = spelled.get(entry.name, full if full not in found else entry.name)
            found[label] = Kernel(self, label, entry)
        declared = {n: i for i, n in enumerate(signature.declared_kernels(self.source))}
        named = {n: i for i, n in enumerate(self.names)}

        def order(kernel: Kernel) -> tuple[int, int]:
            return declared.get(kernel.plain, len(declared)), named.get(kernel.name, len(named))

        return {k.name: k for k in sorted(found.values(), key=order)}

    @property
    def kernel(self) -> Kernel:
        """The module's only kernel. Raises NoKernelError if there are none or several."""
        return self._only()

    @for_readers
    def _only(self) -> Kernel:
        if len(self.kernels) == 1:
            return next(iter(self.kernels.values()))
        if self.kernels:
            first = next(iter(self.kernels))
            raise NoKernelError(
                f"this module has {len(self.kernels)} kernels: {', '.join(self.kernels)}.",
                "module.kernel is for sources with a single one.",
                f"module[{first!r}].",
            )
        raise self._none()

    def _none(self) -> NoKernelError:
        templates = re.findall(r"template\s*<[^{};]*?__global__[^(]*?(\w+)\s*\(", self.source)
        if templates:
            return NoKernelError(
                f"this module has no kernel: {templates[0]} is a template.",
                "The compiler makes code for a template only once its arguments are known.",
                f'cuda.compile(source, names=["{templates[0]}<float>"]).',
            )
        return NoKernelError(
            "this module has no kernel.",
            "A function that is launched from Python is marked __global__.",
            "__global__ void name(…) { … }.",
        )

    @for_readers
    def __getitem__(self, name: str) -> Kernel:
        if name in self.kernels:
            return self.kernels[name]
        wanted = re.sub(r"\s+", "", name)
        for test in (
            lambda k: re.sub(r"\s+", "", k.name) == wanted or k.entry.name == name,
            lambda k: k.plain == name,
        ):
            matching = [k for k in self.kernels.values() if test(k)]
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise NoKernelError(
                    f"{name} has {len(matching)} instances: {', '.join(k.name for k in matching)}.",
                    "Each instance of a template is a kernel of its own.",
                    f"module[{matching[0].name!r}].",
                )
        if not self.kernels:
            raise self._none()
        close = difflib.get_close_matches(name, self.kernels, n=1, cutoff=0.5) or list(self.kernels)
        raise NoKernelError(
            f"this module has no kernel called {name}.",
            f"It has {', '.join(self.kernels)}.",
            f"module[{close[0]!r}].",
        )

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or "kernels" not in self.__dict__:
            raise AttributeError(name)
        return self._only() if name == "kernel" else self[name]  # the property's error comes by here

    @property
    def program(self) -> isa.Module:
        """The module that the machine runs, with the values that were set."""
        found = parsed(self.ptx)
        if not self.values:
            return found
        variables = found.variables | {
            name: dataclasses.replace(found.variables[name], initial=data)
            for name, data in self.values.items()
        }
        return dataclasses.replace(found, variables=variables)

    @for_readers
    def set(self, name: str, value: Any) -> None:
        """Fill a `__constant__` or `__device__` variable, as cudaMemcpyToSymbol does.

        Later launches read it. On the machine every launch starts from what was set (or from the source's
        initial value); on a GPU a `__device__` variable keeps what kernels write to it.

        value   an array of the variable's size in bytes, or a number for a single one

        Raises   UnknownNameError for a variable that is not there; ArgumentError for another size.
        """
        variables = {n: v for n, v in parsed(self.ptx).variables.items() if v.space in ("const", "global")}
        if name not in variables:
            raise UnknownNameError(
                f"this module has no variable called {name}.",
                f"It has {', '.join(variables) or 'none'}; one that no kernel uses is not kept.",
                f"__constant__ float {name}[16]; at the top of the source.",
            )
        variable = variables[name]
        if isinstance(value, int | float):
            value = np.array(value, isa.DTYPES[variable.type])
        array = as_numpy(value.cpu() if is_tensor(value) else np.asarray(value))
        if array.nbytes != variable.size:
            raise ArgumentError(
                f"{name} has {variable.size} bytes, and {array.nbytes} were given ({array.dtype}).",
                "The bytes are copied as they are; nothing converts them.",
                "an array of the variable's type and length, such as np.zeros(n, np.float32).",
            )
        self.values[name] = array.tobytes()
        native.write_loaded(self, name, self.values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def __len__(self) -> int:
        return len(self.kernels)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(n for n in self.kernels if n.isidentifier())})

    def __reduce__(self) -> tuple[Any, ...]:
        kept = ("source", "arch", "options", "names", "name", "compiled", "lowered", "warnings", "log")
        given = {name: getattr(self, name) for name in kept}
        return _rebuild, (self.ptx, given, self.values)

    def __repr__(self) -> str:
        return f"<cuda.Module {self.name} for {self.arch}: {', '.join(self.kernels) or 'no kernels'}>"


def _rebuild(ptx: str, given: dict[str, Any], values: dict[str, bytes]) -> Module:
    module = Module(ptx, **given)
    module.values.update(values)
    return module


class Kernel:
    """One kernel: `kernel[grid, block](x, y, 2.0, n)` launches it.

    name      in the source; `entry` in the PTX
    module    where it comes from; `source`, `ptx`, `options` and `arch` are the module's, as plain strings
    """

    def __init__(self, module: Module, name: str, entry: signature.Entry) -> None:
        self.module, self.name, self.entry = module, name, entry
        self.plain, arguments = signature.plain_name(entry.name)
        if name in module.lowered and "<" in name:
            arguments = [a.strip() for a in name.partition("<")[2].rpartition(">")[0].split(",")]
        macros = [option[2:].partition("=") for option in module.options if option.startswith("-D")]
        self.parameters = signature.parameters(
            module.source, self.plain, arguments or (), {m: text for m, _, text in macros}
        )

    @property
    def __name__(self) -> str:
        """The function's own name, as a Python function has it."""
        return self.plain

    @property
    def source(self) -> str:
        return self.module.source

    @property
    def ptx(self) -> str:
        return self.module.ptx

    @property
    def options(self) -> tuple[str, ...]:
        return self.module.options

    @property
    def arch(self) -> str:
        return self.module.arch

    def as_text(self) -> dict[str, str]:
        """All that running it takes, as plain text: its name in `ptx`, and `source` to show its lines."""
        return {"name": self.entry.name, "ptx": self.ptx, "source": self.source}

    @cached_property
    def program(self) -> isa.Kernel:
        """The typed instructions that the machine runs. Raises PtxError for PTX that it cannot read."""
        return parsed(self.ptx).kernels[self.entry.name]

    @cached_property
    def static_shared(self) -> int:
        """Bytes of shared memory that the kernel declares."""
        from llmcourse.vgpu.memory import lay_out_shared

        variables = (*parsed(self.ptx).variables.values(), *self.program.variables.values())
        return lay_out_shared([v for v in variables if v.space == "shared"], 0).used

    @for_readers
    def resources(self, arch: nvrtc.Arch = None) -> nvrtc.Resources:
        """Registers, shared memory and spills of the machine code for `arch` (the module's if None).

        The assembler (`ptxas`) runs on the CPU: no GPU is needed. Raises LaunchError after from_ptx.
        """
        module = self.module
        if not module.compiled:
            raise LaunchError(
                f"{self.name} was made from PTX.",
                "Its resources are known once its C++ source is compiled to machine code.",
                "cuda.compile(source) with the options that the PTX was made with.",
            )
        compiled = nvrtc.compile_source(
            self.source,
            arch or self.arch,
            options=self.options,
            names=module.names,
            name=module.name,
            cubin=True,
        )
        return compiled.resources[self.entry.name]

    @for_readers
    def __getitem__(self, shape: Any) -> Launcher:
        if not isinstance(shape, tuple) or not 2 <= len(shape) <= 3:
            raise LaunchError(
                f"{self.name}[{shape!r}] says only part of a launch.",
                "A launch needs the number of blocks and the number of threads in each.",
                f"{self.name}[grid, block](…), or [grid, block, shared_bytes].",
            )
        from llmcourse.vgpu.cuda import Launcher

        grid, block = size3(shape[0], "grid"), size3(shape[1], "block")
        return Launcher(self, grid, block, operator.index(shape[2]) if len(shape) == 3 else 0)

    @for_readers
    def __call__(self, *arguments: object) -> Result:
        raise LaunchError(
            f"{self.name} was called without a grid.",
            "A kernel runs in many threads: the launch says in how many blocks of how many threads.",
            f"{self.name}[blocks, threads](…), for instance {self.name}[(n + 255) // 256, 256](…).",
        )

    def __repr__(self) -> str:
        shown = ", ".join(p.text for p in self.parameters) if self.parameters is not None else "…"
        return f"<kernel {self.name}({shown})>"


@lru_cache(maxsize=64)
def parsed(ptx: str) -> isa.Module:
    from llmcourse.vgpu.ptx import parse

    return parse(ptx)
