"""The pictures, drawn from the data file and nothing else: median as the mark, lowest and highest sample as the bar.

Colours are those of M. Okabe and K. Ito, "Color Universal Design" (2008), which people with any colour vision can tell apart;
marks and line styles differ as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks import pictures
from benchmarks.fork.results import Results, Spread, megabytes, pauses

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"

SNOWFLOCK_CLONES, SNOWFLOCK_MS = 32, 800.0
"""H. A. Lagar-Cavilla et al., "SnowFlock: Virtual Machine Cloning as a First-Class Cloud Primitive", ACM TOCS 29(1), 2011."""

TARGET_MS, TARGET_MS_PER_MB = 10.0, 0.4
"""The pause that the project promises: issue 3."""

# Milestones of a fork, and what the time up to each went into.
PHASES = (
    ("frozen", "freeze programs", SKY), ("stopped", "stop processors", PURPLE), ("devices", "save devices", ORANGE),
    ("committed", "commit memory", RED), ("resumed", "resume the parent", YELLOW), ("loaded", "load clones", BLUE),
    ("first_woken", "wake the first clone", GREEN), ("last_answer", "wake the others, answers of all", GREY),
)  # fmt: skip


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _decades(low: float, high: float) -> list[float]:
    return [scale * 10.0**power for power in range(-2, 8) for scale in (1, 2, 5) if low <= scale * 10.0**power <= high]


def _line(axes: Axes, data: list[tuple[float, Spread]], label: str, color: str, marker: str, style: str = "-") -> None:
    """Medians as a line, with bars from the lowest to the highest sample."""
    if not data:
        return
    x = [value for value, _ in data]
    middle = [spread.median for _, spread in data]
    below = [spread.median - spread.low for _, spread in data]
    above = [spread.high - spread.median for _, spread in data]
    axes.errorbar(x, middle, yerr=[below, above], label=label, color=color, marker=marker, linestyle=style, markersize=5,
                  linewidth=1.5, elinewidth=1, capsize=3)  # fmt: skip


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _source(figure: Figure, results: Results, *parts: str, marks: str = "marks: median; bars: lowest and highest sample") -> None:
    """Below a picture: the machine, and what was measured when."""
    runs = [run for part in parts if part in results.parts for run in results.parts[part]["runs"]]
    pictures.source(figure, results.machine, [{**run, "day": run["begun"][:10]} for run in runs], marks)


def time_to_n(results: Results) -> Figure:
    """Time until n workers have answered, for every way to get them."""
    figure, (axes,) = _figure(1, 8.4, 5.4)
    pools = results.spreads("floor", "n", "answered_ms", way="multiprocessing")
    ways = [
        (results.spreads("boot", "n", "milestones_ms", "last_answer"), "cold boot of n VMs", RED, "s", "-"),
        (results.spreads("classic", "n", "milestones_ms", "last_answer"), "full save, n restores", ORANGE, "^", "-"),
        (results.spreads("clones", "n", "milestones_ms", "last_answer"), "sfparallel: n clones have answered", BLUE, "o", "-"),
        (results.spreads("clones", "n", "milestones_ms", "loaded"), "sfparallel: n clones are loaded", SKY, "o", "--"),
        (pools, "Pool(n) of multiprocessing, one guest", GREEN, "D", "-"),
        (results.spreads("floor", "n", "answered_ms", way="os.fork"), "n times os.fork, one guest", PURPLE, "v", "-"),
    ]  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for data, label, color, marker, style in ways:
        _line(axes, data, label, color, marker, style)
    axes.plot([SNOWFLOCK_CLONES], [SNOWFLOCK_MS], color=BLACK, marker="*", markersize=11, linestyle="none",
              label="SnowFlock, as published: 32 clones in 800 ms\n(Xen on a cluster of machines, TOCS 2011)")  # fmt: skip
    counts = sorted({x for data, *_ in ways for x, _ in data} | {SNOWFLOCK_CLONES})
    _log_ticks(axes.xaxis, counts)
    low, high = axes.get_ylim()
    _log_ticks(axes.yaxis, [value for value in _decades(low, high) if f"{value:e}"[0] == "1"])
    axes.set_xlabel("n: clones, VMs or processes")
    axes.set_ylabel("time (ms, logarithmic)")
    axes.set_title("Time to start n workers")
    handles, labels = axes.get_legend_handles_labels()
    published = next(i for i, label in enumerate(labels) if label.startswith("SnowFlock"))
    order = [*(i for i in range(len(labels)) if i != published), published]
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right upper")
    _source(figure, results, "clones", "boot", "classic", "floor")
    return figure


def _stack(axes: Axes, results: Results, phases: Sequence[tuple[str, str, str]], unit_ms: float) -> None:
    """One bar for each n: each phase from the median of the milestone before it to that of its own, so that the top is the median
    of the whole; the whiskers are those of the whole."""
    points = sorted(results.points("clones"), key=lambda pair: float(pair[0]["n"]))
    for place, (_, samples) in enumerate(points):
        bottom = 0.0
        for i in range(len(phases)):
            name, label, color = phases[i]
            top = Spread.of([sample["milestones_ms"][name] for sample in samples]).median / unit_ms
            axes.bar(place, top - bottom, 0.7, bottom, color=color, edgecolor="white", linewidth=0.4,
                     label=None if place else label)  # fmt: skip
            bottom = top
        whole = Spread.of([sample["milestones_ms"][phases[-1][0]] / unit_ms for sample in samples])
        axes.vlines(place, whole.low, whole.high, color=BLACK, linewidth=1)
        axes.text(place, max(whole.high, bottom), f" {whole.median:.3g}\n", ha="center", va="bottom", fontsize=8, linespacing=0.4)
    axes.set_xticks(range(len(points)), [f"{point['n']}" for point, _ in points])
    axes.set_xlabel("n: clones")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.1)


def phases(results: Results) -> Figure:
    """Where the time of a fork goes: until all clones are loaded, and until all have answered."""
    figure, (left, right) = _figure(2, 10.4, 4.8)
    _stack(left, results, PHASES[:-2], 1.0)
    left.set_ylabel("time (ms)")
    left.set_title("Until all n clones are loaded")
    _stack(right, results, PHASES, 1000.0)
    right.set_ylabel("time (s)")
    right.set_title("Until all n have answered")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper")
    _source(figure, results, "clones")
    return figure


def _dirtied(results: Results, earlier: str) -> list[tuple[float, Spread]]:
    """Pause over what the fork found to be dirty."""
    found = [(megabytes(samples), pauses(samples)) for _, samples in results.points("pause", earlier=earlier)]
    return sorted(found, key=lambda pair: pair[0])


def _pause_by_dirtied(axes: Axes, results: Results) -> None:
    gone, kept = _dirtied(results, "gone"), _dirtied(results, "kept")
    measured = [x for x, _ in (*gone, *kept)]
    axes.set_visible(bool(measured))
    if not measured:
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    _line(axes, gone, "no earlier clone or checkpoint alive", BLUE, "o")
    _line(axes, kept, "an earlier checkpoint is kept", ORANGE, "^")
    low, high = min(measured), max(measured)
    steps = [low * (high / low) ** (i / 50) for i in range(51)]
    target = [TARGET_MS + TARGET_MS_PER_MB * x for x in steps]
    axes.plot(steps, target, color=BLACK, linestyle=":", label=f"target: {TARGET_MS:g} ms + {TARGET_MS_PER_MB:g} ms/MB")
    _log_ticks(axes.xaxis, _decades(low * 0.9, high * 1.1))
    _log_ticks(axes.yaxis, _decades(*axes.get_ylim()))
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("dirty memory at the fork (MB, logarithmic)")
    axes.set_ylabel("pause of the parent (ms, logarithmic)")
    axes.set_title("Pause by memory dirtied since the last fork")
    axes.legend(loc="upper left")


def _pause_by_size(axes: Axes, results: Results) -> None:
    held = results.spreads("parent", "holds_gib", "pause_ms")
    axes.set_visible(bool(held))
    if not held:
        return
    _line(axes, held, "measured", BLUE, "o")
    first = held[0][1].median
    axes.axhspan(0.8 * first, 1.2 * first, color=GREEN, alpha=0.2, linewidth=0, label="within 20 % of the smallest")
    dirty = megabytes([sample for _, samples in results.points("parent") for sample in samples])
    axes.axhline(TARGET_MS + TARGET_MS_PER_MB * dirty, color=BLACK, linestyle=":", label="target for what was dirty")
    axes.set_title(f"Pause by size of the parent, {dirty:.0f} MB dirty")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("memory that the parent holds (GiB)")
    axes.set_ylabel("pause of the parent (ms)")
    axes.legend(loc="lower right")


def pause(results: Results) -> Figure:
    """The parent's pause against what it has dirtied, and against what it holds."""
    figure, (left, right) = _figure(2, 10.4, 4.8)
    _pause_by_dirtied(left, results)
    _pause_by_size(right, results)
    _source(figure, results, "pause", "parent")
    return figure


