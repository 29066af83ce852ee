"""The pictures, drawn from the data file and nothing else: medians."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import pictures

# M. Okabe and K. Ito, "Color Universal Design" (2008): people with any colour vision can tell them apart.
OURS, THEIRS = ("#0072B2", "o", "-"), ("#D55E00", "s", "--")
LABELS = {"sfparallel": "sfparallel", "mpich": "mpi4py on MPICH (TCP)"}

Row = dict[str, Any]


def _rows(data: dict[str, Any], library: str, call: str) -> list[Row]:
    return [row for result in data["results"] for row in result[library] if row["call"] == call]


def _line(axes: Axes, rows: Sequence[Row], x: str, library: str, *, label: str = "", rate: bool = False) -> None:
    colour, mark, dashes = OURS if library == "sfparallel" else THEIRS
    rows = sorted(rows, key=lambda row: row[x])
    values = [row["bytes"] / row["median_us"] if rate else row["median_us"] / 1e3 for row in rows]
    axes.plot([row[x] for row in rows], values, color=colour, marker=mark, linestyle=dashes, markersize=5,
              label=label or LABELS[library])  # fmt: skip


def messages(data: dict[str, Any]) -> Figure:
    """Latency and bandwidth between two clones."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    kinds = (("send, array", "send and recv (pickled)"), ("Send", "Send and Recv (buffers)"))
    for row, (call, title) in zip(panels, kinds, strict=True):
        for library in LABELS:
            rows = _rows(data, library, call)
            _line(row[0], [each for each in rows if each["bytes"] <= 64 << 10], "bytes", library)
            _line(row[1], [each for each in rows if each["bytes"] >= 64 << 10], "bytes", library, rate=True)
        row[0].set(title=f"{title}: one way", xlabel="bytes", ylabel="ms", xscale="log", ylim=(0, None))
        row[1].set(title=f"{title}: bandwidth", xlabel="bytes", ylabel="MB/s", xscale="log", ylim=(0, None))
    panels[0][0].legend()
    pictures.source(figure, data["machine"], data["results"], "medians")
    return figure


def collectives(data: dict[str, Any]) -> Figure:
    """Collective calls over the number of clones."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    chosen = [("barrier", 0), ("bcast", 8), ("allreduce", 8), ("Bcast", 1 << 20), ("Allreduce", 1 << 10), ("Allreduce", 1 << 20)]
    for axes, (call, size) in zip(figure.subplots(2, 3).flat, chosen, strict=True):
        for library in LABELS:
            _line(axes, [row for row in _rows(data, library, call) if row["bytes"] == size], "n", library)
        clones = sorted({row["n"] for row in _rows(data, "sfparallel", call)})
        axes.set(title=call if not size else f"{call}, {_size(size)}", xlabel="clones", ylabel="ms", xscale="log", ylim=(0, None))
        axes.set_xticks(clones, [str(each) for each in clones])
        axes.minorticks_off()
    figure.axes[0].legend()
    pictures.source(figure, data["machine"], data["results"], "medians, until the last rank is done")
    return figure


def _size(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return "a number" if size == 8 else f"{size} bytes"


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write both pictures as PNG and SVG."""
    with matplotlib.rc_context(pictures.STYLE):
        for drawing in (messages, collectives):
            pictures.save(drawing(data), folder, drawing.__name__, drawing.__doc__ or "")
