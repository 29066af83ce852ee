"""Ctrl-Z, `fg` and `bg` in a real shell: the job stops with its VMs, and goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfparallel.vmm import processes
from tests.conftest import BIN, HANG_S, LEAK_GRACE_S, Sfrun, command_of, descendants
from tests.screen import Screen

LOCAL = pytest.param("--local", id="local")
VM = pytest.param("", id="vm", marks=pytest.mark.needs("qemu", "image", "root"))
BOTH = pytest.mark.parametrize("option", [LOCAL, VM])
ONLY_VM = pytest.mark.needs("qemu", "image", "root")
PROMPT = "shell> "

# Each line by one write: where PYTHONUNBUFFERED is set print() needs several, and what the shell says may come in between.
TICKS = """
    import os, time
    number = 0
    while True:
        os.write(1, b"tick %d\\n" % number)
        number += 1
        time.sleep(0.02)
    """


class Shell(Screen):
    """bash with job control."""

    def __init__(self, folder: Path) -> None:
        super().__init__(["bash", "--norc", "--noprofile", "--noediting", "-i"], folder)
        # Otherwise Ctrl-Z throws away what has been printed and not yet been read (termios(3), ISIG).
        self.type("stty noflsh\n")
        self.type(f"PS1='{PROMPT[:3]}''{PROMPT[3:]}'\n")
        self.until(PROMPT)

    def run(self, command: str) -> str:
        """A command that ends by itself: what it shows."""
        self.type(f"{command}\n")
        return self.until(PROMPT).removesuffix(PROMPT)

    def sfrun(self, program: Path, *words: str) -> None:
        self.type(" ".join([str(BIN / "sfrun"), *filter(None, words[:1]), str(program), *words[1:]]) + "\n")

    def interrupt_until_stopped(self) -> str:
        """Ctrl-Z."""
        self.type("\x1a")
        return self.until("Stopped") + self.until(PROMPT)

    def front(self) -> int:
        """Process id of the `sfrun` that the shell waits for."""
        return next(pid for pid in descendants(self.pid) if "sfrun" in command_of(pid))

    def fg(self) -> None:
        """Until the job has the terminal and was continued: before that, Ctrl-Z is the shell's, which ignores it."""
        self.type("fg\n")
        deadline = time.monotonic() + HANG_S
        while os.tcgetpgrp(self.master) == self.pid or not processes.runs(self.front()):
            assert time.monotonic() < deadline, self.shown[-500:]
            time.sleep(0.001)

    def states(self) -> dict[str, str]:
        """Of everything that the shell has started: its command, and the kernel's letter for what it does."""
        found = {}
        for pid in descendants(self.pid):
            try:
                found[f"{pid} {command_of(pid)}"] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
        return found


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell at its prompt; what it has started ends with it."""
    opened = Shell(tmp_path)
    yield opened
    for pid in descendants(opened.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    opened.close()


def _ticks(text: str) -> list[int]:
    # The echo of a key comes in between, also in the midst of a line: print() may write one in pieces.
    return [int(number) for number in re.findall(r"tick (\d+)\r\n", re.sub(r"\^[ZC]", "", text))]


@BOTH
def test_a_stopped_job_stands_still_and_leaves_the_terminal_to_the_shell(shell: Shell, sfrun: Sfrun, option: str) -> None:
    shell.sfrun(sfrun.write(TICKS), option)
    start = len(shell.shown)
    for _ in range(3):
        shell.until("tick")
        shell.until("tick")
        shell.interrupt_until_stopped()
        # Only `sfrun` itself and the init wait; all that does something is stopped.
        running = {name: state for name, state in shell.states().items() if state != "T"}
        assert all("sfrun" in name for name in running) and len(running) <= 1, running
        if not option:
            assert any("qemu" in name for name in shell.states())
        assert "tick" not in shell.quiet_for(0.5)
        assert shell.run("echo $((40 + 2))").endswith("42\r\n")
        assert "Stopped" in shell.run("jobs")
        shell.type("fg\n")
    shell.until("tick")
    shell.type("\x03")
    shell.until(PROMPT)
    assert shell.run("echo code $?").endswith("code 130\r\n")
    numbers = _ticks(shell.shown[start:].decode())
    assert numbers == list(range(len(numbers))), "no tick was lost, or came twice"


@BOTH
def test_a_job_goes_on_in_the_background(shell: Shell, sfrun: Sfrun, option: str) -> None:
    path = sfrun.write(
        """
        import time
        print("started", flush=True)
        for number in range(400):  # in this time it must be stopped
            print("tick", number, flush=True)
            time.sleep(0.025)
        print("printed in the background", flush=True)
        print("read", input())
        """
    )
    shell.sfrun(path, option)
    shell.until("started")
    shell.interrupt_until_stopped()
    shell.run("bg")
    shell.until("printed in the background")
    if option:
        return  # a local program has a session of its own, and reads the terminal whenever it likes
    # What is typed now is the shell's.
    assert shell.run("echo $((40 + 2))").endswith("42\r\n")
    assert "Running" in shell.run("jobs")
    shell.type("fg\n")
    shell.until("program.py")
    shell.type("for the program\n")
    shell.until("read for the program")
    shell.until(PROMPT)


@ONLY_VM
def test_a_program_started_in_the_background_takes_nothing_of_the_shell_s_input(shell: Shell, sfrun: Sfrun) -> None:
    path = sfrun.write("print('asks', flush=True); print('read', input())")
    shell.type(f"{BIN / 'sfrun'} {path} &\n")
    shell.until("asks")
    assert shell.run("echo $((40 + 2))").endswith("42\r\n")
    assert "Running" in shell.run("jobs")
    shell.type("fg\n")
    shell.until("program.py")
    shell.type("at last\n")
    shell.until("read at last")
    shell.until(PROMPT)


@BOTH
def test_stops_while_forks_are_under_way(shell: Shell, sfrun: Sfrun, option: str) -> None:
    """Also at once after `fg`: `sfrun` then stops before the job has gone on, or before it has stopped again."""
    path = sfrun.write(
        """
        import itertools
        import os
        import sfparallel as sf
        for number in itertools.count():
            results = sf.parallel(n=2)(lambda: sf.comm().rank + 10 * number)()
            os.write(1, f"results {results}\\n".encode())
        """
    )
    shell.sfrun(path, option)
    start = len(shell.shown)
    shell.until("results")
    for turn in range(20 if option else 8):
        shell.quiet_for((0, 0.01, 0.13, 0.39)[turn % 4])  # anywhere in a fork
        shell.interrupt_until_stopped()
        shell.fg()
    shell.until("results")
    shell.type("\x03")
    shell.until(PROMPT)
    shown = re.sub(r"\^[ZC]", "", shell.shown[start:].decode())
    results = re.findall(r"results \[(\d+), (\d+)\]\r\n", shown)
    assert results == [(f"{10 * number}", f"{10 * number + 1}") for number in range(len(results))]


def test_a_stop_that_was_answered_already_does_not_come_any_more(tmp_path: Path) -> None:
    """The job is continued while it still makes ready to stop; the next time it is not."""
    program = """
        import asyncio
        import sys
        from sfparallel.vmm import confinement, job_control

        async def ready_to_stop():
            print("makes ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)

        async def job():
            job_control.watch(ready_to_stop, lambda: print("goes on", flush=True))
            print("started", flush=True)
            await asyncio.Event().wait()

        confinement.block_waited()
        confinement.unblock_waited()
        job_control.run(job())
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, process_group=0) as process:  # fmt: skip
        assert process.stdin and process.stdout
        says = process.stdout.readline
        try:
            assert says() == "started\n"
            for answered in (True, False):
                process.send_signal(signal.SIGTSTP)
                assert says() == "makes ready\n"
                if answered:
                    process.send_signal(signal.SIGCONT)
                process.stdin.write("\n")
                process.stdin.flush()
                while not processes.is_stopped(process.pid) and not select.select([process.stdout], [], [], 0.01)[0]:
                    assert process.poll() is None
                assert processes.is_stopped(process.pid) != answered
                process.send_signal(signal.SIGCONT)
                assert says() == "goes on\n"
        finally:
            process.kill()


