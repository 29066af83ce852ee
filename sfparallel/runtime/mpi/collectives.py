"""Collective algorithms, as generators: each yields the operations it has to wait for, and returns its result.

So one description serves blocking calls, non-blocking ones and persistent requests. Payloads are bytes: what they mean is the
caller's business. The algorithms and when each of them is good: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective
Communication Operations in MPICH", IJHPCA 19(1), 2005.

Payloads of different lengths, which only their senders know, travel in bundles along a tree. A long one stays out of the bundle,
which then only says how long it is, and goes straight to where it is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Generator, Sequence
from typing import Any

import numpy as np

from sfparallel.runtime.mpi.endpoint import Endpoint
from sfparallel.runtime.mpi.errors import ERR_UNKNOWN, MPIException, mismatch
from sfparallel.runtime.mpi.matching import Buffer, RecvOp, SendOp
from sfparallel.runtime.mpi.pickling import Payload

Wait = Sequence[SendOp | RecvOp]
Collective = Generator[Wait, None, Any]

DIRECT_BYTES = 16 << 10
"""Longer payloads do not travel in bundles."""

LARGE_BYTES = 256 << 10
"""From here on, bandwidth counts more than the number of messages."""

_COUNT = struct.Struct("<Q")
_RECORD = struct.Struct("<IIQ")
_ALIGN = 64
_DIRECT = 1 << 16
_LARGE = 1 << 7


class Channel:
    """The ranks of one collective call.

    Args:
        endpoint: of this process.
        ctx, tag: what tells this call's messages from all others.
        ranks: the processes, in the order of the ranks.
        me: this process's rank among them; -1 if it is not one of them.
        members: whose loss fails the call.
    """

    __slots__ = ("ctx", "endpoint", "engine", "me", "members", "ranks", "size", "tag")

    def __init__(self, endpoint: Endpoint, ctx: int, tag: int, ranks: Sequence[int], me: int, members: Collection[int]) -> None:
        self.endpoint = endpoint
        self.engine = endpoint.engine
        self.ctx = ctx
        self.tag = tag
        self.ranks = ranks
        self.me = me
        self.size = len(ranks)
        self.members = members

    def send(self, rank: int, payload: Payload) -> SendOp:
        flags, frames, nbytes = payload
        with self.endpoint.lock:
            return self.engine.send(self.ranks[rank], self.ctx, self.tag, frames, nbytes, flags, self.members, True)

    def recv(self, rank: int, place: memoryview | None = None) -> RecvOp:
        with self.endpoint.lock:
            return self.engine.recv(self.ctx, self.ranks[rank], self.tag, place, self.members, True)


def raw(data: Any) -> Payload:
    """A payload of plain bytes."""
    view = memoryview(data)
    return 0, [view] if view.nbytes else [], view.nbytes


def received(op: RecvOp) -> Payload:
    """What was received, to be passed on."""
    return op.flags, [op.payload], op.nbytes


class Record:
    """One rank's payload in a bundle; `view` is None while it comes by another way."""

    __slots__ = ("flags", "nbytes", "rank", "view")

    def __init__(self, rank: int, flags: int, nbytes: int, view: Buffer | None) -> None:
        self.rank = rank
        self.flags = flags
        self.nbytes = nbytes
        self.view = view


def record_of(rank: int, payload: Payload) -> Record:
    flags, frames, nbytes = payload
    return Record(rank, flags, nbytes, frames[0] if len(frames) == 1 else b"".join(frames))


def bundle(records: Sequence[Record]) -> Payload:
    table = [_COUNT.pack(len(records))]
    frames: list[Buffer] = []
    at = 8 + _RECORD.size * len(records)
    for record in records:
        if record.view is None:
            table.append(_RECORD.pack(record.rank, record.flags | _DIRECT, record.nbytes))
            continue
        table.append(_RECORD.pack(record.rank, record.flags, record.nbytes))
        padding = -at % _ALIGN
        frames += [bytes(padding), record.view] if padding else [record.view]
        at += padding + record.nbytes
    return 0, [b"".join(table), *frames], at


