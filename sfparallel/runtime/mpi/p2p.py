"""Point-to-point calls of communicators: of objects in lower case, of buffers in upper case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

from sfparallel.runtime.mpi.constants import ANY_SOURCE, ANY_TAG, PROC_NULL, TAG_LIMIT
from sfparallel.runtime.mpi.core import CommCore
from sfparallel.runtime.mpi.errors import CODES, ERR_RANK, ERR_TAG, MPIException
from sfparallel.runtime.mpi.handle import Core, Handle, predefined
from sfparallel.runtime.mpi.matching import PARTS, SYNC, Arrival, RecvOp, SendOp
from sfparallel.runtime.mpi.messages import EMPTY, Block, simple
from sfparallel.runtime.mpi.pickling import Payload, pickle
from sfparallel.runtime.mpi.request import (
    Finished,
    FromNobody,
    Persistent,
    Prequest,
    Receiving,
    Request,
    RequestCore,
    Sending,
    deadline_of,
    timed_out,
)
from sfparallel.runtime.mpi.status import Status


def frames(block: Block) -> Payload:
    data = block.read()
    return 0, [data.data] if len(data) else [], len(data)


def _owned(payload: Payload) -> Payload:
    """The same, in memory of its own."""
    flags, frames, nbytes = payload
    return flags, [b"".join(frames)], nbytes


def _pickled(obj: Any) -> Payload:
    """An object that may change before it is sent: only buffers that are left out of the pickle are not copied yet."""
    payload = pickle.payload(obj)
    return _owned(payload) if payload[0] & PARTS else payload


class _Probe:
    """Waits for a message without receiving it."""

    def __init__(self, core: CommCore, source: int, tag: int) -> None:
        self._core, self._source, self._tag = core, source, int(tag)
        self.arrival: Arrival | None = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        core = self._core
        self.arrival = core.engine.probe(core.ctx, self._source, self._tag)
        if self.arrival is None:
            self.error = core.engine.why_blocked(core.ctx, self._source, core.sources - core.acknowledged)
        return self.arrival is not None or self.error is not None


class PointToPoint:
    """Sends and receives. The calls that wait take `timeout=`, in seconds."""

    _core: CommCore

    def _live(self) -> Any:
        raise NotImplementedError

    # What the calls are made of

    def _to(self, dest: int, tag: int) -> int:
        """The process of a destination; PROC_NULL if there is none."""
        core: Any = self._core
        if core is None or core.revoked:
            core = self._live()
        peers: Sequence[int] = core.peers
        if 0 <= dest < len(peers):
            if not 0 <= tag <= TAG_LIMIT:
                core.raise_error(MPIException(ERR_TAG, f"{tag}"))
            try:
                return peers[dest]
            except TypeError:
                return peers[int(dest)]
        if dest != PROC_NULL:
            core.raise_error(MPIException(ERR_RANK, f"{dest} of {len(core.peers)}"))
        return PROC_NULL

    def _from(self, source: int, tag: int) -> int:
        core: Any = self._core
        if core is None or core.revoked:
            core = self._live()
        if tag != ANY_TAG and not 0 <= tag <= TAG_LIMIT:
            core.raise_error(MPIException(ERR_TAG, f"{tag}"))
        peers: Sequence[int] = core.peers
        if 0 <= source < len(peers):
            try:
                return peers[source]
            except TypeError:
                return peers[int(source)]
        if source not in (ANY_SOURCE, PROC_NULL):
            core.raise_error(MPIException(ERR_RANK, f"{source} of {len(core.peers)}"))
        return source

    def _post_send(self, peer: int, tag: int, payload: Payload, flags: int = 0) -> SendOp:
        core = self._core
        if type(tag) is not int:
            tag = int(tag)  # floats are cut, as for mpi4py; so for the calls below
        with core.endpoint.lock:
            op = core.engine.send(peer, core.ctx, tag, payload[1], payload[2], payload[0] | flags)
            if peer == core.endpoint.rank:
                core.endpoint.changed()
        return op

    def _post_recv(self, peer: int, tag: int, place: memoryview | None) -> RecvOp:
        core = self._core
        if type(tag) is not int:
            tag = int(tag)
        with core.endpoint.lock:
            op = core.engine.recv(core.ctx, peer, tag, place, core.sources - core.acknowledged if peer < 0 else ())
            if op.done:
                core.endpoint.changed()  # perhaps another thread's synchronous send to this process
        return op

    def _finish_send(self, op: SendOp, call: str, timeout: float | None) -> None:
        core = self._core
        if not op.done:
            endpoint = core.endpoint
            with endpoint.lock:
                # Two ranks that send each other something large before they receive must not wait for each other.
                endpoint.engine.blocked_in_send += 1
                endpoint.engine.pull()
            try:
                if not endpoint.wait(op, deadline_of(timeout)):
                    raise timed_out(call, timeout, [op.dest])
            finally:
                with endpoint.lock:
                    endpoint.engine.blocked_in_send -= 1
        if op.error is not None:
            core.raise_error(op.error)

    def _finish_recv(self, op: RecvOp, call: str, timeout: float | None, status: Status | None) -> None:
        core, endpoint = self._core, self._core.endpoint
        try:
            in_time = op.done or endpoint.wait(op, None if timeout is None else deadline_of(timeout), op.source)
        except BaseException:  # a signal's handler has raised: nobody waits for the message any more
            with endpoint.lock:
                core.engine.withdraw(op)
            raise
        if not in_time:
            with endpoint.lock:
                withdrawn = core.engine.withdraw(op)
            if withdrawn:
                raise timed_out(call, timeout, [op.source] if op.source >= 0 else sorted(core.sources - {endpoint.rank}))
            endpoint.wait(op)  # it is coming in, into its buffer
        if status is not None:
            status.set_all(core.source_of(op.source), op.tag, op.nbytes)
        if op.error is not None:
            core.raise_error(op.error)

    def _send(self, payload: Payload, dest: int, tag: int, call: str, timeout: float | None, flags: int = 0) -> None:
        peer = self._to(dest, tag)
        if peer != PROC_NULL:
            self._finish_send(self._post_send(peer, tag, payload, flags), call, timeout)

    def _isend(self, payload: Payload, dest: int, tag: int, flags: int = 0) -> RequestCore:
        peer = self._to(dest, tag)
        endpoint = self._core.endpoint
        if peer == PROC_NULL:
            return Finished(endpoint)
        return Sending(endpoint, self._core, self._post_send(peer, tag, payload, flags))

    def _irecv(self, source: int, tag: int, block: Block | None, send: SendOp | None = None) -> RequestCore:
        peer = self._from(source, tag)
        if peer == PROC_NULL:
            return Finished(self._core.endpoint)
        op = self._post_recv(peer, tag, None if block is None else block.place())
        return Receiving(self._core.endpoint, self._core, op, block, send)

    # Objects

    def send(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> None:
        """Send an object."""
        peer = self._to(dest, tag)
        if peer == PROC_NULL:
            return
        # What `_send` does, for most messages without more calls.
        if type(tag) is not int:
            tag = int(tag)
        flags, frames, nbytes = pickle.payload(obj)
        core = self._core
        endpoint = core.endpoint
        with endpoint.lock:
            op = core.engine.send(peer, core.ctx, tag, frames, nbytes, flags)
            if peer == endpoint.rank:
                endpoint.changed()
        if not op.done or op.error is not None:
            self._finish_send(op, "send", timeout)

    def ssend(self, obj: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> None:
        """Send an object; returns when its receive has begun."""
        self._send(pickle.payload(obj), dest, tag, "ssend", timeout, SYNC)

    def bsend(self, obj: Any, dest: int, tag: int = 0) -> None:
        """Send a copy of an object; does not wait."""
        self._isend(_owned(pickle.payload(obj)), dest, tag)

    def isend(self, obj: Any, dest: int, tag: int = 0) -> Request:
        """Begin to send an object as it is now."""
        return Request._of(self._isend(_pickled(obj), dest, tag))

    def issend(self, obj: Any, dest: int, tag: int = 0) -> Request:
        return Request._of(self._isend(_pickled(obj), dest, tag, SYNC))

    def ibsend(self, obj: Any, dest: int, tag: int = 0) -> Request:
        self._isend(_owned(pickle.payload(obj)), dest, tag)
        return Request._of(Finished(self._core.endpoint, source=ANY_SOURCE))

    def recv(self, buf: Any = None, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None, *,
             timeout: float | None = None) -> Any:
        """Receive an object. `buf` is not needed and not used."""
        if buf is not None:
            warnings.warn("the buffer argument of recv is not used", UserWarning, stacklevel=2)
        peer = self._from(source, tag)
        if peer == PROC_NULL:
            if status is not None:
                status.set_all(PROC_NULL, ANY_TAG, 0)
            return None
        op = self._post_recv(peer, tag, None)
        if not op.done or status is not None or op.error is not None:
            self._finish_recv(op, "recv", timeout, status)
        return pickle.object(op.payload, op.flags)

    def irecv(self, buf: Any = None, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        """Receive an object, of any size; `wait` returns it."""
        return Request._of(self._irecv(source, tag, None))

    def sendrecv(self, sendobj: Any, dest: int, sendtag: int = 0, recvbuf: Any = None, source: int = ANY_SOURCE,
                 recvtag: int = ANY_TAG, status: Status | None = None, *, timeout: float | None = None) -> Any:
        """Send an object and receive one."""
        payload = pickle.payload(sendobj)
        send = self._isend(payload, dest, sendtag)
        value = self.recv(None, source, recvtag, status, timeout=timeout)
        if isinstance(send, Sending):
            self._finish_send(send.op, "sendrecv", timeout)
        return value

    # Buffers

    def Send(self, buf: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> None:
        self._send(frames(simple(buf, readonly=True, peer=dest)), dest, tag, "Send", timeout)

    def Ssend(self, buf: Any, dest: int, tag: int = 0, *, timeout: float | None = None) -> None:
        self._send(frames(simple(buf, readonly=True, peer=dest)), dest, tag, "Ssend", timeout, SYNC)

    Rsend = Send

    def Bsend(self, buf: Any, dest: int, tag: int = 0) -> None:
        self._isend(_owned(frames(simple(buf, readonly=True, peer=dest))), dest, tag)

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        return Request._of(self._isend(frames(simple(buf, readonly=True, peer=dest)), dest, tag))

    Irsend = Isend

    def Issend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        return Request._of(self._isend(frames(simple(buf, readonly=True, peer=dest)), dest, tag, SYNC))

    def Ibsend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        self.Bsend(buf, dest, tag)
        return Request._of(Finished(self._core.endpoint, source=ANY_SOURCE))

    def Recv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None, *,
             timeout: float | None = None) -> None:
        block = simple(buf, readonly=False, peer=source)
        peer = self._from(source, tag)
        if peer == PROC_NULL:
            if status is not None:
                status.set_all(PROC_NULL, ANY_TAG, 0)
            return
        place = block.place()
        op = self._post_recv(peer, tag, place)
        self._finish_recv(op, "Recv", timeout, status)
        if not block.core.is_contiguous:
            block.put(place, op.nbytes)

    def Irecv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        return Request._of(self._irecv(source, tag, simple(buf, readonly=False, peer=source)))

    def Sendrecv(self, sendbuf: Any, dest: int, sendtag: int = 0, recvbuf: Any = None, source: int = ANY_SOURCE,
                 recvtag: int = ANY_TAG, status: Status | None = None, *, timeout: float | None = None) -> None:
        self.Isendrecv(sendbuf, dest, sendtag, recvbuf, source, recvtag).Wait(status, timeout=timeout)

    def Isendrecv(self, sendbuf: Any, dest: int, sendtag: int = 0, recvbuf: Any = None, source: int = ANY_SOURCE,
                  recvtag: int = ANY_TAG) -> Request:
        payload = frames(simple(sendbuf, readonly=True, peer=dest))
        block = simple(recvbuf, readonly=False, peer=source)
        return self._both(payload, dest, sendtag, block, source, recvtag)

    def _both(self, payload: Payload, dest: int, sendtag: int, block: Block, source: int, recvtag: int) -> Request:
        self._from(source, recvtag)
        send = self._isend(payload, dest, sendtag)
        receive = self._irecv(source, recvtag, block, send.op if isinstance(send, Sending) else None)
        if isinstance(receive, Finished) and isinstance(send, Sending):
            return Request._of(FromNobody(send.endpoint, send.owner, send.op))
        return Request._of(receive)

    def Sendrecv_replace(self, buf: Any, dest: int, sendtag: int = 0, source: int = ANY_SOURCE, recvtag: int = ANY_TAG,
                         status: Status | None = None, *, timeout: float | None = None) -> None:
        self.Isendrecv_replace(buf, dest, sendtag, source, recvtag).Wait(status, timeout=timeout)

    def Isendrecv_replace(self, buf: Any, dest: int, sendtag: int = 0, source: int = ANY_SOURCE,
                          recvtag: int = ANY_TAG) -> Request:
        peer = PROC_NULL if dest == source == PROC_NULL else 0
        block = simple(buf, readonly=False, peer=peer)
        payload = (0, [], 0) if dest == PROC_NULL else _owned(frames(block))
        return self._both(payload, dest, sendtag, block if source != PROC_NULL else EMPTY, source, recvtag)

    # Persistent requests

    def _repeat(self, begin: Callable[[], RequestCore]) -> Prequest:
        return Prequest._of(Persistent(self._live().endpoint, begin))

    def Send_init(self, buf: Any, dest: int, tag: int = 0) -> Prequest:
        block = simple(buf, readonly=True, peer=dest)
        self._to(dest, tag)
        return self._repeat(lambda: self._isend(frames(block), dest, tag))

    Rsend_init = Send_init

    def Ssend_init(self, buf: Any, dest: int, tag: int = 0) -> Prequest:
        block = simple(buf, readonly=True, peer=dest)
        self._to(dest, tag)
        return self._repeat(lambda: self._isend(frames(block), dest, tag, SYNC))

    def Bsend_init(self, buf: Any, dest: int, tag: int = 0) -> Prequest:
        block = simple(buf, readonly=True, peer=dest)
        self._to(dest, tag)
        return self._repeat(lambda: self._isend(_owned(frames(block)), dest, tag))

    def Recv_init(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Prequest:
        block = simple(buf, readonly=False, peer=source)
        self._from(source, tag)
        return self._repeat(lambda: self._irecv(source, tag, block))

    # Probing

    def _look(self, source: int, tag: int) -> tuple[bool, Arrival | None]:
        """Whether there is a message (also of nobody), and which."""
        peer = self._from(source, tag)
        if peer == PROC_NULL:
            return True, None
        core = self._core
        probe = _Probe(core, peer, tag)
        with core.endpoint.lock:
            found = probe.done
        if not found:
            core.endpoint.poll()  # not with the lock: it may wait a little
            with core.endpoint.lock:
                probe.done  # noqa: B018
        if probe.error is not None:
            core.raise_error(probe.error)
        return probe.arrival is not None, probe.arrival

    def _wait_for(self, source: int, tag: int, call: str, timeout: float | None, deadline: float | None) -> Arrival | None:
        peer = self._from(source, tag)
        if peer == PROC_NULL:
            return None
        core = self._core
        probe = _Probe(core, peer, tag)
        if not core.endpoint.wait(probe, deadline):
            raise timed_out(call, timeout, [peer] if peer >= 0 else sorted(core.sources - {core.endpoint.rank}))
        if probe.error is not None:
            core.raise_error(probe.error)
        return probe.arrival

    def _describe(self, arrival: Arrival | None, status: Status | None) -> None:
        if status is not None:
            if arrival is None:
                status.set_all(PROC_NULL, ANY_TAG, 0)
            else:
                status.set_all(self._core.source_of(arrival.peer), arrival.tag, arrival.nbytes)

    def Probe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None, *,
              timeout: float | None = None) -> Literal[True]:
        """Wait for a message without receiving it."""
        self._describe(self._wait_for(source, tag, "Probe", timeout, deadline_of(timeout)), status)
        return True

    def Iprobe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None) -> bool:
        """Whether there is a message."""
        found, arrival = self._look(source, tag)
        if found:
            self._describe(arrival, status)
        return found

    def Mprobe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None, *,
               timeout: float | None = None) -> Message:
        """Wait for a message and take it out, to be received later."""
        core = self._live()
        deadline = deadline_of(timeout)
        while True:
            # Without the lock: other threads go on, and may take the message first.
            arrival = self._wait_for(source, tag, "Mprobe", timeout, deadline)
            with core.endpoint.lock:
                if arrival is None or core.engine.holds(core.ctx, arrival):
                    self._describe(arrival, status)
                    return self._extracted(arrival)

    def Improbe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None) -> Message | None:
        """The same without waiting: None if there is no message."""
        core = self._live()
        while True:
            found, arrival = self._look(source, tag)
            if not found:
                return None
            with core.endpoint.lock:
                if arrival is None or core.engine.holds(core.ctx, arrival):  # no other thread was faster
                    self._describe(arrival, status)
                    return self._extracted(arrival)

    def _extracted(self, arrival: Arrival | None) -> Message:
        if arrival is None:
            return Message(MESSAGE_NO_PROC)
        core = self._core
        core.engine.extract(core.ctx, arrival)
        return Message._of(MessageCore(core, arrival))

    probe, iprobe, mprobe, improbe = Probe, Iprobe, Mprobe, Improbe


class MessageCore(Core):
    """A message that was taken out by a matched probe."""

    def __init__(self, comm: CommCore | None, arrival: Arrival | None) -> None:
        self.comm = comm
        self.arrival = arrival


class Message(Handle):
    """A matched message (mpi4py's `MPI.Message`)."""

    _invalid: ClassVar[int] = CODES["ERR_REQUEST"]
    _null_name = "MESSAGE_NULL"
    _core: MessageCore | None

    @classmethod
    def Probe(cls, comm: PointToPoint, source: int = ANY_SOURCE, tag: int = ANY_TAG, status: Status | None = None) -> Self:
        return cls(comm.Mprobe(source, tag, status))

    @classmethod
    def Iprobe(cls, comm: PointToPoint, source: int = ANY_SOURCE, tag: int = ANY_TAG,
               status: Status | None = None) -> Self | None:
        message = comm.Improbe(source, tag, status)
        return None if message is None else cls(message)

    probe, iprobe = Probe, Iprobe

    def _start(self, block: Block | None) -> RequestCore:
        core = self._live()
        if core.comm is None:
            from sfparallel.runtime.mpi.core import world_endpoint
            return Finished(world_endpoint())
        self._core = None
        endpoint = core.comm.endpoint
        with endpoint.lock:
            op = endpoint.engine.recv_extracted(core.comm.ctx, core.arrival, None if block is None else block.place())
            if op.done:
                endpoint.changed()
        return Receiving(endpoint, core.comm, op, block)

    def _wait(self, block: Block | None, status: Status | None) -> Any:
        no_message = self._core is MESSAGE_NO_PROC._core
        request = Request._of(self._start(block))
        if no_message and not self._is_constant:
            self._core = None
        return request.wait(status)

    def Recv(self, buf: Any, status: Status | None = None) -> None:
        """Receive it."""
        self._wait(EMPTY if self._core is MESSAGE_NO_PROC._core else simple(buf, readonly=False), status)

    def Irecv(self, buf: Any) -> Request:
        return self._begun(EMPTY if self._core is MESSAGE_NO_PROC._core else simple(buf, readonly=False))

    def recv(self, status: Status | None = None) -> Any:
        """Receive it as an object."""
        return self._wait(None, status)

    def irecv(self) -> Request:
        return self._begun(None)

    def _begun(self, block: Block | None) -> Request:
        no_message = self._core is MESSAGE_NO_PROC._core
        request = Request._of(self._start(block))
        if no_message and not self._is_constant:
            self._core = None
        return request


MESSAGE_NULL: Message = predefined(Message(), "MESSAGE_NULL")
MESSAGE_NO_PROC: Message = predefined(Message._of(MessageCore(None, None)), "MESSAGE_NO_PROC")

