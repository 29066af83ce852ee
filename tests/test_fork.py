"""The fork on real VMs: right answers from every clone, again and again."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

import pytest

from tests.conftest import HANG_S, Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_eight_clones_return_their_ranks(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        @sf.parallel
        def rank():
            return sf.comm().rank, sf.comm().size

        print(rank())
        """,
        "-n", "8",
    ).ok()  # fmt: skip
    assert ended.out.strip() == str([(rank, 8) for rank in range(8)])


def test_thirty_forks_in_one_program_and_the_parent_goes_on(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import numpy as np
        import sfparallel as sf

        state = np.zeros(100_000)

        @sf.parallel(n=2)
        def look(generation):
            assert (state[:-1] == generation).all(), "a clone must see the parent's memory as it is at this fork"
            state[:] = -1          # must reach neither the parent nor later clones
            return generation * 10 + sf.comm().rank

        for generation in range(30):
            state[:] = generation
            assert look(generation) == [generation * 10, generation * 10 + 1]
        print("all", int(state[0]))
        """
    ).ok()
    assert ended.out.strip() == "all 29"


def test_forks_with_earlier_clones_alive(sfrun: Sfrun) -> None:
    """Clones of each generation live on while the parent changes its memory and forks again; none sees a later state."""
    ended = sfrun(
        """
        import threading, time
        import sfparallel as sf

        value = "generation 0"

        @sf.parallel(n=2)
        def slow(generation, seconds):
            time.sleep(seconds)
            return value == f"generation {generation}", value

        futures = []
        for generation in range(4):
            value = f"generation {generation}"
            futures.append(slow.submit(generation, 3.0 - generation * 0.5))
        value = "changed later"
        for future in futures:
            assert all(right for right, _ in future.result()), future.result()
        print("right")
        """
    ).ok()
    assert ended.out.strip() == "right"


def test_low_level_calls_have_the_meaning_of_fork(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        ticket = sf.request_ticket(3)
        me = sf.clone(ticket)
        if me:
            print("clone", me, flush=True)
            sf.exit(me + 10)
        print("parent", sf.join(ticket))
        """,
        "--no-label",
    ).ok()  # fmt: skip
    lines = ended.out.split("\n")
    assert sorted(line for line in lines if line.startswith("clone")) == ["clone 1", "clone 2", "clone 3"]
    assert "parent {1: 11, 2: 12, 3: 13}" in lines


def test_fork_of_a_clone(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        @sf.parallel(n=2)
        def inner(outer):
            return outer * 10 + sf.comm().rank

        @sf.parallel(n=2)
        def outer():
            return inner(sf.comm().rank)

        print(outer())
        """
    ).ok()
    assert ended.out.strip() == "[[0, 1], [10, 11]]"


def test_arrays_of_50_mb_gather_bit_exact(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import hashlib
        import numpy as np
        import sfparallel as sf

        def make(rank):
            return np.random.default_rng(rank).random(6_553_600)

        @sf.parallel(n=2, seed=1)
        def big():
            return make(sf.comm().rank)

        arrays = big()
        for rank, array in enumerate(arrays):
            assert array.nbytes == 52_428_800 and array.flags.writeable
            assert hashlib.sha256(array).digest() == hashlib.sha256(make(rank)).digest()
        print("exact")
        """,
        "--memory", "2G",
    ).ok()  # fmt: skip
    assert ended.out.strip() == "exact"


def test_sixty_four_clones(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf
        print(sum(sf.parallel(n=64)(lambda: sf.comm().rank)()))
        """
    ).ok()
    assert ended.out.strip() == str(sum(range(64)))


@dataclass(frozen=True)
class Look:
    """Clocks of a guest next to the host's, each as seconds that the guest's is behind."""

    time_of_day: float
    monotonic: float


def test_the_parents_clock_keeps_up_with_the_hosts(sfrun: Sfrun) -> None:
    """Its VM stands still while it is saved, with all its clocks; its time of day is set afterwards, its monotonic clock is not.

    So the one is behind by as long as the message took, which is not bounded on a busy machine; the other by all pauses together.
    """
    process = sfrun.start(
        """
        import sys, time
        import sfparallel as sf

        data = bytearray(150 << 20)
        for i, line in enumerate(sys.stdin):
            if line == "fork\\n":
                data[::4096] = bytes([i % 255 + 1]) * (len(data) // 4096)
                sf.parallel(n=1)(lambda: None)()
            print(time.time(), time.monotonic(), flush=True)
        """,
        stdin=subprocess.PIPE,
    )

    def ask(what: str) -> tuple[float, float]:
        assert process.stdin and process.stdout
        process.stdin.write(what + "\n")
        process.stdin.flush()
        words = process.stdout.readline().split()
        return float(words[0]), float(words[1])

    def look() -> Look:
        looks = []
        for _ in range(10):  # what the guest says lies between two looks at our clocks: the closest ones are the most exact
            began, mono_began = time.time(), time.monotonic()
            day, mono = ask("look")
            ended, mono_ended = time.time(), time.monotonic()
            looks.append((ended - began, Look((began + ended) / 2 - day, (mono_began + mono_ended) / 2 - mono)))
        return min(looks, key=lambda each: each[0])[1]

    begin, late = look(), []
    for i in range(10):
        ask("fork")
        if i >= 5:
            late.append(look())
    process.communicate(timeout=HANG_S)
    stood_still = [each.monotonic - begin.monotonic for each in late]
    print(f"the parent stood still for {stood_still} s; its time of day is behind by {[each.time_of_day for each in late]} s")
    assert any(abs(each.time_of_day) < still / 2 for each, still in zip(late, stood_still, strict=True)), (begin, late)
