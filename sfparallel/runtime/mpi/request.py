"""Requests: operations that go on while the program does something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self

from sfparallel.errors import RegionTimeout
from sfparallel.runtime.keywords import bounded
from sfparallel.runtime.mpi.constants import ANY_SOURCE, ANY_TAG, PROC_NULL, UNDEFINED
from sfparallel.runtime.mpi.endpoint import Endpoint
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_REQUEST, MPIException, call_user
from sfparallel.runtime.mpi.handle import Core, Handle, predefined
from sfparallel.runtime.mpi.matching import RecvOp, SendOp
from sfparallel.runtime.mpi.messages import Block
from sfparallel.runtime.mpi.pickling import pickle
from sfparallel.runtime.mpi.status import Status
from sfparallel.text import no_answer


class Owner(Protocol):
    """The communicator of an operation, as far as requests need it."""

    def source_of(self, peer: int) -> int:
        """Rank of a process."""

    def raise_error(self, error: BaseException) -> None:
        """Handle an error as the communicator's error handler says."""


class RequestCore(Core):
    """What goes on.

    Attributes:
        active: it was started, and nobody has taken its result yet.
        persistent: it can be started again.
    """

    endpoint: Endpoint
    persistent = False
    active = True

    @property
    def done(self) -> bool:
        raise NotImplementedError

    def result(self, status: Status | None) -> Any:
        """The outcome of a done operation: fills the status in; returns the object of a lower-case call.

        Raises:
            MPIException: it failed.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Withdraw it, if that is still possible."""

    def waits_for(self) -> list[int]:
        """Ranks of the world without which it is not done."""
        return []


class Finished(RequestCore):
    """Nothing to do: a message to or from PROC_NULL, or something that was done at once."""

    def __init__(self, endpoint: Endpoint, *, source: int = PROC_NULL, tag: int = ANY_TAG, value: Any = None) -> None:
        self.endpoint = endpoint
        self._source, self._tag, self._value = source, tag, value

    @property
    def done(self) -> bool:
        return True

    def result(self, status: Status | None) -> Any:
        if status is not None:
            status.set_all(self._source, self._tag, 0)
        return self._value


class Sending(RequestCore):
    """A send."""

    def __init__(self, endpoint: Endpoint, owner: Owner, op: SendOp) -> None:
        self.endpoint, self.owner, self.op = endpoint, owner, op

    @property
    def done(self) -> bool:
        return self.op.done

    def result(self, status: Status | None) -> Any:
        if self.op.error is not None:
            self.owner.raise_error(self.op.error)
        if status is not None:
            status.clear()

    def waits_for(self) -> list[int]:
        return [] if self.op.done else [self.op.dest]


class FromNobody(Sending):
    """A send, with a receive from PROC_NULL."""

    def result(self, status: Status | None) -> Any:
        super().result(status)
        if status is not None:
            status.set_all(PROC_NULL, ANY_TAG, 0)


class Receiving(RequestCore):
    """A receive, of an object or into a block; with a send if it is both (`Isendrecv`)."""

    def __init__(self, endpoint: Endpoint, owner: Owner, op: RecvOp, block: Block | None, send: SendOp | None = None) -> None:
        self.endpoint, self.owner, self.op, self.block, self.send = endpoint, owner, op, block, send
        self._value: Any = None
        self._taken = False

    @property
    def done(self) -> bool:
        return self.op.done and (self.send is None or self.send.done)

    def result(self, status: Status | None) -> Any:
        op = self.op
        if status is not None:
            if op.cancelled:
                status.set_all(ANY_SOURCE, ANY_TAG, 0, True)
            else:
                status.set_all(self.owner.source_of(op.source), op.tag, op.nbytes)
        error = op.error or (self.send.error if self.send is not None else None)
        if error is not None:
            if status is not None and isinstance(error, MPIException):
                status.Set_error(int(error))
            self.owner.raise_error(error)
        elif not self._taken and not op.cancelled:
            if self.block is None:
                self._value = pickle.object(op.payload, op.flags)
            elif op.buffer is not None:
                self.block.put(op.buffer, op.nbytes)
            self._taken = True  # not before: whoever asks again gets the same error, and not None
        return self._value

    def cancel(self) -> None:
        with self.endpoint.lock:
            if self.endpoint.engine.cancel(self.op):
                self.endpoint.changed()

    def waits_for(self) -> list[int]:
        if not self.op.done:
            return [self.op.source] if self.op.source >= 0 else sorted(set(self.op.members) - {self.endpoint.rank})
        return [] if self.send is None or self.send.done else [self.send.dest]


