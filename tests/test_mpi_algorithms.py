"""Collective algorithms without sockets: right at any number of ranks, and in a number of steps that grows with its logarithm."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sfparallel.runtime.mpi import collectives, reductions
from sfparallel.runtime.mpi.collectives import Channel, Collective
from sfparallel.runtime.mpi.matching import DATA, EAGER, HEADER, RTS, Buffer, Engine, SendOp
from sfparallel.runtime.mpi.op import OPS
from sfparallel.runtime.mpi.pickling import Payload, pickle
from sfparallel.runtime.mpi.types import lookup

SIZES = [*range(1, 10), 13, 16, 17, 31, 32, 33, 64]


class Ranks:
    """Engines of so many ranks that run one algorithm in lockstep: what is sent in a round arrives in the next.

    Attributes:
        rounds: how many there were.
        sent, received: messages with a payload, or empty ones, by rank; what only announces others does not count.
    """

    def __init__(self, size: int) -> None:
        self.rounds = 0
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self._under_way: deque[tuple[int, int, bytes, bytes, SendOp | None]] = deque()
        self._engines = [Engine(rank, SimpleNamespace(push=self._pusher(rank))) for rank in range(size)]
        self._size = size

    def run(self, algorithm: Callable[[Channel], Collective]) -> list[Any]:
        """The result of each rank."""
        results: list[Any] = [None] * self._size
        running: dict[int, Collective] = {}
        waits: dict[int, Sequence[Any]] = {}
        for rank, engine in enumerate(self._engines):
            endpoint: Any = SimpleNamespace(engine=engine, lock=contextlib.nullcontext())
            running[rank] = algorithm(Channel(endpoint, 9, 1, range(self._size), rank, range(self._size)))
            waits[rank] = ()
        while running:
            for rank in [rank for rank in running if all(op.done for op in waits[rank])]:
                try:
                    while all(op.done for op in waits[rank]):
                        waits[rank] = running[rank].send(None)
                except StopIteration as stop:
                    results[rank] = stop.value
                    del running[rank]
            assert self._under_way or not running, f"ranks {list(running)} wait for ever"
            self._deliver()
        return results

    def _pusher(self, source: int) -> Callable[[int, bytes, Sequence[Buffer], SendOp | None], None]:
        def push(peer: int, header: bytes, frames: Sequence[Buffer], op: SendOp | None) -> None:
            self._under_way.append((source, peer, header, b"".join(frames), op))

        return push

    def _deliver(self) -> None:
        counts = False
        for _ in range(len(self._under_way)):
            source, dest, header, payload, op = self._under_way.popleft()
            if op is not None:
                op.on_the_way()
            kind, flags, _, tag, ctx, number, credit, nbytes = HEADER.unpack(header)
            engine = self._engines[dest]
            if kind in (EAGER, DATA):
                counts = True
                self.sent[source] += 1
                self.received[dest] += 1
            if kind == DATA:
                engine.landing(source, number, nbytes)[:] = payload
                engine.on_data(source, number)
            elif kind == RTS:
                engine.on_rts(source, flags, tag, ctx, number, credit, nbytes)
            else:
                engine.on_header(source, kind, flags, tag, ctx, number, credit, memoryview(payload))
        self.rounds += counts


def text(rank: int) -> Payload:
    return pickle.payload(f"of {rank}")


def texts(records: Any) -> list[Any] | None:
    return None if records is None else [pickle.object(each.view, each.flags) for each in records]


def joined(ranks: Sequence[int]) -> str:
    return "".join(f"({rank})" for rank in ranks)


STRINGS = reductions.Objects(OPS["SUM"], pure=True)
NUMBERS = reductions.Memory(OPS["SUM"]._core, lookup("d")._core)  # type: ignore[arg-type]


def numbers(values: Sequence[float]) -> Any:
    return np.array(values, np.float64).view(np.uint8)


def cases(n: int, root: int) -> dict[str, tuple[Callable[[Channel], Collective], Callable[[list[Any]], bool]]]:
    """Each algorithm, and whether its results are right."""
    def at_root(found: list[Any], wanted: Any) -> bool:
        return bool(found[root] == wanted) and all(each is None for rank, each in enumerate(found) if rank != root)

    def run(steps: Callable[[Channel], Collective], finish: Callable[[Any], Any]) -> Callable[[Channel], Collective]:
        def algorithm(ch: Channel) -> Collective:
            return finish((yield from steps(ch)))

        return algorithm

    everything = [f"of {rank}" for rank in range(n)]
    cuts = [8 * rank for rank in range(n + 1)]
    return {
        "barrier": (collectives.barrier, lambda found: True),
        "bcast": (run(lambda ch: collectives.bcast(ch, text(7) if ch.me == root else None, root),
                      lambda result: pickle.object(result[1], result[0])), lambda found: found == ["of 7"] * n),
        "gather": (run(lambda ch: collectives.gather(ch, text(ch.me), root), texts),
                   lambda found: at_root(found, everything)),
        "scatter": (run(lambda ch: collectives.scatter(ch, [text(r) for r in range(n)] if ch.me == root else None, root),
                        lambda record: pickle.object(record.view, record.flags)), lambda found: found == everything),
        "allgather": (run(lambda ch: collectives.allgather(ch, text(ch.me)), texts), lambda found: found == [everything] * n),
        "reduce": (lambda ch: reductions.reduce(ch, f"({ch.me})", STRINGS, root),
                   lambda found: at_root(found, joined(range(n)))),
        "allreduce": (lambda ch: reductions.allreduce(ch, f"({ch.me})", STRINGS),
                      lambda found: found == [joined(range(n))] * n),
        "scan": (lambda ch: reductions.scan(ch, f"({ch.me})", STRINGS, exclusive=False),
                 lambda found: found == [joined(range(rank + 1)) for rank in range(n)]),
        "exscan": (lambda ch: reductions.scan(ch, f"({ch.me})", STRINGS, exclusive=True),
                   lambda found: found == [None, *(joined(range(rank)) for rank in range(1, n))]),
        "Reduce_scatter": (lambda ch: reductions.reduce_scatter(ch, numbers(range(n)), NUMBERS, cuts),
                           lambda found: [each.view(np.float64).tolist() for each in found] == [[rank * n] for rank in range(n)]),
    }  # fmt: skip


@pytest.mark.parametrize("call", list(cases(1, 0)))
def test_steps_grow_with_the_logarithm(call: str) -> None:
    for n in SIZES:
        log = (n - 1).bit_length()
        for root in {0, n // 2, n - 1}:
            algorithm, right = cases(n, root)[call]
            ranks = Ranks(n)
            found = ranks.run(algorithm)
            assert right(found), (n, root, found)
            # A reduction in the order of the ranks goes to rank 0, and on to the root; two calls in one for the last.
            limit = 2 * log + 2
            busiest = max((ranks.sent[rank] + ranks.received[rank] for rank in range(n)), default=0)
            assert ranks.rounds <= limit, (n, root, ranks.rounds)
            assert busiest <= 2 * limit, (n, root, busiest)


@pytest.mark.parametrize("elements", [0, 1, 7, 50_000])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8])
def test_memory_of_any_size_at_any_number_of_ranks(n: int, elements: int) -> None:
    """Small, large and empty: other algorithms each."""
    def value(rank: int) -> Any:
        return numbers(np.arange(elements) + rank)

    total = sum((np.arange(elements) + float(rank) for rank in range(n)), np.zeros(elements))
    for found in Ranks(n).run(lambda ch: reductions.allreduce_memory(ch, value(ch.me), NUMBERS, 8)):
        assert found.view(np.float64).tolist() == total.tolist()

    places = [np.zeros(elements * 8, np.uint8) for _ in range(n)]
    places[n - 1][:] = value(3)
    Ranks(n).run(lambda ch: collectives.bcast_into(ch, places[ch.me].data, n - 1))
    assert all((place == value(3)).all() for place in places)

    gathered = [[np.zeros(elements * 8, np.uint8) for _ in range(n)] for _ in range(n)]
    for rank in range(n):
        gathered[rank][rank][:] = value(rank)
    Ranks(n).run(lambda ch: collectives.allgather_into(ch, [part.data for part in gathered[ch.me]]))
    assert all((gathered[rank][other] == value(other)).all() for rank in range(n) for other in range(n))

    cuts = [elements * rank // n * 8 for rank in range(n + 1)]
    for rank, part in enumerate(Ranks(n).run(lambda ch: reductions.reduce_scatter(ch, value(ch.me), NUMBERS, cuts))):
        assert part.view(np.float64).tolist() == total[cuts[rank] // 8:cuts[rank + 1] // 8].tolist()
