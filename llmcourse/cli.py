"""The command line: `llmcourse COMMAND`.

Only parsing lives here. A command's work is a function of the package with the same arguments, and
its module is imported when the command runs, so that `llmcourse --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llmcourse import __version__
from llmcourse.errors import CourseError


def _start(args: argparse.Namespace) -> int:
    from llmcourse.start import start

    return start(jupyter=args.jupyter, browser=args.browser, port=args.port)


def _doctor(args: argparse.Namespace) -> int:
    from llmcourse.doctor import report

    return report(as_json=args.json)


def _assets(args: argparse.Namespace) -> int:
    from llmcourse import assets

    return assets.command(args.action)


def _chat(args: argparse.Namespace) -> int:
    from llmcourse.chat import chat

    return chat(
        model=args.model,
        prompt=args.prompt,
        device=args.device,
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )


def _run(args: argparse.Namespace) -> int:
    from llmcourse.runner import run

    return run(
        args.names,
        scale=args.scale,
        device=args.device,
        jobs=args.jobs,
        cell_timeout=args.cell_timeout,
        out=args.out,
        cluster=args.cluster,
    )


def _notebooks(args: argparse.Namespace) -> int:
    from llmcourse.runner import maintain

    return maintain.command(args.action, args.names)


def _bench(args: argparse.Namespace) -> int:
    from llmcourse.bench import command

    return command(args.names, device=args.device, out=args.out, list_only=args.list)


def _lab(args: argparse.Namespace) -> int:
    from llmcourse.labs import command

    return command.command(
        args.action, args.names, folder=args.folder, file=args.file, seed=args.seed, hint=args.hint
    )


def _labs(args: argparse.Namespace) -> int:
    from llmcourse.grading import authoring

    return authoring.command(args.action, args.names)


def _grade(args: argparse.Namespace) -> int:
    from llmcourse.grading import command

    return command.command(
        args.folder,
        lab=args.lab,
        course=args.course,
        db=args.db,
        jobs=args.jobs,
        cluster=args.cluster,
        unsafe=args.unsafe,
        again=args.again,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmcourse", description="A course that runs: from backprop to an LLM serving engine."
    )
    parser.add_argument("--version", action="version", version=f"llmcourse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, handler: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    p = add("start", _start, "fetch the model, check the machine, hear the model speak, open JupyterLab")
    p.add_argument("--no-jupyter", dest="jupyter", action="store_false", help="stop before JupyterLab")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")
    p.add_argument("--port", type=int, help="JupyterLab's port (default: the first free one from 8888)")

    p = add("doctor", _doctor, "what this machine can do for the course, and what to do about the rest")
    p.add_argument("--json", action="store_true", help="print the report as JSON")

    p = add("assets", _assets, "the model and the text that the course uses")
    p.add_argument("action", choices=["fetch", "verify", "path"], nargs="?", default="fetch")

    p = add("chat", _chat, "talk to the model in the terminal, through the course's own engine")
    p.add_argument("--model", type=Path, help="a GGUF file or a Llama/Qwen safetensors folder")
    p.add_argument("--prompt", help="answer this one message and stop")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    p.add_argument("--max-tokens", type=int, default=256, help="the longest answer, in tokens")
    p.add_argument("--temperature", type=float, default=0.0, help="0 always picks the likeliest token")
    p.add_argument("--seed", type=int, default=0)

    p = add("run", _run, "execute notebooks and write executed copies and a report")
    p.add_argument("names", nargs="*", metavar="NAME", help="e.g. 01, 01_backprop or a path (default: all)")
    p.add_argument("--scale", default="ci", choices=["ci", "full"])
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--jobs", type=int, help="notebooks at once (default: as cores and memory allow)")
    p.add_argument("--cell-timeout", type=float, default=120.0, help="seconds one cell may take")
    p.add_argument("--out", type=Path, default=Path("build/run"), help="folder of copies and report")
    p.add_argument("--cluster", metavar="ADDRESS", help="spread the work over this Ray cluster")

    p = add("notebooks", _notebooks, "keep the notebooks on disk in order (for their authors)")
    p.add_argument("action", choices=["check", "fix", "store"])
    p.add_argument("names", nargs="*", metavar="NAME")

    p = add("lab", _lab, "the graded labs: list, start a copy of your own, check it, see where you are")
    p.add_argument("action", choices=["list", "start", "check", "hint", "status"])
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="a lab, e.g. 01; for check and hint, exercises after it"
    )
    p.add_argument("--folder", type=Path, default=Path("mylabs"), help="where your copies lie")
    p.add_argument("--file", type=Path, help="check this notebook")
    p.add_argument("--seed", type=int, help="repeat the inputs of an earlier check")
    p.add_argument("--hint", type=int, metavar="N", help="hint number N (default: the next)")

    p = add("grade", _grade, "grade a class's submissions of a lab (for instructors)")
    p.add_argument("folder", type=Path, metavar="FOLDER", help="one file or folder for each student")
    p.add_argument("--lab", metavar="NAME", help="e.g. 01 (default: what the files are named after)")
    p.add_argument("--course", type=Path, default=Path("gradebook"), help="folder of gradebook and feedback")
    p.add_argument("--db", metavar="URL", help="the gradebook's database (default: SQLite in that folder)")
    p.add_argument("--jobs", type=int, help="submissions judged at once (default: one for each core)")
    p.add_argument("--cluster", metavar="ADDRESS", help="judge on this Ray cluster")
    p.add_argument("--unsafe", action="store_true", help="run submissions without a sandbox")
    p.add_argument("--again", action="store_true", help="judge anew what was judged before")

    p = add("labs", _labs, "make the labs from their solutions, and check them (for their authors)")
    p.add_argument("action", choices=["build", "check", "report"])
    p.add_argument("names", nargs="*", metavar="NAME", help="e.g. 01 (default: all)")

    p = add("bench", _bench, "measure, and keep the result as a record")
    p.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all)")
    p.add_argument("--list", action="store_true", help="list benchmarks and stored records")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    p.add_argument("--out", type=Path, help="folder for the records (default: print only)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that a terminal lacks must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        return args.handler(args)
    except CourseError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
