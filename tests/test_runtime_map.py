"""parallel_map on the double: order, distribution, errors, losses, seeds."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def test_results_are_in_the_order_of_items(double: Doubles) -> None:
    assert sf.parallel_map(lambda a, b: a * b, range(30), range(1, 100), n=4) == [i * (i + 1) for i in range(30)]


def test_iterators_are_read_before_the_fork(double: Doubles) -> None:
    assert sf.parallel_map(str, iter("abc"), n=2) == ["a", "b", "c"]


def test_items_are_never_pickled(double: Doubles) -> None:
    items = [(lambda k=k: k) for k in range(6)] + [iter([9]).__next__]
    assert sf.parallel_map(lambda item: item(), items, n=3) == [0, 1, 2, 3, 4, 5, 9]


def test_not_more_clones_than_items(double: Doubles) -> None:
    sizes = sf.parallel_map(lambda _: sf.comm().size, range(3), n=8)
    assert sizes == [3, 3, 3]
    assert sf.parallel_map(abs, [], n=8) == []


def test_what_fits_is_used_when_no_n_was_asked_for(double: Doubles) -> None:
    double.default_n, double.capacity = 8, 2
    assert sf.parallel_map(lambda _: sf.comm().size, range(5)) == [2] * 5
    with pytest.raises(sf.CapacityError):
        sf.parallel_map(abs, range(5), n=4)


def test_work_goes_to_whoever_is_free(double: Doubles) -> None:
    reader, writer = os.pipe()

    def work(item: int) -> int:
        if item == 0:
            os.read(reader, 1)  # until all other items are done, by the other clone
        if item == 39:
            os.write(writer, b"x")
        return sf.comm().rank

    ranks = sf.parallel_map(work, range(40), n=2, chunksize=1)
    assert ranks == [0] + [1] * 39
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_chunksize(double: Doubles, chunksize: int) -> None:
    assert sf.parallel_map(abs, range(-20, 0), n=3, chunksize=chunksize) == list(range(20, 0, -1))
    with pytest.raises(sf.UsageError):
        sf.parallel_map(abs, [1], chunksize=0)


def test_streams_belong_to_items_not_to_ranks(double: Doubles) -> None:
    def draw(_: int) -> float:
        return float(sf.rng().random())

    expected = [float(np.random.default_rng(each).random()) for each in np.random.SeedSequence(3).spawn(12)]
    for n in (1, 2, 5):
        assert sf.parallel_map(draw, range(12), n=n, seed=3) == expected


def inverse(x: int) -> float:
    return 1 / x


def test_an_error_names_the_item(double: Doubles) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        sf.parallel_map(inverse, [4, 2, 0, 1], n=2)
    assert caught.value.__notes__[0].startswith("raised in item 2, rank ")
    results: list[Any] = sf.parallel_map(inverse, [4, 0, 1], n=2, on_error="return")
    assert [results[0], type(results[1]), results[2]] == [0.25, ZeroDivisionError, 1.0]
    with pytest.raises(sf.RankError, match="1 of 3 items failed; the first is item 1") as gathered:
        sf.parallel_map(inverse, [4, 0, 1], n=2, on_error="gather")
    assert gathered.value.results == {0: 0.25, 2: 1.0}


def deadly(x: int) -> int:
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_a_lost_clone(double: Doubles) -> None:
    with pytest.raises(sf.CloneLost, match=r"item 0, rank 0 .* was lost: its process was killed by signal 9"):
        sf.parallel_map(deadly, [5], n=1)
    results: list[Any] = sf.parallel_map(deadly, [5, *range(20, 40)], n=2, chunksize=7, on_error="return")
    assert isinstance(results[0], sf.CloneLost)
    assert results[1:] == list(range(20, 40)), "other items of the lost clone's chunk went to the other clone"


def test_all_clones_lost(double: Doubles) -> None:
    results: list[Any] = sf.parallel_map(deadly, [5, 5, 5, 5], n=2, on_error="return")
    assert [type(result) for result in results] == [sf.CloneLost] * 4
    assert "was not computed: the last clone" in str(results[3])


def test_timeout(double: Doubles) -> None:
    def work(x: int) -> int:
        if x == 1:
            signal.pause()
        return x

    with pytest.raises(sf.RegionTimeout) as caught:
        sf.parallel_map(work, range(6), n=2, timeout=4, chunksize=1)
    assert len(caught.value.missing) == 1
    assert caught.value.results == {0: 0, 2: 2, 3: 3, 4: 4, 5: 5}


def test_regions_inside_maps(double: Doubles) -> None:
    inner = sf.parallel(n=2, merge=sum)(lambda x: x + sf.comm().rank)
    assert sf.parallel_map(inner, [10, 20, 30], n=3) == [21, 41, 61]
