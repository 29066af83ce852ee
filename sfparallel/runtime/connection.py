"""A client of the guest agent: requests to the supervisor, and events from it, over the agent's local socket.

One packet is one msgpack map (sfparallel.wire). In a fork the very same socket, with the very same request pending, exists in
every VM: the parent's and each clone's reply arrive on it in their own VM.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from typing import Any, NoReturn

from sfparallel import wire
from sfparallel.config import Setting
from sfparallel.errors import (
    CapacityError,
    GuestError,
    OutsideVMError,
    ProtocolError,
    RegionTimeout,
    SfError,
    StateError,
    UsageError,
    VMError,
)
from sfparallel.runtime.hypervisor import Answer, Batch, End, Fork, Grant, Hello, Lost, Moment, Sibling
from sfparallel.runtime.wakeup import SignalAlarm

AGENT = Setting("SF_AGENT_SOCKET", wire.AGENT_SOCKET, "the guest agent's socket (for tests)")


def connect() -> Connection:
    """Connect to the agent of this VM.

    Raises:
        OutsideVMError: there is none.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(AGENT.get())
    except OSError:
        sock.close()
        # Everyone's first slip: that a socket is not there would only distract from what to do.
        raise OutsideVMError("this call works only inside a virtual machine of sfparallel",
                             hint="start the program with sfrun, e.g. `sfrun -n 8 script.py`") from None
    return Connection(sock)


