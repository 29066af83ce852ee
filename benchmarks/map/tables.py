"""The table of docs/performance-maps.md, from the data file."""

from __future__ import annotations

import statistics
from typing import Any


def text(data: dict[str, Any]) -> str:
    """The table, as Markdown: medians, in microseconds per task."""
    machine, specification, rows = data["machine"], data["specification"], data["results"]
    cases = list(dict.fromkeys((row["task"], row["chunksize"]) for row in rows))
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    found = {(row["pool"], row["task"], row["chunksize"]): row["us_per_task"] for row in rows}
    lines = [f"Machine: {machine['cores']} cores ({machine['processor']}), Linux {machine['kernel']}, QEMU {machine['qemu']} "
             f"with {machine['accelerator'].upper()}; revision `{data['revision']}`. {specification['workers']} workers, "
             f"{specification['items']} tasks, median of {specification['repeat']} maps, in microseconds per task.", "",
             "![Microseconds per task, for each pool, kind of task and chunksize](performance/map.svg)", "",
             "| pool | " + " | ".join(f"{task}, chunksize {chunksize}" for task, chunksize in cases) + " |",
             "|" + " --- |" + " ---: |" * len(cases)]  # fmt: skip
    for pool in pools:
        cells = [found.get((pool, task, chunksize)) for task, chunksize in cases]
        medians = [f"{statistics.median(times):,.0f}".replace(",", " ") if times else "-" for times in cells]
        lines.append(f"| {pool} | " + " | ".join(medians) + " |")
    return "\n".join([*lines, ""])
