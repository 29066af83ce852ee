"""Heat that spreads in a plate, in clones of a running VM: `sfrun -n 4 examples/stencil/stencil.py`.

The plate is cut into blocks on a Cartesian grid of ranks. In each step a rank swaps the edges of its block with its neighbours,
then computes its cells. The clones' plate must be, bit for bit, what the parent computes by itself.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import numpy.typing as npt

import sfparallel as sf
from sfparallel import MPI

Cells = npt.NDArray[np.float64]

SHADES = " .:-=+*#%@"


def hot_plate(rows: int, columns: int) -> Cells:
    """A cold plate whose upper edge is kept hot, with a hot spot."""
    plate = np.zeros((rows, columns))
    plate[0] = 1
    plate[rows // 2:rows * 3 // 4, columns // 5:columns // 3] = 1
    return plate


def step(cells: Cells) -> None:
    """One step of the explicit scheme for the heat equation, in place, for all cells but the outermost."""
    inner = cells[1:-1, 1:-1]
    around = cells[:-2, 1:-1] + cells[2:, 1:-1] + cells[1:-1, :-2] + cells[1:-1, 2:]
    inner += 0.2 * (around - 4 * inner)


def serial(plate: Cells, steps: int) -> Cells:
    plate = plate.copy()
    for _ in range(steps):
        step(plate)
    return plate


def share(length: int, parts: int, index: int) -> slice:
    """The cells of block `index` along one axis of the plate, without the outermost ones, which never change."""
    return slice(1 + (length - 2) * index // parts, 1 + (length - 2) * (index + 1) // parts)


@sf.parallel
def spread(plate: Cells, steps: int) -> tuple[tuple[slice, slice], Cells]:
    """This rank's block of the plate after so many steps, and where it belongs."""
    world = sf.comm()
    grid = world.Create_cart(MPI.Compute_dims(world.size, 2))
    rows, columns = map(share, plate.shape, grid.dims, grid.coords)
    # The block with a rim of one cell. Nothing is sent for this: the plate is in every clone's memory.
    block = plate[rows.start - 1:rows.stop + 1, columns.start - 1:columns.stop + 1].copy()
    rims = block[0, 1:-1], block[-1, 1:-1], block[1:-1, 0], block[1:-1, -1]
    edges = block[1, 1:-1], block[-2, 1:-1], block[1:-1, 1], block[1:-1, -2]
    for _ in range(steps):
        for rim, received in zip(rims, grid.neighbor_alltoall(edges), strict=True):
            if received is not None:  # no neighbour there: the rim is the plate's own edge
                rim[:] = received
        step(block)
    return (rows, columns), block[1:-1, 1:-1]


def drawn(plate: Cells, rows: int = 20, columns: int = 60) -> str:
    """The plate in characters."""
    height, width = plate.shape
    sample = plate[np.ix_(np.arange(rows) * height // rows, np.arange(columns) * width // columns)]
    return "\n".join("".join(SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] for value in row) for row in sample)


def main() -> int:
    parser = argparse.ArgumentParser(description="Spread heat in a plate, in clones of this VM, and compare with a serial run.")
    parser.add_argument("--size", type=int, default=96, help="rows and columns of the plate (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    options = parser.parse_args()
    plate = hot_plate(options.size, options.size)
    result = plate.copy()
    blocks = spread(plate, options.steps)
    for place, block in blocks:
        result[place] = block
    print(drawn(result))
    if not np.array_equal(result, serial(plate, options.steps)):
        print("The clones' plate is not the serial run's.", file=sys.stderr)
        return 1
    print(f"The plate of {len(blocks)} clones is the serial run's, bit for bit.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
