"""Going on after ranks were lost (User-Level Failure Mitigation, MPI Forum proposal 2012): revoke, shrink, agree."""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from sfparallel.runtime.mpi.buffers import byte_array
from sfparallel.runtime.mpi.core import Call, CommCore, mix
from sfparallel.runtime.mpi.errors import ERR_OTHER, MPIException
from sfparallel.runtime.mpi.group import GROUP_EMPTY, Group, GroupCore
from sfparallel.runtime.mpi.matching import RecvOp, SendOp
from sfparallel.runtime.mpi.pickling import pickle
from sfparallel.runtime.mpi.request import Request

LATE = MPIException(ERR_OTHER, "the agreement is over")
"""For what nobody waits for."""


class _Quiet:
    """An operation whose failure is an answer, too."""

    __slots__ = ("error", "op")
    collective = False  # the loss of others does not fail it

    def __init__(self, op: SendOp | RecvOp) -> None:
        self.op = op
        self.error = None

    @property
    def done(self) -> bool:
        return self.op.done


class _View:
    """What one process knows of an agreement.

    Attributes:
        values: of the processes heard of.
        failed: processes that are lost.
    """

    def __init__(self, me: int, value: int, failed: frozenset[int]) -> None:
        self.values = {me: value}
        self.failed = failed


def agree(core: CommCore, call: Call, value: int) -> Generator[Any, None, tuple[int, frozenset[int]]]:
    """The bitwise AND of the values of all who live, and who does not: the same at all who live.

    Everybody tells everybody what he knows, until a round brings nothing new to anybody (flooding consensus for crash failures,
    M. Raynal, "Fault-Tolerant Agreement in Synchronous Message-Passing Systems", 2010). Who has decided says so once more.
    """
    engine, me = core.engine, core.endpoint.rank
    ctx = mix(call.ctx, call.number)
    view = _View(me, value, frozenset(engine.dead) & core.members)
    decided = False
    for number in range(len(core.members) + 2):
        alive = sorted(core.members - view.failed - {me})
        flags, frames, nbytes = pickle.payload((view.values, view.failed, decided))
        with core.endpoint.lock:
            # At once: the last ones may never be received, because their receivers have decided, too.
            sends = [engine.send(peer, ctx, number, [bytes(frame) for frame in frames], nbytes, flags, urgent=True)
                     for peer in alive]
            receives = [] if decided else [engine.recv(ctx, peer, number) for peer in alive]
        yield [*(_Quiet(op) for op in sends), *(_Quiet(op) for op in receives)]
        if decided:
            break
        decided = _merge(view, alive, receives)
    with core.endpoint.lock:
        engine.revoke(ctx, LATE)
    result = -1
    for peer, each in view.values.items():
        if peer not in view.failed:
            result &= each
    return result, view.failed


def _merge(view: _View, alive: Sequence[int], receives: Sequence[RecvOp]) -> bool:
    """Take in what was received; whether nothing was new to anybody."""
    values, failed, stable = dict(view.values), set(view.failed), True
    for peer, op in zip(alive, receives, strict=True):
        if op.error is not None:
            failed.add(peer)
            stable = False
            continue
        their_values, their_failed, they_decided = pickle.object(op.payload, op.flags)
        if they_decided:
            view.values, view.failed = their_values, their_failed
            return True
        stable = stable and their_values.keys() == view.values.keys() and their_failed == view.failed
        values.update(their_values)
        failed |= their_failed
    stable = stable and values.keys() == view.values.keys()
    view.values, view.failed = values, frozenset(failed)
    return stable


class Survival:
    """The calls of communicators."""

    _core: CommCore

    def _any(self) -> CommCore:
        raise NotImplementedError

    def _child(self, cls: type[Any], ctx: int, ranks: Sequence[int], remote: Sequence[int] | None = None) -> Any:
        raise NotImplementedError

    def Revoke(self) -> None:
        """Make every call on this communicator fail, in all ranks."""
        core = self._any()
        with core.endpoint.lock:
            core.endpoint.revoke(core.contexts, core.members)
            core.endpoint.changed()
        core.revoked = True

    def Is_revoked(self) -> bool:
        core = self._any()
        core.endpoint.poll()
        core.revoked = core.revoked or core.ctx in core.engine.revoked
        return core.revoked

    def Get_failed(self) -> Group:
        """The processes that are known to be lost."""
        core = self._any()
        core.endpoint.poll()
        failed = [peer for peer in core.ranks if peer in core.engine.dead]
        return Group._of(GroupCore(failed, core.endpoint.rank)) if failed else Group(GROUP_EMPTY)

    def Ack_failed(self, num_to_ack: int | None = None) -> int:
        """Acknowledge losses: receives from any source then work again. How many are acknowledged."""
        core = self._any()
        failed = [peer for peer in core.ranks if peer in core.engine.dead]
        wanted = failed if num_to_ack is None else failed[:max(num_to_ack, len(core.acknowledged))]
        core.acknowledged = frozenset(wanted)
        return len(core.acknowledged)

    def Agree(self, flag: int) -> int:
        """Bitwise AND of all flags, the same at all who live."""
        core = self._any()
        result, _ = core.run("Agree", lambda call: agree(core, call, flag), call=core.new_agreement())
        return int(result)

    def Iagree(self, flag: Any) -> Request:
        """The same for an integer in memory."""
        core = self._any()
        data = byte_array(flag, readonly=False)
        if len(data) != struct.calcsize("i"):
            raise ValueError(f"message: expecting {struct.calcsize('i')} bytes")

        def steps(call: Call) -> Any:
            result, _ = yield from agree(core, call, int(data.view(np.int32)[0]))
            data.view(np.int32)[0] = result

        return Request._of(core.start(steps, core.new_agreement()))

    def Shrink(self) -> Any:
        """A communicator of those who live."""
        core = self._any()
        _, failed = core.run("Shrink", lambda call: agree(core, call, -1), call=core.new_agreement())
        return self._survivors(failed)

    def Ishrink(self) -> tuple[Any, Request]:
        """The same, as a request; the communicator may be used when it is done."""
        core = self._any()
        comm = self._survivors(frozenset())

        def steps(call: Call) -> Any:
            _, failed = yield from agree(core, call, -1)
            if failed and comm._core is not None:
                ranks = [rank for rank in core.ranks if rank not in failed]
                remote = None if core.remote is None else [rank for rank in core.remote if rank not in failed]
                comm._core.place(core.endpoint, mix(comm._core.ctx, *sorted(failed)), ranks, remote)

        return comm, Request._of(core.start(steps, core.new_agreement()))

    def _survivors(self, failed: frozenset[int]) -> Any:
        from sfparallel.runtime.mpi.comm import Intracomm
        from sfparallel.runtime.mpi.intercomm import Intercomm
        core = self._any()
        ranks = [rank for rank in core.ranks if rank not in failed]
        remote = None if core.remote is None else [rank for rank in core.remote if rank not in failed]
        ctx = core.child_context(4, *sorted(failed))
        return self._child(Intracomm if remote is None else Intercomm, ctx, ranks, remote)