def test_a_second_stop_is_not_taken_away_by_the_first_one_s_end() -> None:
    """SIGCONT takes a SIGTSTP away that has come, but has not arrived: it is passed on only to a child that stands still."""
    program = """
        import os
        import signal
        from sfparallel.vmm import confinement, signals

        confinement.block_waited()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTSTP)
            print("started", flush=True)
            signal.sigwait([signal.SIGTERM])
            os._exit(7 if signal.SIGTSTP in signal.sigpending() else 1)
        os._exit(confinement.wait_for(child, signals.Interrupts()))
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGCONT)
        status = Path(f"/proc/{process.pid}/status")
        while not re.search(r"State:\s+S.*ShdPnd:\s+0+\n", status.read_text(), re.DOTALL):
            time.sleep(0.001)  # it deals with it
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 7


def test_time_limits_stand_still_too(shell: Shell, sfrun: Sfrun) -> None:
    shell.sfrun(sfrun.write("print('started', flush=True); input(); print('in time')"), "--local --timeout 30")
    shell.until("started")
    shell.interrupt_until_stopped()
    assert shell.quiet_for(31) == ""
    shell.type("fg\n\n")
    shell.until("in time")
    shell.until(PROMPT)
    assert shell.run("echo code $?").endswith("code 0\r\n")


@ONLY_VM
def test_the_clocks_of_a_guest(shell: Shell, sfrun: Sfrun) -> None:
    """Neither its monotonic clock nor a time limit counts the stop; its time of day is right again afterwards."""
    path = sfrun.write(
        """
        import time
        import sfparallel as sf

        @sf.parallel(n=1)
        def wait(seconds):
            print("waits", seconds, flush=True)
            time.sleep(seconds)
            return "in time"

        wait(0)  # the first fork takes longest
        input("go? ")
        began = time.monotonic()
        print(wait.options(timeout=30)(10))
        print("monotonic", time.monotonic() - began, "clock", time.time())
        """
    )
    shell.sfrun(path)
    shell.until("go? ")
    began = time.monotonic()
    shell.type("\n")
    shell.until("waits 10")
    shell.interrupt_until_stopped()
    stopped = time.monotonic()
    shell.quiet_for(31)
    stood_still = time.monotonic() - stopped
    shell.type("fg\n")
    shell.until("in time")
    shell.until("monotonic")
    monotonic, clock = re.match(r" ([\d.]+) clock ([\d.]+)", shell.until("\n")).groups()  # type: ignore[union-attr]
    took, now = time.monotonic() - began, time.time()
    shell.until(PROMPT)
    assert float(monotonic) < took - stood_still / 2
    assert abs(float(clock) - now) < stood_still / 2


@BOTH
def test_signals_to_sfrun_alone(shell: Shell, sfrun: Sfrun, option: str) -> None:
    shell.sfrun(sfrun.write(TICKS), option)
    shell.until("tick")
    sfrun_pid = shell.front()
    os.kill(sfrun_pid, signal.SIGTSTP)
    shell.until("Stopped")
    shell.until(PROMPT)
    assert "tick" not in shell.quiet_for(0.5)
    os.kill(sfrun_pid, signal.SIGCONT)
    shell.until("tick")
    # It cannot be caught: the job goes on, until it is told something.
    os.kill(sfrun_pid, signal.SIGSTOP)
    while processes.runs(sfrun_pid):
        time.sleep(0.01)
    shell.until("tick")
    os.kill(sfrun_pid, signal.SIGCONT)
    while "Running" not in shell.run("jobs"):  # a shell does not wait for what it believes to be stopped
        pass
    os.kill(sfrun_pid, signal.SIGTERM)
    shell.type("wait %1; echo code $?\n")
    shell.until("code 143")


@ONLY_VM
def test_a_stop_gives_the_terminal_s_modes_back(shell: Shell, sfrun: Sfrun) -> None:
    path = sfrun.write(
        """
        import sys, tty
        tty.setcbreak(0)
        print("keys", flush=True)
        while (key := sys.stdin.buffer.raw.read(1)) != b"q":
            print("key", key, flush=True)
        """
    )
    shell.sfrun(path)
    shell.until("keys")
    assert not shell.edits_lines() and not shell.echoes()
    shell.interrupt_until_stopped()
    assert shell.edits_lines() and shell.echoes()
    shell.type("fg\n")
    shell.until("program.py")
    while shell.edits_lines():  # until the job has the terminal again
        shell.quiet_for(0.05)
    shell.type("x")
    shell.until("key b'x'")
    assert not shell.edits_lines()
    shell.type("q")
    shell.until(PROMPT)
    assert shell.edits_lines() and shell.echoes()


@ONLY_VM
def test_a_stopped_job_that_is_killed_leaves_nothing(shell: Shell, sfrun: Sfrun) -> None:
    shell.sfrun(sfrun.write(TICKS))
    shell.until("tick")
    shell.interrupt_until_stopped()
    shell.run("kill -9 %1; wait")
    # The kernel kills what is in the job's namespace, and that takes a moment.
    deadline = time.monotonic() + LEAK_GRACE_S
    while any("qemu" in name for name in shell.states()):
        assert time.monotonic() < deadline