def unbundle(payload: Buffer, ranks: Sequence[int], sender: int, *, direct: bool = False) -> list[Record]:
    """The payloads of these ranks, in this order, out of a bundle.

    Args:
        sender: the process that sent it, for the error.
        direct: some may come by another way.

    Raises:
        MPIException: this is no such bundle.
    """
    view = memoryview(payload)
    at = 8 + _RECORD.size * len(ranks)
    if len(view) < at or _COUNT.unpack_from(view)[0] != len(ranks):
        raise _no_bundle(sender, f"{len(view)} bytes where the payloads of {len(ranks)} ranks were expected")
    records = []
    for i, expected in enumerate(ranks):
        rank, flags, nbytes = _RECORD.unpack_from(view, 8 + _RECORD.size * i)
        if rank != expected:
            raise _no_bundle(sender, f"a payload of rank {rank} of the communicator in place of rank {expected}'s")
        if flags & _DIRECT and direct:
            records.append(Record(rank, flags & ~_DIRECT, nbytes, None))
            continue
        at += -at % _ALIGN
        if nbytes > len(view) - at or flags & _DIRECT:
            raise _no_bundle(sender, f"a payload of {nbytes} bytes, which is not there")
        records.append(Record(rank, flags, nbytes, view[at:at + nbytes]))
        at += nbytes
    return records


def _no_bundle(sender: int, what: str) -> MPIException:
    return MPIException(ERR_UNKNOWN, f"in a collective call, rank {sender} sent {what}")


# Barrier and broadcast


def barrier(ch: Channel) -> Collective:
    """Dissemination: in round k every rank tells the one 2**k further on."""
    step = 1
    while step < ch.size:
        yield [ch.send((ch.me + step) % ch.size, (0, [], 0)), ch.recv((ch.me - step) % ch.size)]
        step *= 2


def bcast(ch: Channel, payload: Payload | None, root: int) -> Collective:
    """A payload of the root's to all: (flags, bytes). A binomial tree; long ones are scattered and gathered again."""
    if ch.me == root:
        assert payload is not None
        flags, frames, nbytes = payload
        if nbytes >= LARGE_BYTES and ch.size > 2:
            yield from _spread(ch, (flags | _LARGE, [_COUNT.pack(nbytes)], 8), root)
            whole = frames[0] if len(frames) == 1 else b"".join(frames)
            yield from bcast_large(ch, memoryview(whole).cast("B"), root)
            return flags, whole
        yield from _spread(ch, payload, root)
        return flags, frames[0] if len(frames) == 1 else b"".join(frames)
    op = yield from _spread(ch, None, root)
    if not op.flags & _LARGE:
        return op.flags, op.payload
    if len(op.payload) != _COUNT.size:
        raise _no_bundle(op.source, f"a length of {len(op.payload)} bytes")
    (nbytes,) = _COUNT.unpack(op.payload)
    try:
        place = np.empty(nbytes, np.uint8).data
    except (MemoryError, ValueError, OverflowError):
        raise _no_bundle(op.source, f"the announcement of {nbytes} bytes, for which there is no memory") from None
    yield from bcast_large(ch, place, root)
    return op.flags & ~_LARGE, place


def bcast_into(ch: Channel, place: memoryview, root: int) -> Collective:
    """Bytes of the root's into the same number of bytes everywhere."""
    if place.nbytes >= LARGE_BYTES and ch.size > 2:
        yield from bcast_large(ch, place, root)
    elif ch.me == root:
        yield from _spread(ch, raw(place), root)
    else:
        op = yield from _spread(ch, None, root, place)
        if op.flags & _LARGE or op.nbytes != place.nbytes:
            raise mismatch(op.nbytes, place.nbytes, f"rank {root}")


