"""The communicator of a region: direct connections among its clones, with mpi4py's names.

Every rank listens on the same port of its own address. The parent looked for a port that is free in itself before the fork, so
it is free in every clone. Nothing is opened before the first collective call: most regions need no communicator.

Collective calls are numbered; a message carries the number of its call, so that a fast rank may be a call ahead of a slow one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import zmq

from sfparallel import wire
from sfparallel.errors import CloneLost, RegionError, RegionTimeout, StateError, UsageError
from sfparallel.runtime.here import HERE
from sfparallel.runtime.link import CloneLink, Kind, set_up_dealer
from sfparallel.runtime.payload import Buffer, dumps, loads

Key = tuple[str, int, int]
"""What a message is: name and number of the call, rank of the sender."""

RECONNECT_MS = 20
"""A peer may not listen yet when it is called first."""

GRACE_S = 0.5
"""How long after a rank's loss its last message is waited for: the notice comes by another way, through the parent."""


class Communicator:
    """Rank, size and collective calls of a region (mpi4py's `Comm`, the part of it that is here).

    Args:
        rank: this process's rank.
        addresses: of all ranks, in order; empty outside a region (then rank is 0 and size 1).
        port: where each rank listens.
        link: the line to the parent, by which ranks are told of others that were lost.
    """

    def __init__(self, rank: int = 0, addresses: Sequence[str] = (), port: int = 0, link: CloneLink | None = None) -> None:
        self._rank = rank
        self._size = len(addresses) or 1
        self._addresses = addresses
        self._port = port
        self._link = link
        self._inbox: zmq.Socket[bytes] | None = None
        self._peers: dict[int, zmq.Socket[bytes]] = {}
        self._arrived: dict[Key, list[memoryview]] = {}
        self._calls = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def is_open(self) -> bool:
        """Whether this rank has taken part in a collective call."""
        return self._inbox is not None

    @property
    def size(self) -> int:
        return self._size

    def Get_rank(self) -> int:  # mpi4py's name
        return self._rank

    def Get_size(self) -> int:  # mpi4py's name
        return self._size

    def __repr__(self) -> str:
        return f"<Communicator rank {self._rank} of {self._size}>"

    def barrier(self, *, timeout: float | None = None) -> None:
        """Wait until every rank has called `barrier`.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            RegionTimeout: some ranks did not call it in time (`.missing`).
            CloneLost: a rank died meanwhile.
        """
        if self._size == 1:
            return
        call, deadline = self._begin(), _Deadline("barrier", timeout)
        if self._rank:
            self._send(0, ("here", call), [])
            # Rank 0 gives up first and says who is missing; only if it is silent too, it is rank 0 that is missing.
            (frame,) = self._wait(("go", call, 0), deadline.later(), {0}, blame=set(range(self._size)))
            verdict = wire.unpack(bytes(frame))
        else:
            verdict = self._count_heads(call, deadline)
            for rank in range(1, self._size):
                if rank not in verdict["missing"]:
                    self._send(rank, ("go", call), [wire.pack(verdict)])
        if verdict["cause"] is not None:
            raise _lost("barrier", verdict["missing"][0], verdict["cause"])
        if verdict["missing"]:
            raise deadline.error(verdict["missing"])

    def bcast(self, obj: Any, root: int = 0, *, timeout: float | None = None) -> Any:
        """Send an object from one rank to all, along a binomial tree.

        Args:
            obj: what rank `root` sends; ignored in the other ranks.
            root: rank that sends.
            timeout: seconds; None waits for ever.

        Returns:
            the object, in every rank.

        Raises:
            RegionTimeout: it did not arrive in time; `.missing` names the rank that should have passed it on.
            CloneLost: a rank died meanwhile.
        """
        if not 0 <= root < self._size:
            raise UsageError(f"root must be a rank (0..{self._size - 1}), not {root!r}")
        if self._size == 1:
            return obj
        call, deadline = self._begin(), _Deadline("bcast", timeout)
        # Ranks relative to the root: r got the object from r without its lowest bit, and passes it on to r + 1, r + 2, r + 4, ...
        relative = (self._rank - root) % self._size
        lowest = relative & -relative if relative else 1 << (self._size - 1).bit_length()
        steps = [1 << bit for bit in reversed(range(lowest.bit_length() - 1)) if relative + (1 << bit) < self._size]
        frames: Sequence[Buffer]
        if relative:
            ancestors, above = set(), relative
            while above:
                above -= above & -above
                ancestors.add((above + root) % self._size)
            source = (relative - lowest + root) % self._size
            frames = self._wait(("bcast", call, source), deadline, ancestors, missing=[source])
            # What is passed on must not change while it is being sent, and what is returned belongs to the caller.
            obj = loads([bytearray(frame) for frame in frames] if steps else frames)
        else:
            frames = [bytes(frame) for frame in dumps(obj)]
        for step in steps:
            self._send((relative + step + root) % self._size, ("bcast", call), frames)
        return obj

    def _count_heads(self, call: int, deadline: _Deadline) -> dict[str, Any]:
        """In rank 0 of a barrier: wait for the others. Who is missing, and the cause if that is a loss."""
        missing = set(range(1, self._size))
        try:
            for rank in range(1, self._size):
                self._wait(("here", call, rank), deadline, missing)
                missing.discard(rank)
        except RegionTimeout:
            return {"missing": sorted(rank for rank in missing if ("here", call, rank) not in self._arrived), "cause": None}
        except CloneLost as error:
            return {"missing": [error.rank], "cause": error.cause}
        return {"missing": [], "cause": None}

    def _begin(self) -> int:
        if self._inbox is None:
            self._open()
        self._calls += 1
        return self._calls

    def _open(self) -> None:
        assert self._link is not None, "a communicator of more than one rank has a line to the parent"
        self._inbox = HERE.zmq_context().socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.bind(f"tcp://{self._addresses[self._rank]}:{self._port}")
        # From now on the parent tells this rank about lost ones, and lets it live until all have answered: what it sent may
        # still be on its way out of this VM.
        self._link.send(Kind.COMM)

    def _send(self, rank: int, call: tuple[str, int], frames: Sequence[Buffer]) -> None:
        peer = self._peers.get(rank)
        if peer is None:
            peer = self._peers[rank] = HERE.zmq_context().socket(zmq.PUSH)
            set_up_dealer(peer)
            peer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
            peer.connect(f"tcp://{self._addresses[self._rank]}:0;{self._addresses[rank]}:{self._port}")
        peer.send_multipart([wire.pack({"call": call[0], "number": call[1], "rank": self._rank}), *frames], copy=False)

    def _wait(self, key: Key, deadline: _Deadline, needed: set[int], *, missing: list[int] | None = None,
              blame: set[int] | None = None) -> list[memoryview]:
        """Wait for the message `key`; messages of later calls are kept for them.

        Args:
            needed: ranks without which it cannot come.
            missing: ranks to name when time runs out; by default those needed.
            blame: ranks to name when one that is needed is lost; by default those needed.
        """
        assert self._inbox is not None
        assert self._link is not None
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._link.dealer, zmq.POLLIN)
        lost = self._link.lost
        grace: _Deadline | None = None
        while True:
            self._link.look()
            self._take_arrived()
            if key in self._arrived:
                return self._arrived.pop(key)
            if grace is None and needed & lost.keys():
                grace = _Deadline(deadline.call, GRACE_S)
            if grace is not None and grace.remaining_ms() == 0:
                # The first of those to blame that was reported: others may have failed because of it.
                rank = next(rank for rank in lost if rank in (blame or needed))
                raise _lost(deadline.call, rank, lost[rank])
            if deadline.remaining_ms() == 0:
                raise deadline.error(sorted(needed) if missing is None else missing)
            poller.poll((grace or deadline).remaining_ms())

    def _take_arrived(self) -> None:
        assert self._inbox is not None
        while True:
            try:
                parts = self._inbox.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            header = wire.unpack(parts[0].bytes)
            rank = header.get("rank")
            if not isinstance(rank, int) or not 0 <= rank < self._size or parts[0].get("Peer-Address") != self._addresses[rank]:
                raise RegionError(f"a message of {parts[0].get('Peer-Address')} claims to come from rank {rank!r}")
            self._arrived[header["call"], header["number"], rank] = [part.buffer for part in parts[1:]]


