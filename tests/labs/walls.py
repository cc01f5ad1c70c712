"""What a submission sees of the machine from inside the sandbox, as one function of a notebook.

Run as a program it prints, as JSON, what the function found: `python walls.py OUTSIDE…`. So the same
facts can be had from a judge that is root and from one that is an ordinary user.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from llmcourse.grading.session import Cell, Session

FORBIDDEN = ("torch", "scipy", "llmcourse.autograd", "wave")

PROBE = r"""
import ctypes, importlib, os, resource, socket, sys
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)

def attempt(fn, *args):
    ctypes.set_errno(0)
    try:
        answer = fn(*args)
    except OSError as error:
        return type(error).__name__ + f" {error.errno}"
    return os.strerror(ctypes.get_errno()) if answer == -1 else "done"

def connect(family, address):
    with socket.socket(family) as s:
        s.settimeout(2)
        s.connect(address)

def touch(folder):
    with open(f"{folder}/touched", "w"):
        os.unlink(f"{folder}/touched")

def linked(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")

def fill(folder):
    written = 0
    try:
        for i in range(100):
            with open(f"{folder}/fill{i}", "wb") as f:
                for _ in range(30):
                    written += f.write(bytes(1_000_000))
    except OSError as error:
        return written, error.errno
    finally:
        for path in Path(folder).glob("fill*"):
            path.unlink()
    return written, 0

def folders(top, depth):
    yield top
    if depth:
        for entry in os.scandir(top):
            if entry.is_dir(follow_symlinks=False) and entry.path != "/proc":
                try:
                    yield from folders(entry.path, depth - 1)
                except PermissionError:
                    pass

def probe(port, abstract, outside):
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines())
    package = Path(sys.modules["llmcourse"].__file__).parent
    x86 = os.uname().machine == "x86_64"
    return {
        "ids": [os.getuid(), os.geteuid(), os.getgid(), *os.getgroups()],
        "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")],
        "no new privileges": status["NoNewPrivs"],
        "environment": sorted(os.environ),
        "processes": [int(name) for name in os.listdir("/proc") if name.isdigit()],
        "first process": os.listdir("/proc/1"),
        "memory of the first process": attempt(libc.process_vm_readv, 1, None, 0, None, 0, 0),
        "open files": sorted(
            os.readlink(f"/proc/self/fd/{f}").split(":")[0] for f in range(3, 4096) if linked(f)
        ),
        "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev").read().splitlines()[2:]],
        "loopback": attempt(connect, socket.AF_INET, ("127.0.0.1", port)),
        "internet": attempt(connect, socket.AF_INET, ("192.0.2.1", 80)),
        "abstract socket": attempt(connect, socket.AF_UNIX, abstract),
        "netlink": attempt(socket.socket, 16, socket.SOCK_RAW),
        "user namespace": attempt(libc.unshare, 0x10000000),
        "new process in a user namespace": attempt(
            libc.syscall, 56 if x86 else 220, 0x10000000 | 17, 0, 0, 0, 0
        ),
        "memfd": attempt(os.memfd_create, "x"),
        "shared segment": attempt(libc.shmget, 1, 4096, 0o1600),
        "mount": attempt(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
        "writable": sorted(p for p in folders("/", 4) if attempt(touch, p) == "done"),
        "written": [fill(folder) for folder in (os.environ["HOME"], "/tmp", "/dev/shm")],
        "beside the package": sorted(os.listdir(package.parent)),
        "exercises": sorted(str(p) for p in package.glob("labs/lab*/*")),
        "catalog": (package / "labs" / "catalog.py").is_file(),
        "hidden": {name: hidden_files(name) for name in hidden},
        "outside": [os.path.exists(path) for path in outside],
        "devices": sorted(os.listdir("/dev")),
    }
"""


def facts(outside: list[str]) -> dict:
    """What a submission finds, `outside` being paths that exist out here."""
    from llmcourse.grading.sandbox import module_paths

    places = {name: [str(p) for p in module_paths(name)] for name in FORBIDDEN}
    hidden = f"""
hidden = {places!r}
def hidden_files(name):
    found = []
    for path in hidden[name]:
        if os.path.isdir(path):
            found += os.listdir(path)
        else:
            try:
                found.append(open(path, "rb").read())
            except OSError:
                pass
    return found
"""
    abstract = f"\0llmcourse-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(abstract)
        listener.listen()
        with Session([Cell("probe", PROBE), Cell("hidden", hidden)], forbidden=FORBIDDEN) as session:
            session.run()
            call = session.call("probe", (server.getsockname()[1], abstract, outside))
    assert call.error is None, call.error
    return call.value


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1:])))
