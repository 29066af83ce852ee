"""What is said of the tests' last run under KVM follows from the data; which tests run there is known; when they are due."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks import documents, host
from sfparallel.vmm import locks
from tests.kvm import __main__ as command
from tests.kvm import choice, counts, outer_root, record, tsc

ENTRY = record.Entry("tests/test_fork.py::test_fork_of_a_clone", "passed", 20.0, "2026-11-01 12:00", "abc", "c0de")
THEN = datetime(2026, 11, 1, 12, tzinfo=UTC)


def test_the_committed_document_is_of_the_committed_record(tmp_path: Path) -> None:
    committed = record.DOCUMENT.read_text(encoding="utf-8")
    document = tmp_path / "kvm.md"
    document.write_text(committed, encoding="utf-8")
    documents.fill(document, "tests.kvm", record.text(record.read(record.FILE)))
    assert document.read_text(encoding="utf-8") == committed


@pytest.mark.parametrize(("entries", "code", "after", "why"), [
    ([], "c0de", timedelta(0), "they have never run"),
    ([replace(ENTRY, test="tests/test_sfrun.py::test_other")], "c0de", timedelta(0), "they have never run"),
    ([ENTRY], "c0de", timedelta(days=7), ""),
    ([ENTRY], "c0de", timedelta(days=7, minutes=1), "the last run is more than a week old"),
    ([ENTRY], "other", timedelta(0), "what it depends on has changed"),
    ([replace(ENTRY, outcome="failed")], "c0de", timedelta(0), "the last run failed"),
    ([ENTRY, replace(ENTRY, test="tests/test_kvm.py::x[y]", code="old")], "c0de", timedelta(0), "what it depends on has changed"),
])  # fmt: skip
def test_when_the_short_run_is_due(entries: list[record.Entry], code: str, after: timedelta, why: str) -> None:
    assert record.why_due(entries, code, THEN + after) == why


def test_a_run_goes_on_where_the_last_one_ended() -> None:
    tests = ["a.py::passed", "a.py::failed", "a.py::old", "a.py::new"]
    entries = [replace(ENTRY, test="a.py::passed"), replace(ENTRY, test="a.py::failed", outcome="failed"),
               replace(ENTRY, test="a.py::old", code="old")]  # fmt: skip
    assert record.to_run(entries, tests, "c0de") == ["a.py::failed", "a.py::old", "a.py::new"]


def test_records_are_joined_by_the_newest_and_written_as_they_are_read(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    newer = replace(ENTRY, outcome="failed", day="2026-11-02 00:00", revision="def+")
    other = replace(ENTRY, test="tests/test_kvm.py::x")
    record.write(ours, [ENTRY, other])
    record.write(theirs, [newer])
    assert record.read(ours, theirs, tmp_path / "missing.json") == record.read(theirs, ours) == [newer, other]
    said = record.last([newer, other])
    assert "between 2026-11-01 12:00 (at abc) and 2026-11-02 00:00 (at def+): 1 passed, 1 failed" in said
    assert f"* `{newer.test}`" in record.text([newer, other])
    assert "never" in record.last([])


def test_a_run_that_was_cut_off_is_known_up_to_its_last_whole_line(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert record.entries_of(results, "abc", "c0de") == []
    results.write_text('{"test": "a.py::b", "outcome": "passed", "seconds": 1.5}\n{"test": "a.py::c", "outc')
    (entry,) = record.entries_of(results, "abc", "c0de")
    assert (entry.test, entry.outcome, entry.seconds, entry.revision, entry.code) == ("a.py::b", "passed", 1.5, "abc", "c0de")


def test_the_digest_is_of_files_that_are_there() -> None:
    assert len(record.code()) == 12


def test_what_is_left_out_or_short_is_there() -> None:
    for name in (*choice.LEFT_OUT, *choice.SMOKE, *choice.NEXT):
        file, _, function = name.partition("::")
        assert f"def {function}(" in (host.ROOT / file).read_text() if function else (host.ROOT / file).exists(), name


def test_tests_are_chosen_and_how_they_end_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "test_chosen.py").write_text(
        "import pytest\n"
        "def test_not(): pass\n"
        "@pytest.mark.needs('ml', 'image')\ndef test_other_image(): pass\n"
        "@pytest.mark.needs('image')\nclass TestAll:\n"
        "    def test_passes(self): pass\n"
        "    def test_fails(self): assert False\n"
        "    def test_skips(self): pytest.skip('no')\n"
        "    @pytest.fixture\n    def broken(self):\n        yield\n        assert False\n"
        "    def test_fails_at_its_end(self, broken): pass\n"
    )
    ends = tmp_path / "ends"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.kvm.choice", "--rootdir", str(tmp_path),
            "-c", "/dev/null", "-o", "markers=needs(what): x", str(tmp_path / "test_chosen.py")]  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "KVM_RESULTS": str(ends), "PYTHONPATH": str(host.ROOT)}
    subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    found = {entry.test.rpartition("::")[2]: entry.outcome for entry in record.entries_of(ends, "abc", "c0de")}
    assert found == {"test_passes": "passed", "test_fails": "failed", "test_skips": "skipped", "test_fails_at_its_end": "failed"}
    # With a file that says so, it ends after the test that is under way.
    ends.unlink()
    (tmp_path / "stop").touch()
    subprocess.run(argv, cwd=tmp_path, env={**environment, "KVM_STOP": str(tmp_path / "stop")}, capture_output=True, timeout=120)
    assert len(record.entries_of(ends, "abc", "c0de")) == 1


TRACE = """\
# tracer: nop
           CPU 0/KVM-900     [000] d....        100: kvm_entry: vcpu 0, rip 0xffffffff81000000
           CPU 0/KVM-900     [000] .....       1107: kvm_exit: vcpu 0 reason EXIT_HLT rip 0xffffffff81000004 info1 0x0 info2 0x0
           CPU 0/KVM-901     [000] .....       1500: kvm_exit: vcpu 0 reason EXIT_INTR rip 0xffffffff81000004 info1 0x0
           CPU 0/KVM-901     [000] d....       2000: kvm_entry: vcpu 0, rip 0xffffffff81000004
           CPU 0/KVM-901     [000] .....       2507: kvm_exit: vcpu 0 reason EXIT_NPF rip 0xffffffff81000004 info1 0x5
           CPU 0/KVM-901     [000] d....       3000: kvm_entry: vcpu 0, rip 0xffffffff81000004
           CPU 0/KVM-901     [000] .....       3007: kvm_exit: vcpu 0 reason EXIT_INTR rip 0xffffffff81000004 info1 0x0
           CPU 0/KVM-900     [000] d....       4000: kvm_entry: vcpu 0, rip 0xffffffff81000000
