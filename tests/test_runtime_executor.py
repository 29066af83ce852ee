"""sf.Executor on the double: futures, maps, losses and retries, fresh memory, ends."""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, as_completed, wait
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from tests.conftest import HANG_S
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def square(x: int) -> int:
    return x * x


def test_futures_know_their_clone(double: Doubles) -> None:
    with sf.Executor(3) as executor:
        futures = [executor.submit(square, k) for k in range(20)]
        assert {future.result() for future in as_completed(futures)} == {k * k for k in range(20)}
        assert {future.rank for future in futures} <= {0, 1, 2}
        assert {future.attempts for future in futures} == {1}
        assert not wait(futures).not_done
    assert double.alive == 0
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)


def test_asyncio(double: Doubles) -> None:
    async def main() -> list[int]:
        with sf.Executor(2) as executor:
            loop = asyncio.get_running_loop()
            wrapped = asyncio.wrap_future(executor.submit(square, 3))
            return await asyncio.gather(wrapped, loop.run_in_executor(executor, square, 4))

    assert asyncio.run(main()) == [9, 16]


@pytest.mark.parametrize("chunksize", [1, 4, 50])
def test_maps(double: Doubles, chunksize: int) -> None:
    with sf.Executor(2) as executor:
        expected = [k * k for k in range(25)]
        assert list(executor.map(square, range(25), chunksize=chunksize)) == expected
        assert list(executor.map(square, range(25), chunksize=chunksize, buffersize=2)) == expected
        assert sorted(executor.map(square, range(25), chunksize=chunksize, ordered=False)) == expected
        assert sorted(executor.map(square, range(25), chunksize=chunksize, ordered=False, buffersize=3)) == expected
        assert list(executor.map(square, [])) == []


def test_a_map_with_a_buffer_reads_as_results_are_taken(double: Doubles) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10**9):
            read.append(item)
            yield item

    with sf.Executor(2) as executor:
        results = executor.map(square, items(), buffersize=3)
        assert [next(results) for _ in range(10)] == [k * k for k in range(10)]
        assert len(read) <= 13
        results.close()  # type: ignore[attr-defined]


def test_timeouts_of_maps(double: Doubles) -> None:
    with sf.Executor(2) as executor:
        for ordered in (True, False):
            results = executor.map(time.sleep, [0, 300], timeout=3, ordered=ordered)
            assert next(results) is None
            with pytest.raises(TimeoutError):
                next(results)
        executor.kill()


def test_exceptions_keep_their_type_and_name_the_clone(double: Doubles) -> None:
    with sf.Executor(1) as executor:
        error = executor.submit(divmod, 1, 0).exception()
        assert isinstance(error, ZeroDivisionError)
        assert error.__notes__[0].startswith("raised in rank 0 (host ")
        left = executor.submit(sys.exit, 3).exception()
        assert isinstance(left, sf.RankExit) and (left.rank, left.code) == (0, 3)
        assert executor.submit(square, 2).result() == 4


def test_large_arrays_both_ways(double: Doubles) -> None:
    with sf.Executor(2) as executor:
        array = np.arange(200_000, dtype=np.float64)
        result = executor.submit(np.multiply, array, 2).result()
        assert (result == 2 * array).all()
        result += 1


def test_lambdas_and_what_cannot_travel(double: Doubles) -> None:
    with sf.Executor(1) as executor:
        assert executor.submit(lambda x: x + 1, 1).result() == 2
        assert isinstance(executor.submit(square, threading.Lock()).exception(), sf.ResultNotPicklable)


