"""What a task costs in maps and executors, next to the usual pools in the same guest: JSON, pictures, tables.

    python -m benchmarks.map             everything, into benchmarks/data/map.json and docs/performance
    python -m benchmarks.map --quick     less of it, printed only
    python -m benchmarks.map --draw      the pictures again, from the data

It needs the image `bench`, which `make bench-map` builds: see Makefile. A pool that the image lacks is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import documents, host
from benchmarks.map import tables

DATA = host.ROOT / "benchmarks" / "data" / "map.json"
PICTURES = host.ROOT / "docs" / "performance"
DOCUMENT = host.ROOT / "docs" / "performance-maps.md"
IMAGE = "bench"

WHOLE = {"workers": 2, "items": 1000, "repeat": 3, "chunksizes": [1, 32]}
QUICK = {"workers": 2, "items": 200, "repeat": 1, "chunksizes": [1, 32]}


def measure(specification: dict[str, Any], image: str) -> list[dict[str, Any]]:
    """Run the guest's program; its rows."""
    command = [str(Path(sys.prefix) / "bin" / "sfrun"), "--image", image, "--cpus", "2", "--memory", "3G",
               "-m", "benchmarks.map.guest", json.dumps(specification)]
    ended = subprocess.run(command, cwd=host.ROOT, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    show(rows)
    if ended.returncode:
        sys.exit(ended.returncode)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'pool':34}{'task':>12}{'chunksize':>11}{'us per task':>13}   (median)")
    for row in rows:
        print(f"{row['pool']:34}{row['task']:>12}{row['chunksize']:>11}{statistics.median(row['us_per_task']):>13.0f}")


def draw(data: dict[str, Any], folder: Path) -> None:
    """Bars: microseconds per task, for each pool, task and chunksize."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = data["results"]
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    cases = list(dict.fromkeys((row["task"], row["chunksize"]) for row in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(3.4 * len(cases), 3.6), sharey=True)
    for axis, (task, chunksize) in zip(axes, cases, strict=True):
        medians = {row["pool"]: statistics.median(row["us_per_task"]) for row in rows
                   if (row["task"], row["chunksize"]) == (task, chunksize)}  # fmt: skip
        bars = axis.barh(pools, [medians.get(pool, 0) for pool in pools],
                         color=["#c44e52" if pool.startswith("sf.") else "#8c8c8c" for pool in pools])
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set(title=f"{task}, chunksize {chunksize}", xlabel="µs per task")
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()  # which all share: the first on top, as in the table
    specification, where = data["specification"], data["machine"]
    figure.suptitle(f"{specification['workers']} workers, {specification['items']} tasks; "
                    f"{where['processor']}, {where['cores']} cores, {where['accelerator'].upper()}", fontsize=9)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"map.{kind}", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--image", default=IMAGE)
    options = parser.parse_args()
    if options.quick:
        measure(QUICK, options.image)
        return
    if not options.draw:
        data = {"machine": host.describe(), **host.revision(), "specification": WHOLE, "results": measure(WHOLE, options.image)}
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    data = json.loads(DATA.read_text())
    draw(data, PICTURES)
    documents.fill(DOCUMENT, "benchmarks.map", tables.text(data))


if __name__ == "__main__":
    main()
