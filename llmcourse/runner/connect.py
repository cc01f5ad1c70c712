"""Joining a Ray cluster that is running already, or saying quickly why not.

ADDRESS is `HOST:6379` from a machine of the cluster, `auto` for the cluster started on this machine, or
`ray://HOST:10001` from anywhere (needs `ray[client]`).

**The code travels with the job.** The package is uploaded through Ray's `py_modules`, and its folder
leads `PYTHONPATH` in the tasks and thus in the kernels they start. Comparing version numbers instead
would let two checkouts that both call themselves 0.1.0 disagree without a word. What the nodes must
have is the same Python, the same Ray, and the packages that notebooks import.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from llmcourse.errors import MissingPackageError, NetworkError

CONNECT_TIMEOUT = 3.0
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x04"
EMPTY_SETTINGS = b"\0\0\0" + SETTINGS + b"\0" + b"\0\0\0\0"  # length, type, flags, stream
PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def connect(address: str) -> Generator[None, None, None]:
    """Join the Ray cluster at `address` for the length of the block.

    Raises MissingPackageError without Ray, NetworkError when no cluster answers (within seconds).
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "--cluster needs Ray, which is not installed.",
            "Spreading notebooks over machines is an optional part of the course.",
            "pip install 'llmcourse[cluster]'",
        ) from error
    host_and_port = address.removeprefix("ray://")
    if ":" not in host_and_port and address != "auto":  # Ray takes "local" to mean: start one here
        raise _unreachable(address, "an address is HOST:PORT, ray://HOST:PORT or auto")
    plain = address != "auto" and os.environ.get("RAY_USE_TLS", "0") != "1"
    if plain and (reason := why_no_cluster(host_and_port)):
        raise _unreachable(address, reason)
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(PACKAGE)]},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        if "ray[client]" in str(error):
            raise MissingPackageError(
                f"{address} needs Ray's client, which is not installed.",
                "Only addresses that begin with ray:// need it.",
                f"pip install 'ray[client]=={ray.__version__}', or HOST:6379 on a machine of the cluster.",
            ) from error
        raise _unreachable(
            address, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def node_lost_errors() -> tuple[type[Exception], ...]:
    """What Ray raises for a task whose node or process is gone: worth another try elsewhere."""
    from ray import exceptions

    return (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
    )


def _unreachable(address: str, reason: str) -> NetworkError:
    return NetworkError(
        f"no Ray cluster answers at {address}: {reason.rstrip('.')}.",
        "--cluster joins a cluster that is running already; it starts none.",
        "`ray status` on the cluster's first machine to see it, `ray start --head` there to start one, "
        "and its address as HOST:6379.",
    )


def why_no_cluster(host_and_port: str, timeout: float = CONNECT_TIMEOUT) -> str:
    """What speaks against a Ray cluster at `HOST:PORT`; an empty string when nothing does.

    Ray itself waits most of a minute for an address that does not answer. Its services speak gRPC, thus
    HTTP/2, where a server answers the client's preface with a SETTINGS frame (RFC 9113, section 3.4).
    """
    host, _, port = host_and_port.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        return f"{port!r} is not a port number"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(HTTP2_PREFACE + EMPTY_SETTINGS)
            head = connection.recv(9)
    except TimeoutError:
        return f"nothing came back within {timeout:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return "" if head[3:4] == SETTINGS else "another service listens there"
