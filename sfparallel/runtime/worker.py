"""A clone's side of a region: works on its keys, sends the answers, ends.

Under emulation every code path that is new in a clone is slow, so nothing is imported, asked or looked up here that the fork or
the parent's memory has not brought along, and no connection is made that is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import zmq

from sfparallel.runtime import guest_errors, lowlevel
from sfparallel.runtime.here import HERE, Membership
from sfparallel.runtime.hypervisor import Fork, Hypervisor
from sfparallel.runtime.identity import Renewal
from sfparallel.runtime.link import CloneLink, Kind, Order, ParentLink, pack_answer
from sfparallel.runtime.payload import Buffer, UsersCode, dump_error, dumps, owned
from sfparallel.runtime.rng import Streams
from sfparallel.runtime.work import Work

EXIT_SOFTWARE = 70  # sysexits.h

LONG_S = 0.05
"""Keys do not wait in a clone behind one that takes longer."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a clone must know beyond what all of them do.

    Attributes:
        hypervisor: the line by which it was made.
        renewal: of its identity.
        link: the parent's end of the line to it, as it was before the fork.
        fork: how the fork returned here.
        port: of the communicator.
        rank: by which the parent knows it.
        keys: its first share; empty where the parent waits to be asked for work.
        answer_bytes: largest answer that the supervisor takes with the exit.
    """

    hypervisor: Hypervisor
    renewal: Renewal | None
    link: ParentLink
    fork: Fork
    port: int
    rank: int
    keys: list[int]
    answer_bytes: int = 0


def live(work: Work, place: Place) -> NoReturn:
    """A clone's whole life after the fork. Nothing may escape from here: it would run the parent's program a second time."""
    try:
        worker = _Worker(work, place)
        worker.run()
        HERE.membership = None
        lowlevel.flush_output()
        place.hypervisor.exit(0, ran_ns=time.monotonic_ns() - worker.began_ns)
    except BaseException:
        die()


def die() -> NoReturn:
    """End a clone in which the runtime itself failed; the supervisor reports it as lost, with the traceback on its console."""
    traceback.print_exc()
    with contextlib.suppress(Exception):
        lowlevel.flush_output()
    os._exit(EXIT_SOFTWARE)


def leave(error: BaseException | None) -> NoReturn:
    """End a process that has come back from a rank's function without being that rank, as its program would end: a process that
    the function has made with `os.fork`, or a clone with `sf.clone`. The answer is the rank's own."""
    status = 1
    if error is None:
        status = 0
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif error.code is None or isinstance(error.code, int):
        status = (error.code or 0) & 255
    else:
        print(error.code, file=sys.stderr)
    lowlevel.flush_output()
    if not HERE.forked and HERE.lifeline is not None:
        HERE.lifeline.exit(status)
    os._exit(status)


def clone_link(hypervisor: Hypervisor, link: ParentLink, fork: Fork, rank: int) -> CloneLink:
    """In a clone: its end of the line to the parent, not connected yet."""
    whole_vm = hypervisor.keeps_threads
    dealer = link.dealer if whole_vm else HERE.zmq_context().socket(zmq.DEALER)
    return CloneLink(dealer, rank, "" if whole_vm else fork.address, link.endpoint)


def membership(fork: Fork, link: CloneLink, port: int, streams: Streams, key: int) -> Membership:
    """In a clone: its place among those that were made with it."""
    return Membership(fork.rank - 1, [clone.address for clone in fork.clones], port, link, streams, key)


