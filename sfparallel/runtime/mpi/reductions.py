"""Reductions, as generators (see `collectives`). Values are combined in the order of the ranks: operations need not commute.

A `Codec` says how values travel and combine: Python objects and memory of a datatype are reduced by the same algorithms.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from sfparallel.runtime.mpi.buffers import Bytes
from sfparallel.runtime.mpi.collectives import LARGE_BYTES, Channel, Collective, raw, scatter
from sfparallel.runtime.mpi.datatype import TypeCore
from sfparallel.runtime.mpi.errors import mismatch
from sfparallel.runtime.mpi.matching import RecvOp, SendOp
from sfparallel.runtime.mpi.op import OpCore
from sfparallel.runtime.mpi.pickling import Payload, pickle


class Codec(Protocol):
    """What is reduced, and how.

    Attributes:
        commutes: values may be combined in any order.
    """

    commutes: bool

    def encode(self, value: Any) -> Payload:
        """A value as bytes, which stay as they are until the value is combined."""

    def decode(self, op: RecvOp) -> Any:
        """The value that was received."""

    def combine(self, left: Any, right: Any) -> Any:
        """left op right; both may be used up."""

    def own(self, value: Any) -> Any:
        """A value that may be used up while the given one stays."""


class Objects:
    """Python objects.

    Args:
        op: of two objects.
        pure: whether it leaves its operands as they are. (A function of the program's may change them in place.)
    """

    commutes = False
    """Even SUM does not commute on all objects (lists, strings)."""

    def __init__(self, op: Any, *, pure: bool) -> None:
        self._op = op
        self._pure = pure

    def encode(self, value: Any) -> Payload:
        return pickle.payload(value)

    def decode(self, op: RecvOp) -> Any:
        return pickle.object(op.payload, op.flags)

    def combine(self, left: Any, right: Any) -> Any:
        return self._op(left, right)

    def own(self, value: Any) -> Any:
        if self._pure:
            return value
        flags, frames, _ = pickle.payload(value)
        return pickle.object(b"".join(frames), flags)


class Memory:
    """Packed memory of a datatype."""

    def __init__(self, op: OpCore, core: TypeCore) -> None:
        self._op = op
        self._core = core
        self.commutes = op.commutative

    def encode(self, value: Bytes) -> Payload:
        return raw(value)

    def decode(self, op: RecvOp) -> Bytes:
        return np.frombuffer(op.payload, np.uint8) if op.nbytes else np.empty(0, np.uint8)

    def combine(self, left: Bytes, right: Bytes) -> Bytes:
        # numpy would repeat a single element for all others.
        if len(left) != len(right):
            raise mismatch(len(left), len(right), "another rank")
        return self._op.combine(self._core, left, right)

    def own(self, value: Bytes) -> Bytes:
        return value.copy()


def reduce(ch: Channel, value: Any, codec: Codec, root: int) -> Collective:
    """All values combined, at the root; None elsewhere. A binomial tree."""
    n = ch.size
    top = root if codec.commutes else 0
    relative = (ch.me - top) % n
    step = 1
    while step < n and not relative & step:
        if relative + step < n:
            op = ch.recv((relative + step + top) % n)
            yield [op]
            value = codec.combine(value, codec.decode(op))
        step *= 2
    if relative:
        yield [ch.send((relative - step + top) % n, codec.encode(value))]
    if top == root:
        return None if relative else value
    # Rank 0 combined in order, but another one wants it.
    if ch.me == 0:
        yield [ch.send(root, codec.encode(value))]
    if ch.me != root:
        return None
    op = ch.recv(0)
    yield [op]
    return codec.decode(op)


def allreduce(ch: Channel, value: Any, codec: Codec) -> Collective:
    """All values combined, at all ranks: recursive doubling."""
    n = ch.size
    half = 1 << (n.bit_length() - 1)
    extra = n - half
    # The first ranks pair up, so that a power of two is left.
    if ch.me < 2 * extra:
        if ch.me % 2 == 0:
            yield [ch.send(ch.me + 1, codec.encode(value))]
            op = ch.recv(ch.me + 1)
            yield [op]
            return codec.decode(op)
        op = ch.recv(ch.me - 1)
        yield [op]
        value = codec.combine(codec.decode(op), value)
    mine = ch.me // 2 if ch.me < 2 * extra else ch.me - extra
    step = 1
    while step < half:
        other = mine ^ step
        rank = 2 * other + 1 if other < extra else other + extra
        op = ch.recv(rank)
        yield [op, ch.send(rank, codec.encode(value))]
        theirs = codec.decode(op)
        value = codec.combine(theirs, value) if other < mine else codec.combine(value, theirs)
        step *= 2
    if ch.me < 2 * extra:
        yield [ch.send(ch.me - 1, codec.encode(value))]
    return value


def allreduce_large(ch: Channel, value: Bytes, codec: Codec, item: int) -> Collective:
    """The same for much memory and operations that commute: each rank reduces its part, and a ring brings the parts to all.

    Args:
        item: bytes of an element.
    """
    n = ch.size
    count = len(value) // item
    cuts = [count * i // n * item for i in range(n + 1)]
    parts = [value[cuts[i]:cuts[i + 1]] for i in range(n)]
    left, right = (ch.me - 1) % n, (ch.me + 1) % n
    for k in range(n - 1):
        op = ch.recv(left)
        yield [ch.send(right, raw(parts[(ch.me - k) % n])), op]
        index = (ch.me - k - 1) % n
        parts[index][...] = codec.combine(parts[index], codec.decode(op))
    mine = (ch.me + 1) % n
    for k in range(n - 1):
        theirs = parts[(mine - k - 1) % n]
        yield [ch.send(right, raw(parts[(mine - k) % n])), ch.recv(left, theirs.data if len(theirs) else None)]
    return value


def allreduce_memory(ch: Channel, value: Bytes, codec: Memory, item: int) -> Collective:
    """`allreduce` or `allreduce_large`, whichever is faster."""
    if codec.commutes and len(value) >= LARGE_BYTES and ch.size > 2 and len(value) // item >= ch.size:
        return (yield from allreduce_large(ch, value, codec, item))
    return (yield from allreduce(ch, value, codec))


def scan(ch: Channel, value: Any, codec: Codec, *, exclusive: bool) -> Collective:
    """The values of all ranks up to this one, combined; without its own if `exclusive` (None at rank 0). log n rounds."""
    result, has_result = (None, False) if exclusive else (codec.own(value), True)
    partial = value
    step = 1
    while step < ch.size:
        pending: list[SendOp | RecvOp] = []
        if ch.me + step < ch.size:
            pending.append(ch.send(ch.me + step, codec.encode(partial)))
        op = ch.recv(ch.me - step) if ch.me >= step else None
        yield [*pending, op] if op is not None else pending
        if op is not None:
            # Decoded twice: to combine may use a value up.
            result = codec.combine(codec.decode(op), result) if has_result else codec.decode(op)
            has_result = True
            partial = codec.combine(codec.decode(op), codec.own(partial))
        step *= 2
    return result


def reduce_scatter(ch: Channel, value: Bytes, codec: Memory, cuts: list[int]) -> Collective:
    """All values combined, of which each rank gets its part.

    Args:
        cuts: where the parts begin and end, in bytes.
    """
    n = ch.size
    if codec.commutes and len(value) >= LARGE_BYTES:
        parts = [value[cuts[i]:cuts[i + 1]] for i in range(n)]
        receives = [ch.recv((ch.me - k) % n) for k in range(1, n)]
        yield [*receives, *(ch.send((ch.me + k) % n, raw(parts[(ch.me + k) % n])) for k in range(1, n))]
        result = parts[ch.me]
        for op in receives:
            result = codec.combine(codec.decode(op), result)
        return result
    whole = yield from reduce(ch, value, codec, 0)
    payloads = [raw(whole[cuts[i]:cuts[i + 1]]) for i in range(n)] if ch.me == 0 else None
    record = yield from scatter(ch, payloads, 0)
    return np.frombuffer(record.view, np.uint8) if record.nbytes else np.empty(0, np.uint8)