class Persistent(RequestCore):
    """An operation that can be started many times.

    Args:
        begin: starts it once.
    """

    persistent = True
    active = False

    def __init__(self, endpoint: Endpoint, begin: Callable[[], RequestCore]) -> None:
        self.endpoint = endpoint
        self._begin = begin
        self._running: RequestCore | None = None

    def start(self) -> None:
        if self.active:
            raise MPIException(ERR_REQUEST, "the request is already active")
        self._running = self._begin()
        self.active = True

    @property
    def done(self) -> bool:
        return self._running is None or self._running.done

    def result(self, status: Status | None) -> Any:
        running = self._running
        if running is None:
            if status is not None:
                status.clear()
            return None
        return running.result(status)

    def cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def waits_for(self) -> list[int]:
        return [] if self._running is None else self._running.waits_for()


class _Some:
    """Several requests, of which some number has to be done."""

    def __init__(self, requests: Sequence[Request], enough: Callable[[Any], bool]) -> None:
        self.cores = [request._core for request in requests if request._core is not None and request._core.active]
        self._enough = enough

    @property
    def done(self) -> bool:
        return self._enough(core.done for core in self.cores)


def deadline_of(timeout: float | None) -> float | None:
    """When a time limit ends."""
    return None if timeout is None else time.monotonic() + bounded(timeout)


def timed_out(call: str, timeout: float | None, missing: list[int]) -> RegionTimeout:
    """The error for a call that took too long."""
    return RegionTimeout(f"{call} took longer than {timeout} s{no_answer(missing)}", missing=missing)


