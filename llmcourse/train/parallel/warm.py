"""The notebook's end of the nursery: starting it once, giving it orders, hearing what became of them."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
from typing import Any


class WarmProcess:
    """The other end of `nursery.main`."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}  # no threads at a fork
        single["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = inherited | single | {"PYTHONPATH": path, "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from llmcourse.train.parallel.nursery import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # an interrupt of the notebook is not one of the workers
        )
        self.gone = False
        self._rest = b""

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and not self.gone and self.process.poll() is None

    def order(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """What it said within `seconds`; `gone` is set once it can say no more."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        if not select.select([descriptor], [], [], seconds)[0]:
            return []
        came = os.read(descriptor, 1 << 16)
        self.gone = self.gone or not came
        *lines, self._rest = (self._rest + came).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """It kills its children when its standard input closes; if it does not, it is killed."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.gone = True


_nursery: WarmProcess | None = None


def warm_process() -> WarmProcess:
    """The one of this process, started if it is not there."""
    global _nursery
    if _nursery is None or not _nursery.alive:
        close()
        _nursery = WarmProcess()
    return _nursery


def warm() -> None:
    """Begin to import PyTorch for the workers now, in the background, so that the first run need not wait."""
    warm_process()


def close() -> None:
    """End the warm process. The next run starts another."""
    global _nursery
    if _nursery is not None and _nursery.owner == os.getpid():
        _nursery.close()
    _nursery = None


atexit.register(close)
