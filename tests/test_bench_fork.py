"""The benchmark of the fork: it takes real samples, keeps them, and ends what it started; pictures and tables show the data.

No timing decides here.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import documents
from benchmarks.fork import __main__ as command
from benchmarks.fork import plots, tables
from benchmarks.fork.parts import FULL, PARTS, QUICK, LeftOut, Part
from benchmarks.fork.results import Point, Results, Spread
from sfparallel.vmm.regions import MEASURED
from tests.conftest import HANG_S, descendants

ROOT = Path(__file__).parent.parent
MACHINE = {"processor": "a processor", "cores": 2, "memory_gib": 24.0, "kernel": "6.1", "qemu": "7.2.22 (Debian)",
           "accelerator": "tcg", "python": "3.11.2"}  # fmt: skip
RUN = {"begun": "2026-01-01 00:00 UTC", "revision": "abc", "measured": "def", "others_busy": 0.0, "speed_ms": 50.0}


def benchmark(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "benchmarks.fork", "--data", str(folder / "fork.json"), "--pictures", str(folder), *arguments]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ran(folder: Path, *arguments: str) -> Results:
    process = benchmark(folder, *arguments)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors + out
    return Results.read(folder / "fork.json")


# -- on real VMs -------------------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "net", "fuse", "qemu", "image")
@pytest.mark.timeout(1200)
def test_a_quick_run_measures_every_part_and_draws_every_picture(tmp_path: Path) -> None:
    results = ran(tmp_path, "--quick")
    for name, part in PARTS.items():
        for point in part.points(QUICK):
            assert results.count(name, point) == part.samples(QUICK), (name, point)
    for point, samples in results.points("clones"):
        for sample in samples:
            assert sample["n"] == point["n"] and len(sample["private_mib"]) == min(point["n"], MEASURED)
            times = sample["milestones_ms"]
            for saved in ("devices", "committed"):  # the two happen side by side, either may end first
                order = [times[key] for key in ("shells", "frozen", "stopped", saved, "resumed", "loaded", "woken")]
                assert order == sorted(order)
            assert times["first_answer"] <= times["last_answer"]
            assert 0 < sample["pause_ms"] < times["last_answer"]
    written, read = (dict(results.spreads("private", "touched_mib", "anonymous_mib", access=access))
                     for access in ("write", "read"))  # fmt: skip
    assert written[8].median - written[0].median > 6  # 8 MiB, but for pages that were private anyway
    assert read[8].median - read[0].median < 4
    dirty = {point["dirty_mib"]: samples[-1]["commit"]["dirty_pages"] for point, samples in results.points("pause")}
    assert dirty[8] - dirty[0] > 1500  # of 2048 pages
    for way in ("boot", "classic"):
        for point, samples in results.points(way):
            assert all(len(sample["private_mib"]) == point["n"] for sample in samples)
            # They share nothing: all that a guest has in memory after its boot is their own.
            assert all(min(sample["private_mib"]) > 80 for sample in samples)
    for name in plots.PICTURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.needs("root", "net", "fuse", "qemu", "image")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("part", ["drift", "boot"])
def test_an_end_in_the_middle_leaves_no_vm_and_keeps_what_was_measured(tmp_path: Path, number: signal.Signals, part: str) -> None:
    process = benchmark(tmp_path, "--quick", "--part", "clones", part, "--n", "1", "--repeat", "2")
    assert process.stderr
    seen = ""
    # Until it is in the middle of the second part, and that has VMs.
    while "clones 2/2" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    while not any(b"-incoming" in _words(pid) or b"-kernel" in _words(pid) for pid in descendants(process.pid)):
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG_S)
    if number == signal.SIGINT:
        assert process.returncode == command.EXIT_INTERRUPTED, errors
        assert "--resume" in errors
    # The fixture `nothing_left` sees to it that no QEMU is.
    assert Results.read(tmp_path / "fork.json").count("clones", {"n": 1}) == 2


def _words(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


# -- the data ----------------------------------------------------------------------------------------------------------


def begun(resume: bool = False, results: Results | None = None, **run: str) -> Results:
    results = results or Results.empty(MACHINE)
    results.begin("clones", "full", {**RUN, **run}, resume=resume)
    return results


def test_data_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = begun()
    for n in (8, 1):
        for value in (3.0, 1.5):
            results.add("clones", {"n": n}, {"milestones_ms": {"loaded": value * n}})
    results.leave_out("clones", {"n": 64}, "no memory")
    results.write(tmp_path / "a" / "fork.json")
    again = Results.read(tmp_path / "a" / "fork.json")
    assert again.data == results.data
    loaded = [(1.0, Spread(1.5, 2.25, 3.0, 2)), (8.0, Spread(12, 18, 24, 2))]
    assert again.spreads("clones", "n", "milestones_ms", "loaded") == loaded
    assert list(again.left_out("clones")) == [({"n": 64}, "no memory")]


def test_a_resumed_part_keeps_its_samples_only_if_the_same_code_was_measured() -> None:
    results = begun()
    results.add("clones", {"n": 1}, {})
    assert begun(True, results).count("clones", {"n": 1}) == 1
    assert begun(True, results, measured="other").count("clones", {"n": 1}) == 0


def test_a_part_measured_anew_leaves_the_others_alone() -> None:
    results = begun()
    results.add("clones", {"n": 1}, {})
    results.begin("pause", "full", RUN, resume=False)
    results.begin("pause", "full", RUN, resume=False)
    assert results.count("clones", {"n": 1}) == 1


def fake(points: list[Point], samples: int, *, whole: bool = False, left_out: Point | None = None) -> tuple[Part, list[Point]]:
    """A part that measures nothing, and the points of which it has given samples."""
    given: list[Point] = []

    def take(scale: Any, wanted: Any) -> Any:
        for _ in range(samples):
            for point in points:
                if wanted(point):
                    if point == left_out:
                        raise LeftOut(point, "too slow")
                    given.append(point)
                    yield point, {"pause_ms": 1.0}

    return Part("", lambda scale: points, lambda scale: samples, take, whole=whole), given


def test_a_part_is_gone_on_with_where_it_ended(tmp_path: Path) -> None:
    part, given = fake([{"n": 1}, {"n": 2}], 3)
    results = begun()
    assert not command.measure("clones", part, FULL, results, tmp_path / "data", command.Clock(0.0))
    results.add("clones", {"n": 1}, {})
    assert command.measure("clones", part, FULL, results, tmp_path / "data", command.Clock(None))
    assert given.count({"n": 1}) == 2 and given.count({"n": 2}) == 3


def test_a_point_that_cannot_be_measured_does_not_end_the_others(tmp_path: Path) -> None:
    part, given = fake([{"n": 1}, {"n": 2}, {"n": 3}], 2, left_out={"n": 2})
    results = begun()
    assert command.measure("clones", part, FULL, results, tmp_path / "data", command.Clock(None))
    assert given.count({"n": 1}) == given.count({"n": 3}) == 2
    assert [point for point, _ in results.left_out("clones")] == [{"n": 2}]


def test_a_part_that_is_whole_or_nothing_begins_again(tmp_path: Path) -> None:
    part, given = fake([{"n": 1}], 5, whole=True)
    results = begun()
    results.add("clones", {"n": 1}, {"half": 1})
    assert command.measure("clones", part, FULL, results, tmp_path / "data", command.Clock(None))
    assert len(given) == results.count("clones", {"n": 1}) == 5


# -- pictures and tables -----------------------------------------------------------------------------------------------


def some() -> Results:
    """Data of every part, in which every quantity at every point is another number."""
    results = Results.empty(MACHINE)
    number = 100.0
    for name, part in PARTS.items():
        results.begin(name, "full", RUN, resume=False)
        for point in part.points(QUICK):
            for _ in range(2):
                number += 1
                times = {key: number + i for i, (key, _, _) in enumerate(plots.PHASES)}
                results.add(name, point, {
                    "milestones_ms": {"shells": 0.0, **times}, "answered_ms": number, "pause_ms": number, "private_mib": [number],
                    "anonymous_mib": [number],
                    "commit": {"dirty_pages": int(number) * 256, "stored_pages": 1},
                    "supervisor": {"open_files": number, "private_mib": number},
                })  # fmt: skip
    return results


def curves(figure: Any) -> dict[str, list[float]]:
    """Label and values of each curve with bars."""
    return {bars.get_label(): list(bars.lines[0].get_ydata()) for axes in figure.axes for bars in axes.containers
            if bars.get_label() and hasattr(bars, "has_yerr")}  # fmt: skip


def test_curves_are_the_medians_of_the_data() -> None:
    results = some()
    found = curves(plots.time_to_n(results))
    assert len(found) == 6
    for part, label, path in (("boot", "cold boot of n VMs", ("milestones_ms", "last_answer")),
                              ("clones", "sfparallel: n clones are loaded", ("milestones_ms", "loaded"))):  # fmt: skip
        assert found[label] == [spread.median for _, spread in results.spreads(part, "n", *path)]
    assert curves(plots.private(results))["written to"] == [
        spread.median for _, spread in results.spreads("private", "touched_mib", "anonymous_mib", access="write")]
    assert curves(plots.pause(results))["measured"] == [
        spread.median for _, spread in results.spreads("parent", "holds_gib", "pause_ms")]


def test_stacks_add_up_to_the_last_answer() -> None:
    results = some()
    right = plots.phases(results).axes[1]
    tops: dict[float, float] = {}
    for bar in right.patches:
        tops[bar.get_x()] = max(tops.get(bar.get_x(), 0.0), bar.get_y() + bar.get_height())
    expected = [spread.median / 1e3 for _, spread in results.spreads("clones", "n", "milestones_ms", "last_answer")]
    assert [tops[x] for x in sorted(tops)] == pytest.approx(expected)


def test_snowflock_is_marked_where_it_was_published() -> None:
    axes = plots.time_to_n(some()).axes[0]
    star = next(line for line in axes.lines if str(line.get_label()).startswith("SnowFlock"))
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([32], [800.0])


def test_drawing_twice_gives_equal_pictures_with_descriptions(tmp_path: Path) -> None:
    results = some()
    first, second = plots.draw(results, tmp_path / "1"), plots.draw(results, tmp_path / "2")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path in first:
        if path.suffix == ".svg":
            picture = ElementTree.parse(path).getroot()
            assert picture.findtext("{http://www.w3.org/2000/svg}title")
            assert picture.findtext("{http://www.w3.org/2000/svg}desc")


def test_nothing_is_drawn_of_what_was_not_measured(tmp_path: Path) -> None:
    assert plots.draw(Results.empty(MACHINE), tmp_path) == []
    results = Results.empty(MACHINE)
    results.begin("pause", "full", RUN, resume=False)
    results.add("pause", {"earlier": "gone", "dirty_mib": 0}, {"pause_ms": 9.0, "commit": {"dirty_pages": 300}})
    assert {path.stem for path in plots.draw(results, tmp_path)} == {"pause"}


def test_tables_show_medians_spreads_and_what_is_missing() -> None:
    results = some()
    text = tables.text(results)
    times = results.spreads("classic", "n", "milestones_ms", "last_answer")
    for _, spread in times:
        assert f"{spread.median:.0f} ({spread.low:.0f} to {spread.high:.0f})" in text
    # Cold boots were measured for one n only.
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    assert f" {tables.NOT_MEASURED} " in row


def test_tables_say_what_a_whole_run_would_have_had() -> None:
    results = begun()
    for n in (1, 2, 4, 8, 16, 64):
        results.add("clones", {"n": n}, {"milestones_ms": {"loaded": 1.0, "last_answer": 2.0}})
    line = next(line for line in tables.text(results).splitlines() if line.startswith("Not measured yet"))
    assert "`clones` (n=32)" in line and "`boot`," in line


def test_tables_replace_what_is_between_the_marks_only(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(f"before\n\n{documents.begin('benchmarks.fork')}\nwhat was there\n{documents.END}\nafter\n")
    documents.fill(document, "benchmarks.fork", tables.text(some()))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "what was there" not in text
    documents.fill(document, "benchmarks.fork", tables.text(some()))
    assert document.read_text() == text
