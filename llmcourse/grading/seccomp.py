"""A filter of system calls: what a submission's process need not ask of the kernel.

Mounts, namespaces, users and rlimits leave some doors open. Memory can be held where no process is
charged for it (memfd_create, System V segments, a tmpfs mounted in a user namespace of one's own), and
rarely used calls are where kernels have had their holes. The filter answers them with an error. It is
a program for the kernel's packet-filter machine (seccomp(2), classic BPF): load the call's number,
compare, jump. bubblewrap installs it just before it starts the program.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY_BIT, JUMP_IF_NOT_LESS, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; arguments are little-endian

NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
X32 = 0x40000000  # x86-64's second numbering of the same calls
SOCKET_FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6: enough to be told that there is no network


@dataclass(frozen=True)
class Machine:
    """What differs between processors: the audit code, and the numbers of the calls."""

    arch: int
    clone: int
    clone3: int
    socket: int
    refused: dict[str, int]


SINCE_5_1 = {  # these have the same number everywhere
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "pidfd_getfd": 438,
    "memfd_secret": 447,
}
MACHINES = {
    "x86_64": Machine(
        0xC000003E,
        clone=56,
        clone3=435,
        socket=41,
        refused={
            "shmget": 29,
            "semget": 64,
            "msgget": 68,
            "ptrace": 101,
            "pivot_root": 155,
            "mount": 165,
            "umount2": 166,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "perf_event_open": 298,
            "setns": 308,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "memfd_create": 319,
            "bpf": 321,
            "userfaultfd": 323,
            **SINCE_5_1,
        },
    ),
    "aarch64": Machine(
        0xC00000B7,
        clone=220,
        clone3=435,
        socket=198,
        refused={
            "umount2": 39,
            "mount": 40,
            "pivot_root": 41,
            "unshare": 97,
            "ptrace": 117,
            "msgget": 186,
            "semget": 190,
            "shmget": 194,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "setns": 268,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "memfd_create": 279,
            "bpf": 280,
            "userfaultfd": 282,
            **SINCE_5_1,
        },
    ),
}


def program(machine: str = "") -> bytes:
    """The filter for this processor, empty for one whose call numbers are not listed here."""
    m = MACHINES.get(machine or platform.machine())
    if m is None:
        return b""
    refuse = _ret(ERROR | errno.EPERM)
    steps = [
        _op(LOAD, ARCH_AT),
        _op(JUMP_IF_EQUAL, m.arch, 1, 0),
        _ret(KILL),  # a 32-bit call, whose numbers mean something else
        _op(LOAD, NUMBER_AT),
    ]
    if m is MACHINES["x86_64"]:
        steps += [_op(JUMP_IF_NOT_LESS, X32, 0, 1), _ret(KILL)]
    for number in m.refused.values():
        steps += [_op(JUMP_IF_EQUAL, number, 0, 1), refuse]
    # clone3 hides its flags behind a pointer: told that it does not exist, the C library uses clone.
    steps += [_op(JUMP_IF_EQUAL, m.clone3, 0, 1), _ret(ERROR | errno.ENOSYS)]
    steps += [
        _op(JUMP_IF_EQUAL, m.clone, 0, 4),
        _op(LOAD, FIRST_ARGUMENT_AT),
        _op(JUMP_IF_ANY_BIT, NEW_NAMESPACES, 0, 1),
        refuse,
        _ret(ALLOW),
    ]
    steps += [_op(JUMP_IF_EQUAL, m.socket, 0, 5), _op(LOAD, FIRST_ARGUMENT_AT)]
    last = len(SOCKET_FAMILIES) - 1
    steps += [_op(JUMP_IF_EQUAL, family, 1 + last - i, 0) for i, family in enumerate(SOCKET_FAMILIES)]
    steps += [_ret(ERROR | errno.EAFNOSUPPORT), _ret(ALLOW)]
    return b"".join(steps)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; the jumps count the instructions to skip."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _ret(answer: int) -> bytes:
    return _op(RETURN, answer)
