"""Buffers for buffered sends: never needed here, but programs attach them to communicators, to sessions and to the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sfparallel.runtime.mpi.buffers import BufferAutomaticType, byte_array
from sfparallel.runtime.mpi.constants import ANY_SOURCE
from sfparallel.runtime.mpi.core import world_endpoint
from sfparallel.runtime.mpi.request import Finished, Request


class Holder(Protocol):
    """Remembers a buffer."""

    buffer: Any


def attach(holder: Holder, buf: Any) -> None:
    """Not needed; remembered for `detach`."""
    if not isinstance(buf, BufferAutomaticType) and buf is not None:
        byte_array(buf, readonly=False)
    holder.buffer = buf


def detach(holder: Holder) -> Any:
    """The buffer that was attached, or None."""
    buf, holder.buffer = holder.buffer, None
    return buf


def flush() -> None:
    """What was sent has a copy of its own, so nothing need be waited for."""
    world_endpoint().poll()


def begin_flush() -> Request:
    """The same as a request, which is done."""
    return Request._of(Finished(world_endpoint(), source=ANY_SOURCE))


class Buffered:
    """The calls of objects that can hold a buffer."""

    if TYPE_CHECKING:
        def _live(self) -> Any: ...

    def Attach_buffer(self, buf: Any) -> None:
        """Lend memory for buffered sends."""
        attach(self._live(), buf)

    def Detach_buffer(self) -> Any:
        """Take it back."""
        return detach(self._live())

    def Flush_buffer(self) -> None:
        """Wait until it is empty."""
        self._live()
        flush()

    def Iflush_buffer(self) -> Request:
        """The same as a request."""
        self._live()
        return begin_flush()
