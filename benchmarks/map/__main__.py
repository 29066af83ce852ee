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
    from benchmarks.map.plots import draw

    data = json.loads(DATA.read_text())
    draw(data, PICTURES)
    documents.fill(DOCUMENT, "benchmarks.map", tables.text(data))


if __name__ == "__main__":
    main()
