"""The picture, drawn from the data file and nothing else: medians."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import pictures

OURS, THEIRS = "#0072B2", "#999999"


def bars(data: dict[str, Any]) -> Figure:
    """Microseconds per task, for each pool, task and chunksize."""
    rows = data["results"]
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    cases = list(dict.fromkeys((row["task"], row["chunksize"]) for row in rows))
    figure = Figure(figsize=(3.4 * len(cases), 3.6), layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True)
    for axis, (task, chunksize) in zip(axes, cases, strict=True):
        medians = {row["pool"]: statistics.median(row["us_per_task"]) for row in rows
                   if (row["task"], row["chunksize"]) == (task, chunksize)}  # fmt: skip
        drawn = axis.barh(pools, [medians.get(pool, 0) for pool in pools],
                         color=[OURS if pool.startswith("sf.") else THEIRS for pool in pools])
        axis.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=f"{task}, chunksize {chunksize}", xlabel="µs per task")
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()  # which all share: the first on top, as in the table
    specification = data["specification"]
    figure.suptitle(f"{specification['workers']} workers, {specification['items']} tasks", fontsize=9)
    pictures.source(figure, data["machine"], [data], "bars: median")
    return figure


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write the picture as PNG and SVG."""
    with matplotlib.rc_context({**pictures.STYLE, "axes.grid.axis": "x"}):
        pictures.save(bars(data), folder, "map", bars.__doc__ or "")
