"""A port of the host that leads to a port of a guest: a relay, because the two networks have no route to each other."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from sfparallel.errors import Closed, NetworkError

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_CONNECT_TIMEOUT_S = 10.0


class Forward:
    """Connections to `address` on the host end at `guest` (made by `CloneNetwork.forward`).

    Attributes:
        address: where the host listens: (IPv4 address, port); the port is the real one where 0 was asked for.
        guest: where the connections go: (IPv4 address, port).
    """

    def __init__(self, guest: tuple[str, int], connector: Callable[[], socket.socket]) -> None:
        self.guest = guest
        self.address: tuple[str, int] = ("", 0)
        self._connector = connector
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> None:
        """Opens the listening socket, in the caller's network namespace.

        Raises:
            NetworkError: the port is taken, or may not be used.
        """
        try:
            self._listener = socket.create_server((host, port))
            self._server = await asyncio.start_server(self._serve, sock=self._listener)
        except OSError as error:
            hint = "choose another host port" if error.errno == errno.EADDRINUSE else None
            raise NetworkError(f"could not listen on {host}:{port} for a forward: {error.strerror}", hint=hint) from error
        self.address = self._listener.getsockname()

    def close(self) -> None:
        """Stops listening and drops the connections. Idempotent."""
        if self._server is not None and not self._server.get_loop().is_closed():
            self._server.close()
        self._server = None
        if self._listener is not None:
            self._listener.close()  # the server has done so, except after the end of its event loop
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs this as a task of its own
        self._tasks.add(task)
        try:
            await self._relay(reader, writer)
        except asyncio.CancelledError:
            pass  # by `close`; asyncio would log it as an error of the server
        except (OSError, Closed) as error:  # Closed: it came while the network was taken down
            log.info("forward %s -> %s: %s", self.address, self.guest, error)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = self._connector()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(inner, self.guest)
            guest_reader, guest_writer = await asyncio.open_connection(sock=inner)
        except BaseException:
            inner.close()
            raise
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, guest_writer))
                group.create_task(_pump(guest_reader, writer))
        except* OSError as errors:
            raise errors.exceptions[0] from None
        finally:
            guest_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end, and passes the end on: the other direction may go on (a half-closed connection)."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    await writer.drain()
