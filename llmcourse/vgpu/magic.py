"""`%%cuda`: a notebook cell of CUDA C++, whose kernels become Python callables.

    %%cuda
    __global__ void twice(float* x) { x[threadIdx.x] *= 2; }

compiles the cell and puts `twice` into the notebook; the next cell runs `twice[1, 32](x)`. Errors are shown
against the cell's own lines: line 1 is the one with %%cuda, as Jupyter numbers them.

    %%cuda [name] [--arch sm_80] [--show] [-D TILE=16]… [--names "copy<float>"]… [--option=--use_fast_math]…

`name` also keeps the module under that name; `--show` prints the PTX. A cell with the line
`#error not implemented yet` is not compiled: it defines kernels that say so (see `unwritten`).
"""

from __future__ import annotations

import argparse
import re
import shlex
from typing import TYPE_CHECKING, Any, NoReturn

from llmcourse.errors import CourseError
from llmcourse.vgpu.shown import concise
from llmcourse.vgpu.unwritten import NOT_YET, unwritten

if TYPE_CHECKING:
    from llmcourse.vgpu.module import Module


class MagicError(CourseError, ValueError):
    """A %%cuda line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MagicError(
            f"%%cuda: {message}.",
            "The line takes a name, --arch, --show, -D MACRO=VALUE, --names and --option.",
            "%%cuda, or %%cuda --arch sm_90 --show.",
        )


def _parser() -> _Parser:
    parser = _Parser(prog="%%cuda", add_help=False)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--arch")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("--names", action="append", default=[])
    parser.add_argument("--option", dest="options", action="append", default=[])
    return parser


def compile_cell(line: str, cell: str) -> tuple[Module, argparse.Namespace]:
    """The cell's module, and its line's settings.

    The magic's own line stays in the source as a comment, so that line N of the cell is line N everywhere.
    """
    from llmcourse.vgpu import cuda

    try:
        words = shlex.split(line)
    except ValueError as error:
        raise MagicError(
            f"%%cuda: {error}.", "Quotes come in pairs.", '%%cuda --names "copy<float>".'
        ) from None
    given = _parser().parse_args(words)
    if given.name and not given.name.isidentifier():
        _parser().error(f"{given.name!r} is not a Python name")
    defines = {m: value or "1" for m, _, value in (d.partition("=") for d in given.defines)}
    source = f"// %%cuda {line}".rstrip() + "\n" + cell
    # A comment that ends in a backslash would swallow the next line.
    source = re.sub(r"\\\n", "\n", source, count=1) if source.split("\n", 1)[0].endswith("\\") else source
    module = cuda.compile(source, given.arch, given.options, defines, names=given.names)
    return module, given


def callables(module: Module) -> dict[str, Any]:
    """Python names for a module's kernels: `saxpy`, and `copy_float` for copy<float>."""
    found = {}
    for kernel in module.kernels.values():
        name = re.sub(r"\W+", "_", kernel.name).strip("_")
        found[name] = kernel
        if sum(k.plain == kernel.plain for k in module.kernels.values()) == 1:
            found[kernel.plain] = kernel
    return found


def summary(module: Module) -> str:
    """One line: the kernels, how large they are, and where they will run; then the warnings."""
    from llmcourse.vgpu import cuda, native

    kernels = ", ".join(module.kernels) or "no kernels"
    if cuda.device() == "cuda":
        arch = native.arch_of(0)
        registers = ", ".join(str(k.resources(arch).registers) for k in module.kernels.values())
        text = f"{kernels}: {registers or 0} registers a thread for {arch}, run on the GPU"
    else:
        instructions = sum(len(k.program.code) for k in module.kernels.values())
        text = f"{kernels}: {instructions} PTX instructions for {module.arch}, run on the PTX machine"
    return "\n".join([text, *(f"warning, {w}" for w in module.warnings)])


def cuda_magic(line: str, cell: str, namespace: dict[str, Any]) -> None:
    """What %%cuda does, with the namespace that the kernels go into."""
    if missing := unwritten(cell):
        namespace.update(missing)
        print(f"{', '.join(missing)}: {NOT_YET}")
        return
    try:
        module, given = compile_cell(line, cell)
        text = summary(module)
    except CourseError as error:
        raise concise(error, calls=False).with_traceback(None) from None
    namespace.update(callables(module))
    if given.name:
        namespace[given.name] = module
    print(text)
    if given.show:
        print(module.ptx)


def load_ipython_extension(ipython: Any) -> None:
    """Register %%cuda: `%load_ext llmcourse.vgpu.magic`, and done by importing `llmcourse.vgpu.cuda`."""

    def cuda(line: str, cell: str) -> None:
        cuda_magic(line, cell, ipython.user_ns)

    cuda.__doc__ = __doc__
    ipython.register_magic_function(cuda, magic_kind="cell", magic_name="cuda")


def register() -> None:
    """Register %%cuda in the running IPython, if there is one."""
    import sys

    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        load_ipython_extension(shell)