class _Worker:
    """One rank of a region, or one of those that serve a stream of work."""

    def __init__(self, work: Work, place: Place) -> None:
        self._work = work
        self._hypervisor = place.hypervisor
        self._renewal = place.renewal
        self._fork = place.fork
        self._keys = deque(place.keys)
        self._generation = HERE.generation
        self.began_ns = 0
        self._watchdog: Watchdog | None = None
        # Items of a map are asked for one after the other: only a rank of a region answers once and is done.
        self._answer_bytes = 0 if work.per_item else place.answer_bytes
        self._link = clone_link(place.hypervisor, place.link, place.fork, place.rank)
        self._rank = place.fork.rank - 1
        if place.keys:
            self._membership = membership(place.fork, self._link, place.port, work.streams, place.keys[0])
        else:  # clones that come and go do different things at different times: none has to do with others
            self._membership = Membership(0, [place.fork.address], place.port, self._link, work.streams, 0)

    def run(self) -> None:
        """Work until the parent says that this was all."""
        if self._answer_bytes <= 0:
            self._link.connect()  # the handshake goes on while the user's function runs
        HERE.membership = self._membership
        # A full collection writes to each object that it looks at, and what is written to is no longer shared. Measured with
        # 30,000 objects under TCG: without this, 8 MiB more of private memory, and 70 ms.
        gc.freeze()
        failure: BaseException | None = None
        try:
            assert self._renewal is not None, "made before every fork"
            self._renewal.leave_event_loop()
            lowlevel.assume_identity(self._renewal, self._fork.entropy, self._rank)
        except BaseException as error:
            failure = error
        self.began_ns = time.monotonic_ns()
        if not self._keys and not self._report_for_work(failure):
            return
        while True:
            while True:
                try:
                    self._membership.key = self._keys.popleft()
                except IndexError:
                    break
                self._answer(failure)
            order = self._receive()
            if order.kind is Kind.RELEASE:
                return
            if order.inputs:
                self._work.inputs.update(zip(order.keys, order.inputs, strict=True))
                self._rank = self._rank if order.rank is None else order.rank
            self._keys.extend(order.keys)
            if order.inputs and len(self._keys) > 1:
                self._watch()

    def _receive(self) -> Order:
        if self._watchdog is not None:
            with self._watchdog.lock:
                pass  # it may be returning keys; now that there are none, it will not begin to
        return self._link.receive()

    def _watch(self) -> None:
        """Have keys returned that wait behind one that takes long."""
        if self._watchdog is None:
            self._watchdog = Watchdog(self._keys, self._work.inputs, self._link)
        self._watchdog.busy.set()

    def _report_for_work(self, failure: BaseException | None) -> bool:
        """Say that this clone is ready for work, or that it will never be."""
        if failure is not None:
            return self._decline(Kind.FAILED, failure)
        try:
            if self._work.prepare is not None:
                self._ask(self._work.prepare)
                lowlevel.flush_output()
        except BaseException as error:
            return self._decline(Kind.UNFIT, error)
        self._link.send(Kind.READY)
        return True

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Call the program's code. Only the rank itself returns from here."""
        try:
            result = call()
        except BaseException as error:
            if HERE.generation != self._generation:
                leave(error)
            raise
        if HERE.generation != self._generation:
            leave(None)
        return result

    def _decline(self, kind: Kind, error: BaseException) -> bool:
        description, frames = dump_error(error, self._rank)
        lowlevel.flush_output()
        self._link.send(kind, frames, error=description)
        while self._link.receive().kind is not Kind.RELEASE:
            pass
        return False

    def _answer(self, failure: BaseException | None) -> None:
        """Work on one key and send the result, or what was raised, whatever it is."""
        key = self._membership.key
        fields: dict[str, Any] = {"key": key}
        began_ns = time.monotonic_ns()
        frames: list[Buffer]
        try:
            if failure is not None:
                raise failure
            result = self._ask(functools.partial(self._work.call, key))
            rank = self._rank
            frames = dumps(result, f"item {key}, computed by rank {rank}" if self._work.per_item else f"rank {rank}")
            if len(frames) > 1 and self._work.per_item:
                frames = owned(frames)  # ZeroMQ sends it while the next item is computed, perhaps in the same array
            self._membership.leave()
            if self._work.collector is not None:
                fields["files"], contents = self._work.collector.changed()
                # Of an item: the next one may write to the file while ZeroMQ sends it.
                frames += map(bytes, contents) if self._work.per_item else contents
            kind = Kind.RESULT
        except BaseException as error:
            if self._hypervisor.keeps_threads:  # a VM
                with UsersCode():
                    guest_errors.explain(error)
            fields = {"key": key}
            fields["error"], frames = dump_error(error, self._rank)
            kind = Kind.ERROR
            if self._work.collector is not None and self._work.per_item:
                self._work.collector.skip()
        # What the rank printed shall be on its way before its answer is.
        lowlevel.flush_output()
        if len(frames) <= 1 and sum(map(len, frames)) < self._answer_bytes and not self._membership.is_open:
            answer = pack_answer(kind, bytes(frames[0]) if frames else b"", fields)
            if len(answer) <= self._answer_bytes:
                self._hypervisor.exit(0, answer, ran_ns=time.monotonic_ns() - self.began_ns)
        if not self._work.inputs_come:
            self._link.send(kind, frames, **fields)
            return
        self._work.streams.forget(key)
        fields["ran_ns"] = time.monotonic_ns() - began_ns
        if self._watchdog is None:
            self._link.send(kind, frames, **fields)
            return
        with self._watchdog.lock:
            self._link.send(kind, frames, **fields)
        self._watchdog.answers += 1
        # Let the answer go out before the next task begins: if that one ends this clone, it shall be known which one it was.
        os.sched_yield()


class Watchdog:
    """Returns keys to the parent that wait in a clone behind one that takes long, so that others can have them.

    Attributes:
        lock: held by whoever sends.
        busy: set while there are keys that wait.
        answers: how many have been sent.
    """

    def __init__(self, keys: deque[int], inputs: dict[int, list[Buffer]], link: CloneLink) -> None:
        self.lock = threading.Lock()
        self.busy = threading.Event()
        self.answers = 0
        self._keys = keys
        self._inputs = inputs
        self._link = link
        self._never = threading.Event()
        threading.Thread(target=self._run, name="sf-watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.busy.wait()
            seen = self.answers
            self._never.wait(LONG_S)
            if not self._keys:
                self.busy.clear()
                if self._keys:
                    self.busy.set()
            elif self.answers == seen:
                self._return()

    def _return(self) -> None:
        with self.lock:
            keys = []
            with contextlib.suppress(IndexError):
                while True:
                    keys.append(self._keys.popleft())
            for key in keys:
                self._inputs.pop(key, None)
            if keys:
                self._link.send(Kind.BACK, keys=keys)
