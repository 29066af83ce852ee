"""What a fork costs on this machine, next to the alternatives: data as JSON, pictures, and tables for docs/performance.md.

    python -m benchmarks.fork                           everything, into benchmarks/data and docs
    python -m benchmarks.fork --part pause drift        these parts anew; the others stay as they are in the data
    python -m benchmarks.fork --resume --seconds 200    go on where the last run ended, for so long (exit code 3: not whole yet)
    python -m benchmarks.fork --draw                    pictures and tables again, from the data
    python -m benchmarks.fork --quick                   few points: does it work?
    python -m benchmarks.fork --part clones --n 8 32    a look at these n only
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import documents, host
from benchmarks.fork.parts import FULL, PARTS, QUICK, LeftOut, Part, Scale
from benchmarks.fork.results import Point, Results
from sfparallel.errors import SfError

DATA = host.ROOT / "benchmarks" / "data" / "fork.json"
DOCUMENT = host.ROOT / "docs" / "performance.md"
PICTURES = host.ROOT / "docs" / "performance"
SCRATCH = host.ROOT / "build" / "bench-fork"
"""Where figures go that are not those of the documents."""

EXIT_INTERRUPTED = 130
EXIT_NOT_WHOLE = 3


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Clock:
    """How long to go on."""

    def __init__(self, seconds: float | None) -> None:
        self._begun = time.monotonic()
        self._seconds = seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def over(self) -> bool:
        return self._seconds is not None and self.elapsed >= self._seconds


def _figures(sample: dict[str, object]) -> str:
    """A sample in a few words, for the progress."""
    found = []
    times = sample.get("milestones_ms")
    if isinstance(times, dict):
        names = {"loaded": "loaded", "last_answer": "answered"}
        found += [f"{names[key]} {times[key]:.0f} ms" for key in names if times.get(key)]
    for key, name in (("pause_ms", "pause"), ("answered_ms", "answered")):
        if isinstance(value := sample.get(key), float):
            found.append(f"{name} {value:.1f} ms")
    return ", ".join(found)


def _name(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point.items())


def measure(name: str, part: Part, scale: Scale, results: Results, data: Path, clock: Clock) -> bool:
    """Take the samples that a part lacks, and write each at once.

    Returns:
        Whether it has all of them now.
    """
    samples, points = part.samples(scale), part.points(scale)

    def lacking() -> int:
        return sum(max(0, samples - results.count(name, point)) for point in points)

    def wanted(point: Point) -> bool:
        return results.count(name, point) < samples

    if part.whole and lacking():
        results.clear(name)
    total = done = lacking()
    while lacking() and not clock.over():
        try:
            with contextlib.closing(part.measure(scale, wanted)) as taken:
                for point, sample in taken:
                    results.add(name, point, sample)
                    results.write(data)
                    done = total - lacking()
                    say(f"{clock.elapsed:6.0f} s  {name} {done}/{total}  {_name(point)}: {_figures(sample)}")
                    if clock.over():
                        break
        except LeftOut as left_out:
            results.leave_out(name, left_out.point, left_out.reason)
            results.write(data)
            say(f"{clock.elapsed:6.0f} s  {name}  {_name(left_out.point)} is left out: {left_out.reason}")
    return not lacking()


def measure_all(names: list[str], scale: Scale, data: Path, *, resume: bool, seconds: float | None) -> bool:
    """Measure parts and merge them into the data file; returns whether all are whole."""
    machine = host.describe()
    results = Results.read(data) if data.exists() else Results.empty(machine)
    if results.machine != machine:
        say("the data are of another machine, or of another QEMU or kernel here: they are begun anew")
        results = Results.empty(machine)
    clock = Clock(seconds)
    whole = True
    for name in names:
        if clock.over():
            say(f"the time is over: {name} is not measured; go on with --resume")
            whole = False
            continue
        begun = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        run = {"begun": begun, **host.revision(), "others_busy": host.busy_share(), "speed_ms": host.speed_ms()}
        results.begin(name, scale.name, run, resume=resume)
        if not measure(name, PARTS[name], scale, results, data, clock):
            say(f"the time is over: {name} is not whole; go on with --resume")
            whole = False
    results.write(data)
    return whole


def draw(data: Path, pictures: Path, document: Path | None) -> None:
    """Pictures and tables, from the data file alone."""
    try:
        from benchmarks.fork import plots
    except ImportError as error:
        say(f"no pictures: {error}; `make bench-fork` installs what is missing")
        return
    from benchmarks.fork import tables

    results = Results.read(data)
    for path in plots.draw(results, pictures):
        say(f"drawn: {path}")
    if document:
        documents.fill(document, "benchmarks.fork", tables.text(results))
        say(f"tables: {document}")
    else:
        print(tables.text(results))


def _scale(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else FULL
    if options.repeat:
        scale = replace(scale, name="own", repeat=options.repeat, boot_repeat=options.repeat)
    if options.n:
        counts = tuple(options.n)
        scale = replace(scale, name="own", counts=counts, processes=counts)
    return scale


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fork", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"which parts: {', '.join(PARTS)}")
    add("--resume", action="store_true", help="keep samples of these parts that are there, and take those that lack")
    add("--seconds", type=float, help="stop after the sample that ends after so many seconds")
    add("--quick", action="store_true", help="few points and repetitions")
    add("--repeat", type=int, help="samples of each point")
    add("--n", type=int, nargs="+", help="numbers of clones")
    add("--draw", action="store_true", help="measure nothing: draw pictures and tables from the data")
    add("--data", type=Path, help="the data file; default: the committed one, with --quick, --n or --repeat one in build/")
    add("--pictures", type=Path, help="folder for the pictures; default likewise")
    options = parser.parse_args()
    scale = _scale(options)
    own = scale is not FULL
    data = options.data or (SCRATCH / "fork.json" if own else DATA)
    committed = data.resolve() == DATA
    pictures = options.pictures or (PICTURES if committed else SCRATCH)
    whole = True
    try:
        if not options.draw:
            whole = measure_all(options.part, scale, data, resume=options.resume, seconds=options.seconds)
        if whole:
            draw(data, pictures, DOCUMENT if committed and not options.pictures else None)
    except KeyboardInterrupt:
        say(f"stopped; what was measured is in {data}; go on with --resume")
        return EXIT_INTERRUPTED
    except SfError as error:
        say(f"benchmark: {error}\nwhat was measured is in {data}; go on with --resume")
        return 1
    return 0 if whole else EXIT_NOT_WHOLE


if __name__ == "__main__":
    sys.exit(main())