def wait_for(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def test_tasks_do_not_wait_behind_a_long_one(double: Doubles, tmp_path: Any) -> None:
    """Many short tasks are sent at a time; a long one among them holds up none of the others."""
    flag = tmp_path / "flag"
    with sf.Executor(2) as executor:
        list(executor.map(square, range(200)))  # it is known now that tasks are short
        futures = [executor.submit(square, k) for k in range(60)]
        long = executor.submit(wait_for, str(flag))
        futures += [executor.submit(square, k) for k in range(300)]
        assert not wait(futures, timeout=HANG_S).not_done
        assert not long.done()
        flag.touch()
        assert long.result()
        assert {future.attempts for future in (long, *futures)} == {1}


def once(path: str) -> int:
    """Kills its clone the first time."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return os.getpid()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def always() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_clone_is_replaced_and_its_task_is_retried(double: Doubles, tmp_path: Any) -> None:
    with sf.Executor(2, retries=1) as executor:
        others = [executor.submit(square, k) for k in range(40)]
        lucky, doomed = executor.submit(once, str(tmp_path / "flag")), executor.submit(always)
        assert lucky.result() and lucky.attempts == 2
        error = doomed.exception()
        assert isinstance(error, sf.CloneLost) and error.rank in (0, 1) and doomed.attempts == 2
        assert "killed by signal 9" in error.cause and error.console == "last words"
        assert [future.result() for future in others] == [k * k for k in range(40)]
        pids = {executor.submit(os.getpid).result() for _ in range(10)}
        assert 1 <= len(pids) <= 2


def test_without_retries_a_task_is_begun_once(double: Doubles, tmp_path: Any) -> None:
    with sf.Executor(1) as executor:
        future, behind = executor.submit(once, str(tmp_path / "flag")), executor.submit(square, 5)
        assert isinstance(future.exception(), sf.CloneLost) and future.attempts == 1
        assert behind.result() == 25


def test_many_losses(double: Doubles, tmp_path: Any) -> None:
    """None lost, none begun again after its success."""
    with sf.Executor(3, retries=1) as executor:
        flags = [str(tmp_path / str(k)) for k in range(50)]
        futures = [executor.submit(square, k) if k % 25 else executor.submit(once, flags[k]) for k in range(50)]
        done = collections.Counter(type(future.result()) for future in futures)
    assert done == {int: 50}
    assert {future.attempts for k, future in enumerate(futures) if k % 25} == {1}


TABLE = {"here": "then"}


def look() -> str:
    return TABLE["here"]


def test_clones_have_the_memory_of_the_first_submit_until_they_are_refreshed(double: Doubles) -> None:
    TABLE["here"] = "before"
    with sf.Executor(2, idle_timeout=0.05) as executor:
        TABLE["here"] = "then"
        assert executor.submit(look).result() == "then"
        TABLE["here"] = "now"
        assert executor.submit(look).result() == "then"
        while double.alive:
            executor._crew.wake()  # type: ignore[union-attr]
            time.sleep(0.01)
        assert executor.submit(look).result() == "then", "clones that come back have the same memory"
        executor.refresh()
        assert executor.submit(look).result() == "now"


def test_a_function_of_the_main_module_that_was_defined_anew(double: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec("def f(): return 'old'", main.__dict__)
    with sf.Executor(1) as executor:
        assert executor.submit(main.f).result() == "old"
        exec("def f(): return 'new'\ndef g(): return 'later'", main.__dict__)
        assert executor.submit(main.f).result() == "new"
        assert list(executor.map(main.g, *[()])) == []
        assert executor.submit(main.g).result() == "later"


def test_initializers(double: Doubles) -> None:
    sentinel = object()  # not pickled: it is in the clones' memory

    def prepare(value: object) -> None:
        assert value is sentinel
        TABLE["here"] = "prepared"

    with sf.Executor(2, initializer=prepare, initargs=(sentinel,)) as executor:
        assert {executor.submit(look).result() for _ in range(6)} == {"prepared"}
    executor = sf.Executor(2, initializer=divmod, initargs=(1, 0))
    error = executor.submit(look).exception()
    assert isinstance(error, BrokenExecutor) and isinstance(error, sf.ExecutorBroken)
    assert isinstance(error.__cause__, ZeroDivisionError)
    with pytest.raises(BrokenExecutor):
        executor.submit(look)
    executor.shutdown()
    assert double.alive == 0
    executor = sf.Executor(1, initializer=always)
    assert isinstance(executor.submit(look).exception(), sf.SfError)
    executor.shutdown()


def test_cancelling(double: Doubles) -> None:
    with sf.Executor(1) as executor:
        first, second, third = (executor.submit(time.sleep, 0.2) for _ in range(3))
        assert second.cancel() and second.cancelled()
        executor.shutdown(wait=False, cancel_futures=True)
        assert not wait([first, third]).not_done
        assert third.cancelled() or third.done()


def test_kill_and_ctrl_c(double: Doubles) -> None:
    with sf.Executor(1) as executor:
        future = executor.submit(signal.pause)
        executor.kill()
        assert isinstance(future.exception(), sf.Closed) or future.cancelled()
    with pytest.raises(KeyboardInterrupt), sf.Executor(1) as executor:
        executor.submit(signal.pause)
        raise KeyboardInterrupt
    assert double.alive == 0


def test_one_that_is_forgotten_finishes(double: Doubles) -> None:
    executor = sf.Executor(2)
    results = executor.map(square, range(10))
    del executor
    gc.collect()
    assert list(results) == [k * k for k in range(10)]
    deadline = time.monotonic() + 30
    while double.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert double.alive == 0


def test_callbacks_may_submit_and_may_raise(double: Doubles) -> None:
    later: list[Any] = []
    with sf.Executor(1) as executor:
        def again(future: Any) -> None:
            later.append(executor.submit(square, future.result()))

        executor.submit(square, 3).add_done_callback(again)
        while not later:
            time.sleep(0.01)
        assert later[0].result() == 81

        def refuses(_: Any) -> None:
            with pytest.raises(sf.StateError):
                executor.refresh()
            later.append(None)

        executor.submit(square, 3).add_done_callback(refuses)
        while len(later) < 2:
            time.sleep(0.01)


def test_several_threads_and_executors(double: Doubles) -> None:
    with sf.Executor(2) as one, sf.Executor(2) as other:
        results: list[int] = []

        def use(executor: sf.Executor) -> None:
            results.extend(executor.map(square, range(50)))

        threads = [threading.Thread(target=use, args=(executor,)) for executor in (one, other, one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert collections.Counter(results) == collections.Counter([k * k for k in range(50)] * 4)


def inner(n: int) -> list[int]:
    with sf.Executor(2) as executor:
        return list(executor.map(square, range(n)))


def test_tasks_may_use_executors_and_regions(double: Doubles) -> None:
    with sf.Executor(2) as executor:
        assert executor.submit(inner, 4).result() == [0, 1, 4, 9]
        assert executor.submit(lambda: sf.comm().size).result() == 1


def test_streams_belong_to_tasks(double: Doubles) -> None:
    expected = [float(np.random.default_rng(each).random()) for each in np.random.SeedSequence(3).spawn(8)]
    for workers in (1, 3):
        with sf.Executor(workers, seed=3) as executor:
            futures = [executor.submit(lambda: float(sf.rng().random())) for _ in range(8)]
            assert [future.result() for future in futures] == expected


def test_capacity(double: Doubles) -> None:
    double.default_n, double.capacity = 8, 2
    with sf.Executor() as executor:
        assert len({executor.submit(os.getpid).result() for _ in range(20)}) <= 2
    with sf.Executor(4) as executor, pytest.raises(sf.CapacityError):
        executor.submit(square, 1)


def test_wrong_arguments(double: Doubles) -> None:
    for wrong in ({"max_workers": 0}, {"max_workers": 1.5}, {"retries": -1}, {"idle_timeout": 0}):
        with pytest.raises(sf.UsageError):
            sf.Executor(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        sf.Executor(1, initializer=3)  # type: ignore[arg-type]
    with sf.Executor(1) as executor:
        for more in ({"chunksize": 0}, {"buffersize": 0}):
            with pytest.raises(sf.UsageError):
                executor.map(square, [1], **more)


def test_arguments_may_change_after_submit(double: Doubles) -> None:
    array = np.ones(100_000)
    with sf.Executor(1) as executor:
        executor.submit(time.sleep, 0.2)
        future = executor.submit(np.sum, array)
        array[:] = 0
        assert future.result() == 100_000


def test_shutdown_in_a_callback(double: Doubles) -> None:
    with sf.Executor(2) as executor:
        first = executor.submit(square, 2)
        first.add_done_callback(lambda _: executor.shutdown())
        assert first.result() == 4
    assert double.alive == 0


def test_kill_reaches_the_clones_that_refresh_waits_for(double: Doubles) -> None:
    executor = sf.Executor(1)
    future = executor.submit(time.sleep, 1000)
    while not future.running():
        time.sleep(0.01)
    refreshing = threading.Thread(target=executor.refresh)
    refreshing.start()
    while executor._crew is not None:
        time.sleep(0.01)
    executor.kill()
    refreshing.join(20)
    assert not refreshing.is_alive() and double.alive == 0
    with pytest.raises(sf.Closed):
        future.result()
    executor.shutdown()
