"""Collective calls between the two groups of an intercommunicator: each works among its own, and its rank 0 speaks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfparallel.runtime.mpi import collectives, reductions
from sfparallel.runtime.mpi.collectives import Collective, bundle, received, unbundle
from sfparallel.runtime.mpi.constants import PROC_NULL, ROOT
from sfparallel.runtime.mpi.core import Call, CommCore
from sfparallel.runtime.mpi.pickling import Payload, pickle

_EMPTY: Payload = (0, [], 0)


def barrier(call: Call) -> Collective:
    """Wait for both groups."""
    yield from collectives.barrier(call.local)
    if call.local.me == 0:
        yield [call.remote.send(0, _EMPTY), call.remote.recv(0)]
    yield from collectives.bcast(call.local, _EMPTY if call.local.me == 0 else None, 0)


def bcast(call: Call, payload: Payload | None, root: int) -> Collective:
    """From the root to the other group: (flags, bytes) there."""
    if root == ROOT:
        assert payload is not None
        yield [call.remote.send(0, payload)]
        return None
    if root == PROC_NULL:
        return None
    arrived = None
    if call.local.me == 0:
        op = call.remote.recv(root)
        yield [op]
        arrived = received(op)
    return (yield from collectives.bcast(call.local, arrived, 0))


def gather(call: Call, payload: Payload, root: int) -> Collective:
    """From the other group to the root: records there."""
    if root == ROOT:
        op = call.remote.recv(0)
        yield [op]
        return unbundle(op.payload, range(call.remote.size), op.source)
    if root == PROC_NULL:
        return None
    records = yield from collectives.gather(call.local, payload, 0)
    if records is not None:
        yield [call.remote.send(root, bundle(records))]
    return None


def scatter(call: Call, payloads: Sequence[Payload] | None, root: int) -> Collective:
    """From the root to the other group: a record at each rank there."""
    if root == ROOT:
        assert payloads is not None
        records = [collectives.record_of(rank, payload) for rank, payload in enumerate(payloads)]
        yield [call.remote.send(0, bundle(records))]
        return None
    if root == PROC_NULL:
        return None
    parts = None
    if call.local.me == 0:
        op = call.remote.recv(root)
        yield [op]
        records = unbundle(op.payload, range(call.local.size), op.source)
        parts = [(record.flags, [record.view], record.nbytes) for record in records]
    return (yield from collectives.scatter(call.local, parts, 0))  # type: ignore[arg-type]


def allgather(call: Call, payload: Payload) -> Collective:
    """Each group gets the other's payloads: records."""
    records = yield from collectives.gather(call.local, payload, 0)
    arrived = None
    if records is not None:
        op = call.remote.recv(0)
        yield [call.remote.send(0, bundle(records)), op]
        arrived = received(op)
    _, payloads = yield from collectives.bcast(call.local, arrived, 0)
    return unbundle(payloads, range(call.remote.size), call.remote.ranks[0])


def alltoall(call: Call, payloads: Sequence[Payload], places: Sequence[memoryview | None]) -> Collective:
    """From everybody to everybody of the other group."""
    receives = [call.remote.recv(rank, places[rank]) for rank in range(call.remote.size)]
    yield [*receives, *(call.remote.send(rank, payload) for rank, payload in enumerate(payloads))]
    return receives


def reduce(call: Call, value: Any, codec: reductions.Codec, root: int) -> Collective:
    """The other group's values combined, at the root."""
    if root == ROOT:
        op = call.remote.recv(0)
        yield [op]
        return codec.decode(op)
    if root == PROC_NULL:
        return None
    result = yield from reductions.reduce(call.local, value, codec, 0)
    if call.local.me == 0:
        yield [call.remote.send(root, codec.encode(result))]
    return None


def allreduce(call: Call, value: Any, codec: reductions.Codec) -> Collective:
    """Each group gets the other's values combined: (flags, bytes)."""
    result = yield from reductions.reduce(call.local, value, codec, 0)
    arrived = None
    if call.local.me == 0:
        op = call.remote.recv(0)
        yield [call.remote.send(0, codec.encode(result)), op]
        arrived = received(op)
    return (yield from collectives.bcast(call.local, arrived, 0))


def reduce_scatter(call: Call, value: Any, codec: reductions.Codec, cuts: list[int]) -> Collective:
    """The other group's values combined, of which each rank gets its part: a record."""
    result = yield from reductions.reduce(call.local, value, codec, 0)
    parts = None
    if call.local.me == 0:
        op = call.remote.recv(0)
        yield [call.remote.send(0, codec.encode(result)), op]
        view = memoryview(op.payload)
        parts = [collectives.raw(view[cuts[i]:cuts[i + 1]]) for i in range(call.local.size)]
    return (yield from collectives.scatter(call.local, parts, 0))


# The calls on objects


def bcast_object(core: CommCore, obj: Any, root: int, timeout: float | None) -> Any:
    payload = pickle.payload(obj) if root == ROOT else None
    result = core.run("bcast", lambda call: bcast(call, payload, root), timeout)
    return None if result is None else pickle.object(result[1], result[0])


def gather_objects(core: CommCore, obj: Any, root: int, timeout: float | None) -> list[Any] | None:
    records = core.run("gather", lambda call: gather(call, pickle.payload(obj), root), timeout)
    return None if records is None else [pickle.object(record.view, record.flags) for record in records]


def scatter_objects(core: CommCore, objects: Sequence[Any] | None, root: int, timeout: float | None) -> Any:
    payloads = None
    if root == ROOT:
        if objects is None or len(objects) != len(core.peers):
            raise ValueError(f"expecting {len(core.peers)} items")
        payloads = [pickle.payload(obj) for obj in objects]
    record = core.run("scatter", lambda call: scatter(call, payloads, root), timeout)
    return None if record is None else pickle.object(record.view, record.flags)


def reduce_objects(core: CommCore, obj: Any, codec: reductions.Codec, root: int, timeout: float | None) -> Any:
    return core.run("reduce", lambda call: reduce(call, obj if root < 0 else codec.own(obj), codec, root), timeout)


def allreduce_objects(core: CommCore, obj: Any, codec: reductions.Codec, timeout: float | None) -> Any:
    flags, payload = core.run("allreduce", lambda call: allreduce(call, codec.own(obj), codec), timeout)
    return pickle.object(payload, flags)
