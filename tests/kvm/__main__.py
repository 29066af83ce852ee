"""Runs tests in the outer VM, under KVM: `python -m tests.kvm`.

Without options: all tests chosen by tests/kvm/choice.py that have not passed with the present code. What it learns goes into
last-run.json and docs/kvm.md as it ends, also by Ctrl-C, so that the next run goes on from there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from benchmarks import documents, host
from sfparallel.config import cache_folder
from sfparallel.vmm import image, locks
from tests.kvm import outer_root, outer_vm, record
from tests.kvm.choice import SMOKE, is_one_of

HANG_S = 6 * 3600.0
"""After so long the outer VM is ended, whatever it does."""

CI_S = 45 * 60
"""What CI may take in all; it is ended after 50 minutes."""
SHORT_S = 12 * 60
"""What the short run took on a busy machine: it is not begun with less time left."""


class Busy(Exception):
    """Another run has the outer VM."""


_JOB = """\
export SF_CACHE=/cache SF_ACCEL=kvm SF_TEST_PATIENCE=10 KVM_RESULTS=/share/results KVM_TESTS=/share/tests KVM_STOP=/share/stop
cd /project
exec python3 -m pytest -v -p no:cacheprovider -p tests.kvm.choice --timeout 3000 {files}
"""


def main() -> int:
    options = _options().parse_args()
    own = cache_folder() / "test-kvm" / record.FILE.name
    entries = record.read(record.FILE, own)
    if options.last:
        print(record.last(entries))
        return 0
    if options.draw:
        draw()
        return 0
    if options.job:
        return ended(run(options.job, None, HANG_S, steady=options.steady), options.job)
    if options.if_due is not None:
        return if_due(options.if_due, entries, own)
    names = SMOKE if options.smoke else None
    return test(names, record.FILE, again=options.again, seconds=options.seconds, steady=options.steady)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.kvm", allow_abbrev=False,
                                     description="run tests in a VM that has KVM, though emulated")
    parser.add_argument("--smoke", action="store_true", help="a few tests, minutes instead of hours")
    parser.add_argument("--again", action="store_true", help="also tests that have passed with this code")
    parser.add_argument("--seconds", type=float, help="begin no other test after this time; the next run goes on from there")
    parser.add_argument("--steady", action="store_true",
                        help="the outer VM's clocks count instructions: slower, but no time limit runs out on a busy machine")
    parser.add_argument("--last", action="store_true", help="say when the tests ran last, and run none")
    parser.add_argument("--draw", action="store_true", help="write docs/kvm.md from the data, and run none")
    parser.add_argument("--if-due", type=float, metavar="BEGAN",
                        help="as CI: the few tests, if they are due and there is time; BEGAN is when CI began (epoch)")
    parser.add_argument("--job", type=Path, metavar="FOLDER", help="run FOLDER/job in the outer VM, where FOLDER is /share")
    return parser


def if_due(began: float, entries: list[record.Entry], own: Path) -> int:
    """The short run if it is due. What it learns is kept in the cache folder: CI commits nothing."""
    say(record.last(entries))
    why = record.why_due(entries, record.code(), datetime.now(UTC))
    if not why:
        say("KVM: the short run is not due")
        return 0
    built = outer_root.root_folder(cache_folder() / "test-kvm").exists()
    left = CI_S - (time.time() - began)
    missing = "the outer VM is not built" if not built else f"{max(0, left):.0f} s are left of CI's time"
    if built and left >= SHORT_S:
        say(f"KVM: the short run is due: {why}")
        try:
            return test(SMOKE, own, again=True, seconds=left - SHORT_S / 2, limit_s=left, steady=True)
        except Busy:
            missing = "another run has the outer VM"
    say(f"KVM: the short run is due ({why}), but NOT RUN: {missing}; `make test-kvm ARGS=--smoke` runs it")
    return 0


def test(
    names: tuple[str, ...] | None, target: Path, *, again: bool, seconds: float | None, limit_s: float | None = None,
    steady: bool = False,
) -> int:
    """Run tests, all if `names` is None, and put how they ended into the record `target`.

    Args:
        limit_s: end the outer VM after this time. It is no failure then, but said; nor does this wait for another run.

    Raises:
        Busy: another run has the outer VM, and there is a limit.
    """
    entries, code, revision = record.read(target), record.code(), record.revision()
    tests = [test for test in collected() if names is None or is_one_of(test, names)]
    chosen = tests if again else record.to_run(entries, tests, code)
    if not chosen:
        say(f"all {len(tests)} have passed with this code; --again runs them once more")
        return 0
    say(f"{len(chosen)} of {len(tests)} tests" + ("" if again else "; the others have passed with this code"))
    with tempfile.TemporaryDirectory(prefix="test-kvm") as folder:
        share = Path(folder)
        (share / "tests").write_text("\n".join(chosen))
        files = " ".join(dict.fromkeys(name.partition("::")[0] for name in chosen))  # others need not even be imported there
        (share / "job").write_text(_JOB.format(files=files))
        # By our clock: the outer VM's may be another one.
        timer = threading.Timer(seconds or HANG_S, (share / "stop").touch)
        timer.daemon = True
        timer.start()
        try:
            result = run(share, share / "output" if limit_s else None, limit_s or HANG_S, wait=limit_s is None, steady=steady)
        finally:
            timer.cancel()
            new = record.entries_of(share / "results", revision, code)
            names_now = set(collected()) if names is None else None
            kept = {entry.test: entry for entry in entries if names_now is None or entry.test in names_now}
            record.write(target, {**kept, **{entry.test: entry for entry in new}}.values())
            if target == record.FILE:
                draw()
        say(f"{record.last(new)}, of {len(chosen)}" if new else f"KVM: none of {len(chosen)} tests came to its end")
        if is_cut_off(result, new, (share / "stop").exists()):
            say("KVM: the time was over before all had run; `make test-kvm` goes on from there")
            return 0
        if result != 0 and limit_s:
            sys.stderr.write((share / "output").read_text(errors="replace"))
        return ended(result, share)


def is_cut_off(code: int | None, new: list[record.Entry], time_is_over: bool) -> bool:
    """If all that a run lacks is time: pytest was told to stop (exit code 2, for interrupted), or the outer VM was ended."""
    return time_is_over and code in (2, None) and not any(entry.outcome == "failed" for entry in new)


def collected() -> list[str]:
    """The tests that belong into the outer VM, by this work tree."""
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "tests.kvm.choice"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # it may ask for another list
    said = subprocess.run(argv, cwd=host.ROOT, check=True, capture_output=True, text=True, env=environment).stdout
    return [line for line in said.splitlines() if "::" in line]


def run(
    share: Path, output: Path | None, limit_s: float, *, wait: bool = True, **options: Any
) -> int | None:
    """Run `share`/job in the outer VM, made if it is not there; its output goes to ours, or into a file.

    Args:
        wait: for another run; without it, raise Busy.
        options: of `outer_vm.run`.

    Returns:
        The job's exit code; None if it did not come to its end.
    """
    folder = cache_folder() / "test-kvm"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def busy() -> None:
        if not wait:
            raise Busy
        say("waiting for another run")

    with locks.locked(folder / ".lock", busy):
        built = outer_root.ensure_root(folder, say)
        project = folder / "project.sqfs"
        outer_vm.project_disk(built / "root", project, say)
        cache = outer_vm.cache_disk(folder, image.find("default"), say)
        say("booting the outer VM")
        stream: IO[Any] | None = output.open("wb") if output else None
        left = limit_s - (time.monotonic() - began)
        try:
            return outer_vm.run(built, project, cache, share, left, output=stream, **options)
        finally:
            if stream:
                stream.close()


def ended(code: int | None, share: Path) -> int:
    """An exit code, also for an outer VM that did not come to its end."""
    if code is None:
        console = (share / "console").read_text(errors="replace")[-2000:] if (share / "console").exists() else ""
        say(f"the outer VM did not come to its end; its console ends with\n{console}")
        return 1
    return code


def draw() -> None:
    documents.fill(record.DOCUMENT, "tests.kvm", record.text(record.read(record.FILE)))


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