def private(results: Results) -> Figure:
    """Private memory of a clone (anonymous memory of its QEMU) against what it touched of its parent's."""
    figure, (axes,) = _figure(1, 7.0, 4.6)
    written = results.spreads("private", "touched_mib", "anonymous_mib", access="write")
    read = results.spreads("private", "touched_mib", "anonymous_mib", access="read")
    _line(axes, written, "written to", BLUE, "o", "none")
    _line(axes, read, "only read", GREEN, "^", "none")
    if written:
        base, most = written[0][1].median, written[-1][0]
        steps = [most * i / 400 for i in range(401)]
        axes.plot(steps, [base + x for x in steps], color=BLACK, linestyle=":", label="idle clone + copy of what it writes")
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)  # linear up to 1, since there is a 0
    _log_ticks(axes.xaxis, sorted({x for x, _ in (*written, *read)}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("memory of the parent that each clone touches (MiB; logarithmic above 1)")
    axes.set_ylabel("anonymous memory of its QEMU (MiB)")
    axes.set_title("Private memory of a clone")
    axes.legend(loc="upper left")
    _source(figure, results, "private")
    return figure


def drift(results: Results) -> Figure:
    """Forks in a row: time, open files and memory of the supervisor."""
    figure, (time, files, memory) = _figure(3, 11.0, 4.2)
    for point, samples in results.points("drift"):
        numbers = range(1, len(samples) + 1)
        answered = [sample["milestones_ms"]["last_answer"] for sample in samples]
        time.plot(numbers, answered, color=BLUE, marker=".", linestyle="none", markersize=4, label=f"{point['n']} have answered")
        time.plot(numbers, [sample["pause_ms"] for sample in samples], color=ORANGE, marker=".", linestyle="none", markersize=4,
                  label="pause of the parent")  # fmt: skip
        for axes, key in ((files, "open_files"), (memory, "private_mib")):
            values = [sample["supervisor"][key] for sample in samples]
            axes.plot(numbers, values, color=BLUE, marker=".", linestyle="none", markersize=4)
            axes.set_ylim(0, 1.15 * max(values))
        time.set_ylim(0, 1.3 * max(answered))
        time.legend(loc="upper right")
    for axes, title, unit in ((time, "Time", "ms"), (files, "Open files of the supervisor", "files"),
                              (memory, "Private memory of the supervisor", "MiB")):  # fmt: skip
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("fork")
    _source(figure, results, "drift", marks="each fork is one mark")
    return figure


Drawing = Callable[[Results], Figure]

PICTURES: dict[str, tuple[Drawing, tuple[str, ...]]] = {
    "time-to-n": (time_to_n, ("clones", "boot", "classic", "floor")),
    "phases": (phases, ("clones",)),
    "pause": (pause, ("pause", "parent")),
    "private": (private, ("private",)),
    "drift": (drift, ("drift",)),
}
"""Each picture, and the parts of the data that it shows."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every picture for which there are data, as SVG and PNG; returns the files."""
    drawn: list[Path] = []
    with matplotlib.rc_context(pictures.STYLE):
        for name, (drawing, parts) in PICTURES.items():
            if not any(list(results.points(part)) for part in parts):
                continue
            drawn += pictures.save(drawing(results), folder, name, drawing.__doc__ or "")
    return drawn
