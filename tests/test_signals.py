"""Signals from outside: each interrupt counts once, whoever sends it; what the caller ignores stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.conftest import BIN, HANG_S, Sfrun

VM = pytest.param((), id="vm", marks=pytest.mark.needs("qemu", "image", "root"))
LOCAL = pytest.param(("--local",), id="local")
BOTH = pytest.mark.parametrize("options", [LOCAL, VM])

WAITS = """
import select, sys
try:
    print("ready", flush=True)
    # Python looks for signals between its own instructions: one that comes right before read(2) does not end that. Under TCG,
    # code that runs for the first time makes the moment long.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
    sys.stdin.read()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    print(sys.stdin.read(), end="")
    sys.exit(7)
print("not interrupted")
"""


def _started(
    sfrun: Sfrun, options: tuple[str, ...], before: Callable[[], object] = lambda: None
) -> subprocess.Popen[str]:
    """A job of a process group of its own, with the program waiting."""
    process = subprocess.Popen(
        [BIN / "sfrun", *options, sfrun.write(WAITS)], cwd=sfrun.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=before,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@BOTH
def test_a_signal_to_the_whole_group_is_one_interrupt(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    """As by timeout(1): `sfrun`, its init and the job get one each."""
    process = _started(sfrun, options)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "interrupted\n"
    assert process.communicate("goes on", timeout=HANG_S)[0] == "goes on"
    assert process.returncode == 7


@BOTH
def test_two_interrupts_to_the_whole_group_end_the_job(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    process = _started(sfrun, options)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "interrupted\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 130


@BOTH
def test_what_the_caller_ignores_stays_ignored(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    """nohup(1) has a job ignore SIGHUP; a shell has one in the background ignore SIGINT."""
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = _started(sfrun, options, ignore)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(process.pid, number)
        process.send_signal(number)
    out, _ = process.communicate(timeout=HANG_S)
    assert (out, process.returncode) == ("not interrupted\n", 0)


@BOTH
def test_a_caller_that_ignores_the_end_of_its_children(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    """The kernel then lets nobody wait for a child (wait(2))."""
    process = _started(sfrun, options, lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    out, err = process.communicate(timeout=HANG_S)
    assert (out, process.returncode) == ("not interrupted\n", 0), err
