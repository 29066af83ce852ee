"""What is under way in an engine (`matching`): sends, receives, and messages that nobody has received yet."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Buffer = bytes | bytearray | memoryview

SYNC = 1
"""Flag: the sender waits until the message is matched (ACK)."""


class SendOp:
    """One send.

    Attributes:
        done: it is complete, or has failed (`error`).
    """

    # In the class, not set by each object: one is made for every message.
    awaits_ack = False
    awaits_wire = True
    done = False
    error: BaseException | None = None
    members: Collection[int] = ()
    collective = False

    def __init__(self, dest: int, ctx: int, tag: int, frames: Sequence[Buffer], nbytes: int, flags: int) -> None:
        self.dest = dest
        self.ctx = ctx
        self.tag = tag
        self.frames = frames
        self.nbytes = nbytes
        self.flags = flags
        if flags & SYNC:
            self.awaits_ack = True

    def on_the_way(self) -> None:
        self.awaits_wire = False
        self.frames = ()
        if not self.awaits_ack:
            self.done = True

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self.frames = ()
            self.error = error
            self.done = True


class RecvOp:
    """One receive.

    Attributes:
        source: of whom; once it is matched, of whom exactly. The same for `tag`.
        buffer: where it shall go, or None: then it comes as `payload`.
        nbytes: length of the message, once it is matched.
        done: it is complete, was cancelled, or has failed (`error`).
    """

    payload: Buffer = b""
    nbytes = 0
    flags = 0
    matched = False
    done = False
    cancelled = False
    error: BaseException | None = None
    members: Collection[int] = ()
    collective = False

    def __init__(self, ctx: int, source: int, tag: int, buffer: memoryview | None) -> None:
        self.ctx = ctx
        self.source = source
        self.tag = tag
        self.buffer = buffer

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self.error = error
            self.done = True


class Arrival:
    """A message that nobody has received yet.

    Attributes:
        payload: None as long as only its announcement is here.
        pulled: the announced message is on its way into `payload`.
        op: the receive that has taken it, while it is being pulled.
    """

    __slots__ = ("flags", "nbytes", "number", "op", "payload", "peer", "pulled", "tag")

    def __init__(self, peer: int, tag: int, flags: int, number: int, nbytes: int, payload: Buffer | None) -> None:
        self.peer = peer
        self.tag = tag
        self.flags = flags
        self.number = number
        self.nbytes = nbytes
        self.payload = payload
        self.pulled = False
        self.op: RecvOp | None = None
