"""sf.Executor, sf.parallel_imap and mpi4py.futures in programs: on real VMs, and with `sfrun --local`."""

from __future__ import annotations

import os
import signal

import pytest

from tests.conftest import Sfrun, machines_of

vms = pytest.mark.needs("qemu", "image", "root")
BOTH = [pytest.param((), id="vms", marks=vms), pytest.param(("--local",), id="local")]


@pytest.mark.parametrize("how", BOTH)
def test_streams_and_executors(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(
        """
        import asyncio, itertools, os, time
        from concurrent.futures import as_completed
        import numpy as np
        import sfparallel as sf

        table = np.arange(1000.0)                        # in every clone's memory: not sent
        squares = sf.parallel_imap(lambda x: float(table[x]) ** 2, itertools.count(), n=2)
        assert list(itertools.islice(squares, 12)) == [k * k for k in range(12)]
        squares.close()
        assert sorted(sf.parallel_imap(abs, range(-9, 0), n=2, ordered=False, chunksize=2)) == list(range(1, 10))

        def look(k):
            return float(table[k])

        with sf.Executor(2, retries=1, idle_timeout=1) as executor:
            futures = [executor.submit(look, k) for k in range(10)]
            assert sorted(future.result() for future in as_completed(futures)) == [float(k) for k in range(10)]
            assert {future.rank for future in futures} <= {0, 1}
            array = np.ones(100_000)
            assert (executor.submit(np.add, array, table[3]).result() == 4).all()
            doomed = executor.submit(os._exit, 3)
            try:
                doomed.result()
            except sf.CloneLost as error:
                assert doomed.attempts == 2, doomed.attempts
                print("lost:", error.cause)
            table += 1
            assert executor.submit(look, 1).result() == 1.0
            time.sleep(3)                                # clones are let go, and made anew
            assert executor.submit(look, 1).result() == 1.0
            executor.refresh()
            assert executor.submit(look, 1).result() == 2.0

            async def main():
                return await asyncio.wrap_future(executor.submit(look, 5))

            assert asyncio.run(main()) == 6.0
        print("done")
        """, *how,
    ).ok()  # fmt: skip
    assert "lost: " in ended.out and ended.out.endswith("done\n")


@pytest.mark.parametrize("how", BOTH)
def test_the_interpreter_waits_at_its_exit(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(
        """
        import atexit, time
        import sfparallel as sf

        @atexit.register
        def last():
            try:
                executor.submit(id, None)
            except RuntimeError as error:
                print(error)

        def work():
            time.sleep(0.5)
            print("apple", flush=True)

        executor = sf.Executor(2)
        executor.submit(work)
        other = sf.Executor(1)
        other.submit(work)
        other.shutdown(wait=False)
        """, "--no-label", *how,
    ).ok()  # fmt: skip
    assert ended.out.splitlines() == ["apple", "apple", "cannot schedule new futures after interpreter shutdown"]


def test_clones_of_clones_end_with_them(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        def square(x):
            return x * x

        executor = sf.Executor(2)
        print(list(executor.map(square, range(3))))
        print(sf.parallel(n=2)(lambda: list(executor.map(square, range(3))))())
        """, "--local",
    ).ok()  # fmt: skip
    assert ended.out.splitlines() == ["[0, 1, 4]", "[[0, 1, 4], [0, 1, 4]]"]


KILLED = """
    import sys, time
    import sfparallel as sf

    TASKS, S = int(sys.argv[1]), 0.001

    def task(k):
        time.sleep(S)
        return k

    with sf.Executor(4, retries=1) as executor:
        started = time.monotonic()
        futures = []
        done = {}

        def note(future):
            k = future.result()
            done[k] = done.get(k, 0) + 1
            if len(done) == TASKS // 2:
                print("half", flush=True)

        for k in range(TASKS):
            future = executor.submit(task, k)
            future.add_done_callback(note)
            futures.append(future)
        assert [future.result() for future in futures] == list(range(TASKS)), "none lost"
        seconds = time.monotonic() - started
    assert done == dict.fromkeys(range(TASKS), 1), "each succeeded once"
    attempts = [future.attempts for future in futures]
    assert sum(attempts) in (TASKS, TASKS + 1), "at most the task of the killed clone was begun again"
    print(f"again {sum(attempts) - TASKS}, {seconds:.1f} s, {1e3 * seconds / TASKS:.2f} ms per task")
    """


@vms
def test_kill_9_of_a_clone_half_way(sfrun: Sfrun) -> None:
    """Tasks of 1 ms on four clones: none is lost, none is begun again after its success."""
    process = sfrun.start(KILLED, "--stats", args=("600",))
    assert process.stdout
    line = process.stdout.readline()
    while line and "half" not in line:
        line = process.stdout.readline()
    os.kill(machines_of(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, f"{out}\n{err}"
    assert "again " in out


JOBLIB = """
    import os
    import joblib
    import numpy as np
    import sfparallel as sf

    sf.register_joblib()
    table = np.arange(100.0)

    def look(k):
        return float(table[k])

    with joblib.parallel_config("sf", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(look)(k) for k in range(20)) == [float(k) for k in range(20)]
        table += 1                                       # each call sees the present memory
        assert list(joblib.Parallel(return_as="generator")(joblib.delayed(look)(k) for k in range(20)))[19] == 20.0
        try:
            joblib.Parallel()(joblib.delayed(divmod)(1, k - 5) for k in range(10))
        except ZeroDivisionError as error:
            print(error.__notes__[0].splitlines()[0])
        with joblib.Parallel() as parallel:
            assert parallel(joblib.delayed(look)(k) for k in range(3)) == [1.0, 2.0, 3.0]
            assert parallel(joblib.delayed(lambda x: -x)(k) for k in range(3)) == [0, -1, -2]
        here = sf.in_clone()
        assert (here, joblib.Parallel()([joblib.delayed(sf.in_clone)()])) == (False, [True])
    """

SKLEARN = """
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score

    data, labels = make_classification(n_samples=200, n_features=8, random_state=0)
    model = RandomForestClassifier(n_estimators=6, random_state=0)
    serial = cross_val_score(model, data, labels, cv=4)
    with joblib.parallel_config("sf", n_jobs=2):
        assert (cross_val_score(model, data, labels, cv=4) == serial).all()
        print("scikit-learn", serial.mean() > 0.7)
    """


def test_joblib(sfrun: Sfrun) -> None:
    ended = sfrun(JOBLIB, "--local").ok()
    assert ended.out.startswith("raised in rank ")


@pytest.mark.needs("qemu", "ml", "root")
def test_joblib_and_scikit_learn_in_vms(sfrun: Sfrun) -> None:
    ended = sfrun(JOBLIB + SKLEARN, "--image", "ml", "--memory", "1G", timeout=500).ok()
    assert ended.out.splitlines()[-1] == "scikit-learn True"


MPI4PY = """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor, MPIPoolExecutor, as_completed

    def power(x, y=2):
        return x**y

    if __name__ == "__main__":
        if MPI.COMM_WORLD.rank == 0:
            with MPIPoolExecutor(max_workers=2) as executor:
                assert executor.bootup().num_workers == 2
                assert list(executor.map(power, range(4))) == [0, 1, 4, 9]
                assert list(executor.starmap(power, [(2, 3), (3, 2)], chunksize=2)) == [8, 9]
                assert sorted(executor.map(power, range(4), unordered=True)) == [0, 1, 4, 9]
                assert {each.result() for each in as_completed([executor.submit(power, k) for k in range(3)])} == {0, 1, 4}
        with MPICommExecutor(MPI.COMM_WORLD, root=1) as executor:
            if executor is not None:
                print("root", MPI.COMM_WORLD.rank, list(executor.map(power, range(5))))
    """


@pytest.mark.parametrize("how", BOTH)
def test_programs_of_mpi4py_futures(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(MPI4PY, "-n", "2", "--mpi4py", "--no-label", *how).ok()
    assert ended.out == "root 1 [0, 1, 4, 9, 16]\n"


def test_a_program_of_one_rank_with_workers_behind_it(sfrun: Sfrun) -> None:
    program = """
        from mpi4py.futures import MPICommExecutor
        with MPICommExecutor() as executor:
            print(list(executor.map(abs, [-1, -2])))
    """
    ended = sfrun(program, "--local", "--mpi4py", "-n", "3", "--no-label", "-m", "mpi4py.futures").ok()
    assert ended.out == "[1, 2]\n"


@vms
def test_processes_that_the_program_forks_have_lines_of_their_own(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import multiprocessing, os, sys
        import sfparallel as sf

        def square(k):
            return k * k

        def in_a_child(k):
            with sf.Executor(2) as own:
                return k, list(own.map(square, range(k, k + 4))), sf.parallel_map(square, range(3), n=2)

        def want(k):
            return k, [x * x for x in range(k, k + 4)], [0, 1, 4]

        executor = sf.Executor(2)
        assert executor.submit(square, 3).result() == 9          # there is a line to the agent, and a thread
        sf.parallel_map(square, range(2), n=2)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(in_a_child, [5, 6]) == [want(5), want(6)]
        assert executor.submit(square, 4).result() == 16
        pid = os.fork()
        if pid == 0:
            assert executor.submit(square, 7).result() == 49     # by clones of its own
            assert in_a_child(8) == want(8)
            sys.exit(3)                                          # does not wait for its parent's clones
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        assert executor.submit(square, 5).result() == 25
        executor.shutdown()
        print("done")
        """,
    ).ok()  # fmt: skip
    assert ended.out == "done\n"
