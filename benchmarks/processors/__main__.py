"""Everyday work under different emulated processors, in turn: which one TCG is fastest with. Prints a table.

    python -m benchmarks.processors [--rounds N] [--image NAME] MODEL ...

A MODEL is what QEMU's option -cpu takes; docs/decisions/0001-emulated-processor.md has those that were compared. Each model gets
a template of its own in the cache folder. The image needs numpy and pandas.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys

from benchmarks import host
from sfparallel.vmm import machine

_AS_CHILD = "--as"


def run(model: str, image: str) -> dict[str, float]:
    """Times of one guest with this processor."""
    command = [sys.executable, "-m", "benchmarks.processors", _AS_CHILD, model, "--image", image,
               "-m", "benchmarks.processors.guest"]  # fmt: skip
    ended = subprocess.run(command, cwd=host.ROOT, stdout=subprocess.PIPE, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode or not lines:
        sys.exit(f"{model}: exit status {ended.returncode}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def as_child(model: str, arguments: list[str]) -> None:
    """This process as an `sfrun` whose guests have this processor."""
    from sfparallel.cli import sfrun

    machine.TCG_CPU_MODEL = model
    sys.argv = ["sfrun", *arguments]
    sys.exit(sfrun())  # type: ignore[func-returns-value]


def table(times: dict[str, list[dict[str, float]]]) -> str:
    """Best times in ms, a column for each model, and the geometric mean of all as a ratio to the first model's."""
    models = list(times)
    best = {model: {name: min(run[name] for run in runs) for name in runs[0]} for model, runs in times.items()}
    lines = [f"{chr(ord('A') + i)}: {models[i]}" for i in range(len(models))]
    lines.append(f"{'ms':20}" + "".join(f"{chr(ord('A') + i):>10}" for i in range(len(models))))
    for name in best[models[0]]:
        lines.append(f"{name:20}" + "".join(f"{best[model][name]:10.2f}" for model in models))
    means = [math.exp(sum(math.log(best[model][name] / best[models[0]][name]) for name in best[model]) / len(best[model]))
             for model in models]  # fmt: skip
    return "\n".join([*lines, f"{'geometric mean':20}" + "".join(f"{mean:10.3f}" for mean in means)])


def main() -> None:
    if sys.argv[1:2] == [_AS_CHILD]:
        as_child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", default="sci")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    options = parser.parse_args()
    times: dict[str, list[dict[str, float]]] = {model: [] for model in options.models}
    for _ in range(options.rounds):
        for model in options.models:
            times[model].append(run(model, options.image))
    print(host.describe())
    print(table(times))


if __name__ == "__main__":
    main()
