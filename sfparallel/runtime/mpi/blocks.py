"""Collective calls on buffers, in upper case: blocking, non-blocking (`I...`) and persistent (`..._init`).

Each call is prepared once: its buffers are looked at, and a generator function is made, which any of the three forms then runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfparallel.runtime.mpi import between, collectives, reductions
from sfparallel.runtime.mpi.buffers import is_in_place
from sfparallel.runtime.mpi.collectives import Collective, raw
from sfparallel.runtime.mpi.constants import PROC_NULL, ROOT
from sfparallel.runtime.mpi.core import Call, CommCore, Prepared
from sfparallel.runtime.mpi.errors import ERR_OP, MPIException, mismatch
from sfparallel.runtime.mpi.info import INFO_NULL, Info
from sfparallel.runtime.mpi.messages import EMPTY, Block, _integers, simple, vector, vector_w
from sfparallel.runtime.mpi.op import SUM, Op
from sfparallel.runtime.mpi.request import Persistent, Prequest, Request


def _take(records: Any, blocks: Sequence[Block], skip: int = -1) -> None:
    """Put gathered records where they belong."""
    for record, block in zip(records, blocks, strict=True):
        if record.rank != skip:
            fill(block, record.view, record.nbytes, f"rank {record.rank}")


def fill(block: Block, data: Any, nbytes: int, who: str = "another rank") -> None:
    """Put packed data into a block.

    Raises:
        MPIException: it is not as long as that.
    """
    if nbytes != block.nbytes:
        raise mismatch(nbytes, block.nbytes, who)
    if nbytes:
        block.put(data, nbytes)


def parts_of(block: Block, parts: int) -> list[Block]:
    """Equal blocks one after the other."""
    return [block.part(i * block.count, block.count) for i in range(parts)]


def _codec(op: Op, block: Block) -> reductions.Memory:
    core = op._core
    if core is None:
        raise MPIException(ERR_OP, "null operation")
    if core.function is None:
        core.require(block.core)
    return reductions.Memory(core, block.core)


def _check_reduction(send: Block, recv: Block) -> None:
    if send.core is not recv.core:
        raise ValueError("mismatch in send and receive MPI datatypes")
    if send.count != recv.count:
        raise ValueError(f"mismatch in send count {send.count} and receive count {recv.count}")


def _own(block: Block) -> Any:
    """The data in memory of its own."""
    data = block.read()
    return data.copy() if block.core.is_contiguous else data


class Runs:
    """The three forms of a collective call."""

    _core: CommCore

    def _live(self) -> Any:
        raise NotImplementedError

    def _now(self, name: str, prepared: Prepared, timeout: float | None) -> None:
        self._core.run(name, prepared, timeout)

    def _begin(self, prepared: Prepared) -> Request:
        return Request._of(self._core.start(prepared))

    def _repeat_collective(self, prepared: Prepared) -> Prequest:
        return Prequest._of(Persistent(self._core.endpoint, self._core.repeated(prepared)))


class BlockCollectives(Runs):
    """Collective calls on buffers; the blocking ones take `timeout=`, in seconds."""

    # Preparations

    def _barrier(self) -> Prepared:
        return between.barrier if self._live().remote is not None else lambda call: collectives.barrier(call.local)

    def _bcast(self, buf: Any, root: int) -> Prepared:
        core = self._live()
        root = core.checked_root(root)
        sends = root == ROOT if core.remote is not None else root == core.rank
        block = simple(buf, readonly=sends, peer=PROC_NULL if root == PROC_NULL else 0)

        def steps(call: Call) -> Collective:
            if core.remote is not None:
                result = yield from between.bcast(call, raw(block.read()) if sends else None, root)
                if result is not None:
                    fill(block, result[1], len(result[1]))
                return
            if core.size > 1:
                place = block.read().data if sends else block.place()
                yield from collectives.bcast_into(call.local, place, root)
                if not sends:
                    block.put(place)

        return steps

    def _gather(self, sendbuf: Any, recvbuf: Any, root: int, *, several: bool) -> Prepared:
        core = self._live()
        root = core.checked_root(root)
        receives = root == ROOT if core.remote is not None else root == core.rank
        peers = len(core.peers)
        targets: list[Block] = []
        if receives:
            targets = vector(recvbuf, readonly=False, parts=peers) if several else parts_of(
                simple(recvbuf, readonly=False, parts=peers), peers)
        in_place = core.remote is None and receives and is_in_place(sendbuf)
        idle = core.remote is not None and root in (ROOT, PROC_NULL)
        block = EMPTY if in_place or idle else simple(sendbuf, readonly=True)

        def steps(call: Call) -> Collective:
            if core.remote is not None:
                records = yield from between.gather(call, raw(block.read()), root)
            else:
                records = yield from collectives.gather(call.local, raw(block.read()), root)
            if records is not None:
                _take(records, targets, core.rank if in_place else -1)

        return steps

    def _scatter(self, sendbuf: Any, recvbuf: Any, root: int, *, several: bool) -> Prepared:
        core = self._live()
        root = core.checked_root(root)
        sends = root == ROOT if core.remote is not None else root == core.rank
        peers = len(core.peers)
        sources: list[Block] = []
        if sends:
            sources = vector(sendbuf, readonly=True, parts=peers) if several else parts_of(
                simple(sendbuf, readonly=True, parts=peers), peers)
        in_place = core.remote is None and sends and is_in_place(recvbuf)
        idle = core.remote is not None and root in (ROOT, PROC_NULL)
        block = EMPTY if in_place or idle else simple(recvbuf, readonly=False)

        def steps(call: Call) -> Collective:
            payloads = [raw(source.read()) for source in sources] if sends else None
            if core.remote is not None:
                record = yield from between.scatter(call, payloads, root)
            else:
                record = yield from collectives.scatter(call.local, payloads, root)
            if record is not None and not in_place:
                fill(block, record.view, record.nbytes, f"rank {root}")

        return steps

    def _allgather(self, sendbuf: Any, recvbuf: Any, *, several: bool) -> Prepared:
        core = self._live()
        peers = len(core.peers)
        targets = vector(recvbuf, readonly=False, parts=peers) if several else parts_of(
            simple(recvbuf, readonly=False, parts=peers), peers)
        in_place = core.remote is None and is_in_place(sendbuf)
        block = targets[core.rank] if in_place else simple(sendbuf, readonly=True)

        def steps(call: Call) -> Collective:
            if core.remote is not None:
                _take((yield from between.allgather(call, raw(block.read()))), targets)
                return
            places = [target.place() for target in targets]
            mine = block.read()
            if len(mine) != len(places[core.rank]):
                raise mismatch(len(mine), len(places[core.rank]), f"rank {core.rank}")
            if len(mine):
                places[core.rank][:len(mine)] = mine.data
            yield from collectives.allgather_into(call.local, places)
            for target, place in zip(targets, places, strict=True):
                target.put(place)

        return steps

    def _alltoall(self, sendbuf: Any, recvbuf: Any, *, kind: str) -> Prepared:
        core = self._live()
        peers = len(core.peers)

        def blocks(buf: Any, readonly: bool) -> list[Block]:
            if kind == "w":
                return vector_w(buf, readonly=readonly, parts=peers)
            if kind == "v":
                return vector(buf, readonly=readonly, parts=peers)
            return parts_of(simple(buf, readonly=readonly, parts=peers), peers)

        targets = blocks(recvbuf, False)
        in_place = core.remote is None and is_in_place(sendbuf)
        sources = [] if in_place else blocks(sendbuf, True)

        def steps(call: Call) -> Collective:
            payloads = [raw(_own(target)) for target in targets] if in_place else [raw(source.read()) for source in sources]
            places: list[memoryview | None] = [target.place() for target in targets]
            if core.remote is not None:
                receives = yield from between.alltoall(call, payloads, places)
            else:
                receives = yield from collectives.alltoall(call.local, payloads, places)
            for rank, (target, op) in enumerate(zip(targets, receives, strict=True)):
                if op.nbytes != target.nbytes:
                    raise mismatch(op.nbytes, target.nbytes, f"rank {rank}")
                target.put(op.buffer, op.nbytes)

        return steps

    def _reduce(self, sendbuf: Any, recvbuf: Any, op: Op, root: int) -> Prepared:
        core = self._live()
        root = core.checked_root(root)
        if core.remote is not None:
            if root == PROC_NULL:
                block = EMPTY
            else:
                block = simple(recvbuf, readonly=False) if root == ROOT else simple(sendbuf, readonly=True)
            target = block
        elif root == core.rank:
            target = simple(recvbuf, readonly=False)
            block = target if is_in_place(sendbuf) else simple(sendbuf, readonly=True)
            _check_reduction(block, target)
        else:
            block = target = simple(sendbuf, readonly=True)
        codec = _codec(op, block) if block is not EMPTY else None

        def steps(call: Call) -> Collective:
            if codec is None:
                return
            if core.remote is not None:
                result = yield from between.reduce(call, None if root == ROOT else _own(block), codec, root)
            else:
                result = yield from reductions.reduce(call.local, _own(block), codec, root)
            if result is not None:
                fill(target, memoryview(result), len(result))

        return steps

    def _allreduce(self, sendbuf: Any, recvbuf: Any, op: Op) -> Prepared:
        core = self._live()
        target = simple(recvbuf, readonly=False)
        in_place = core.remote is None and is_in_place(sendbuf)
        block = target if in_place else simple(sendbuf, readonly=True)
        _check_reduction(block, target)
        codec = _codec(op, block)

        def steps(call: Call) -> Collective:
            if core.remote is not None:
                _, result = yield from between.allreduce(call, _own(block), codec)
            else:
                result = yield from reductions.allreduce_memory(call.local, _own(block), codec, block.core.size or 1)
            fill(target, memoryview(result), len(result))

        return steps

    def _reduce_scatter(self, sendbuf: Any, recvbuf: Any, recvcounts: Any, op: Op, *, equal: bool) -> Prepared:
        core = self._live()
        in_place = core.remote is None and is_in_place(sendbuf)
        if equal:
            target = simple(recvbuf, readonly=False, parts=core.size if in_place else 0)
            whole = Block(target.data, target.origin, target.count * core.size, target.core)
            block = whole if in_place else simple(sendbuf, readonly=True, parts=core.size)
            if not in_place:
                _check_reduction(block, target)
                block = Block(block.data, block.origin, block.count * core.size, block.core)
            counts: list[int] | None = [target.count] * core.size
        else:
            target = simple(recvbuf, readonly=False)
            block = target if in_place else simple(sendbuf, readonly=True)
            counts = self._counts(core, block, target, recvcounts, in_place)
        codec = _codec(op, block)
        item = block.core.size

        def steps(call: Call) -> Collective:
            known = counts
            if known is None:
                records = yield from collectives.allgather(call.local, raw(np.array([target.count], np.int64)))
                known = [int(np.frombuffer(record.view, np.int64)[0]) for record in records]
                _check_counts(block, target, known, core.rank, in_place)
            cuts = [sum(known[:i]) * item for i in range(len(known) + 1)]
            if core.remote is not None:
                record = yield from between.reduce_scatter(call, _own(block), codec, cuts)
                fill(target, record.view, record.nbytes)
            else:
                result = yield from reductions.reduce_scatter(call.local, _own(block), codec, cuts)
                if len(result):
                    Block(target.data, target.origin, known[core.rank], target.core).put(memoryview(result))

        return steps

    @staticmethod
    def _counts(core: CommCore, block: Block, target: Block, recvcounts: Any, in_place: bool) -> list[int] | None:
        """The counts as far as they are known before all ranks are asked."""
        if recvcounts is None and core.remote is None and not in_place:
            return None
        if isinstance(recvcounts, int | np.integer):
            counts = [int(recvcounts)] * core.size
        else:
            counts = _integers(recvcounts, core.size, "counts")
        _check_counts(block, target, counts, core.rank, in_place)
        return counts

    # The calls

    def Barrier(self, *, timeout: float | None = None) -> None:
        self._now("Barrier", self._barrier(), timeout)

    def Ibarrier(self) -> Request:
        return self._begin(self._barrier())

    def Barrier_init(self, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._barrier())

    def Bcast(self, buf: Any, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Bcast", self._bcast(buf, root), timeout)

    def Ibcast(self, buf: Any, root: int = 0) -> Request:
        return self._begin(self._bcast(buf, root))

    def Bcast_init(self, buf: Any, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._bcast(buf, root))

    def Gather(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Gather", self._gather(sendbuf, recvbuf, root, several=False), timeout)

    def Igather(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> Request:
        return self._begin(self._gather(sendbuf, recvbuf, root, several=False))

    def Gather_init(self, sendbuf: Any, recvbuf: Any, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._gather(sendbuf, recvbuf, root, several=False))

    def Gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Gatherv", self._gather(sendbuf, recvbuf, root, several=True), timeout)

    def Igatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> Request:
        return self._begin(self._gather(sendbuf, recvbuf, root, several=True))

    def Gatherv_init(self, sendbuf: Any, recvbuf: Any, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._gather(sendbuf, recvbuf, root, several=True))

    def Scatter(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Scatter", self._scatter(sendbuf, recvbuf, root, several=False), timeout)

    def Iscatter(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> Request:
        return self._begin(self._scatter(sendbuf, recvbuf, root, several=False))

    def Scatter_init(self, sendbuf: Any, recvbuf: Any, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._scatter(sendbuf, recvbuf, root, several=False))

    def Scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Scatterv", self._scatter(sendbuf, recvbuf, root, several=True), timeout)

    def Iscatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> Request:
        return self._begin(self._scatter(sendbuf, recvbuf, root, several=True))

    def Scatterv_init(self, sendbuf: Any, recvbuf: Any, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._scatter(sendbuf, recvbuf, root, several=True))

    def Allgather(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Allgather", self._allgather(sendbuf, recvbuf, several=False), timeout)

    def Iallgather(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._allgather(sendbuf, recvbuf, several=False))

    def Allgather_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._allgather(sendbuf, recvbuf, several=False))

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Allgatherv", self._allgather(sendbuf, recvbuf, several=True), timeout)

    def Iallgatherv(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._allgather(sendbuf, recvbuf, several=True))

    def Allgatherv_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._allgather(sendbuf, recvbuf, several=True))

    def Alltoall(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Alltoall", self._alltoall(sendbuf, recvbuf, kind=""), timeout)

    def Ialltoall(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._alltoall(sendbuf, recvbuf, kind=""))

    def Alltoall_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._alltoall(sendbuf, recvbuf, kind=""))

    def Alltoallv(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Alltoallv", self._alltoall(sendbuf, recvbuf, kind="v"), timeout)

    def Ialltoallv(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._alltoall(sendbuf, recvbuf, kind="v"))

    def Alltoallv_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._alltoall(sendbuf, recvbuf, kind="v"))

    def Alltoallw(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Alltoallw", self._alltoall(sendbuf, recvbuf, kind="w"), timeout)

    def Ialltoallw(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._alltoall(sendbuf, recvbuf, kind="w"))

    def Alltoallw_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._alltoall(sendbuf, recvbuf, kind="w"))

    def Reduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, root: int = 0, *, timeout: float | None = None) -> None:
        self._now("Reduce", self._reduce(sendbuf, recvbuf, op, root), timeout)

    def Ireduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, root: int = 0) -> Request:
        return self._begin(self._reduce(sendbuf, recvbuf, op, root))

    def Reduce_init(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, root: int = 0, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._reduce(sendbuf, recvbuf, op, root))

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, *, timeout: float | None = None) -> None:
        self._now("Allreduce", self._allreduce(sendbuf, recvbuf, op), timeout)

    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        return self._begin(self._allreduce(sendbuf, recvbuf, op))

    def Allreduce_init(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._allreduce(sendbuf, recvbuf, op))

    def Reduce_scatter_block(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, *, timeout: float | None = None) -> None:
        self._now("Reduce_scatter_block", self._reduce_scatter(sendbuf, recvbuf, None, op, equal=True), timeout)

    def Ireduce_scatter_block(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        return self._begin(self._reduce_scatter(sendbuf, recvbuf, None, op, equal=True))

    def Reduce_scatter_block_init(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._reduce_scatter(sendbuf, recvbuf, None, op, equal=True))

    def Reduce_scatter(self, sendbuf: Any, recvbuf: Any, recvcounts: Sequence[int] | None = None, op: Op = SUM, *,
                       timeout: float | None = None) -> None:
        self._now("Reduce_scatter", self._reduce_scatter(sendbuf, recvbuf, recvcounts, op, equal=False), timeout)

    def Ireduce_scatter(self, sendbuf: Any, recvbuf: Any, recvcounts: Sequence[int] | None = None, op: Op = SUM) -> Request:
        return self._begin(self._reduce_scatter(sendbuf, recvbuf, recvcounts, op, equal=False))

    def Reduce_scatter_init(self, sendbuf: Any, recvbuf: Any, recvcounts: Sequence[int] | None = None, op: Op = SUM,
                            info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._reduce_scatter(sendbuf, recvbuf, recvcounts, op, equal=False))


def _check_counts(block: Block, target: Block, counts: Sequence[int], rank: int, in_place: bool) -> None:
    total = sum(counts)
    if in_place:
        if target.count != total:
            raise ValueError(f"mismatch in receive count {target.count} and sum(counts) {total}")
        return
    if block.core is not target.core:
        raise ValueError("mismatch in send and receive MPI datatypes")
    if block.count != total:
        raise ValueError(f"mismatch in send count {block.count} and sum(counts) {total}")
    if target.count != counts[rank]:
        raise ValueError(f"mismatch in receive count {target.count} and counts[{rank}] {counts[rank]}")


class BlockScans(Runs):
    """Prefix reductions on buffers (of communicators with one group)."""

    def _scan(self, sendbuf: Any, recvbuf: Any, op: Op, *, exclusive: bool) -> Prepared:
        self._live()
        target = simple(recvbuf, readonly=False)
        block = target if is_in_place(sendbuf) else simple(sendbuf, readonly=True)
        _check_reduction(block, target)
        codec = _codec(op, block)

        def steps(call: Call) -> Collective:
            result = yield from reductions.scan(call.local, _own(block), codec, exclusive=exclusive)
            if result is not None:
                fill(target, memoryview(result), len(result))

        return steps

    def Scan(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, *, timeout: float | None = None) -> None:
        self._now("Scan", self._scan(sendbuf, recvbuf, op, exclusive=False), timeout)

    def Iscan(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        return self._begin(self._scan(sendbuf, recvbuf, op, exclusive=False))

    def Scan_init(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._scan(sendbuf, recvbuf, op, exclusive=False))

    def Exscan(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, *, timeout: float | None = None) -> None:
        self._now("Exscan", self._scan(sendbuf, recvbuf, op, exclusive=True), timeout)

    def Iexscan(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        return self._begin(self._scan(sendbuf, recvbuf, op, exclusive=True))

    def Exscan_init(self, sendbuf: Any, recvbuf: Any, op: Op = SUM, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._scan(sendbuf, recvbuf, op, exclusive=True))
