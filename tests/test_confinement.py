"""The processes around a job: the init reaps everything, passes signals on, and its end is the end of all."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import HANG_S, children_of

pytestmark = pytest.mark.needs("root")

CONFINED = """
import os, signal, sys, time
from sfparallel.vmm.confinement import confine

def orphan():
    # The process between the job and its orphan ends at once, so that the job is nobody's parent.
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(writer, str(child).encode())
            os._exit(0)
        time.sleep(1000)
    os.waitpid(between, 0)
    return int(os.read(reader, 20))

{job}
sys.exit(confine(job, public_folder=False))
"""


@contextlib.contextmanager
def confined(job: str) -> Iterator[subprocess.Popen[str]]:
    """A program whose function `job` is the job of a confinement."""
    with subprocess.Popen([sys.executable, "-c", CONFINED.format(job=job)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_orphan_that_has_ended_is_gone() -> None:
    """libvirt kills the QEMU that it has probed, and asks kill(2) for 40 s whether it is gone: a zombie is not."""
    with confined("""
def job(places, pid):
    victim = orphan()
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(victim, 0)
        except ProcessLookupError:
            return 17
        time.sleep(0.01)
    return 1
""") as process:
        assert process.wait(HANG_S) == 17


@pytest.mark.parametrize(("ending", "code"), [("return 3", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137), ("sys.exit(4)", 4)])
def test_the_exit_code_is_the_jobs_and_orphans_do_not_outlive_it(ending: str, code: int) -> None:
    with confined(f"""
def job(places, pid):
    orphan()
    {ending}
""") as process:
        assert process.stdout
        # The orphan holds our pipe: its end is the end of all.
        assert process.stdout.read() == ""
        assert process.wait(HANG_S) == code


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_sfrun_arrives_at_the_job_once(number: str) -> None:
    with confined(f"""
def job(places, pid):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{number}])
    print("up", flush=True)
    signal.sigwait([signal.{number}])
    return 21 if signal.sigtimedwait([signal.{number}], 0.5) is None else 22
""") as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        process.send_signal(signal.Signals[number])
        assert process.wait(HANG_S) == 21


def test_the_job_is_no_init() -> None:
    """Signals without a handler end it, as any program: they do nothing to process 1 of a namespace."""
    with confined("""
def job(places, pid):
    print("up", flush=True)
    time.sleep(1000)
""") as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        (init,) = children_of(process.pid)
        assert len(children_of(init)) == 1
        process.terminate()
        assert process.wait(HANG_S) == 128 + 15


def test_a_chroot_that_is_no_mount_point_is_told_in_a_line(tmp_path: Path) -> None:
    """It used to be a traceback."""
    root = tmp_path / "root"
    (root / "run").mkdir(parents=True)
    script = ("import os, sys; from sfparallel.vmm.confinement import confine; "
              f"os.chroot({str(root)!r}); os.chdir('/'); sys.exit(confine(lambda places, pid: 0, public_folder=False))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70 and done.stderr.startswith("sfrun: cannot make the job's mounts: "), done
    assert "chroot" in done.stderr and "mount --bind ROOT ROOT" in done.stderr and "Traceback" not in done.stderr, done
