"""parallel_imap on the double: order, laziness, look-ahead, early ends, errors, losses, seeds."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.errors import StateError
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def test_a_failing_hook_costs_its_rank(double: Doubles) -> None:
    @sf.on_clone
    def hook(rank: int) -> None:
        if rank == 1:
            raise PermissionError(f"not rank {rank}")

    assert list(sf.parallel_imap(lambda x: x * x, range(20), n=3)) == [x * x for x in range(20)]
    with pytest.raises(sf.CloneLost, match="on_clone failed: PermissionError: not rank 1") as caught:
        sf.on_clone(lambda rank: hook(1))
        list(sf.parallel_imap(abs, range(4), n=2))
    assert isinstance(caught.value.__cause__, PermissionError)
    assert double.alive == 0


def test_each_item_has_an_error_of_its_own(double: Doubles) -> None:
    errors = list(sf.parallel_imap(lambda _: os._exit(3), range(6), n=1, chunksize=6, on_error="return"))
    notes = [getattr(error, "__notes__", []) for error in errors]
    assert [[note for note in each if note.startswith("in item")] for each in notes] == [[f"in item {i}"] for i in range(6)]


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_results_are_in_the_order_of_items(double: Doubles, chunksize: int) -> None:
    results = sf.parallel_imap(lambda a, b: a * b, range(30), range(1, 100), n=4, chunksize=chunksize)
    assert list(results) == [i * (i + 1) for i in range(30)]
    assert double.alive == 0


def test_endless_iterables_and_an_early_end(double: Doubles) -> None:
    squares = sf.parallel_imap(lambda x: x * x, itertools.count(), n=3)
    assert list(itertools.islice(squares, 20)) == [x * x for x in range(20)]
    squares.close()
    assert double.alive == 0
    assert list(squares) == []


def test_a_stream_that_is_forgotten_closes(double: Doubles) -> None:
    squares = sf.parallel_imap(lambda x: x * x, itertools.count(), n=2)
    assert next(squares) == 0
    del squares
    gc.collect()
    assert double.alive == 0
    with sf.parallel_imap(abs, itertools.count(), n=2) as numbers:
        assert next(numbers) == 0
    assert double.alive == 0


def test_items_are_read_only_so_far_ahead(double: Doubles) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            read.append(item)
            yield item

    with sf.parallel_imap(abs, items(), n=2, buffersize=5) as numbers:
        for taken in range(1, 30):
            next(numbers)
            assert taken <= len(read) <= taken + 5


def test_unordered_results_come_as_they_are_computed(double: Doubles) -> None:
    reader, writer = os.pipe()

    def work(item: int) -> int:
        if item == 0:
            os.read(reader, 1)
        return item

    results = sf.parallel_imap(work, range(10), n=2, ordered=False)
    early = [next(results) for _ in range(9)]
    assert sorted(early) == list(range(1, 10))
    os.write(writer, b"x")
    assert list(results) == [0]
    os.close(reader)
    os.close(writer)


def test_large_buffers_go_beside_the_pickle(double: Doubles) -> None:
    arrays = [np.full(100_000, k, dtype=np.float64) for k in range(6)]

    def double_it(array: Any) -> Any:
        array *= 2  # writable, and aligned
        return array

    for k, array in enumerate(sf.parallel_imap(double_it, arrays, n=2, chunksize=2)):
        assert array.shape == (100_000,) and (array == 2 * k).all()
    assert (arrays[5] == 5).all()


def test_functions_as_items_and_no_items_at_all(double: Doubles) -> None:
    assert list(sf.parallel_imap(lambda item: item(), [(lambda k=k: k) for k in range(6)], n=3)) == list(range(6))
    assert list(sf.parallel_imap(abs, [], n=8)) == []
    assert not double.lines or double.alive == 0


def test_not_more_clones_than_items(double: Doubles) -> None:
    pids = set(sf.parallel_imap(lambda _: os.getpid(), range(3), n=8))
    assert os.getpid() not in pids and 1 <= len(pids) <= 3


def test_what_fits_is_used_when_no_n_was_asked_for(double: Doubles) -> None:
    double.default_n, double.capacity = 8, 2
    assert len(set(sf.parallel_imap(lambda _: os.getpid(), range(50)))) <= 2
    with pytest.raises(sf.CapacityError):
        sf.parallel_imap(abs, range(5), n=4)


def inverse(x: int) -> float:
    return 1 / x


def test_errors(double: Doubles) -> None:
    results = sf.parallel_imap(inverse, [4, 2, 0, 1], n=2)
    assert [next(results), next(results)] == [0.25, 0.5]
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert caught.value.__notes__[0].startswith("raised in item 2, rank ")
    assert caught.value.__notes__[1] == "in item 2"
    assert list(results) == [] and double.alive == 0
    returned: list[Any] = list(sf.parallel_imap(inverse, [4, 0, 1], n=2, on_error="return"))
    assert [returned[0], type(returned[1]), returned[2]] == [0.25, ZeroDivisionError, 1.0]
    gathering = sf.parallel_imap(inverse, [4, 0, 1], n=2, on_error="gather")
    assert [next(gathering), next(gathering)] == [0.25, 1.0]
    with pytest.raises(sf.RankError, match="1 of 3 items failed; the first is item 1"):
        next(gathering)


def test_items_that_cannot_travel(double: Doubles) -> None:
    returned: list[Any] = list(sf.parallel_imap(type, [1, threading.Lock(), 3], n=2, on_error="return"))
    assert (returned[0], returned[2]) == (int, int)
    assert "cannot be sent to a clone" in str(returned[1])


def test_an_iterable_that_raises_ends_the_map(double: Doubles) -> None:
    def items() -> Iterator[int]:
        yield from range(7)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(sf.parallel_imap(abs, items(), n=2))
    assert double.alive == 0


def deadly(x: int) -> int:
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_a_lost_clone(double: Doubles) -> None:
    with pytest.raises(sf.CloneLost, match=r"rank 0 .*was lost: its process was killed by signal 9"):
        list(sf.parallel_imap(deadly, [5], n=1))
    results: list[Any] = list(sf.parallel_imap(deadly, [5, *range(20, 40)], n=2, chunksize=7, on_error="return"))
    assert isinstance(results[0], sf.CloneLost)
    assert results[1:] == list(range(20, 40)), "other items of the lost clone's chunk went to the other clone"
    results = list(sf.parallel_imap(deadly, [5] * 6, n=2, on_error="return"))
    assert [type(result) for result in results] == [sf.CloneLost] * 6
    assert "no clone is left" in str(results[5])


def test_timeout(double: Doubles) -> None:
    def work(x: int) -> int:
        if x == 3:
            signal.pause()
        return x

    results = sf.parallel_imap(work, range(6), n=2, timeout=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(sf.RegionTimeout):
        next(results)
    assert double.alive == 0


def test_streams_belong_to_items_not_to_ranks(double: Doubles) -> None:
    def draw(_: int) -> float:
        return float(sf.rng().random())

    expected = [float(np.random.default_rng(each).random()) for each in np.random.SeedSequence(3).spawn(12)]
    for n in (1, 2, 5):
        assert list(sf.parallel_imap(draw, range(12), n=n, seed=3)) == expected


def test_regions_inside_and_streams_of_the_parent(double: Doubles) -> None:
    inner = sf.parallel(n=2, merge=sum)(lambda x: x + sf.comm().rank)
    outer = sf.parallel_imap(inner, [10, 20, 30], n=3)

    @sf.parallel(n=2)
    def takes() -> int:
        return next(outer)

    with pytest.raises(StateError, match="belong to the parent"):
        takes()
    assert list(outer) == [21, 41, 61]


def test_wrong_arguments(double: Doubles) -> None:
    for wrong in ({"n": 0}, {"chunksize": 0}, {"buffersize": 0}, {"timeout": -1}, {"on_error": "x"}, {"seed": -1}):
        with pytest.raises(sf.UsageError):
            sf.parallel_imap(abs, [1], **wrong)  # type: ignore[call-overload]
    with pytest.raises(sf.UsageError):
        sf.parallel_imap(abs)


def test_items_and_results_may_change_after_they_were_given(double: Doubles) -> None:
    """Neither the iterable nor the function has to know when its array has been sent."""
    result = np.zeros(100_000)

    def refilled() -> Iterator[np.ndarray[Any, Any]]:
        array = np.zeros(100_000)
        for k in range(40):
            array[:] = k
            yield array

    def fill(item: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        result[:] = item
        return result

    assert [set(found) for found in sf.parallel_imap(fill, refilled(), n=2)] == [{float(k)} for k in range(40)]
    assert [set(found) for found in sf.parallel_map(lambda k: fill(np.full(100_000, k)), range(40), n=2)] == [
        {float(k)} for k in range(40)]
