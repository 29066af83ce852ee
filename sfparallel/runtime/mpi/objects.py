"""Collective calls on Python objects, in lower case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sfparallel.runtime.mpi import between, collectives, reductions
from sfparallel.runtime.mpi.collectives import Collective
from sfparallel.runtime.mpi.core import Call, CommCore, Prepared
from sfparallel.runtime.mpi.op import SUM, Op
from sfparallel.runtime.mpi.pickling import PLAIN, pickle


def _copy(obj: Any) -> Any:
    flags, frames, _ = pickle.payload(obj)
    return pickle.object(b"".join(frames), flags)


def _apart(result: Any, given: Any) -> Any:
    """What a reduction returns: not the caller's own object, though it may be what came out (MAX, say)."""
    return _copy(result) if result is given and type(result) not in PLAIN else result


def _values(records: Sequence[Any] | None) -> list[Any] | None:
    return None if records is None else [pickle.object(record.view, record.flags) for record in records]


def _objects(op: Op | Callable[[Any, Any], Any]) -> reductions.Objects:
    return reductions.Objects(op, pure=isinstance(op, Op) and op.is_predefined)


class ObjectCollectives:
    """Collective calls on objects; all take `timeout=`, in seconds."""

    _core: CommCore

    def _live(self) -> Any:
        raise NotImplementedError

    def barrier(self, *, timeout: float | None = None) -> None:
        """Wait until every rank has called `barrier`.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            RegionTimeout: some ranks did not call it in time (`.missing`).
            CloneLost: a rank died meanwhile.
        """
        core = self._live()
        core.run("barrier", between.barrier if core.remote is not None else lambda call: collectives.barrier(call.local), timeout)

    def bcast(self, obj: Any, root: int = 0, *, timeout: float | None = None) -> Any:
        """Send an object from one rank to all.

        Args:
            obj: what rank `root` sends; ignored in the other ranks.
            root: rank that sends.
            timeout: seconds; None waits for ever.

        Returns:
            the object, in every rank.

        Raises:
            RegionTimeout: it did not arrive in time; `.missing` names the ranks that did not take part.
            CloneLost: a rank died meanwhile.
        """
        core = self._live()
        root = core.checked_root(root)
        if core.remote is not None:
            return between.bcast_object(core, obj, root, timeout)
        sends = core.rank == root

        def steps(call: Call) -> Collective:
            if core.size == 1:
                return None, None
            return (yield from collectives.bcast(call.local, pickle.payload(obj) if sends else None, root))

        flags, payload = core.run("bcast", steps, timeout)
        return obj if sends else pickle.object(payload, flags)

    def gather(self, sendobj: Any, root: int = 0, *, timeout: float | None = None) -> list[Any] | None:
        """Objects of all ranks, as a list at the root."""
        core = self._live()
        root = core.checked_root(root)
        if core.remote is not None:
            return between.gather_objects(core, sendobj, root, timeout)
        return _values(core.run("gather", lambda call: collectives.gather(call.local, pickle.payload(sendobj), root), timeout))

    def scatter(self, sendobj: Sequence[Any] | None, root: int = 0, *, timeout: float | None = None) -> Any:
        """To each rank its object of a list of the root's."""
        core = self._live()
        root = core.checked_root(root)
        if core.remote is not None:
            return between.scatter_objects(core, sendobj, root, timeout)
        payloads = None
        if core.rank == root:
            payloads = [pickle.payload(obj) for obj in _as_many(sendobj, core.size)]
        record = core.run("scatter", lambda call: collectives.scatter(call.local, payloads, root), timeout)
        return pickle.object(record.view, record.flags)

    def allgather(self, sendobj: Any, *, timeout: float | None = None) -> list[Any]:
        """Objects of all ranks, as a list at all ranks."""
        core = self._live()
        payload = pickle.payload(sendobj)
        prepared: Prepared = ((lambda call: between.allgather(call, payload)) if core.remote is not None
                              else lambda call: collectives.allgather(call.local, payload))
        return _values(core.run("allgather", prepared, timeout)) or []

    def alltoall(self, sendobj: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """The i-th object of each rank's list to rank i."""
        core = self._live()
        payloads = [pickle.payload(obj) for obj in _as_many(sendobj, len(core.peers))]
        places = [None] * len(payloads)
        prepared: Prepared = ((lambda call: between.alltoall(call, payloads, places)) if core.remote is not None
                              else lambda call: collectives.alltoall(call.local, payloads, places))
        return [pickle.object(op.payload, op.flags) for op in core.run("alltoall", prepared, timeout)]

    def reduce(self, sendobj: Any, op: Op | Callable[[Any, Any], Any] = SUM, root: int = 0, *,
               timeout: float | None = None) -> Any:
        """Objects of all ranks combined by `op`, in the order of the ranks, at the root."""
        core = self._live()
        root = core.checked_root(root)
        codec = _objects(op)
        if core.remote is not None:
            return between.reduce_objects(core, sendobj, codec, root, timeout)
        if core.size == 1:
            return _copy(sendobj)
        result = core.run("reduce", lambda call: reductions.reduce(call.local, codec.own(sendobj), codec, root), timeout)
        return _apart(result, sendobj)

    def allreduce(self, sendobj: Any, op: Op | Callable[[Any, Any], Any] = SUM, *, timeout: float | None = None) -> Any:
        """The same at all ranks."""
        core = self._live()
        codec = _objects(op)
        if core.remote is not None:
            return between.allreduce_objects(core, sendobj, codec, timeout)
        if core.size == 1:
            return _copy(sendobj)
        result = core.run("allreduce", lambda call: reductions.allreduce(call.local, codec.own(sendobj), codec), timeout)
        return _apart(result, sendobj)


class ObjectScans:
    """Prefix reductions on objects (of communicators with one group)."""

    _core: CommCore

    def _live(self) -> Any:
        raise NotImplementedError

    def scan(self, sendobj: Any, op: Op | Callable[[Any, Any], Any] = SUM, *, timeout: float | None = None) -> Any:
        """Objects of the ranks up to this one, combined by `op`."""
        core = self._live()
        if core.size == 1:
            return _copy(sendobj)
        codec = _objects(op)
        result = core.run("scan", lambda call: reductions.scan(call.local, codec.own(sendobj), codec, exclusive=False), timeout)
        return _apart(result, sendobj)

    def exscan(self, sendobj: Any, op: Op | Callable[[Any, Any], Any] = SUM, *, timeout: float | None = None) -> Any:
        """Objects of the ranks before this one, combined by `op`; None at rank 0."""
        core = self._live()
        codec = _objects(op)
        return core.run("exscan", lambda call: reductions.scan(call.local, codec.own(sendobj), codec, exclusive=True), timeout)


def _as_many(objects: Sequence[Any] | None, count: int) -> list[Any]:
    """As many objects as there are ranks; None stands for None for each of them."""
    values = [None] * count if objects is None else list(objects)
    if len(values) != count:
        raise ValueError(f"expecting {count} items, got {len(values)}")
    return values