def _spread(ch: Channel, payload: Payload | None, root: int, place: memoryview | None = None) -> Generator[Wait, None, Any]:
    """Along a binomial tree: relative to the root, r gets it from r without its lowest bit."""
    relative = (ch.me - root) % ch.size
    lowest = relative & -relative if relative else 1 << (ch.size - 1).bit_length()
    op = None
    if relative:
        op = ch.recv((relative - lowest + root) % ch.size, place)
        yield [op]
        payload = (op.flags, [op.payload if place is None else place[:op.nbytes]], op.nbytes)
    assert payload is not None
    sends = []
    step = lowest >> 1
    while step:
        if relative + step < ch.size:
            sends.append(ch.send((relative + step + root) % ch.size, payload))
        step >>= 1
    yield sends
    return op


def _cuts(nbytes: int, parts: int) -> list[int]:
    """Where to cut: multiples of 64 as far as possible."""
    share = -(-nbytes // parts)
    share = -(-share // _ALIGN) * _ALIGN
    return [min(i * share, nbytes) for i in range(parts + 1)]


def bcast_large(ch: Channel, place: memoryview, root: int) -> Collective:
    """Scatter along a binomial tree, then a ring (van de Geijn): each byte crosses each link about twice, whatever the size."""
    n, relative = ch.size, (ch.me - root) % ch.size
    cuts = _cuts(place.nbytes, n)
    lowest = relative & -relative if relative else 1 << (n - 1).bit_length()
    if relative:
        part = place[cuts[relative]:cuts[min(relative + lowest, n)]]
        op = ch.recv((relative - lowest + root) % n, part)
        yield [op]
        # The flag tells a part from the whole of one that is shorter (`_spread`).
        if not op.flags & _LARGE or op.nbytes != part.nbytes:
            raise mismatch(op.nbytes, part.nbytes, f"rank {root}")
    step = lowest >> 1
    sends = []
    while step:
        if relative + step < n:
            part = place[cuts[relative + step]:cuts[min(relative + 2 * step, n)]]
            sends.append(ch.send((relative + step + root) % n, (_LARGE, *raw(part)[1:])))
        step >>= 1
    yield sends
    parts = [place[cuts[i]:cuts[i + 1]] for i in range(n)]
    # The root has all parts, so nothing need be sent to it.
    yield from _ring(ch, parts, relative, receives=relative != 0, sends=relative != n - 1)


def _ring(ch: Channel, parts: Sequence[memoryview], mine: int, *, receives: bool = True, sends: bool = True) -> Collective:
    """Everybody has part `mine`, and gets all others from the left. (`mine` grows with the rank, modulo the size.)"""
    n = ch.size
    for k in range(n - 1):
        pending: list[SendOp | RecvOp] = [ch.send((ch.me + 1) % n, raw(parts[(mine - k) % n]))] if sends else []
        if receives:
            op = ch.recv((ch.me - 1) % n, parts[(mine - k - 1) % n])
            pending.append(op)
        yield pending
        if receives and op.nbytes != parts[(mine - k - 1) % n].nbytes:
            raise mismatch(op.nbytes, parts[(mine - k - 1) % n].nbytes, f"rank {(ch.me - k - 1) % n}")


# Gather, scatter, and from all to all


def gather(ch: Channel, payload: Payload, root: int) -> Collective:
    """Everybody's payload to the root: a list of records in the order of the ranks there, None elsewhere."""
    n, relative = ch.size, (ch.me - root) % ch.size
    own = record_of(ch.me, payload)
    long = relative and own.nbytes > DIRECT_BYTES
    records = [Record(ch.me, own.flags, own.nbytes, None) if long else own]
    step = 1
    while step < n and not relative & step:
        if relative + step < n:
            op = ch.recv((relative + step + root) % n)
            yield [op]
            below = range(relative + step, min(relative + 2 * step, n))
            records += unbundle(op.payload, [(r + root) % n for r in below], op.source, direct=True)
        step *= 2
    if relative:
        sends = [ch.send((relative - step + root) % n, bundle(records))]
        if long:
            sends.append(ch.send(root, payload))
        yield sends
        return None
    yield from _fetch(ch, records)
    return sorted(records, key=lambda record: record.rank)


def _fetch(ch: Channel, records: Sequence[Record]) -> Collective:
    """Receive the payloads that did not come in the bundle."""
    direct = [(record, ch.recv(record.rank)) for record in records if record.view is None]
    yield [op for _, op in direct]
    for record, op in direct:
        record.nbytes, record.view = op.nbytes, op.payload


def scatter(ch: Channel, payloads: Sequence[Payload] | None, root: int) -> Collective:
    """To each rank its payload of the root's: a record."""
    n, relative = ch.size, (ch.me - root) % ch.size
    lowest = relative & -relative if relative else 1 << (n - 1).bit_length()
    sends: list[SendOp] = []
    if relative:
        op = ch.recv((relative - lowest + root) % n)
        yield [op]
        ranks = [(r + root) % n for r in range(relative, min(relative + lowest, n))]
        records = dict(enumerate(unbundle(op.payload, ranks, op.source, direct=True), relative))
        direct: list[int] = []
    else:
        assert payloads is not None
        direct = [rank for rank in range(n) if rank != root and payloads[rank][2] > DIRECT_BYTES]
        records = {(rank - root) % n: Record(rank, payload[0], payload[2], None) if rank in direct else record_of(rank, payload)
                   for rank, payload in enumerate(payloads)}
    step = lowest >> 1
    while step:
        if relative + step < n:
            below = [records[r] for r in range(relative + step, min(relative + 2 * step, n))]
            sends.append(ch.send((relative + step + root) % n, bundle(below)))
        step >>= 1
    if payloads is not None and not relative:
        sends += [ch.send(rank, payloads[rank]) for rank in direct]
    mine = records[relative]
    if mine.view is None:
        op = ch.recv(root)
        yield [op]
        mine.nbytes, mine.view = op.nbytes, op.payload
    yield sends
    return mine


def allgather(ch: Channel, payload: Payload) -> Collective:
    """Everybody's payload to everybody: records in the order of the ranks (Bruck's algorithm: log n rounds)."""
    n = ch.size
    records = [record_of(ch.me, payload)]
    step = 1
    while step < n:
        part = records[:min(step, n - step)]
        op = ch.recv((ch.me + step) % n)
        yield [ch.send((ch.me - step) % n, bundle(part)), op]
        records += unbundle(op.payload, [(ch.me + step + k) % n for k in range(len(part))], op.source)
        step *= 2
    return sorted(records, key=lambda record: record.rank)


def allgather_into(ch: Channel, parts: Sequence[memoryview]) -> Collective:
    """The same for parts whose lengths all ranks know; the own part is in place."""
    if sum(part.nbytes for part in parts) >= LARGE_BYTES:
        yield from _ring(ch, parts, ch.me)
        return
    records = yield from allgather(ch, raw(parts[ch.me]))
    for part, record in zip(parts, records, strict=True):
        if record.nbytes != part.nbytes:
            raise mismatch(record.nbytes, part.nbytes, f"rank {record.rank}")
        if record.rank != ch.me and record.nbytes:
            part[:] = record.view


def alltoall(ch: Channel, payloads: Sequence[Payload], places: Sequence[memoryview | None]) -> Collective:
    """From everybody to everybody: the receives, in the order of the ranks. Neighbours first, so that no rank is flooded."""
    n = ch.size
    receives: list[Any] = [None] * n
    pending: list[SendOp | RecvOp] = []
    for k in range(n):
        source, dest = (ch.me - k) % n, (ch.me + k) % n
        receives[source] = ch.recv(source, places[source])
        pending += [receives[source], ch.send(dest, payloads[dest])]
    yield pending
    return receives
