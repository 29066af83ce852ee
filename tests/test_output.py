"""What programs print reaches its reader whole and in order; and a reader that does not read keeps nobody."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time

import pytest

from sfparallel.vmm.processes import cpu_seconds
from tests.conftest import BIN, HANG_S, Sfrun, job_of

pytestmark = pytest.mark.needs("qemu", "image", "root")

BLOCKS = 400
EXPECTED = "".join(f"{i:015}\n" * 4096 for i in range(BLOCKS))
"""26 MB: more than pipes, the guest and the supervisor together hold."""
MUCH = f"""
    import os, sys
    print("started", file=sys.stderr, flush=True)
    for i in range({BLOCKS}):
        os.write(1, b"%015d\\n" % i * 4096)
    """
ENDLESS = """
    import os, sys
    print("started", file=sys.stderr, flush=True)
    line = b"x" * 65535 + b"\\n"
    while True:
        os.write(1, line)
    """


def _stalled(sfrun: Sfrun, program: str, *options: str) -> subprocess.Popen[str]:
    """A program whose output fills everything up to a reader that does not read."""
    process = sfrun.start(program, *options)
    assert process.stderr
    while (line := process.stderr.readline()) != "started\n":
        assert line == "booting the guest once to make a template\n"
    _wait_until_idle(process)
    return process


def _wait_until_idle(process: subprocess.Popen[str]) -> None:
    """Until the supervisor has used no processor time for a second: it takes no more output."""
    supervisor = job_of(process.pid)
    used, since = -1.0, time.monotonic()
    deadline = since + HANG_S
    while time.monotonic() < since + 1:
        if (now := cpu_seconds(supervisor)) != used:
            used, since = now, time.monotonic()
        assert since < deadline, "it goes on taking output that nobody reads"
        time.sleep(0.05)


def test_a_reader_that_comes_late_finds_all_of_it(sfrun: Sfrun) -> None:
    process = _stalled(sfrun, MUCH)
    assert process.stdout and process.poll() is None
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == EXPECTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_job_whose_reader_stalls(sfrun: Sfrun, number: signal.Signals) -> None:
    process = _stalled(sfrun, ENDLESS)
    process.send_signal(number)
    if number is signal.SIGINT:
        # The first one is the program's: it ends with its KeyboardInterrupt, but its output waits for the reader.
        assert process.stderr
        while "KeyboardInterrupt" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
    assert process.wait(timeout=HANG_S) == 128 + number


def test_timeout_ends_a_job_whose_reader_stalls(sfrun: Sfrun) -> None:
    process = sfrun.start(ENDLESS, "--timeout", "30")  # by then nobody has read for long
    assert process.wait(timeout=HANG_S) == 124
    assert process.stderr and "--timeout" in process.stderr.read()


def test_a_stalled_reader_does_not_stall_a_clone_that_prints_nothing(sfrun: Sfrun) -> None:
    process = sfrun.start(
        """
        import os, sys
        import sfparallel as sf

        @sf.parallel(n=2, timeout=300, on_error="return")
        def work():
            if sf.comm().rank == 0:
                while True:
                    os.write(1, b"x" * 65536)
            sys.stderr.write("silent one has ended\\n")
            return "done"

        print(work()[1], file=sys.stderr)
        """,
        "--no-label",
    )
    assert process.stderr and process.stderr.readline() == "silent one has ended\n"
    _wait_until_idle(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HANG_S) == 128 + signal.SIGTERM


def test_forks_while_output_is_held(sfrun: Sfrun) -> None:
    """The guest stands still for the fork while its reader stalls, and no byte is lost or printed twice."""
    process = sfrun.start(
        f"""
        import subprocess, sys
        import sfparallel as sf

        code = "import os\\nfor i in range({BLOCKS}): os.write(1, b'%015d\\\\n' % i * 4096)"
        other = subprocess.Popen([sys.executable, "-c", code])
        answers = [sf.parallel(n=2)(lambda: sf.comm().rank)() for _ in range(5)]
        print(answers, file=sys.stderr)
        sys.exit(other.wait())
        """
    )
    assert process.stdout
    pieces: list[str] = []

    def read_slowly() -> None:
        assert process.stdout
        while text := process.stdout.read(1 << 20):
            pieces.append(text)
            time.sleep(0.2)  # the slow reader that this is about

    reader = threading.Thread(target=read_slowly)
    reader.start()
    assert process.wait(timeout=300) == 0
    reader.join()
    # The other process is cloned too, and prints in the clones as long as they live.
    assert re.sub(r"\[[01]\] [^\n]*\n", "", "".join(pieces)) == EXPECTED
    assert process.stderr and process.stderr.read() == f"{[[0, 1]] * 5}\n"


def test_order_is_kept_where_both_streams_are_one_pipe(sfrun: Sfrun) -> None:
    script = sfrun.write(
        """
        import sys, time
        for i in range(20):
            print(i, file=sys.stderr if i % 2 else sys.stdout, flush=True)
            time.sleep(0.05)       # the agent reads two pipes: what comes at the same time has no order
        """
    )
    ended = subprocess.run([str(BIN / "sfrun"), str(script)], cwd=sfrun.folder, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, timeout=HANG_S)  # fmt: skip
    assert ended.stdout.split() == [str(i) for i in range(20)]


@pytest.mark.parametrize("options", [(), ("--local",)], ids=["vm", "local"])
def test_who_prints_to_a_reader_that_has_gone_gets_an_error(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    process = sfrun.start(ENDLESS, *options)
    assert process.stdout and process.stdout.readline() == "x" * 65535 + "\n"
    process.stdout.close()
    assert process.stderr and "BrokenPipeError" in process.stderr.read()
    assert process.wait(timeout=HANG_S) == 1


@pytest.mark.parametrize("options", [(), ("--local",)], ids=["vm", "local"])
def test_a_rank_that_prints_to_a_reader_that_has_gone_gets_an_error(sfrun: Sfrun, options: tuple[str, ...]) -> None:
    process = sfrun.start(
        """
        import sfparallel as sf

        @sf.parallel(n=1)
        def endless():
            while True:
                print("x" * 1000)

        try:
            endless()
        except BrokenPipeError as error:
            open("note.txt", "w").write(error.__notes__[0])
        """,
        "--no-label", *options,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "x" * 1000 + "\n"
    process.stdout.close()
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err
    assert "raised in rank" in (sfrun.folder / "note.txt").read_text()


def test_a_program_that_prints_no_more_outlives_its_reader(sfrun: Sfrun) -> None:
    process = sfrun.start("import os; print('one line', flush=True); input(); open('done', 'w')", stdin=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "one line\n"
    process.stdout.close()
    process.communicate("\n", timeout=HANG_S)
    assert process.returncode == 0 and (sfrun.folder / "done").exists()


@pytest.mark.parametrize("program", ["print('hello')", ENDLESS], ids=["at its end", "midway"])
def test_output_that_cannot_be_written_ends_the_job(sfrun: Sfrun, program: str) -> None:
    script = sfrun.write(program)
    with open("/dev/full", "w") as full:
        command = [str(BIN / "sfrun"), str(script)]
        ended = subprocess.run(command, cwd=sfrun.folder, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG_S)
    assert ended.returncode == 74
    assert "No space left" in ended.stderr
