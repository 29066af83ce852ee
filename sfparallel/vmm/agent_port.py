"""The agent port of one VM: frames in both directions, and how much of them may wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from sfparallel.errors import ProtocolError
from sfparallel.wire import Frame, FrameParser

log = logging.getLogger(__name__)

HIGH_WATER_BYTES = 512 << 10
"""When more waits for a guest than this, it has to read first: what else it asked for is made only then (`congested`)."""

LOW_WATER_BYTES = 128 << 10

MOST_UNREAD_BYTES = 16 << 20
"""A guest that leaves more unread is ended. One that reads never comes near: answers wait already above `HIGH_WATER_BYTES`, what
else is sent (ends of clones, replies) is small, and its agent reads whatever its programs do."""


class AgentPort(asyncio.Protocol):
    """The port's byte stream as frames.

    Args:
        on_frame: called with each frame, in order. What it raises ends the VM: a ProtocolError is the guest's fault.
        on_broken: called once, with the cause, when the port is unusable; nothing more is read then.
        on_closed: called when QEMU closed it.
        on_room: called when a guest that was congested has read.
    """

    def __init__(
        self,
        on_frame: Callable[[Frame], None],
        on_broken: Callable[[str], None],
        on_closed: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        self._on_frame = on_frame
        self._on_broken = on_broken
        self._on_closed = on_closed
        self._on_room = on_room
        self._parser = FrameParser()
        self._transport: asyncio.Transport | None = None
        self.congested = False
        """More waits for the guest than `HIGH_WATER_BYTES`."""
        self._broken = False

    # -- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._on_closed()

    def data_received(self, data: bytes) -> None:
        if not self.is_broken():
            with self._guarded():
                for frame in self._parser.feed(data):
                    self._on_frame(frame)
                    if self.is_broken():
                        return

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What a guest causes ends this VM at most: neither the job nor another VM."""
        try:
            yield
        except ProtocolError as error:
            # Whoever is root in there can send anything; only the agent sends what makes sense.
            self._break(f"it broke the protocol of the agent port: {error.message}")
        except Exception as error:  # a mistake of ours
            log.exception("could not handle what a guest sent")
            self._break(f"the supervisor failed on a frame that it sent: {error!r:.200}")

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False
        if not self.is_broken():
            with self._guarded():
                self._on_room()

    # -- for the VM ------------------------------------------------------------------------------------------------

    def is_broken(self) -> bool:
        """Whether nothing more is taken from this guest; it is about to end."""
        return self._broken

    def write(self, frame: Frame) -> None:
        """Send a frame; it waits here while the guest does not read."""
        if self._broken or not self._transport or self._transport.is_closing():
            return
        self._transport.write(frame.encode())
        if self._transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            self.overflow()

    def overflow(self) -> None:
        """More waits for the guest than there is room for."""
        self._break(f"its agent did not read {MOST_UNREAD_BYTES >> 20} MiB that were sent to it")

    def pause_reading(self) -> None:
        """Take nothing from the guest."""
        if self._transport and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take what comes from the guest again."""
        if self._transport and not self._transport.is_closing():
            self._transport.resume_reading()

    def drain(self, descriptor: int) -> None:
        """Deal with what stands in the socket: QEMU is gone, and nothing more will come."""
        if not self._transport:
            return
        try:
            while data := os.read(descriptor, 65536):
                self.data_received(data)
        except OSError:
            return

    def close(self) -> bool:
        """Drop the connection; whether there was one."""
        if self._transport:
            self._transport.abort()
        return self._transport is not None

    def _break(self, cause: str) -> None:
        if not self._broken:
            self._broken = True
            self.pause_reading()
            self._on_broken(cause)
