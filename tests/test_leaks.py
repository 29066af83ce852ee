"""Nothing is left of a job, however it ends, without any command; and nothing piles up while it runs."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S, Sfrun, children_of, job_of, left_overs, machines_of, wait_for_nothing_new

pytestmark = pytest.mark.needs("qemu", "image", "root")

FORKS = """
    import time
    import sfparallel as sf

    data = bytearray(20 << 20)
    print("up", flush=True)
    for i in range(1000):
        data[:] = bytes([i % 256]) * len(data)
        sf.parallel(n=3)(lambda: sf.comm().rank)()
    """


@pytest.mark.parametrize("moment", range(10))
def test_kill_9_of_sfrun_at_a_random_moment(sfrun: Sfrun, moment: int) -> None:
    before = left_overs()
    process = sfrun.start(FORKS)
    # From the very start (no VM yet) to the middle of forks.
    delay = random.Random(moment).uniform(0.05, 1.0) * (1 if moment < 3 else 6)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    leaked = wait_for_nothing_new(before)
    assert not leaked, f"killed after {delay:.2f} s; left over: {sorted(leaked)}"


@pytest.mark.parametrize("whom", ["init", "job"])
def test_kill_9_of_a_process_between_sfrun_and_the_vms(sfrun: Sfrun, whom: str) -> None:
    before = left_overs()
    process = sfrun.start(FORKS)
    assert process.stdout and process.stdout.readline() == "up\n"
    (init,) = children_of(process.pid)
    os.kill(init if whom == "init" else job_of(process.pid), signal.SIGKILL)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + signal.SIGKILL
    assert not wait_for_nothing_new(before)


def test_fifty_forks_stay_flat(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import sfparallel as sf

        work = sf.parallel(n=2)(lambda: sf.comm().rank)
        for i in range(50):
            assert work() == [0, 1]
            if i in (9, 49):
                print(i, flush=True)
                input()
        """,
        stdin=-1,
    )
    assert process.stdout and process.stdin
    seen = []
    for expected in ("9\n", "49\n"):
        assert process.stdout.readline() == expected
        seen.append(_settled(process.pid))
        process.stdin.write("\n")
        process.stdin.flush()
    process.communicate(timeout=HANG_S)
    assert process.returncode == 0
    (files, memory, vms), (later_files, later_memory, later_vms) = seen
    assert later_files <= files + 2
    assert later_vms == vms
    assert later_memory <= memory + (8 << 20), f"{memory >> 20} MiB grew to {later_memory >> 20} MiB"


def _settled(pid: int) -> tuple[int, int, int]:
    """Open files, private memory and QEMUs of a supervisor whose pool is full again and whose clones are gone."""
    last = None
    supervisor = job_of(pid)
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        vms = len(machines_of(pid))
        now = (len(os.listdir(f"/proc/{supervisor}/fd")), vms)
        if now == last:
            break
        last = now
        time.sleep(1.0)  # not readiness: two equal looks a second apart mean that nothing is going on
    text = Path(f"/proc/{supervisor}/smaps_rollup").read_text()
    memory = sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_Dirty"))
    return now[0], memory, now[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_job_cleanly(sfrun: Sfrun, number: signal.Signals) -> None:
    before = left_overs()
    process = sfrun.start(FORKS)
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + number
    assert not wait_for_nothing_new(before)
