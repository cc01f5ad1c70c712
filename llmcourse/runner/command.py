"""`llmcourse run`: find the notebooks, execute them here or on a cluster, report, and say what failed."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from llmcourse.errors import DiskError, NotebookError
from llmcourse.runner.discover import discover, notebook_argument, refuse_to_overwrite
from llmcourse.runner.outcome import Outcome
from llmcourse.runner.pool import Stopped, places_for, run_here
from llmcourse.runner.progress import show
from llmcourse.runner.report import remove_report, write_report


def run(
    names: Sequence[str],
    *,
    scale: str = "ci",
    device: str = "cpu",
    jobs: int | None = None,
    cell_timeout: float = 120.0,
    out: Path = Path("build/run"),
    cluster: str | None = None,
) -> int:
    """Execute notebooks and write executed copies, `report.json` and `report.html` to `out`.

    `names` are chapter numbers, names or paths; none means every notebook of the notebooks folder.
    `jobs` is how many run at once; by default as many as cores and memory allow, and one with
    device="cuda", where notebooks would share one GPU's memory and spoil each other's times.
    `cell_timeout` is in seconds, 0 for no limit. `cluster` is the address of a running Ray cluster.

    Returns 0 when every notebook ran to its end. Raises NotebookError naming notebook and cell of each
    failure, after all of them have run and the report is written; UnknownNameError, NetworkError and
    MissingPackageError before anything ran.
    """
    notebooks = discover(names)
    if cell_timeout < 0:
        raise NotebookError(
            f"--cell-timeout {cell_timeout:g} is in the past.",
            "A cell may take a number of seconds, or 0 for no limit.",
            "--cell-timeout 120.",
        )
    places_for(jobs, len(notebooks))
    refuse_to_overwrite((notebook.path for notebook in notebooks), out)
    _prepare(out)
    parameters = {"device": device, "scale": scale}
    limits: dict[str, Any] = {"jobs": jobs, "cell_timeout": cell_timeout}
    asked = {**parameters, **limits, "cluster": cluster}
    began = monotonic()
    try:
        if cluster is None:
            limits["jobs"] = jobs or (1 if device == "cuda" else None)
            with _sigterm_is_ctrl_c(), show(len(notebooks)) as shown:
                outcomes = run_here(notebooks, parameters=parameters, **limits, out=out, on_event=shown)
        else:
            from llmcourse.runner.cluster import run_on_cluster
            from llmcourse.runner.connect import connect

            # Ray sets a SIGTERM handler of its own when it connects, hence the order.
            with connect(cluster), _sigterm_is_ctrl_c(), show(len(notebooks)) as shown:
                outcomes = run_on_cluster(notebooks, parameters=parameters, **limits, out=out, on_event=shown)
    except Stopped as stopped:
        write_report(out, stopped.outcomes, seconds=monotonic() - began, asked=asked)
        raise
    write_report(out, outcomes, seconds=monotonic() - began, asked=asked)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        given = {nb.name: notebook_argument(nb) for nb in notebooks}
        raise _failure(failed, len(outcomes), out, given, asked)
    what = f"{len(outcomes)} notebooks" if len(outcomes) > 1 else outcomes[0].name
    print(f"{what} ran to the end in {monotonic() - began:.1f} s. Report: {out / 'report.html'}")
    return 0


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_report(out)
        probe = out / ".part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DiskError(
            f"{out} cannot be written: {error.strerror}.",
            "Executed copies and the report go to that folder.",
            "--out with a folder that you may write to.",
        ) from error


def _failure(
    failed: Sequence[Outcome], total: int, out: Path, given: dict[str, str], asked: dict[str, Any]
) -> NotebookError:
    head = f"{failed[0].name} failed." if total == 1 else f"{len(failed)} of {total} notebooks failed."
    why = "\n  ".join(f"{o.name}: {o.error}" for o in failed)
    again = shlex.join(["llmcourse", "run", *(given[o.name] for o in failed), *_options(asked)])
    copies = [str(o.executed_path) for o in failed if o.executed_path]
    kept = f"; what ran is kept in {', '.join(_short(copies))}" if copies else ""
    return NotebookError(
        head, why, f"`{again}`{kept}, and {out / 'report.html'} shows each failing cell with its traceback."
    )


def _options(asked: dict[str, Any]) -> list[str]:
    """The options, as far as they differ from the defaults, that a rerun needs."""
    defaults = {"scale": "ci", "device": "cpu", "cell_timeout": 120.0, "cluster": None}
    options: list[str] = []
    for option, default in defaults.items():
        if (value := asked[option]) != default:
            options += [f"--{option.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else value]
    return options


def _short(paths: list[str]) -> list[str]:
    here = f"{Path.cwd()}/"
    shown = [path.removeprefix(here) for path in paths]
    return shown if len(shown) <= 3 else [*shown[:3], "…"]


@contextmanager
def _sigterm_is_ctrl_c() -> Generator[None, None, None]:
    """Let SIGTERM and a closed terminal end a run as Ctrl-C does: kernels ended, report written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
