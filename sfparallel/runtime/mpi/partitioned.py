"""Partitioned communication: one message that is filled, or looked at, part by part.

It travels as one message when all its parts are ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sfparallel.runtime.mpi.constants import PROC_NULL
from sfparallel.runtime.mpi.endpoint import Endpoint
from sfparallel.runtime.mpi.errors import ERR_ARG, MPIException
from sfparallel.runtime.mpi.messages import Block, simple
from sfparallel.runtime.mpi.request import Persistent, Prequest, RequestCore
from sfparallel.runtime.mpi.status import Status


class _Waiting(RequestCore):
    """A send that waits for its parts."""

    def __init__(self, endpoint: Endpoint, parts: int, begin: Callable[[], RequestCore]) -> None:
        self.endpoint = endpoint
        self.missing = set(range(parts))
        self._begin = begin
        self._sending: RequestCore | None = None if parts else begin()

    def ready(self, part: int) -> None:
        if part not in self.missing:
            raise MPIException(ERR_ARG, f"partition {part}")
        self.missing.discard(part)
        if not self.missing:
            self._sending = self._begin()

    @property
    def done(self) -> bool:
        return self._sending is not None and self._sending.done

    def result(self, status: Status | None) -> Any:
        assert self._sending is not None
        return self._sending.result(status)


class Partitioned(Persistent):
    """A send or receive in parts."""

    def __init__(self, endpoint: Endpoint, begin: Callable[[], RequestCore], partitions: int) -> None:
        super().__init__(endpoint, begin)
        self._partitions = partitions

    def ready(self, partitions: Iterable[int]) -> None:
        """Parts of a send are filled."""
        if not isinstance(self._running, _Waiting):
            raise MPIException(ERR_ARG, "not an active partitioned send")
        for part in partitions:
            self._running.ready(part)

    def arrived(self, partition: int) -> bool:
        """Whether a part of a receive is there."""
        if not 0 <= partition < self._partitions:
            raise MPIException(ERR_ARG, f"partition {partition}")
        if self._running is not None:
            self.endpoint.settle(self._running)
        return self.done


def _block(buf: Any, partitions: int, peer: int, *, readonly: bool) -> Block:
    block = simple(buf, readonly=readonly, peer=peer, parts=partitions)
    return Block(block.data, block.origin, block.count * partitions, block.core).check()


def send_init(comm: Any, buf: Any, partitions: int, dest: int, tag: int) -> Prequest:
    """`Comm.Psend_init`."""
    endpoint = comm._live().endpoint
    block = _block(buf, partitions, dest, readonly=True)
    comm._to(dest, tag)

    def begin() -> RequestCore:
        from sfparallel.runtime.mpi.p2p import frames
        return _Waiting(endpoint, 0 if dest == PROC_NULL else partitions, lambda: comm._isend(frames(block), dest, tag))

    return Prequest._of(Partitioned(endpoint, begin, partitions))


def recv_init(comm: Any, buf: Any, partitions: int, source: int, tag: int) -> Prequest:
    """`Comm.Precv_init`."""
    block = _block(buf, partitions, source, readonly=False)
    comm._from(source, tag)
    return Prequest._of(Partitioned(comm._live().endpoint, lambda: comm._irecv(source, tag, block), partitions))
