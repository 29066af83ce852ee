"""What a rank may send for its part of a collective call: anything of any length. The call fails with an error that names it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfparallel.runtime.mpi import collectives, reductions
from sfparallel.runtime.mpi.collectives import Channel, Collective, bundle, record_of, unbundle
from sfparallel.runtime.mpi.errors import MPIException
from sfparallel.runtime.mpi.pickling import Payload
from tests.test_mpi_algorithms import NUMBERS, Ranks

SIZE, BAD = 8, 5

numbers = st.integers(0, SIZE) | st.sampled_from([1 << 31, 1 << 40, 1 << 60, (1 << 64) - 1])
tables = st.builds(
    lambda count, records, rest: struct.pack("<Q", count) + b"".join(struct.pack("<IIQ", *each) for each in records) + rest,
    numbers, st.lists(st.tuples(st.integers(0, SIZE), st.sampled_from([0, 1 << 7, 1 << 16, 3]), numbers), max_size=SIZE),
    st.binary(max_size=100) | st.integers(0, 300).map(bytes))
lies = st.none() | st.tuples(st.sampled_from([0, 2, 1 << 7, 1 << 7 | 2, 255]), tables | st.binary(max_size=100))


class Lying(Channel):
    """Sends something else, as long as there is something."""

    __slots__ = ("lies",)
    lies: Iterator[tuple[int, bytes] | None]

    def send(self, rank: int, payload: Payload) -> Any:
        lie = next(self.lies, None)
        return super().send(rank, payload if lie is None else (lie[0], [lie[1]], len(lie[1])))


def plain(data: bytes) -> Payload:
    return 0, [data], len(data)


def own(ch: Channel, size: int = 9) -> bytes:
    return bytes([ch.me]) * size


ALGORITHMS: dict[str, Callable[[Channel], Collective]] = {
    "bcast": lambda ch: collectives.bcast(ch, plain(own(ch)) if ch.me == BAD else None, BAD),
    "bcast of much": lambda ch: collectives.bcast(ch, plain(bytes(1 << 20)) if ch.me == BAD else None, BAD),
    "gather": lambda ch: collectives.gather(ch, plain(own(ch)), 0),
    "gather of much": lambda ch: collectives.gather(ch, plain(own(ch, 100_000)), 0),
    "scatter": lambda ch: collectives.scatter(ch, [plain(own(ch))] * SIZE if ch.me == BAD else None, BAD),
    "allgather": lambda ch: collectives.allgather(ch, plain(own(ch))),
    "reduce": lambda ch: reductions.reduce(ch, np.ones(4).view(np.uint8), NUMBERS, 0),
    "allreduce": lambda ch: reductions.allreduce(ch, np.ones(4).view(np.uint8), NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_payload_in_a_collective_call(name: str) -> None:
    def algorithm(ch: Channel) -> Collective:
        if ch.me == BAD:
            liar = Lying(ch.endpoint, ch.ctx, ch.tag, ch.ranks, ch.me, ch.members)
            liar.lies = iter(told)
            ch = liar
        return ALGORITHMS[name](ch)

    told: list[Any] = []

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(st.lists(lies, min_size=1, max_size=4))
    def check(said: list[Any]) -> None:
        told[:] = said
        try:
            Ranks(SIZE).run(algorithm)
        except MPIException as error:
            assert f"rank {BAD}" in str(error) or "bytes" in str(error)
        except AssertionError as error:
            if "wait for ever" not in str(error):  # until the time limit: it has promised something
                raise

    check()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(tables | st.binary(max_size=60), st.booleans())
@example(b"", False)
@example(struct.pack("<Q", 1 << 60), False)
def test_any_bundle(data: bytes, direct: bool) -> None:
    ranks = [6, 7, 0]
    try:
        records = unbundle(data, ranks, BAD, direct=direct)
    except MPIException as error:
        assert f"rank {BAD} sent" in str(error)
        return
    assert [record.rank for record in records] == ranks
    assert all(direct if record.view is None else len(record.view) == record.nbytes for record in records)


def test_a_bundle_is_what_was_bundled() -> None:
    _, frames, nbytes = bundle([record_of(rank, plain(bytes([rank]) * size)) for rank, size in ((6, 3), (7, 0), (0, 200))])
    data = b"".join(frames)
    assert len(data) == nbytes
    assert [bytes(record.view or b"") for record in unbundle(data, [6, 7, 0], BAD)] == [b"\6" * 3, b"", b"\0" * 200]
