"""A job that does what the benchmark tells it, one order at a time; and programs that measure in a process of their own.

Whatever is started here dies with the benchmark: each process has a parent-death signal, and what it starts is in a PID
namespace of which it holds the init.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.fork.supervisor import Order
from sfparallel.errors import VMError
from sfparallel.vmm.processes import cpu_seconds, matching

ROOT = Path(__file__).parent.parent.parent

ANSWER_TIMEOUT_S = 300.0
"""Longer than any order takes under emulation: a job that hangs is to be told."""

POOL_TIMEOUT_S = 60.0
"""How long a pool may take to become full; after that a fork is measured as it is."""

WARM_TRIES = 3
"""A fork that had to start shells itself is done again, so often."""

_REST_S = 0.2
_REST_CPU_S = 0.03


class Lines:
    """Lines of JSON from a pipe."""

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what
        self._buffer = b""

    def next(self, timeout_s: float) -> Any:
        """The next line.

        Raises:
            VMError: the other side ended, or took too long.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise VMError(f"{self._what} did not answer within {timeout_s:.0f} s")
            data = os.read(self._fd, 1 << 16)
            if not data:
                raise VMError(f"{self._what} ended before it answered")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def drain(self, timeout_s: float) -> None:
        """Wait until nobody holds the other end any more."""
        deadline = time.monotonic() + timeout_s
        while select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0] and os.read(self._fd, 1 << 16):
            pass


class Session:
    """A job whose program waits for orders (`guest`), with a warm pool.

    Args:
        memory_mib: RAM of the parent.
        pool: shells to keep warm.
    """

    def __init__(self, *, memory_mib: int = 1024, pool: int = 0, cpus: int = 1) -> None:
        self._pool = pool
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (__exit__ closes it)
        ours, theirs = os.pipe()
        order = Order(os.getpid(), theirs, memory_mib, cpus, pool)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fork.supervisor", order.encode()], cwd=ROOT, pass_fds=[theirs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        assert self._process.stdout
        self._answers = Lines(self._process.stdout.fileno(), "the measured program")
        self._reports = Lines(ours, "the measured job")
        self._reports_fd = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process = self._process
        assert process.stdin and process.stdout
        if kind is None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # which ends the program, and with it the job
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        process.wait()
        # The kernel ends what is left in the job's namespace; until then it may hold memory and processors.
        self._reports.drain(10)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        os.close(self._reports_fd)
        self._errors.close()

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Give the program an order, and wait until it is done.

        Raises:
            VMError: the job ended, or hangs; the message has what it said.
        """
        assert self._process.stdin
        try:
            os.write(self._process.stdin.fileno(), json.dumps({"do": do, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = self._answers.next(ANSWER_TIMEOUT_S)
        except (VMError, BrokenPipeError) as error:
            raise VMError(f"{do}: {error}\n{self._said()}") from error
        return answer

    def fork(self, **arguments: object) -> dict[str, Any]:
        """One fork with a warm pool, as the supervisor's report has it (`supervisor.summary`), with the program's own time."""
        for _ in range(WARM_TRIES):
            self._wait_warm()
            answer = self.ask("fork", **arguments)
            report = self.report()
            if report["warm"]:
                break
        return {**report, **answer}

    def report(self) -> dict[str, Any]:
        """The report of the fork that ended last; those of checkpoints are passed over."""
        while True:
            report: dict[str, Any] = self._reports.next(ANSWER_TIMEOUT_S)
            if report["n"]:
                return report

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]

    def _shells(self) -> list[int]:
        """QEMUs of the job, the parent among them."""
        inits = matching(lambda parent, _: parent == self._process.pid)
        jobs = matching(lambda parent, _: parent in inits)
        found = ((pid, _words_of(pid)) for pid in matching(lambda parent, _: parent in jobs))
        return [pid for pid, words in found if "-incoming" in words and words[0] != "sf-launcher"]

    def _wait_warm(self) -> None:
        """Wait until the pool is full and nothing runs: a fork is not to be measured beside the end of the one before it."""
        deadline = time.monotonic() + POOL_TIMEOUT_S
        while time.monotonic() < deadline:
            before = {pid: cpu_seconds(pid) for pid in self._shells()}
            time.sleep(_REST_S)
            after = {pid: cpu_seconds(pid) for pid in self._shells()}
            busy_s = sum(after.values()) - sum(before.values())
            if len(after) > self._pool and before.keys() == after.keys() and busy_s <= _REST_CPU_S:
                return


def _words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def measured(module: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """Run a module that prints one JSON object, in a process of its own.

    Raises:
        VMError: it failed; the message has what it said.
        TimeoutError: it took longer.
    """
    argv = [sys.executable, "-m", module, str(os.getpid()), *arguments]
    with _run(argv) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done after {timeout_s:.0f} s") from None
    if process.returncode:
        raise VMError(f"{module} {' '.join(arguments)} failed:\n{errors[-2000:]}")
    result: dict[str, Any] = json.loads(out)
    return result


@contextlib.contextmanager
def _run(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        argv, cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()  # until nobody has the other end: what it started is gone then, too
