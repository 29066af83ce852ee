"""A QMP client for asyncio: commands with descriptors, events as futures, pipelining.

QMP is QEMU's JSON monitor (https://www.qemu.org/docs/master/interop/qmp-spec.html). `qemu.qmp` from PyPI speaks it as well,
but runs three tasks for each connection and sends one command at a time; a fork talks to up to 64 monitors at once, and sends
`getfd`, `migrate-incoming` and `cont` to each in one write.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sfparallel.errors import ProtocolError, QmpError

Event = dict[str, Any]
"""With `event`, its name, and `data`, empty where QEMU says nothing more."""

MAX_LINE_BYTES = 4 << 20
"""The longest line of QEMU's; those that we ask for have some KiB."""

_NAME_CHARS = 100
_TEXT_CHARS = 1000
"""Of a refusal."""


def decode(line: bytes) -> dict[str, Any]:
    """Read one line: a greeting, an event or a reply.

    A guest that has taken its QEMU over can say anything here.

    Raises:
        ProtocolError: no QEMU says this.
    """
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a line that is not JSON: {str(error)[:_NAME_CHARS]}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a {type(message).__name__} where a message was expected")
    if "event" in message:
        name, data = message["event"], message.get("data", {})
        if not isinstance(name, str) or not 0 < len(name) <= _NAME_CHARS or not isinstance(data, dict):
            raise ProtocolError("an event without a name, or whose data have none")
        return {"event": name, "data": data}
    if "error" in message:
        refusal = message["error"]
        text = refusal.get("desc") if isinstance(refusal, dict) else None
        if not isinstance(text, str):
            raise ProtocolError("a refusal without a reason")
        return {"error": text[:_TEXT_CHARS]}
    if "QMP" not in message and "return" not in message:
        raise ProtocolError("what is neither greeting nor event nor reply")
    return message


class Qmp:
    """One monitor connection.

    Args:
        sock: a connected unix stream socket; the object owns it from here on.
        name: the VM's name, for messages.
        on_event: called for every event, in order.
        on_close: called once when QEMU closed the connection, or was hung up on: with what it did wrong then, else "".
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        on_event: Callable[[Event], None] = lambda event: None,
        on_close: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.name = name
        self._sock = sock
        self._on_event = on_event
        self._on_close = on_close
        self._replies: deque[tuple[str, asyncio.Future[Any]]] = deque()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        """Commands, or the rest of one, that the socket has no room for yet, with their descriptors."""
        self._buffer = bytearray()
        self._closed = False
        self._why = ""
        """What QEMU did wrong."""
        self._waiters: list[tuple[Callable[[Event], bool], asyncio.Future[Event]]] = []
        self._loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[Event] = self._loop.create_future()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    async def negotiate(self) -> None:
        """Wait for the greeting and leave capabilities mode.

        Raises:
            QmpError: QEMU ended before it answered.
        """
        await self._greeted
        await self.execute("qmp_capabilities")

    def send(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> asyncio.Future[Any]:
        """Send a command without waiting; the future has its return value.

        Descriptors are duplicated by the kernel as they pass (SCM_RIGHTS); the caller keeps its own.
        """
        reply: asyncio.Future[Any] = self._loop.create_future()
        if self._closed:
            reply.set_exception(self._gone(command))
            return reply
        names = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": names}).encode() + b"\n"
        self._replies.append((command, reply))
        try:
            self._write(message, fds)
        except OSError as error:
            self._replies.pop()
            reply.set_exception(QmpError(f"{self.name}: cannot send {command!r} to QEMU: {error}"))
        return reply

    def _write(self, message: bytes, fds: Sequence[int]) -> None:
        """Send a command, or what the socket takes of it now; the rest follows when there is room.

        Raises:
            OSError: nothing of it was sent.
        """
        sent = 0
        if not self._unsent:
            with contextlib.suppress(BlockingIOError):
                sent = socket.send_fds(self._sock, [message], list(fds)) if fds else self._sock.send(message)
        if sent == len(message):
            return
        # The kernel passes descriptors with the first byte. Those that have to wait are duplicated, as the caller closes its own.
        kept = [os.dup(fd) for fd in fds] if not sent else []
        if not self._unsent:
            self._loop.add_writer(self._sock.fileno(), self._writable)
        self._unsent.append((message[sent:], kept))

    def _writable(self) -> None:
        message, fds = self._unsent[0]
        try:
            sent = socket.send_fds(self._sock, [message], fds) if fds else self._sock.send(message)
        except BlockingIOError:
            return
        except OSError:
            self._end()  # half a command may have been sent: the stream is unusable
            return
        for fd in fds:
            os.close(fd)
        if sent < len(message):
            self._unsent[0] = (message[sent:], [])
            return
        self._unsent.popleft()
        if not self._unsent:
            self._loop.remove_writer(self._sock.fileno())

    async def execute(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Run a command and return what it returns.

        Raises:
            QmpError: QEMU refused it, or is gone.
        """
        return await self.send(command, fds, **arguments)

    async def monitor(self, line: str) -> str:
        """Run a command of the human monitor; only for what QMP does not offer (`gpa2hva`)."""
        return str(await self.execute("human-monitor-command", command_line=line))

    def expect(self, matches: Callable[[Event], bool]) -> asyncio.Future[Event]:
        """A future for the next event that matches; register before the command that causes it."""
        future: asyncio.Future[Event] = self._loop.create_future()
        if self._closed:
            future.set_exception(self._gone("wait for an event"))
        else:
            self._waiters.append((matches, future))
        return future

    def close(self) -> None:
        """Close the connection; commands and waits in flight fail."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        pending = [(command, future) for command, future in self._replies]
        pending += [("wait for an event", future) for _, future in self._waiters]
        pending.append(("connect", self._greeted))
        for command, future in pending:
            if not future.done():
                future.set_exception(self._gone(command))
                # Nobody may be waiting any more: then "never retrieved" would only be noise.
                future.exception()
        self._replies.clear()
        self._waiters.clear()

    def _gone(self, command: str) -> QmpError:
        return QmpError(f"{self.name}: {self._why or 'QEMU is gone'}, so {command!r} has no answer")

    def _readable(self) -> None:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._buffer += data
        try:
            while (end := self._buffer.find(b"\n")) >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                if line.strip():
                    self._dispatch(decode(line))
                    if self._closed:
                        return
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ProtocolError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        except ProtocolError as error:
            self._end(f"its QEMU broke the protocol of its monitor: {error.message}")

    def _end(self, why: str = "") -> None:
        self._why = why
        self._buffer.clear()
        self.close()
        self._on_close(why)

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._deliver(message)
        elif "QMP" in message:
            if not self._greeted.done():
                self._greeted.set_result(message)
        elif self._replies:
            command, future = self._replies.popleft()
            if future.done():
                return
            if "error" in message:
                future.set_exception(QmpError(f"{self.name}: QEMU refused {command!r}: {message['error']}"))
            else:
                future.set_result(message["return"])

    def _deliver(self, event: Event) -> None:
        kept = []
        for matches, future in self._waiters:
            if future.done():
                continue
            if matches(event):
                future.set_result(event)
            else:
                kept.append((matches, future))
        self._waiters = kept
        self._on_event(event)


@contextlib.contextmanager
def reopened(fd: int, flags: int) -> Iterator[int]:
    """A new open file description of the same file: its own offset, its own access mode."""
    again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    try:
        yield again
    finally:
        os.close(again)