class Request(Handle):
    """A request (mpi4py's `MPI.Request`). The calls that wait take `timeout=`, in seconds."""

    _invalid: ClassVar[int] = ERR_REQUEST
    _null_name = "REQUEST_NULL"
    _core: RequestCore | None

    @classmethod
    def _accepts(cls, handle: Handle) -> bool:
        if not isinstance(handle, Request):
            return False
        core = handle._core
        if cls is Request or core is None or not cls._restricted:
            return True
        return isinstance(core, cls._restricted)

    _restricted: ClassVar[tuple[type, ...]] = ()

    @classmethod
    def _family(cls) -> type[Handle]:
        return Request

    def _take(self, status: Status | None) -> Any:
        """The result of a done request, which is over by that."""
        core = self._core
        if core is None or not core.active:
            if status is not None:
                status.clear()
            return None
        if core.persistent:
            core.active = False
        else:
            self._core = None
        return core.result(status)

    def _block(self, call: str, timeout: float | None) -> None:
        core = self._core
        if core is not None and core.active and not core.done and not core.endpoint.wait(core, deadline_of(timeout)):
            raise timed_out(call, timeout, core.waits_for())

    def _is_done(self) -> bool:
        core = self._core
        if core is None or not core.active:
            return True
        core.endpoint.settle(core)
        return core.done

    def wait(self, status: Status | None = None, *, timeout: float | None = None) -> Any:
        """Wait; the object of a lower-case receive."""
        self._block("wait", timeout)
        return self._take(status)

    def test(self, status: Status | None = None) -> tuple[bool, Any]:
        """Whether it is done, and the object."""
        return (True, self._take(status)) if self._is_done() else (False, None)

    def get_status(self, status: Status | None = None) -> bool:
        """Whether it is done; it stays."""
        done = self._is_done()
        if done and status is not None:
            if self._core is None or not self._core.active:
                status.clear()
            else:
                self._core.result(status)
        return done

    def Wait(self, status: Status | None = None, *, timeout: float | None = None) -> Literal[True]:
        Request.wait(self, status, timeout=timeout)
        return True

    def Test(self, status: Status | None = None) -> bool:
        return Request.test(self, status)[0]

    def Get_status(self, status: Status | None = None) -> bool:
        return Request.get_status(self, status)

    @classmethod
    def waitany(cls, requests: Sequence[Request], status: Status | None = None, *,
                timeout: float | None = None) -> tuple[int, Any]:
        """Wait for one of several: its index, and its object."""
        some = _Some(requests, any)
        if not some.cores:
            if status is not None:
                status.clear()
            return UNDEFINED, None
        if not some.cores[0].endpoint.wait(some, deadline_of(timeout)):
            raise timed_out("waitany", timeout, _missing(some))
        index, _, value = cls._first(requests, status)
        return index, value

    @classmethod
    def testany(cls, requests: Sequence[Request], status: Status | None = None) -> tuple[int, bool, Any]:
        """The index of one that is done, whether there is one, and its object."""
        _poll(requests)
        return cls._first(requests, status)

    @classmethod
    def _first(cls, requests: Sequence[Request], status: Status | None) -> tuple[int, bool, Any]:
        pending = False
        for index, request in enumerate(requests):
            core = request._core
            if core is not None and core.active:
                if core.done:
                    return index, True, request._take(status)
                pending = True
        if not pending and status is not None:
            status.clear()
        return UNDEFINED, not pending, None

    @classmethod
    def waitall(cls, requests: Sequence[Request], statuses: Any = None, *, timeout: float | None = None) -> list[Any]:
        """Wait for all: their objects."""
        some = _Some(requests, all)
        if some.cores and not some.cores[0].endpoint.wait(some, deadline_of(timeout)):
            raise timed_out("waitall", timeout, _missing(some))
        return cls._all(requests, statuses)

    @classmethod
    def _all(cls, requests: Sequence[Request], statuses: Any) -> list[Any]:
        values, error = [], None
        filled = _statuses(statuses, len(requests))
        for request, status in zip(requests, filled, strict=True):
            try:
                values.append(request._take(status))
            except MPIException as failure:
                error = error or failure
        if error is not None:
            raise error
        return values

    @classmethod
    def testall(cls, requests: Sequence[Request], statuses: Any = None) -> tuple[bool, list[Any] | None]:
        """Whether all are done, and their objects."""
        _poll(requests)
        return (True, cls._all(requests, statuses)) if _Some(requests, all).done else (False, None)

    @classmethod
    def waitsome(cls, requests: Sequence[Request], statuses: Any = None, *,
                 timeout: float | None = None) -> tuple[list[int] | None, list[Any] | None]:
        """Wait for at least one: the indices of those that are done, and their objects."""
        some = _Some(requests, any)
        if not some.cores:
            return None, None
        if not some.cores[0].endpoint.wait(some, deadline_of(timeout)):
            raise timed_out("waitsome", timeout, _missing(some))
        return cls._done(requests, statuses)

    @classmethod
    def testsome(cls, requests: Sequence[Request], statuses: Any = None) -> tuple[list[int] | None, list[Any] | None]:
        """The indices of those that are done, and their objects."""
        _poll(requests)
        return cls._done(requests, statuses)

    @classmethod
    def _done(cls, requests: Sequence[Request], statuses: Any) -> tuple[list[int] | None, list[Any] | None]:
        if not _Some(requests, any).cores:
            return None, None
        indices = [i for i, each in enumerate(requests) if each._core is not None and each._core.active and each._core.done]
        return indices, cls._all([requests[i] for i in indices], statuses)

    @classmethod
    def get_status_any(cls, requests: Sequence[Request], status: Status | None = None) -> tuple[int, bool]:
        _poll(requests)
        pending = False
        for index, request in enumerate(requests):
            core = request._core
            if core is not None and core.active:
                if core.done:
                    core.result(status)
                    return index, True
                pending = True
        if not pending and status is not None:
            status.clear()
        return UNDEFINED, not pending

    @classmethod
    def get_status_all(cls, requests: Sequence[Request], statuses: Any = None) -> bool:
        _poll(requests)
        done = _Some(requests, all).done
        if done and statuses is not None:
            for request, status in zip(requests, _statuses(statuses, len(requests)), strict=True):
                request.get_status(status)
        return done

    @classmethod
    def get_status_some(cls, requests: Sequence[Request], statuses: Any = None) -> list[int] | None:
        _poll(requests)
        if not _Some(requests, any).cores:
            return None
        indices = [i for i, each in enumerate(requests) if each._core is not None and each._core.active and each._core.done]
        if statuses is not None:
            for i, status in zip(indices, _statuses(statuses, len(indices)), strict=True):
                requests[i].get_status(status)
        return indices

    @classmethod
    def Waitany(cls, requests: Sequence[Request], status: Status | None = None, *, timeout: float | None = None) -> int:
        return Request.waitany(requests, status, timeout=timeout)[0]

    @classmethod
    def Testany(cls, requests: Sequence[Request], status: Status | None = None) -> tuple[int, bool]:
        return Request.testany(requests, status)[:2]

    @classmethod
    def Waitall(cls, requests: Sequence[Request], statuses: Any = None, *, timeout: float | None = None) -> Literal[True]:
        Request.waitall(requests, statuses, timeout=timeout)
        return True

    @classmethod
    def Testall(cls, requests: Sequence[Request], statuses: Any = None) -> bool:
        return Request.testall(requests, statuses)[0]

    @classmethod
    def Waitsome(cls, requests: Sequence[Request], statuses: Any = None, *, timeout: float | None = None) -> list[int] | None:
        return Request.waitsome(requests, statuses, timeout=timeout)[0]

    @classmethod
    def Testsome(cls, requests: Sequence[Request], statuses: Any = None) -> list[int] | None:
        return Request.testsome(requests, statuses)[0]

    Get_status_any = get_status_any
    Get_status_all = get_status_all
    Get_status_some = get_status_some

    def Cancel(self) -> None:
        """Withdraw a receive that is not matched yet. (A send goes on: its status says that it was not cancelled.)"""
        self._live().cancel()

    cancel = Cancel

    def Free(self) -> None:
        """Forget it; what was started goes on."""
        self._live()
        self._core = None


