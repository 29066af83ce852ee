"""The price of an Asian option by Monte Carlo, in clones of a running VM: `sfrun -n 4 examples/montecarlo/montecarlo.py`.

The option pays what the mean price of a share over a year exceeds the strike. Prices follow geometric Brownian motion. For the
geometric mean the value is known in closed form (Kemna & Vorst 1990, https://doi.org/10.1016/0378-4266(90)90039-5), which checks
the simulation. Each batch of paths draws from a stream of its own, so that every digit is the same for any number of clones.
"""

from __future__ import annotations

import argparse
import math
from statistics import NormalDist

import numpy as np

import sfparallel as sf

SPOT, STRIKE, RATE, VOLATILITY, YEARS, STEPS = 100.0, 100.0, 0.05, 0.2, 1.0, 12


def batch(paths: int) -> tuple[float, float]:
    """Mean discounted payoffs of so many paths: of the option, and of the same option on the geometric mean."""
    step = YEARS / STEPS
    moves = sf.rng().normal((RATE - VOLATILITY**2 / 2) * step, VOLATILITY * math.sqrt(step), (paths, STEPS))
    logarithms = math.log(SPOT) + np.cumsum(moves, axis=1)
    means = np.exp(logarithms).mean(axis=1), np.exp(logarithms.mean(axis=1))
    arithmetic, geometric = (math.exp(-RATE * YEARS) * np.maximum(mean - STRIKE, 0).mean() for mean in means)
    return float(arithmetic), float(geometric)


def exact_geometric() -> float:
    """Value of the option on the geometric mean."""
    mean = math.log(SPOT) + (RATE - VOLATILITY**2 / 2) * YEARS * (STEPS + 1) / (2 * STEPS)
    deviation = VOLATILITY * math.sqrt(YEARS * (STEPS + 1) * (2 * STEPS + 1) / (6 * STEPS**2))
    distance = (mean - math.log(STRIKE)) / deviation
    normal = NormalDist().cdf
    forward = math.exp(mean + deviation**2 / 2)
    return math.exp(-RATE * YEARS) * (forward * normal(distance + deviation) - STRIKE * normal(distance))


def main() -> None:
    parser = argparse.ArgumentParser(description="Price an Asian option by Monte Carlo in clones of this VM.")
    parser.add_argument("--batches", type=int, default=64, help="shares of the work (%(default)s; at least 2)")
    parser.add_argument("--paths", type=int, default=20_000, help="paths in each batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()

    values = np.array(sf.parallel_map(batch, [options.paths] * options.batches, seed=options.seed))

    # Batches are independent and of one size: the spread of their means is that of the estimate, times the root of their number.
    price, geometric = values.mean(axis=0)
    error, geometric_error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    print(f"Asian option              {price:.6f} ± {error:.6f}")
    print(f"on the geometric mean     {geometric:.6f} ± {geometric_error:.6f}")
    print(f"the same, in closed form  {exact_geometric():.6f}")


if __name__ == "__main__":
    main()
