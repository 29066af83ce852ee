"""The picture, drawn from the data file and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import pictures

COLOURS = {False: "#0072B2", True: "#D55E00"}


def starts(data: dict[str, Any]) -> Figure:
    """Seconds of each start, by core, with a cold and a warm cache: wall time, and a processor's time."""
    rows = data["results"]
    kinds = list(dict.fromkeys((row["core"], row["cold"]) for row in rows))
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    for axis, (field, title) in zip(figure.subplots(1, 2), (("wall_s", "wall time"), ("cpu_s", "processor's time")), strict=True):
        for place, (core, cold) in enumerate(kinds):
            values = [row[field] for row in rows if (row["core"], row["cold"]) == (core, cold)]
            axis.plot([place] * len(values), values, "o", color=COLOURS[cold], alpha=0.6)
        axis.set_xticks(range(len(kinds)), [f"core {core}\n{'cold' if cold else 'warm'}" for core, cold in kinds])
        axis.set(title=title, ylabel="s", xlim=(-0.5, len(kinds) - 0.5), ylim=(0, None))
    figure.suptitle(f"{len(rows)} starts of sfrun -c pass", fontsize=9)
    pictures.source(figure, data["machine"], [data], "each start is one mark")
    return figure


def draw(data: dict[str, Any], folder: Path) -> None:
    """Write the picture as PNG and SVG."""
    with matplotlib.rc_context({**pictures.STYLE, "axes.grid.axis": "y"}):
        pictures.save(starts(data), folder, "start", starts.__doc__ or "")
