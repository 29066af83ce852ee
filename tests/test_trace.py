"""`--trace` and `--stats`: one record of a fork, two views of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import statistics
from sfparallel.vmm.record import PARENT, SUPERVISOR, ForkReport, Phase
from sfparallel.vmm.trace import TraceFile, Tracks
from tests.conftest import Sfrun

Events = list[dict[str, Any]]


def check_format(events: Events) -> None:
    """What the Trace Event Format asks for: named processes, paired asynchronous events, complete events that nest."""
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    open_forks: set[int] = set()
    for event in events:
        assert event["pid"] in named, f"{event} stands before the name of its process"
        match event["ph"]:
            case "b":
                open_forks.add(event["id"])
            case "e":
                open_forks.remove(event["id"])
            case "X":
                assert event["dur"] >= 0
            case phase:
                assert phase in "MiC"
        assert event["ph"] == "M" or event["ts"] >= 0
    assert not open_forks
    for pid in named:
        check_nesting([event for event in events if event["pid"] == pid and event["ph"] == "X"])


def check_nesting(spans: Events) -> None:
    """Complete events of one thread may lie within each other, and may not overlap otherwise."""
    ends: list[float] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        while ends and ends[-1] <= span["ts"] + 0.002:  # times are rounded to nanoseconds
            ends.pop()
        end = span["ts"] + span["dur"]
        assert not ends or end <= ends[-1] + 0.002, f"{span} overlaps another phase of its VM"
        ends.append(end)


def track_names(events: Events) -> dict[str, int]:
    return {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}


def one_fork() -> ForkReport:
    report = ForkReport(2, started=10.0)
    report.note(SUPERVISOR, Phase.SHELLS, 10.0, 10.25)
    report.note(PARENT, Phase.FREEZE, 10.25, 10.5)
    report.note(PARENT, Phase.STOP, 10.5, 10.625)
    report.note(PARENT, Phase.DEVICES, 10.625, 10.75)
    report.note(PARENT, Phase.COMMIT, 10.75, 11.0, stored_pages=7)
    report.note(PARENT, Phase.RESUME, 11.0, 11.125)
    for number in (1, 2):
        name = f"clone {number}"
        report.note(name, Phase.MAP, 11.25, 11.5)
        report.note(name, Phase.LOAD, 11.5, 11.5 + number)
        report.note(name, Phase.WAKE, 14.0, 14.0 + number, guest_cpu_ms=40.0, guest_wall_ms=50.0)
        report.mark(name, Phase.ANSWER, 17.0)
        report.note(name, Phase.EXIT, 17.0, 18.0, private_bytes=3 << 20, host_cpu_s=0.25)
    report.mark(PARENT, Phase.FIRST_ANSWER, 17.0)
    report.mark(PARENT, Phase.LAST_ANSWER, 17.5)
    return report


def test_events_of_one_fork() -> None:
    events = list(Tracks(origin=8.0).events(one_fork()))
    check_format(events)
    tracks = track_names(events)
    assert list(tracks) == [SUPERVISOR, PARENT, "clone 1", "clone 2"]
    begin, end = (event for event in events if event["ph"] in "be")
    assert (begin["name"], begin["ts"], end["ts"]) == ("fork 1, n=2", 2e6, 10e6)
    (load,) = (event for event in events if event["name"] == "load devices" and event["pid"] == tracks["clone 2"])
    assert (load["ph"], load["ts"], load["dur"], load["args"]) == ("X", 3.5e6, 2e6, {"fork": 1})
    counters = [(event["name"], event["args"], event["ts"]) for event in events if event["ph"] == "C"]
    assert counters == [("pages committed", {"pages": 7}, 3e6), *[("private MiB", {"MiB": 3.0}, 10e6)] * 2]


def test_stats_are_of_the_same_record() -> None:
    report = one_fork()
    assert report.save and report.save.pause == 0.625
    assert report.loads == [1.25, 2.25]
    assert (report.shells_ready, report.loaded, report.wakes, report.woken) == (0.25, 3.5, [5.0, 6.0], 6.0)
    assert (report.first_answer, report.last_answer) == (7.0, 7.5)
    assert (report.wake_cpu, report.private_bytes, report.cpu) == ([0.04] * 2, [3 << 20] * 2, [0.25] * 2)
    text = statistics.describe(report)
    assert "woken 5000.0 ms first, 6000.0 ms last, 40.0 ms guest CPU each" in text
    assert "private memory 3.0 MiB median" in text


def test_a_fork_that_never_came_about_is_described_too() -> None:
    report = ForkReport(3, started=1.0)
    assert report.save is None and report.last_answer is None
    assert "n=3" in statistics.describe(report)
    check_format(list(Tracks(0.0).events(report)))


def test_the_file_is_whole_at_the_end_and_readable_before(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    trace = TraceFile(path, 0.0, pytest.fail)
    trace.add(one_fork())
    trace.add(one_fork())
    before = json.loads(path.read_text() + "]")
    trace.close()
    events = json.loads(path.read_text())
    assert events == before
    check_format(events)
    assert len(track_names(events)) == sum(event["name"] == "process_name" for event in events)


def test_a_job_without_forks_leaves_an_empty_trace(tmp_path: Path) -> None:
    TraceFile(tmp_path / "out.json", 0.0, pytest.fail).close()
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_a_full_disk_ends_the_trace_and_not_the_job() -> None:
    said: list[str] = []
    trace = TraceFile(Path("/dev/full"), 0.0, said.append)
    trace.add(one_fork())
    trace.add(one_fork())
    trace.close()
    assert len(said) == 1 and "No space left" in said[0]


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"--trace .*No such file or directory"):
        TraceFile(tmp_path / "no" / "out.json", 0.0, pytest.fail)


CLONE_PHASES = {
    Phase.START, Phase.TAKEN, Phase.MAP, Phase.LOAD, Phase.CONT, Phase.WAKE, Phase.USER, Phase.ANSWER, Phase.EXIT,
}  # fmt: skip


@pytest.mark.needs("qemu", "image", "root")
def test_trace_and_stats_of_real_forks(sfrun: Sfrun) -> None:
    """Two regions, and one whose clones are killed: an end is seen of them, and no answer."""
    ended = sfrun(
        """
        import time
        import sfparallel as sf

        for _ in range(2):
            sf.parallel(n=2)(lambda: sf.comm().rank)()
        try:
            sf.parallel(n=1, timeout=0.5)(time.sleep)(60)
        except sf.RegionTimeout:
            pass
        """,
        "-n", "2", "--stats", "--trace", "out.json",
    ).ok()  # fmt: skip
    events = json.loads((sfrun.folder / "out.json").read_text())
    check_format(events)
    tracks = {number: name for name, number in track_names(events).items()}
    by_fork: dict[int, dict[str, set[str]]] = {}
    for event in events:
        if event["ph"] in "Xi":
            by_fork.setdefault(event["args"]["fork"], {}).setdefault(tracks[event["pid"]], set()).add(event["name"])
    assert sorted(by_fork) == [1, 2, 3]
    for number, vms in by_fork.items():
        assert vms[PARENT] >= {"freeze programs", "stop processors", "save devices", "commit memory", "resume"}
        clones = [phases for name, phases in vms.items() if name.startswith("clone")]
        expected = CLONE_PHASES if number < 3 else CLONE_PHASES - {Phase.USER, Phase.ANSWER}
        assert clones == [{phase.value for phase in expected}] * (2 if number < 3 else 1)
    wakes = [event["args"] for event in events if event["name"] == Phase.WAKE.value]
    assert all(args["guest_cpu_ms"] > 0 and args["guest_wall_ms"] > 0 for args in wakes)
    dirty = [event["args"]["dirty_pages"] for event in events if event["name"] == Phase.COMMIT.value]
    assert [int(text) for text in re.findall(r"(\d+) dirty pages", ended.err)] == dirty
