"""The table of starts in docs/performance.md, from the data file."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import documents


def text(data: dict[str, Any]) -> str:
    """The table, as Markdown: seconds from the start of `sfrun -c pass` to its end."""
    rows = data["results"]
    lines = []
    for core, cold in dict.fromkeys((row["core"], row["cold"]) for row in rows):
        found = [row for row in rows if (row["core"], row["cold"]) == (core, cold)]
        walls = [row["wall_s"] for row in found]
        lines.append([f"{core}", "cold" if cold else "warm", f"{min(walls):.2f}", f"{statistics.median(walls):.2f}",
                      f"{max(walls):.2f}", f"{statistics.median(row['cpu_s'] for row in found):.2f}"])  # fmt: skip
    walls = [row["wall_s"] for row in rows]
    used = [row["cpu_s"] for row in rows]
    loads = [row["load"] for row in rows]
    return "\n".join([
        f"{documents.machine(data['machine'])}; {data['day']}, revision `{data['revision']}`. "
        f"{len(rows)} starts, in seconds; the load "
        f"average was {min(loads):.1f} to {max(loads):.1f}. The longest took {max(walls) / min(walls):.2f} times as long as the "
        f"shortest, and {max(used) / min(used):.2f} times as much of a processor's time.", "",
        "![Seconds of each start, by core and cache](performance/start.svg)", "",
        *documents.table(["core", "cache", "shortest", "median", "longest", "processor's time"], lines, left=2),
    ])  # fmt: skip
