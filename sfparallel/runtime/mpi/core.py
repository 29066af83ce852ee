"""What a communicator refers to, and how its calls are run: blocking, as a request, or as a persistent request.

Contexts need no agreement by messages: the members of a communicator create others in the same order (MPI requires it), so each
computes the same number from the parent's context and a count. Numbers have 64 bits and are well mixed, so they do not collide.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NoReturn

from sfparallel.errors import RegionTimeout
from sfparallel.runtime.here import HERE
from sfparallel.runtime.mpi.collectives import Channel, Collective, Wait
from sfparallel.runtime.mpi.constants import PROC_NULL, ROOT
from sfparallel.runtime.mpi.endpoint import Endpoint
from sfparallel.runtime.mpi.errhandler import ErrhandlerCore, initial
from sfparallel.runtime.mpi.errors import ERR_ROOT, MPIException, PeerLost
from sfparallel.runtime.mpi.handle import Core
from sfparallel.runtime.mpi.matching import Engine, RecvOp, SendOp
from sfparallel.runtime.mpi.request import RequestCore, deadline_of, timed_out
from sfparallel.runtime.mpi.status import Status

WORLD_CONTEXT, SELF_CONTEXT = 2, 4
_MASK = (1 << 64) - 1
_GLANCE_EVERY = 16
_INQUIRY_S = 1.0
"""After a time limit, how long the others are asked whether they take part."""


def mix(*numbers: int) -> int:
    """A well-mixed even number of 64 bits (the finalizer of splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state & ~1


class Call:
    """One collective call.

    Attributes:
        local: the ranks of the own group.
        remote: the ranks of the other group, if there is one.
    """

    __slots__ = ("ctx", "local", "number", "remote")

    def __init__(self, core: CommCore, ctx: int, number: int) -> None:
        self.ctx, self.number = ctx, number
        tag = number & 0x7FFFFFFF
        self.local = Channel(core.endpoint, ctx | 1, tag, core.ranks, core.rank, core.members)
        if core.remote is not None:
            self.remote = Channel(core.endpoint, ctx, tag, core.remote, -1, core.members)


Prepared = Callable[[Call], Collective]


def _loss(ops: Wait, engine: Engine) -> BaseException | None:
    """What is said of a lost rank on which collective operations depend, though they wait for others: for one, say, that has
    given up because of the same loss, and takes in no message any more."""
    return next((error for rank, error in engine.dead.items() for op in ops if op.collective and rank in op.members), None)


class _Step:
    """Operations that a collective call waits for: it goes on when all are done, or one has failed.

    Attributes:
        error: of the one that has failed.
    """

    __slots__ = ("_engine", "_open", "error")

    def __init__(self, ops: Wait, engine: Engine) -> None:
        self._open = list(ops)
        self._engine = engine
        self.error: BaseException | None = None

    @property
    def source(self) -> int:
        """Of which process a message is waited for, if it is only one."""
        sources = [op.source for op in self._open if isinstance(op, RecvOp) and not op.done]
        return sources[0] if len(sources) == 1 else -1

    @property
    def done(self) -> bool:
        still_open = self._open
        if self.error is not None:
            return True
        while still_open and still_open[-1].done:
            self.error = still_open.pop().error
            if self.error is not None:
                return True
        if self._engine.dead or self._engine.left or self._engine.revoked:
            # Who is waited for first may wait for the one that is gone, too.
            self.error = next((op.error for op in still_open if op.error is not None), None) or _loss(still_open, self._engine)
        return not still_open or self.error is not None


class CommCore(Core):
    """What a communicator refers to.

    Args:
        endpoint: of this process.
        ctx: the context of its messages; its collective calls use the next one.
        ranks: processes of the (own) group.
        remote: processes of the other group, in an intercommunicator.
    """

    endpoint: Endpoint
    ctx: int
    ranks: tuple[int, ...]
    rank: int
    remote: tuple[int, ...] | None

    def __init__(self, endpoint: Endpoint, ctx: int, ranks: Sequence[int], remote: Sequence[int] | None = None) -> None:
        self.attributes: dict[int, Any] = {}
        self.info: dict[str, str] = {}
        self.name = ""
        self.errhandler: ErrhandlerCore = initial()
        self.topology: Any = None
        self.buffer: Any = None
        self.revoked = False
        self.acknowledged: frozenset[int] = frozenset()
        self.calls = 0
        self.children = 0
        self.agreements = 0
        self.repeats: list[int] = []
        """Contexts of persistent collective calls."""
        self.locks: dict[Hashable, Any] = {}
        self.hidden: Any = None
        """A duplicate for what a library does beside the program (`environment.context_within`)."""
        self.tags: Iterator[int] = iter(())
        self.local: CommCore | None = None
        """Of an intercommunicator's own group, for agreements there."""
        self.group_counts: dict[tuple[int, ...], int] = {}
        self.place(endpoint, ctx, ranks, remote)

    def place(self, endpoint: Endpoint, ctx: int, ranks: Sequence[int], remote: Sequence[int] | None) -> None:
        """Set who takes part."""
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.ctx = ctx
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(endpoint.rank)
        self.size = len(self.ranks)
        self.remote = None if remote is None else tuple(remote)
        self.peers = self.ranks if self.remote is None else self.remote
        self.members = frozenset(self.ranks) | frozenset(self.remote or ())
        self.sources = frozenset(self.peers)
        self._rank_of: dict[int, int] | None = None

    def source_of(self, peer: int) -> int:
        """Rank of a process of the world; what is no process (PROC_NULL, ANY_SOURCE) stays."""
        if peer < 0:
            return peer
        if self._rank_of is None:
            self._rank_of = {world: rank for rank, world in enumerate(self.peers)}
        return self._rank_of[peer]

    def child_context(self, *salt: int) -> int:
        """The context of the next communicator that is made of this one."""
        self.children += 1
        return mix(self.ctx, self.children, *salt)

    def raise_error(self, error: BaseException) -> NoReturn:
        """Do what the error handler says, then raise."""
        if isinstance(error, PeerLost):
            # The error was made when the loss became known; each call raises one of its own.
            error = PeerLost(error.message, rank=error.rank, cause=error.cause, code=int(error))
        if isinstance(error, MPIException):
            self.errhandler.handle(self, int(error))
        raise error

    # Collective calls

    def checked_root(self, root: int) -> int:
        """A root as an integer, which floats become as they do for mpi4py.

        Raises:
            MPIException: it is no rank; in an intercommunicator: none of the other group, and neither ROOT nor PROC_NULL.
        """
        if not 0 <= root < len(self.peers) and (self.remote is None or root not in (ROOT, PROC_NULL)):
            self.raise_error(MPIException(ERR_ROOT, f"root must be a rank (0..{len(self.peers) - 1}), not {root!r}"))
        return int(root)

    def new_call(self) -> Call:
        """Number the next collective call."""
        self.calls += 1
        number = self.calls
        self.endpoint.entered[self.ctx] = number
        if number % _GLANCE_EVERY == 0:
            # A rank that is behind finds the messages of thousands of calls here already.
            self.endpoint.glance()
        return Call(self, mix(self.ctx, 1), number)

    def new_agreement(self) -> Call:
        """Number the next agreement: they are counted apart, as others may call them in another order with collective calls."""
        self.agreements += 1
        return Call(self, mix(self.ctx, 3), self.agreements)

    def run(self, name: str, prepared: Prepared, timeout: float | None = None, call: Call | None = None) -> Any:
        """Do a collective call now. Calls of the same name in several threads come one after the other."""
        with self.lock(name):
            return self._run(name, prepared, timeout, call or self.new_call())

    def lock(self, name: Hashable) -> Any:
        """A lock of this communicator."""
        try:
            return self.locks[name]
        except KeyError:
            return self.locks.setdefault(name, threading.Lock())

    def _run(self, name: str, prepared: Prepared, timeout: float | None, call: Call) -> Any:
        deadline = deadline_of(timeout)
        steps = prepared(call)
        waiting: Wait = ()
        try:
            waiting = next(steps)
            while True:
                step = _Step(waiting, self.engine)
                if not self.endpoint.wait(step, deadline, step.source):
                    self._give_up(waiting)
                    raise self._timed_out(name, timeout, call.number)
                if step.error is not None:
                    self._give_up(waiting)
                    self.raise_error(step.error)
                waiting = steps.send(None)
        except StopIteration as stop:
            return stop.value
        except MPIException:
            self._give_up(waiting)
            raise

    def start(self, prepared: Prepared, call: Call | None = None) -> Collecting:
        """Begin a collective call."""
        with self.endpoint.lock:
            task = Collecting(self, prepared(call or self.new_call()))
            self.endpoint.add_task(task)
        return task

    @property
    def contexts(self) -> list[int]:
        """All contexts in which this communicator's messages travel, but for agreements: these survive that it is revoked."""
        collective = [mix(self.ctx, 1), *self.repeats]
        return [self.ctx, *collective, *(ctx | 1 for ctx in collective)]

    def repeated(self, prepared: Prepared) -> Callable[[], RequestCore]:
        """Begin the same collective call again and again. Each such call has a context of its own, since processes may start
        several of them in different orders."""
        self.calls += 1
        ctx, count = mix(self.ctx, 2, self.calls), 0
        self.repeats.append(ctx)

        def begin() -> RequestCore:
            nonlocal count
            count += 1
            return self.start(prepared, Call(self, ctx, count))

        return begin

    def _give_up(self, waiting: Wait) -> None:
        with self.endpoint.lock:
            for op in waiting:
                if isinstance(op, RecvOp):
                    self.engine.cancel(op)

    def _timed_out(self, name: str, timeout: float | None, number: int) -> RegionTimeout:
        missing = self.endpoint.who_is_missing(self.ctx, number, self.members, _INQUIRY_S)
        return timed_out(name, timeout, sorted(missing))


class Collecting(RequestCore):
    """A collective call that goes on."""

    def __init__(self, core: CommCore, steps: Collective) -> None:
        self.endpoint = core.endpoint
        self._core = core
        self._steps = steps
        self._waiting: Wait = ()
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done

    def advance(self) -> bool:
        """Go on as far as possible; True when it has ended."""
        if self._done:
            return True
        while True:
            for op in self._waiting:
                if op.error is not None:
                    return self._end(op.error)
            if self._core.engine.dead and (error := _loss([op for op in self._waiting if not op.done], self._core.engine)):
                return self._end(error)
            if not all(op.done for op in self._waiting):
                return False
            try:
                self._waiting = self._steps.send(None)
            except StopIteration as stop:
                self._value = stop.value
                return self._end(None)
            except Exception as error:  # a reduction's function may raise anything; it is raised where the result is taken
                return self._end(error)
            except BaseException as error:  # Ctrl-C, say: for whoever is here, and the call will not come to its end any more
                self._end(error)
                raise

    def _end(self, error: BaseException | None) -> bool:
        self._error = error
        self._done = True
        if error is not None:
            self._core._give_up(self._waiting)
            self._steps.close()
        return True

    def result(self, status: Status | None) -> Any:
        if status is not None:
            status.clear()
        if self._error is not None:
            self._core.raise_error(self._error)
        return self._value

    def waits_for(self) -> list[int]:
        ranks = set()
        for op in self._waiting:
            if not op.done:
                ranks.add(op.dest if isinstance(op, SendOp) else op.source)
        return sorted(ranks)


class WorldCore(CommCore):
    """The core of COMM_WORLD and of COMM_SELF: who takes part depends on the region that this process is in.

    It is looked up when it is used first, because most clones never ask (until then it is an `UnknownWorldCore`); in a clone
    `forget` makes it be looked up again. Copies of the object that a program made before the fork
    (`from mpi4py.MPI import COMM_WORLD`) refer to this same core.
    """

    def __init__(self, ctx: int, name: str, *, alone: bool) -> None:
        self._world_context = ctx
        self._world_name = name
        self._alone = alone
        HERE.forgetful.append(self.forget)
        self.__class__ = UnknownWorldCore

    def forget(self) -> None:
        """This process has become another one."""
        kept = ("_world_context", "_world_name", "_alone", "constant", "_number")
        for name in [name for name in self.__dict__ if name not in kept]:
            del self.__dict__[name]
        self.__class__ = UnknownWorldCore


class UnknownWorldCore(WorldCore):
    """One that nobody has used yet in this process. A class of its own, as `__getattr__` makes each use of an attribute slow,
    also of one that is there."""

    def __getattr__(self, name: str) -> Any:
        # Only called for what is not there.
        if name.startswith("__"):
            raise AttributeError(name)
        membership = HERE.membership
        if membership is not None and not self._alone and name in ("rank", "size"):
            # All that most regions ask for; what can send is made when something is sent.
            return membership.rank if name == "rank" else len(membership.addresses)
        endpoint = world_endpoint()
        with endpoint.lock:
            if "endpoint" not in self.__dict__:  # another thread may have been first
                CommCore.__init__(self, endpoint, self._world_context, (endpoint.rank,) if self._alone else range(endpoint.size))
                self.name = self._world_name
                known: Any = self
                known.__class__ = WorldCore
            if name not in self.__dict__:
                raise AttributeError(name)
            return self.__dict__[name]


def world_endpoint() -> Endpoint:
    """The endpoint of this process in its region; outside a region, one that is alone."""
    membership = HERE.membership
    endpoint = HERE.alone if membership is None else membership.endpoint
    if endpoint is not None:
        return endpoint
    with HERE.first_use:
        if membership is None:
            HERE.alone = HERE.alone or Endpoint()
            return HERE.alone
        membership.endpoint = membership.endpoint or Endpoint(membership.rank, membership.addresses, membership.port,
                                                              membership.link)
        return membership.endpoint