def park() -> NoReturn:
    """Never return: for a thread that belongs to the parent and goes on in a clone only because the whole VM was forked."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


class Connection:
    """The real `Hypervisor`. Used by one thread at a time."""

    keeps_threads = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ids = itertools.count(1)
        self._events: list[Lost | Answer] = []

    def hello(self) -> Hello:
        reply = self._request("hello")
        return Hello(role=reply["role"], address=reply["address"], default_n=reply.get("default_n"), seed=reply.get("seed"),
                     job=reply.get("job") or "", answer_bytes=reply.get("answer_bytes") or 0)

    def request_ticket(self, n: int) -> Grant:
        reply = self._request("ticket", n=n)
        return Grant(number=reply["ticket"], granted=reply["granted"])

    def clone(self, ticket: int, clones: int, context: bytes, within_s: float | None = None) -> Fork:
        return _fork(self._request("clone", ticket=ticket, context=context, **_limit(within_s)))

    def checkpoint(self, within_s: float | None = None) -> Moment:
        reply = self._request("checkpoint", **_limit(within_s))
        return Moment(number=reply["checkpoint"], batch=reply["batch"], fork=_fork(reply))

    def create(self, ticket: int, checkpoint: int, first: int = 1, within_s: float | None = None) -> Batch:
        reply = self._request("create", ticket=ticket, checkpoint=checkpoint, first=first, **_limit(within_s))
        return Batch(reply["batch"], _siblings(reply))

    def drop(self, checkpoint: int) -> None:
        self._request("drop", checkpoint=checkpoint)

    def exit(self, status: int, answer: bytes = b"", *, ran_ns: int = 0) -> NoReturn:
        self._post("exit", status=status, ran_ns=ran_ns, **({"answer": answer} if answer else {}))
        # The supervisor discards the VM without an answer. Going on would run the parent's program a second time.
        park()

    def abort(self, status: int, cause: str) -> None:
        self._post("abort", status=status, cause=cause)

    def signal(self, ticket: int, ranks: list[int] | None, number: int) -> None:
        some: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
        self._request("signal", ticket=ticket, number=number, **some)

    def join(self, ticket: int, timeout_s: float | None) -> dict[int, int | None] | None:
        with SignalAlarm() as signals:  # this may take long, and Ctrl-C is to end it
            reply = self._request("join", timeout_s=timeout_s, signals=signals, ticket=ticket)
        return None if reply is None else {int(rank): status for rank, status in reply["status"].items()}

    def kill(self, ticket: int, ranks: list[int] | None) -> None:
        some: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
        self._request("kill", ticket=ticket, **some)

    def report(self, ticket: int, first_s: float, last_s: float) -> None:
        self._post("stats", ticket=ticket, first_s=first_s, last_s=last_s)

    def fileno(self) -> int:
        return self._socket.fileno()

    def events(self) -> list[Lost | Answer]:
        while self._readable(0.0):
            self._receive()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        self._socket.close()

    def _post(self, op: str, **fields: Any) -> None:
        """Send something; it has a reply only if it has an id. (The agent remembers ids, to tell clones that the parent got the
        answer.)"""
        message = wire.pack({"op": op, **fields})
        try:
            self._socket.send(message)
        except OSError as error:
            raise GuestError(f"the guest agent does not take the request {op!r}: {error}") from error

    def _request(self, op: str, *, timeout_s: float | None = None, signals: SignalAlarm | None = None, **fields: Any) -> Any:
        """Send a request and wait for its reply; None only when a time limit was given and ran out."""
        number = next(self._ids)
        self._post(op, id=number, **fields)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if signals is not None or deadline is not None:
                remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._readable(remaining, signals):
                    if remaining == 0.0:
                        return None
                    continue
            message = self._receive()
            if message is not None and message.get("id") == number:
                if "error" in message:
                    raise _error(op, message)
                return message
            # Otherwise the late reply to a request whose caller was interrupted, or had a time limit.

    def _readable(self, timeout_s: float | None, signals: SignalAlarm | None = None) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if signals is not None:
            poll.register(signals, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else timeout_s * 1000)
        if signals is not None:
            signals.reset()
        return any(descriptor == self._socket.fileno() for descriptor, _ in ready)

    def _receive(self) -> dict[str, Any] | None:
        """Take one packet; None when it was an event, which is kept for `events`."""
        try:
            data = self._socket.recv(wire.MAX_MESSAGE_BYTES)
        except OSError as error:
            raise GuestError(f"the connection to the guest agent broke: {error}") from error
        if not data:
            raise GuestError("the guest agent closed the connection")
        message = wire.unpack(data)
        if "event" not in message:
            return message
        if message["event"] == "answer":
            self._events.append(Answer(ticket=message["ticket"], rank=message["rank"], data=message["data"]))
        elif message["event"] == "lost":
            self._events.append(Lost(ticket=message["ticket"], rank=message["rank"], cause=message["cause"],
                                     host=message.get("host") or "", console=message.get("console") or "",
                                     end=End(message.get("end", End.DIED)), status=message.get("status", 0)))
        return None


def _limit(within_s: float | None) -> dict[str, Any]:
    return {} if within_s is None else {"within_s": within_s}


def _fork(reply: dict[str, Any]) -> Fork:
    return Fork(rank=reply["rank"], address=reply.get("address") or "", parent=reply.get("parent") or "", clones=_siblings(reply),
                entropy=reply.get("entropy") or b"")


def _siblings(reply: dict[str, Any]) -> tuple[Sibling, ...]:
    return tuple(Sibling(each["rank"], each["address"], each.get("host") or "") for each in reply["clones"])


def _error(op: str, reply: dict[str, Any]) -> SfError:
    kind, message, hint = reply["error"], reply.get("message") or f"the supervisor refused {op!r}", reply.get("hint")
    match kind:
        case "cancelled":
            # Another thread forked this VM while the caller waited; this is the clone, and here nobody will ever answer.
            park()
        case "capacity":
            return CapacityError(message, fits=reply.get("fits", 0), hint=hint)
        case "state":
            return StateError(message, hint=hint)
        case "invalid":
            return UsageError(message, hint=hint)
        case "timeout":
            return RegionTimeout(message, missing=[], hint=hint)
        case "clone_failed":
            return VMError(message, hint=hint)
        case _:
            return ProtocolError(f"the supervisor answered {op!r} with the unknown error {kind!r}: {message}")
