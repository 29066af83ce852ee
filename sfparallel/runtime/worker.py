"""A clone's side of a region: works on its keys, sends the answers, ends.

Under emulation every code path that is new in a clone is dear, so nothing is imported, asked or looked up here that the fork or
the parent's memory has not brought along, and no connection is made that is not needed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn

import zmq

from sfparallel.runtime import full_disk, lowlevel
from sfparallel.runtime.here import HERE, Membership
from sfparallel.runtime.hypervisor import Fork
from sfparallel.runtime.link import CloneLink, Kind, ParentLink, pack_answer
from sfparallel.runtime.payload import Buffer, dump_error, dumps
from sfparallel.runtime.rng import Streams
from sfparallel.runtime.work import Work

EXIT_SOFTWARE = 70  # sysexits.h


@dataclass(frozen=True, slots=True)
class Place:
    """What a clone must know beyond what all of them do.

    Attributes:
        fork: how the fork returned here.
        port: of the communicator.
        answer_bytes: largest answer that the supervisor takes with the exit.
        keys: the first share of this rank.
    """

    fork: Fork
    port: int
    answer_bytes: int
    keys: list[int]


def live(work: Work, ticket: lowlevel.Ticket, link: ParentLink, place: Place) -> NoReturn:
    """A clone's whole life after the fork. Nothing may escape from here: it would run the parent's program a second time."""
    try:
        worker = _Worker(work, ticket, link, place)
        worker.run()
        HERE.membership = None
        lowlevel.flush_output()
        ticket.hypervisor.exit(0, ran_ns=time.monotonic_ns() - worker.began_ns)
    except BaseException:
        die()


def die() -> NoReturn:
    """End a clone in which the runtime itself failed; the supervisor reports it as lost, with the traceback on its console."""
    traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(EXIT_SOFTWARE)


def clone_link(ticket: lowlevel.Ticket, link: ParentLink, fork: Fork) -> CloneLink:
    """In a clone: its end of the line to the parent, not connected yet."""
    whole_vm = ticket.hypervisor.keeps_threads
    dealer = link.dealer if whole_vm else HERE.zmq_context().socket(zmq.DEALER)
    return CloneLink(dealer, fork.rank - 1, "" if whole_vm else fork.address, link.endpoint)


def membership(fork: Fork, link: CloneLink, port: int, streams: Streams, key: int) -> Membership:
    """In a clone: its place among those that were made with it."""
    return Membership(fork.rank - 1, [clone.address for clone in fork.clones], port, link, streams, key)


class _Worker:
    """One rank of a region."""

    def __init__(self, work: Work, ticket: lowlevel.Ticket, link: ParentLink, place: Place) -> None:
        self._work = work
        self._ticket = ticket
        self._fork = place.fork
        self._keys = deque(place.keys)
        self.began_ns = 0
        # Items of a map are asked for one after the other: only a rank of a region answers once and is done.
        self._answer_bytes = 0 if work.per_item else place.answer_bytes
        self._link = clone_link(ticket, link, place.fork)
        self._membership = membership(place.fork, self._link, place.port, work.streams, place.keys[0])

    def run(self) -> None:
        """Work until the parent says that this was all."""
        if self._answer_bytes <= 0:
            self._link.connect()  # the handshake goes on while the user's function runs
        HERE.membership = self._membership
        failure: BaseException | None = None
        try:
            lowlevel.assume_identity(self._ticket, self._fork.entropy, self._membership.rank)
        except BaseException as error:
            failure = error
        self.began_ns = time.monotonic_ns()
        while True:
            while self._keys:
                self._membership.key = self._keys.popleft()
                self._answer(failure)
            kind, more = self._link.receive()
            if kind is Kind.RELEASE:
                return
            self._keys.extend(more)

    def _answer(self, failure: BaseException | None) -> None:
        """Work on one key and send the result, or what was raised, whatever it is."""
        key = self._membership.key
        fields: dict[str, Any] = {"key": key}
        frames: list[Buffer]
        try:
            if failure is not None:
                raise failure
            result = self._work.call(key)
            rank = self._membership.rank
            frames = dumps(result, f"item {key}, computed by rank {rank}" if self._work.per_item else f"rank {rank}")
            self._membership.leave()
            if self._work.collector is not None:
                fields["files"], contents = self._work.collector.changed()
                frames += contents
            kind = Kind.RESULT
        except BaseException as error:
            if self._ticket.hypervisor.keeps_threads:  # a VM
                full_disk.explain(error)
            fields = {"key": key}
            fields["error"], frames = dump_error(error, self._membership.rank)
            kind = Kind.ERROR
        # What the rank printed shall be on its way before its answer is.
        lowlevel.flush_output()
        if sum(map(len, frames)) < self._answer_bytes and len(frames) <= 1 and not self._membership.is_open:
            answer = pack_answer(kind, bytes(frames[0]) if frames else b"", fields)
            if len(answer) <= self._answer_bytes:
                self._ticket.hypervisor.exit(0, answer, ran_ns=time.monotonic_ns() - self.began_ns)
        self._link.send(kind, frames, **fields)