def _missing(some: _Some) -> list[int]:
    return sorted({rank for core in some.cores if not core.done for rank in core.waits_for()})


def _poll(requests: Sequence[Request]) -> None:
    for request in requests:
        if request._core is not None and request._core.active and not request._core.done:
            request._core.endpoint.poll()
            return


def _statuses(statuses: Any, count: int) -> list[Status | None]:
    """As many statuses as there are requests; a list is made longer."""
    if statuses is None:
        return [None] * count
    if isinstance(statuses, list):
        statuses.extend(Status() for _ in range(len(statuses), count))
    return [*statuses[:count], *[None] * max(0, count - len(statuses))]


class Prequest(Request):
    """A persistent request (mpi4py's `MPI.Prequest`)."""

    _restricted = (Persistent,)

    def Start(self) -> None:
        """Start it (again)."""
        core = self._live()
        if not isinstance(core, Persistent):
            raise MPIException(ERR_REQUEST, "not a persistent request")
        core.start()

    @classmethod
    def Startall(cls, requests: list[Prequest]) -> None:
        for request in requests:
            request.Start()

    def Pready(self, partition: int) -> None:
        self._partitioned().ready([partition])

    def Pready_range(self, partition_low: int, partition_high: int) -> None:
        self._partitioned().ready(range(partition_low, partition_high + 1))

    def Pready_list(self, partitions: Sequence[int]) -> None:
        self._partitioned().ready(partitions)

    def Parrived(self, partition: int) -> bool:
        return bool(self._partitioned().arrived(partition))

    def _partitioned(self) -> Any:
        core = self._live()
        if not hasattr(core, "ready"):
            raise MPIException(ERR_REQUEST, "not a partitioned request")
        return core


class Generalized(RequestCore):
    """An operation of the program's own."""

    def __init__(self, endpoint: Endpoint, query_fn: Any, free_fn: Any, cancel_fn: Any, args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        self.endpoint = endpoint
        self._query, self._free, self._cancel, self._args, self._kwargs = query_fn, free_fn, cancel_fn, args, kwargs
        self._done = False
        self._freed = False
        self.value: Any = None

    @property
    def done(self) -> bool:
        return self._done

    def result(self, status: Status | None) -> Any:
        filled = Status() if status is None else status
        filled.clear()
        filled.Set_source(ANY_SOURCE)
        if self._query is not None:
            call_user(self._query, filled, *self._args, **self._kwargs)
        return self.value

    def release(self) -> None:
        """The request is freed."""
        if not self._freed:
            self._freed = True
            if self._free is not None:
                call_user(self._free, *self._args, **self._kwargs)

    def cancel(self) -> None:
        if self._cancel is not None:
            call_user(self._cancel, self._done, *self._args, **self._kwargs)

    def complete(self, value: Any) -> None:
        with self.endpoint.lock:
            self.value = value
            self._done = True
            self.endpoint.changed()


class Grequest(Request):
    """A generalized request (mpi4py's `MPI.Grequest`)."""

    _restricted = (Generalized,)

    @classmethod
    def Start(cls, query_fn: Callable[..., None] | None = None, free_fn: Callable[..., None] | None = None,
              cancel_fn: Callable[..., None] | None = None, args: tuple[Any, ...] | None = None,
              kwargs: dict[str, Any] | None = None) -> Self:
        """Create one; it is done when `Complete` is called."""
        from sfparallel.runtime.mpi.comm import COMM_SELF
        return cls._of(Generalized(COMM_SELF._live().endpoint, query_fn, free_fn, cancel_fn, args or (), kwargs or {}))

    def Complete(self) -> None:
        self.complete(None)

    def complete(self, obj: Any = None) -> None:
        """It is done, and `obj` is its object."""
        core = self._live()
        if not isinstance(core, Generalized) or core.done:
            raise MPIException(ERR_ARG, "not an active generalized request")
        core.complete(obj)

    def _take(self, status: Status | None) -> Any:
        core = self._core
        value = super()._take(status)
        if isinstance(core, Generalized):
            core.release()
        return value

    def Free(self) -> None:
        core = self._live()
        super().Free()
        if isinstance(core, Generalized):
            core.release()


REQUEST_NULL: Request = predefined(Request(), "REQUEST_NULL")
