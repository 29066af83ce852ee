"""What the start of a job costs, by core, with a cold and a warm cache: JSON, a picture, a table.

    python -m benchmarks.start             everything, into benchmarks/data/start.json and docs/performance
    python -m benchmarks.start --quick     one start of each kind, printed only
    python -m benchmarks.start --draw      the picture again, from the data

A start is `sfrun -c pass`, from its first instruction to its end. Warm: all is as the start before has left it. Cold: the cache
folder is a new one that has only image, initramfs and template, so that nothing is remembered of earlier starts, and the page
cache has nothing of these files. The kinds take turns, so that what else the machine does meets all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import documents, host
from benchmarks.start import tables
from sfparallel.config import CACHE, cache_folder

DATA = host.ROOT / "benchmarks" / "data" / "start.json"
PICTURES = host.ROOT / "docs" / "performance"
DOCUMENT = host.ROOT / "docs" / "performance.md"
STARTS = 20
_KEPT = ("images", "initrd", "templates")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _evict(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _start(core: int, cache: Path) -> dict[str, float]:
    command = ["taskset", "-c", str(core), str(Path(sys.prefix) / "bin" / "sfrun"), "-c", "pass"]
    before, used = time.monotonic(), os.times()
    subprocess.run(command, env={**os.environ, CACHE.variable: str(cache)}, check=True, stdin=subprocess.DEVNULL)
    after = os.times()
    cpu_s = after.children_user + after.children_system - used.children_user - used.children_system
    return {"wall_s": round(time.monotonic() - before, 3), "cpu_s": round(cpu_s, 3)}


def measure(starts: int) -> list[dict[str, Any]]:
    """Starts of all kinds in turn, so many in all."""
    home, cores, results = cache_folder(), sorted(os.sched_getaffinity(0))[:2], []
    _start(cores[0], home)  # makes the template, if there is none
    kinds = [(core, cold) for cold in (False, True) for core in cores]
    for number in range(starts):
        core, cold = kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory() as folder:
            for name in _KEPT:
                (Path(folder) / name).symlink_to(home / name)
            if cold:
                for name in _KEPT:
                    for path in _files(home / name):
                        _evict(path)
            result = {"core": core, "cold": cold, "load": round(os.getloadavg()[0], 2),
                      **_start(core, Path(folder) if cold else home)}  # fmt: skip
        results.append(result)
        print(f"core {core}, {'cold' if cold else 'warm'}: {result['wall_s']:.2f} s, {result['cpu_s']:.2f} s of processor time",
              flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if shutil.which("taskset") is None:
        sys.exit("taskset is not installed: apt install util-linux")
    if options.quick:
        measure(4)
        return
    if not options.draw:
        data = {"machine": host.describe(), **host.revision(), "results": measure(STARTS)}
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    from benchmarks.start.plots import draw

    data = json.loads(DATA.read_text())
    draw(data, PICTURES)
    documents.fill(DOCUMENT, "benchmarks.start", tables.text(data))


if __name__ == "__main__":
    main()
