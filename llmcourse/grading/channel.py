"""Messages over one end of a socket pair whose other end nobody trusts.

A message is its length in 8 bytes and then the bytes that `plain.pack` made. The process at the other
end runs a learner's code. It may stop reading, stop writing, write for ever, announce a message of 2⁶⁰
bytes, or write noise. So each wait has a deadline, no message may be larger than `max_bytes`, and what
arrives is unpacked by `plain.unpack`, which executes nothing.
"""

from __future__ import annotations

import socket
import struct
from time import monotonic
from typing import Any

from llmcourse.grading.plain import CallableId, MakeCallable, NotPlainError, pack, unpack

HEADER = struct.Struct("<Q")
MAX_MESSAGE_BYTES = 64_000_000
CHUNK = 1 << 20


class ChannelError(Exception):
    """The exchange over this channel is over."""


class ChannelClosed(ChannelError):
    """The other end is gone."""


class ChannelTimeout(ChannelError):
    """The deadline passed."""


class ChannelGarbage(ChannelError):
    """What arrived is no message."""


class MessageTooLarge(ValueError):
    """A message to be sent is larger than the other end accepts. Nothing of it was sent."""


class Channel:
    """One end. Deadlines are moments of `time.monotonic()`; None waits as long as it takes."""

    def __init__(self, sock: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.sock, self.max_bytes = sock, max_bytes

    def send(
        self, message: Any, deadline: float | None = None, callable_id: CallableId | None = None
    ) -> None:
        """Send plain `message`.

        Raises   NotPlainError, MessageTooLarge (the channel stays usable); ChannelClosed,
                 ChannelTimeout (it does not: part of the message may be under way).
        """
        data = pack(message, callable_id)
        if len(data) > self.max_bytes:
            raise MessageTooLarge(f"a message of {len(data):,} bytes; at most {self.max_bytes:,} can be sent")
        left = memoryview(HEADER.pack(len(data)) + data)
        while left:
            left = left[self._wait(deadline, self.sock.send, left[:CHUNK]) :]

    def receive(self, deadline: float | None = None, make_callable: MakeCallable | None = None) -> Any:
        """The next message. Raises ChannelClosed, ChannelTimeout or ChannelGarbage."""
        (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
        if size > self.max_bytes:
            raise ChannelGarbage(f"a message of {size:,} bytes was announced, over {self.max_bytes:,}")
        try:
            return unpack(self._read(size, deadline), make_callable)
        except NotPlainError as error:
            raise ChannelGarbage(error.what) from None
        except (RecursionError, MemoryError) as error:
            raise ChannelGarbage(f"a message that cannot be unpacked ({type(error).__name__})") from None

    def close(self) -> None:
        self.sock.close()

    def _read(self, size: int, deadline: float | None) -> bytes:
        data = bytearray()  # grows with what arrives, not with what was announced
        while len(data) < size:
            chunk = self._wait(deadline, self.sock.recv, min(size - len(data), CHUNK))
            if not chunk:
                raise ChannelClosed("the other end is closed")
            data += chunk
        return bytes(data)

    def _wait(self, deadline: float | None, operation: Any, argument: Any) -> Any:
        left = None if deadline is None else deadline - monotonic()
        if left is not None and left <= 0:
            raise ChannelTimeout("the deadline has passed")
        try:
            self.sock.settimeout(left)
            return operation(argument)
        except TimeoutError:
            raise ChannelTimeout("the deadline has passed") from None
        except OSError as error:
            raise ChannelClosed(f"the other end is closed ({error.strerror or error})") from None


def pair(max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[Channel, socket.socket]:
    """Our end, and the socket to hand to the other process."""
    ours, theirs = socket.socketpair()
    return Channel(ours, max_bytes), theirs
