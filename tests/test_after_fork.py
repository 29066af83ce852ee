"""A clone's process finds what a forked one would find: event loops, callbacks for forks, locks, timers, other modules' state."""

from __future__ import annotations

import pytest

from tests.conftest import Sfrun

vms = pytest.mark.needs("qemu", "image", "root")
BOTH = [pytest.param((), id="vms", marks=vms), pytest.param(("--local",), id="local")]


@pytest.mark.parametrize("how", BOTH)
def test_workers_run_event_loops_of_their_own(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(
        """
        import asyncio
        import sfparallel as sf

        async def twice(x):
            await asyncio.sleep(0.01)
            return 2 * x

        def work(x):
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return asyncio.run(twice(x))

        def old_style(x):
            return asyncio.get_event_loop_policy().get_event_loop().run_until_complete(twice(x))

        async def main():
            results = [sf.parallel_map(work, [21, 22], n=2), sf.parallel(work, n=2)(21),
                       list(sf.parallel_imap(work, [21, 22], n=2)), sf.parallel_map(old_style, [21, 22], n=2)]
            assert asyncio.current_task() is not None          # the parent's goes on
            with sf.Executor(2) as executor:
                loop = asyncio.get_running_loop()
                results.append(await asyncio.gather(*(loop.run_in_executor(executor, work, x) for x in (21, 22))))
            return results

        print(asyncio.run(main()))
        """, *how,
    ).ok()  # fmt: skip
    assert ended.out == "[[42, 44], [42, 42], [42, 44], [42, 44], [42, 44]]\n"


CALLBACKS = """
    import os
    import sfparallel as sf

    told = []
    for name in "ab":
        os.register_at_fork(before=lambda name=name: told.append(f"before {name}"),
                            after_in_parent=lambda name=name: told.append(f"parent {name}"),
                            after_in_child=lambda name=name: told.append(f"child {name}"))
    os.register_at_fork(after_in_child=lambda: 1 / 0)
    sf.on_clone(lambda rank: told.append("hook"))

    IN_CLONE = ["before b", "before a", "child a", "child b", "hook"]

    def check(where):
        assert told[-5:] == IN_CLONE and told.count("hook") == 1, (where, told)
        return "good"

    def fork(call):
        told.clear()
        call()
        assert told[:4] == ["before b", "before a", "parent a", "parent b"] == told[-4:], told

    fork(lambda: print("region", sf.parallel(check, n=2)("region")))
    fork(lambda: print("imap", list(sf.parallel_imap(check, ["imap"], n=1))))
    ticket = sf.request_ticket(2)
    told.clear()
    if sf.clone(ticket):
        check("clone")
        sf.exit(7)
    print("clones", sf.join(ticket))
    told.clear()
    checkpoint = sf.checkpoint_parent()
    if checkpoint.rank:
        check("checkpoint")
        sf.exit(7)
    assert told == ["before b", "before a", "parent a", "parent b"], told
    ticket = sf.request_ticket(2)
    sf.create_clones(checkpoint, ticket)
    print("checkpoint", sf.join(ticket))
    try:
        os.register_at_fork(after_in_child=1)
    except TypeError:
        print("refused")
"""


@pytest.mark.parametrize("how", BOTH)
def test_callbacks_for_forks(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(CALLBACKS, *how).ok()
    assert ended.out.splitlines() == ["region ['good', 'good']", "imap ['good']", "clones {1: 7, 2: 7}",
                                      "checkpoint {1: 7, 2: 7}", "refused"]
    # What a callback raises is told by each clone, and ignored. (A checkpoint with --local is made by forks of its own.)
    assert ended.err.count("ZeroDivisionError") >= 7 if how else ended.err.count("ZeroDivisionError") == 7


@pytest.mark.parametrize("how", BOTH)
def test_state_of_the_standard_library(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(
        """
        import atexit, logging, os, signal, sqlite3, subprocess, threading, time
        import sfparallel as sf

        atexit.register(lambda: print("atexit", flush=True))
        database = sqlite3.connect(":memory:")
        database.execute("create table t (x)"), database.execute("insert into t values (42)")
        random = lambda: database.execute("select random()").fetchone()[0]
        random()
        caught = []
        signal.signal(signal.SIGUSR1, lambda *_: caught.append("USR1"))
        signal.signal(signal.SIGALRM, lambda *_: caught.append("ALRM"))
        signal.setitimer(signal.ITIMER_REAL, 3600)

        # Another thread is in the middle of a message at the fork. In a clone of a VM it goes on.
        inside, gate = threading.Event(), threading.Event()

        class Handler(logging.StreamHandler):
            def emit(self, record):
                if threading.current_thread().name == "slow":
                    inside.set()
                    gate.wait()
                super().emit(record)

        log = logging.getLogger("log")
        log.addHandler(Handler())
        threading.Thread(target=log.warning, args=("from the thread",), name="slow", daemon=True).start()
        inside.wait()

        @sf.parallel(n=3)
        def look():
            gate.set()
            log.warning("from rank %d", sf.comm().rank)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert caught == ["USR1"], caught
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
            assert threading.current_thread() is threading.main_thread()
            assert database.execute("select x from t").fetchone() == (42,)
            return random()

        numbers = look()
        assert len({*numbers, random()}) == 4, numbers
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        gate.set()
        print("end")
        """, *how,
    ).ok()  # fmt: skip
    assert ended.out.splitlines() == ["end", "atexit"]
    lines = [line.split("] ", 1)[-1] for line in ended.err.splitlines()]
    assert all(lines.count(f"from rank {rank}") == 1 for rank in range(3))
    assert "from the thread" in lines and "Exception" not in ended.err and "Error" not in ended.err


@pytest.mark.parametrize("how", BOTH)
def test_multiprocessing_in_clones_of_a_parent_that_used_it(sfrun: Sfrun, how: tuple[str, ...]) -> None:
    ended = sfrun(
        """
        import multiprocessing as mp
        from concurrent.futures import ThreadPoolExecutor
        from multiprocessing import shared_memory
        import sfparallel as sf

        def use():
            with mp.get_context("fork").Pool(2) as pool:
                squares = pool.starmap(pow, [(2, 2), (3, 2)])
            process = mp.Process(target=int)
            process.start(), process.join()
            block = shared_memory.SharedMemory(create=True, size=64)      # starts the resource tracker, or finds it
            block.buf[0] = 7
            again = shared_memory.SharedMemory(block.name)
            value = again.buf[0]
            again.close(), block.close(), block.unlink()
            with ThreadPoolExecutor(2) as threads:
                return squares, process.exitcode, value, list(threads.map(abs, [-1, -2]))

        expected = [4, 9], 0, 7, [1, 2]
        assert use() == expected
        assert sf.parallel(use, n=2)() == [expected] * 2
        assert list(sf.parallel_imap(lambda _: use(), range(2), n=1)) == [expected] * 2
        print("end")
        """, *how,
    ).ok()  # fmt: skip
    assert ended.out == "end\n"
    assert "leaked" not in ended.err and "Error" not in ended.err


@vms
def test_threads_and_processes_of_the_parent_go_on_in_a_clone(sfrun: Sfrun) -> None:
    """In VMs only: a forked process has neither."""
    ended = sfrun(
        """
        import queue, subprocess, sys, threading, time
        from concurrent.futures import ThreadPoolExecutor
        import sfparallel as sf

        pool = ThreadPoolExecutor(1)
        pool.submit(int).result()                       # its thread waits for work
        other = subprocess.Popen(["sleep", "1000"])

        @sf.parallel(n=2)
        def look():
            assert pool.submit(pow, 6, 2).result(60) == 36
            assert any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())
            assert other.poll() is None
            other.terminate()
            return other.wait()

        print(look(), other.poll())
        other.kill()

        # From a thread that is not the main one: that stays the main thread, and goes on.
        def in_thread():
            print(sf.parallel(lambda: (threading.current_thread() is threading.main_thread(),
                                       threading.main_thread().is_alive()), n=1)())

        thread = threading.Thread(target=in_thread)
        thread.start(), thread.join()

        # Threads that hold what is the parent's, and use it when another one has forked: they have their answer in the parent.
        held, go_on, done = threading.Barrier(5), threading.Event(), []

        def holder(make, use):
            thing = make()
            held.wait()
            go_on.wait()
            done.append(use(thing))

        def clone(ticket):
            if sf.clone(ticket):
                sf.exit(7)
            return sf.join(ticket)[1]

        def keep():
            checkpoint = sf.checkpoint_parent()
            if checkpoint.rank:
                sf.exit(8)
            return checkpoint

        def create(checkpoint):
            ticket = sf.request_ticket(1)
            sf.create_clones(checkpoint, ticket)
            return sf.join(ticket)[1]

        def waits(thread):
            frame = sys._current_frames().get(thread.ident)
            while frame is not None and frame.f_code.co_name != "park":
                frame = frame.f_back
            return frame is not None

        threads = [threading.Thread(target=holder, args=each, daemon=True) for each in (
            (lambda: sf.request_ticket(1), clone), (lambda: sf.request_ticket(1), lambda ticket: sf.kill(ticket) or 9),
            (keep, create), (lambda: sf.parallel_imap(abs, [-10, -11], n=1), lambda stream: sum(stream)))]
        for thread in threads:
            thread.start()

        def look_on():
            go_on.set()
            while any(thread.is_alive() and not waits(thread) for thread in threads):
                time.sleep(0.01)
            return [thread.is_alive() for thread in threads]

        held.wait()
        print(sf.parallel(look_on, n=1)())
        go_on.set()
        for thread in threads:
            thread.join()
        print(sorted(done))
        """
    ).ok()
    assert ended.out.splitlines() == ["[-15, -15] None", "[(False, True)]", "[[True, True, True, True]]", "[7, 8, 9, 21]"]
    assert "StateError" not in ended.err


@vms
def test_a_coroutine_that_forks_at_the_low_level_goes_on_in_its_loop(sfrun: Sfrun) -> None:
    """In VMs only: in a forked process asyncio has no running loop."""
    ended = sfrun(
        """
        import asyncio
        import sfparallel as sf

        async def main():
            ticket = sf.request_ticket(2)
            if sf.clone(ticket):
                await asyncio.sleep(0.01)
                sf.exit(7)
            return sf.join(ticket)

        print(asyncio.run(main()))
        """
    ).ok()
    assert ended.out == "{1: 7, 2: 7}\n"