def _lost(call: str, rank: int, cause: str) -> CloneLost:
    return CloneLost(f"{call} cannot complete: rank {rank} {cause}", rank=rank, cause=cause)


class _Deadline:
    """A time limit of one collective call."""

    def __init__(self, call: str, timeout: float | None, end: float | None = None) -> None:
        self.call = call
        self.timeout = timeout
        self._end = end if timeout is None or end is not None else time.monotonic() + timeout

    def later(self) -> _Deadline:
        """The same limit, with a margin."""
        if self._end is None or self.timeout is None:
            return self
        return _Deadline(self.call, self.timeout, self._end + max(2.0, self.timeout / 4))

    def remaining_ms(self) -> int | None:
        """For `poll`: None waits for ever, 0 means that time is up."""
        return None if self._end is None else max(0, int((self._end - time.monotonic()) * 1000 + 0.999))

    def error(self, missing: list[int]) -> RegionTimeout:
        names = ", ".join(map(str, missing))
        return RegionTimeout(f"{self.call} took longer than {self.timeout} s; missing: rank {names}", missing=missing)


def comm() -> Communicator:
    """The communicator of the region that this rank belongs to; outside a region, in the parent: rank 0 of 1.

    Raises:
        OutsideVMError: this is not a VM of sfparallel.
        StateError: this is a clone made with `sf.clone`, which belongs to no region.
    """
    if HERE.membership is not None:
        return HERE.membership.communicator
    if HERE.rank:
        raise StateError("a clone made with sf.clone() belongs to no region and has no communicator", hint="use sf.parallel")
    HERE.require_vm()
    return Communicator()
