"""The tables of docs/performance.md, from the data file; between two marks in the document: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import documents
from benchmarks.fork.parts import FULL, PARTS
from benchmarks.fork.plots import TARGET_MS, TARGET_MS_PER_MB
from benchmarks.fork.results import Results, Sample, Spread, megabytes, pauses

NOT_MEASURED = "-"
_SAME_SPEED = 1.15


def text(results: Results) -> str:
    """All tables, as Markdown."""
    return "\n".join([*_machine(results), *_times(results), *_pauses(results), *_parents(results), *_private(results),
                      *_drift(results)])  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 10 else documents.whole(value)


def _cell(spread: Spread | None) -> str:
    """Median, and the lowest and highest sample."""
    if spread is None:
        return NOT_MEASURED
    if spread.count == 1:
        return _number(spread.median)
    return f"{_number(spread.median)} ({_number(spread.low)} to {_number(spread.high)})"


def _machine(results: Results) -> list[str]:
    lines = [f"{documents.machine(results.machine)}. Figures are medians, with the lowest and the highest sample.", ""]
    runs = [(name, run) for name, part in results.parts.items() for run in part["runs"]]
    counts = {name: sorted({len(samples) for _, samples in results.points(name)}) for name in results.parts}
    rows = [(name, "/".join(map(str, counts[name])),
             " ".join(dict.fromkeys(run["begun"][:10] for run in part["runs"])),
             " ".join(dict.fromkeys(f"`{run['revision']}`" for run in part["runs"])),
             _number(Spread.of([run["speed_ms"] for run in part["runs"]]).median),
             f"{max(run['others_busy'] for run in part['runs']):.0%}")
            for name, part in results.parts.items()]  # fmt: skip
    head = ("part", "samples of each point", "day", "sfparallel at", "fixed loop on a core (ms)", "others busy before")
    lines += documents.table(head, rows)
    speeds = [run["speed_ms"] for _, run in runs]
    if speeds and max(speeds) > _SAME_SPEED * min(speeds):
        lines += [f"The machine was not equally fast in all parts: the loop took {min(speeds):.0f} to {max(speeds):.0f} ms.", ""]
    return [*lines, *_missing(results)]


def _missing(results: Results) -> list[str]:
    """What a whole run has and these data have not."""
    missing = []
    for name, part in PARTS.items():
        lacking = [point for point in part.points(FULL) if not results.count(name, point)]
        if len(lacking) == len(part.points(FULL)):
            missing.append(f"`{name}`")
        elif lacking:
            points = "; ".join(", ".join(f"{key}={value}" for key, value in point.items()) for point in lacking)
            missing.append(f"`{name}` ({points})")
    return [f"Not measured yet: {', '.join(missing)}.", ""] if missing else []


def _times(results: Results) -> list[str]:
    columns = {
        "clones loaded": results.spreads("clones", "n", "milestones_ms", "loaded"),
        "clones answered": results.spreads("clones", "n", "milestones_ms", "last_answer"),
        "full save, n restores": results.spreads("classic", "n", "milestones_ms", "last_answer"),
        "cold boot": results.spreads("boot", "n", "milestones_ms", "last_answer"),
        "`multiprocessing.Pool`": results.spreads("floor", "n", "answered_ms", way="multiprocessing"),
        "`os.fork`": results.spreads("floor", "n", "answered_ms", way="os.fork"),
    }
    by_n = {name: dict(data) for name, data in columns.items()}
    counts = sorted({n for data in by_n.values() for n in data})
    lines = ["### Time until n workers have answered (ms)", ""]
    lines += documents.table(("n", *columns), ([f"{n:.0f}", *(_cell(data.get(n)) for data in by_n.values())] for n in counts))
    lines += ["As ratios to the clones' answers of the same n (medians):", ""]
    others = list(columns)[2:]
    rows = []
    for n in counts:
        clones = by_n["clones answered"].get(n)
        if clones:
            found = [by_n[name].get(n) for name in others]
            rows.append([f"{n:.0f}", *(f"{spread.median / clones.median:.3g}" if spread else NOT_MEASURED for spread in found)])
    lines += documents.table(("n", *others), rows)
    for part, name in (("boot", "Cold boot"), ("classic", "Full save, n restores")):
        lines += [f"{name}, n={point['n']}: left out, {reason}." for point, reason in results.left_out(part)]
    return lines if not lines[-1] else [*lines, ""]


def _target(samples: Sequence[Sample]) -> float:
    return TARGET_MS + TARGET_MS_PER_MB * megabytes(samples)


def _pauses(results: Results) -> list[str]:
    lines = ["### Pause of the parent by memory dirtied", ""]
    rows = []
    for earlier, name in (("gone", "no"), ("kept", "yes")):
        for point, samples in results.points("pause", earlier=earlier):
            pause, target = pauses(samples), _target(samples)
            stored = megabytes(samples, "stored_pages")
            rows.append([f"{point['dirty_mib']:g} MiB", name, _number(megabytes(samples)), _number(stored), _cell(pause),
                         _number(target), f"{pause.median / target:.2f}"])  # fmt: skip
    head = ("written", "earlier checkpoint kept", "dirty (MB)", "stored (MB)", "pause (ms)", "target (ms)", "pause / target")
    return [*lines, *documents.table(head, rows)]


def _parents(results: Results) -> list[str]:
    lines = ["### Pause by size of the parent", ""]
    points = [(point, samples, pauses(samples)) for point, samples in results.points("parent")]
    rows = [[f"{point['holds_gib']:g} GiB", _cell(pause), _number(_target(samples)), f"{pause.median / points[0][2].median:.2f}"]
            for point, samples, pause in points]  # fmt: skip
    return [*lines, *documents.table(("parent holds", "pause (ms)", "target (ms)", "ratio to the smallest"), rows)]


def _private(results: Results) -> list[str]:
    lines = ["### Private memory of a clone (MiB)", ""]
    columns = {
        f"{words}, {kind}": dict(results.spreads("private", "touched_mib", key, access=access))
        for access, words in (("write", "written to"), ("read", "only read"))
        for kind, key in (("its own", "anonymous_mib"), ("Private_*", "private_mib"))
    }
    touched = sorted({mib for data in columns.values() for mib in data})
    rows = [[f"{mib:g} MiB", *(_cell(data.get(mib)) for data in columns.values())] for mib in touched]
    return [*lines, *documents.table(("touched by each clone", *columns), rows)]


def _drift(results: Results) -> list[str]:
    lines: list[str] = []
    for point, samples in results.points("drift"):
        part = max(1, len(samples) // 10)
        quantities = {
            f"{point['n']} clones have answered (ms)": [sample["milestones_ms"]["last_answer"] for sample in samples],
            "pause (ms)": [sample["pause_ms"] for sample in samples],
            "open files of the supervisor": [sample["supervisor"]["open_files"] for sample in samples],
            "private memory of the supervisor (MiB)": [sample["supervisor"]["private_mib"] for sample in samples],
        }
        lines += [f"### {len(samples)} forks in a row", ""]
        rows = [[name, _cell(Spread.of(values[:part])), _cell(Spread.of(values[-part:]))] for name, values in quantities.items()]
        lines += documents.table(("", f"first {part} forks", f"last {part} forks"), rows)
    return lines
