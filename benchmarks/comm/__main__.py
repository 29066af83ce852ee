"""What messages among clones cost on this machine, next to mpi4py on MPICH (TCP) in the same clones: JSON, pictures, tables.

    python -m benchmarks.comm                    everything, into benchmarks/data/comm.json and docs
    python -m benchmarks.comm --n 2 4            these numbers of clones anew; the others stay as they are in the data
    python -m benchmarks.comm --quick            less of it, printed only
    python -m benchmarks.comm --draw             pictures and tables again, from the data

It needs the image `bench`: sf image build bench --package mpich --pip mpi4py==4.1.2 --pip loky
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import documents, host
from benchmarks.comm import tables

DATA = host.ROOT / "benchmarks" / "data" / "comm.json"
PICTURES = host.ROOT / "docs" / "performance"
DOCUMENT = host.ROOT / "docs" / "performance-messages.md"
IMAGE = "bench"

KIB, MIB = 1 << 10, 1 << 20
WHOLE = {
    "n": [2, 4, 8, 16], "budget_s": 0.4, "message_bytes": [8, KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB],
    "collective_bytes": [8, KIB, 64 * KIB, MIB],
}  # fmt: skip
QUICK = {"n": [2, 4], "budget_s": 0.1, "message_bytes": [8, MIB], "collective_bytes": [8, 64 * KIB]}


def measure(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the guest's program: for each n, the rows of both libraries."""
    sfrun = str(Path(sys.prefix) / "bin" / "sfrun")
    command = [sfrun, "--image", IMAGE, "-m", "benchmarks.comm.guest", json.dumps(specification)]
    results = []
    with subprocess.Popen(command, cwd=host.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            results.append(json.loads(line) | host.revision())
            print(f"measured {results[-1]['n']} clones", file=sys.stderr)
    if process.returncode:
        sys.exit(process.returncode)
    return results


def show(results: list[dict[str, Any]]) -> None:
    """A table of all rows."""
    print(f"{'call':14}{'bytes':>10}{'n':>4}{'sfparallel':>14}{'MPICH':>14}{'ratio':>8}   (median, microseconds)")
    for result in results:
        for ours, theirs in tables.pairs(result):
            line = f"{ours['call']:14}{ours['bytes']:10}{ours['n']:4}{ours['median_us']:14.1f}"
            if theirs:
                line += f"{theirs['median_us']:14.1f}{ours['median_us'] / theirs['median_us']:8.2f}"
            print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", help="numbers of clones")
    parser.add_argument("--quick", action="store_true", help="few sizes, little time; nothing is written")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures, from the data that is there")
    options = parser.parse_args()
    if not options.draw:
        specification = {**(QUICK if options.quick else WHOLE), **({"n": options.n} if options.n else {})}
        results = measure(specification)
        show(results)
        sys.stdout.flush()
        if options.quick:
            return 0
        known = json.loads(DATA.read_text())["results"] if options.n and DATA.exists() else []
        together = {result["n"]: result for result in (*known, *results)}
        data = {"machine": host.describe(), "specification": {**WHOLE, "n": sorted(together)},
                "results": [together[n] for n in sorted(together)]}  # fmt: skip
        DATA.parent.mkdir(exist_ok=True)
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    from benchmarks.comm.plots import draw

    data = json.loads(DATA.read_text())
    draw(data, PICTURES)
    documents.fill(DOCUMENT, "benchmarks.comm", tables.text(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
