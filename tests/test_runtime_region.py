"""Parallel regions on a double that forks with os.fork: results, errors, losses, limits, futures."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.runtime.here import HERE
from tests.conftest import HANG_S
from tests.fork_double import Doubles, start_afresh
from tests.fork_double import double_fixture as double_fixture


def forever() -> None:
    while True:
        signal.pause()


def test_results_come_in_rank_order_with_arguments(double: Doubles) -> None:
    @sf.parallel(n=5)
    def work(a: int, *, b: int) -> tuple[int, int, int]:
        comm = sf.comm()
        return comm.rank, comm.Get_size(), a * b

    assert work(6, b=7) == [(rank, 5, 42) for rank in range(5)]
    assert work(1, b=1)[4] == (4, 5, 1)
    assert len(double.lines) == 1, "one line serves all regions of a thread"
    first, last = double.lines[0].reports[0]
    assert 0 < first <= last


def test_without_parentheses_n_comes_from_sfrun(double: Doubles) -> None:
    double.default_n = 3

    @sf.parallel
    def where() -> int:
        """Docs."""
        return sf.comm().rank

    assert where() == [0, 1, 2]
    assert where.__doc__ == "Docs."
    assert where.__name__ == "where"
    assert where.__wrapped__ is not where
    assert where.options(n=2)() == [0, 1]


def test_clones_have_the_parents_memory_and_their_changes_stay_theirs(double: Doubles) -> None:
    box = [0]

    @sf.parallel(n=3)
    def work() -> list[int]:
        box.append(sf.comm().rank)
        return box

    assert work() == [[0, 0], [0, 1], [0, 2]]
    assert box == [0]


def test_methods_can_be_parallel(double: Doubles) -> None:
    class Model:
        scale = 10

        @sf.parallel(n=2)
        def run(self, x: int) -> int:
            return self.scale * x + sf.comm().rank

    assert Model().run(4) == [40, 41]
    assert Model().run.options(merge=sum)(4) == 81


def test_merge(double: Doubles) -> None:
    @sf.parallel(n=4, merge=sum)
    def rank() -> int:
        return sf.comm().rank

    assert rank() == 6
    assert rank.options(merge=None)() == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        rank.options(merge=lambda results: 1 // 0)()


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 2.0}, {"n": True}, {"timeout": 0}, {"on_error": "ignore"}, {"seed": -1},
                                 {"merge": 3}, {"collect": "../x"}, {"collect": "/etc/*"}, {"workers": 3}])
def test_wrong_options_are_refused_before_any_call(bad: dict[str, Any]) -> None:
    with pytest.raises(sf.UsageError):
        sf.parallel(**bad)
    with pytest.raises(sf.UsageError):
        sf.parallel(n=2)(len).options(**bad)


def test_arrays_of_50_mb_gather_bit_exact_and_writable(double: Doubles) -> None:
    @sf.parallel(n=8, seed=1)
    def draw() -> Any:
        return sf.rng().random(6_250_000)

    expected = [np.random.default_rng(sequence) for sequence in np.random.SeedSequence(1).spawn(8)]
    for array, generator in zip(draw(), expected, strict=True):
        assert array.tobytes() == generator.random(6_250_000).tobytes()
        array[0] = 1.0


# Errors ----------------------------------------------------------------------------------------------------------------------


@sf.parallel(n=4)
def rank_2_fails() -> int:
    rank = sf.comm().rank
    if rank == 2:
        raise LookupError("no such thing", rank)
    if rank == 3:
        forever()
    return rank


def test_raise_is_the_original_exception_with_rank_host_and_traceback(double: Doubles) -> None:
    with pytest.raises(LookupError) as caught:
        rank_2_fails()
    assert caught.value.args == ("no such thing", 2)
    (note,) = caught.value.__notes__
    assert note.startswith("raised in rank 2 (host host1):\nTraceback")
    assert "in rank_2_fails" in note
    assert "sfparallel/runtime" not in note
    assert all(rank == result for rank, result in caught.value.sf_results.items())  # type: ignore[attr-defined]


def test_return_puts_exceptions_into_the_list(double: Doubles) -> None:
    @sf.parallel(n=3, on_error="return")
    def work() -> int:
        return 10 // sf.comm().rank

    first, *others = work()
    assert isinstance(first, ZeroDivisionError)
    assert others == [10, 5]


def test_gather_waits_for_all(double: Doubles) -> None:
    @sf.parallel(n=4, on_error="gather")
    def work() -> int:
        rank = sf.comm().rank
        if rank % 2:
            raise ValueError(rank)
        return rank

    with pytest.raises(sf.RankError, match="2 of 4 ranks failed; the first is rank 1: ValueError: 1") as caught:
        work()
    assert {rank: error.args for rank, error in caught.value.errors.items()} == {1: (1,), 3: (3,)}
    assert caught.value.results == {0: 0, 2: 2}
    assert isinstance(caught.value.__cause__, ValueError)


def test_results_that_cannot_travel(double: Doubles) -> None:
    @sf.parallel(n=2, on_error="return")
    def work() -> Any:
        return (x for x in "ab") if sf.comm().rank else "fine"

    fine, error = work()
    assert fine == "fine"
    assert isinstance(error, sf.ResultNotPicklable)
    assert "rank 1" in error.__notes__[0]


def test_exceptions_that_cannot_travel(double: Doubles) -> None:
    class Odd(Exception):
        def __init__(self, a: object, b: object) -> None:
            super().__init__("odd")
            self.handle = threading.Lock()

    @sf.parallel(n=1)
    def work() -> None:
        raise Odd(1, 2)

    with pytest.raises(sf.RemoteError, match="Odd: odd") as caught:
        work()
    assert "raise Odd(1, 2)" in caught.value.traceback_text


@pytest.mark.parametrize("leave", [sys.exit, sf.exit], ids=["sys.exit", "sf.exit"])
def test_exit_in_a_rank(double: Doubles, leave: Callable[[int], None]) -> None:
    @sf.parallel(n=2)
    def work() -> None:
        if sf.comm().rank == 1:
            leave(2)
        forever()

    with pytest.raises(sf.RankExit, match=r"rank 1 called sys.exit\(2\)"):
        work()


def die(how: str) -> None:
    if how == "os._exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["os._exit", "SIGKILL"])
def test_a_lost_clone_is_reported_at_once(double: Doubles, how: str) -> None:
    @sf.parallel(n=3)
    def work() -> None:
        if sf.comm().rank == 1:
            die(how)
        forever()

    with pytest.raises(sf.CloneLost, match=r"rank 1 .* was lost: its pro") as caught:
        work()
    assert (caught.value.rank, caught.value.host, caught.value.console) == (1, "host0", "last words")


def test_other_results_of_a_region_with_a_loss_stay_reachable(double: Doubles) -> None:
    @sf.parallel(n=3, on_error="return")
    def work() -> int:
        if sf.comm().rank == 1:
            os._exit(0)
        return sf.comm().rank

    zero, lost, two = work()
    assert (zero, two) == (0, 2)
    assert isinstance(lost, sf.CloneLost)
    with pytest.raises(sf.RankError) as caught:
        work.options(on_error="gather")()
    assert caught.value.results == {0: 0, 2: 2}


def test_timeout_names_the_missing_and_keeps_the_others(double: Doubles) -> None:
    @sf.parallel(n=4, timeout=4.0)
    def work() -> int:
        if sf.comm().rank in (1, 3):
            forever()
        return sf.comm().rank

    with pytest.raises(sf.RegionTimeout, match=r"longer than 4\.0 s; no answer from ranks 1 and 3") as caught:
        work()
    assert caught.value.missing == [1, 3]
    assert caught.value.results == {0: 0, 2: 2}
    assert isinstance(caught.value, TimeoutError)


def test_ctrl_c_stops_the_clones(double: Doubles) -> None:
    @sf.parallel(n=2)
    def work() -> None:
        if sf.comm().rank == 0:
            os.kill(os.getppid(), signal.SIGINT)
        forever()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert double.alive == 0


def test_ctrl_c_during_the_fork_is_for_the_parent_only(double: Doubles) -> None:
    line = double.connect()
    HERE.give_back(line)
    fork = line.clone

    def interrupted(ticket: int, clones: int, context: bytes, within_s: float | None = None) -> Any:
        signal.raise_signal(signal.SIGINT)  # as if the key was pressed just before the snapshot: every VM has it pending
        return fork(ticket, clones, context)

    line.clone = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rank_2_fails()
    assert double.alive == 0


def test_an_n_that_does_not_fit_is_refused_before_cloning(double: Doubles) -> None:
    double.capacity = 3
    with pytest.raises(sf.CapacityError, match="4 clones do not fit on this host now; 3 would") as caught:
        rank_2_fails()
    assert caught.value.fits == 3
    assert sf.parallel(n=3)(os.getppid)() == [os.getpid()] * 3


def test_outside_a_vm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SF_AGENT_SOCKET", str(tmp_path / "none"))
    assert not sf.in_clone()
    for call in (rank_2_fails, lambda: sf.parallel_map(abs, [1]), sf.comm, sf.rng, lambda: sf.request_ticket(1),
                 rank_2_fails.submit):
        with pytest.raises(sf.OutsideVMError, match=r"sfrun -n 8 script\.py"):
            call()


# Futures, threads, nesting ---------------------------------------------------------------------------------------------------


def test_submit(double: Doubles) -> None:
    reader, writer = os.pipe()

    @sf.parallel(n=2, merge=sum)
    def work(x: int) -> int:
        os.read(reader, 1)
        return x + sf.comm().rank

    future = work.submit(20)
    assert future.running()
    os.write(writer, b"gogo")
    assert future.result(timeout=HANG_S) == 41
    assert not future.cancel()
    os.close(reader)
    os.close(writer)


def test_futures_of_failing_regions(double: Doubles) -> None:
    future = rank_2_fails.submit()
    assert isinstance(future.exception(timeout=HANG_S), LookupError)
    with pytest.raises(LookupError):
        future.result()


def test_cancel_kills_the_clones(double: Doubles) -> None:
    future = sf.parallel(n=2)(forever).submit()
    assert double.alive == 2
    done = as_completed([future], timeout=HANG_S)
    assert future.cancel()
    assert next(done) is future
    with pytest.raises(CancelledError):
        future.result()
    assert future.cancelled()
    for thread in threading.enumerate():
        if thread.name.startswith("sf-gather"):
            thread.join(30)
    assert double.alive == 0


def test_regions_in_many_threads(double: Doubles) -> None:
    @sf.parallel(n=2)
    def work(x: int) -> tuple[int, int]:
        return x, sf.comm().rank

    results: dict[int, Any] = {}

    def call(x: int) -> None:
        for _ in range(3):
            results[x] = work(x)

    threads = [threading.Thread(target=call, args=(x,)) for x in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {x: [(x, 0), (x, 1)] for x in range(4)}


def test_regions_in_regions(double: Doubles) -> None:
    @sf.parallel(n=2)
    def inner(x: int) -> int:
        return 10 * x + sf.comm().rank

    @sf.parallel(n=2)
    def outer() -> tuple[list[int], int, int]:
        before = sf.comm().rank
        return inner(before), before, sf.comm().rank

    assert outer() == [([0, 1], 0, 0), ([10, 11], 1, 1)]


def test_50_regions_leave_nothing_open(double: Doubles) -> None:
    rank = sf.parallel(n=2)(lambda: sf.comm().rank)
    rank()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert rank() == [0, 1]
    # ZeroMQ's reaper thread closes what it owned in the background.
    deadline = time.monotonic() + 10
    while (now := len(os.listdir("/proc/self/fd"))) > before and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert now <= before


# What else is seen -----------------------------------------------------------------------------------------------------------


def test_in_clone_and_hooks(double: Doubles) -> None:
    seen: list[Any] = []
    sf.on_clone(lambda rank: seen.append(("first", rank)))

    @sf.on_clone
    def hook(rank: int) -> None:
        seen.append(("second", rank, sf.comm().size))

    @sf.parallel(n=2)
    def work() -> tuple[bool, list[Any]]:
        return sf.in_clone(), seen

    assert not sf.in_clone()
    assert work() == [(True, [("first", 0), ("second", 0, 2)]), (True, [("first", 1), ("second", 1, 2)])]
    assert not seen


def test_a_failing_hook_is_an_error_of_the_rank(double: Doubles) -> None:
    @sf.on_clone
    def hook(rank: int) -> None:
        raise PermissionError(rank)

    ran: list[int] = []
    answers = sf.parallel(n=2, on_error="return")(lambda: ran.append(1))()
    assert all(isinstance(answer, PermissionError) for answer in answers)


def test_progress(double: Doubles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rank = sf.parallel(n=3)(lambda: sf.comm().rank)
    rank()
    assert capsys.readouterr().err == ""
    rank.options(progress=True)()
    assert capsys.readouterr().err.endswith("3/3\n")
    monkeypatch.setenv("SF_PROGRESS", "1")
    sf.parallel_map(abs, range(4), n=2)
    assert "abs: 4/4" in capsys.readouterr().err
    rank.options(progress=False)()
    assert capsys.readouterr().err == ""


def test_seeds(double: Doubles) -> None:
    draw = sf.parallel(n=3)(lambda: float(sf.rng().random()))
    seeded = draw.options(seed=7)
    expected = [float(np.random.default_rng(each).random()) for each in np.random.SeedSequence(7).spawn(3)]
    assert seeded() == expected == seeded()
    assert len({*draw(), *draw()}) == 6
    twice = sf.parallel(n=1, seed=7)(lambda: [float(sf.rng().random()), float(sf.rng().random())])
    assert len(set(twice()[0])) == 2
    assert sf.rng() is sf.rng()


def test_a_job_seed_makes_every_run_the_same_and_every_region_different(double: Doubles) -> None:
    def run() -> list[float]:
        start_afresh()
        HERE.connect = double.connect
        double.seed = 5
        draw = sf.parallel(n=2)(lambda: float(sf.rng().random()))
        nested = sf.parallel(n=2)(draw)
        return [*draw(), *draw(), float(sf.rng().random()), *nested()[0], *nested()[1]]

    first = run()
    assert len(set(first)) == len(first)
    assert run() == first


def test_collect(double: Doubles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clones of the double share the parent's files, so what was collected differs from what was there in its inode only."""
    monkeypatch.chdir(tmp_path)

    @sf.parallel(n=1, collect="out/*.txt", on_error="return")
    def work() -> int:
        os.makedirs("out", exist_ok=True)
        path = Path("out/x.txt")
        path.unlink(missing_ok=True)
        path.write_text("x" * 100_000)
        os.chdir("/")  # the globs are relative to where the region began
        return path.absolute().exists() or (tmp_path / path).stat().st_ino

    (inode,) = work()
    assert inode != (tmp_path / "out/x.txt").stat().st_ino
    assert (tmp_path / "out/x.txt").read_text() == "x" * 100_000

    @sf.parallel(n=2, collect=["*.log"])
    def conflict() -> int:
        (tmp_path / "one.log").write_text(str(os.getpid()))
        return sf.comm().rank

    with pytest.raises(sf.CollectConflict, match=r"ranks 0 and 1 both wrote 'one\.log'") as caught:
        conflict()
    assert caught.value.results == {0: 0, 1: 1}
    failing = sf.parallel(n=1, collect="*.bin")(lambda: (tmp_path / "a.bin").write_text("x") // 0)
    with pytest.raises(ZeroDivisionError):
        failing()