"""


def test_the_committed_figures_are_of_the_committed_counts(tmp_path: Path) -> None:
    committed = counts.DOCUMENT.read_text(encoding="utf-8")
    document = tmp_path / "performance.md"
    document.write_text(committed, encoding="utf-8")
    documents.fill(document, "tests.kvm.counts", counts.text(json.loads(counts.DATA.read_text(encoding="utf-8"))))
    assert document.read_text(encoding="utf-8") == committed


def test_a_trace_of_kvm_is_counted() -> None:
    """The clone is the thread that began last; 7 instructions are the host's, between the two tracepoints."""
    assert counts.sample(TRACE) == {"instructions": 500, "exits": {"intr": 1, "npf": 1}}


def test_the_rate_of_the_tsc_is_the_same_each_time() -> None:
    first, second = tsc.kilohertz(), tsc.kilohertz()
    assert 100_000 < first < 10_000_000 and abs(first - second) < first / 1000


@pytest.mark.parametrize(("built", "began", "said"), [
    (False, time.time(), "NOT RUN: the outer VM is not built"),
    (True, 0.0, "NOT RUN: 0 s are left of CI's time"),
])  # fmt: skip
def test_a_run_that_is_due_and_cannot_be_is_told(
    built: bool, began: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SF_CACHE", str(tmp_path))
    if built:
        outer_root.root_folder(tmp_path / "test-kvm").mkdir(parents=True)
    assert command.if_due(began, [], tmp_path / "record.json") == 0
    err = capsys.readouterr().err
    assert "have never run" in err and said in err and "make test-kvm ARGS=--smoke" in err


@pytest.mark.parametrize(("code", "outcome", "over", "cut_off"), [
    (2, "passed", True, True), (None, "passed", True, True), (2, "failed", True, False), (2, "passed", False, False),
    (None, "passed", False, False), (1, "passed", True, False), (0, "passed", True, False),
])  # fmt: skip
def test_only_a_run_that_lacks_nothing_but_time_is_cut_off(code: int | None, outcome: str, over: bool, cut_off: bool) -> None:
    assert command.is_cut_off(code, [replace(ENTRY, outcome=outcome)], over) == cut_off


def test_a_run_that_is_due_waits_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SF_CACHE", str(tmp_path))
    outer_root.root_folder(tmp_path / "test-kvm").mkdir(parents=True)
    with locks.locked(tmp_path / "test-kvm" / ".lock", lambda: None):
        assert command.if_due(time.time(), [], tmp_path / "record.json") == 0
    assert "NOT RUN: another run has the outer VM" in capsys.readouterr().err


def test_no_run_where_none_is_due(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = replace(ENTRY, day=record.now(), code=record.code())
    assert command.if_due(time.time(), [fresh], tmp_path / "record.json") == 0
    assert "not due" in capsys.readouterr().err
