"""Ray tracing with POV-Ray in clones of a running VM: `sfrun --image render -n 4 examples/render/render.py`.

Clones render a picture in tiles, and then an animation in frames. The parent puts the tiles together, and renders both once more
by itself, for reference: the clones' pixels must be the same, all of them.

Scenes: biscuit.pov (Fabien Mosen) and camera2.pov (Dieter Bayer), from POV-Ray's own examples (Debian: povray-examples).
POV-Ray: http://www.povray.org (Debian: povray).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import sfparallel as sf

EXAMPLES = Path("/usr/share/doc/povray/examples")
PICTURE = Path("advanced/biscuit.pov")
FILM = Path("animations/camera2/camera2.ini")

BLOCK = 16
"""POV-Ray works in square blocks of so many pixels, and where blocks begin decides which pixels antialiasing refines: a tile has
the pixels of the whole picture only if its edges are edges of blocks."""

Pixels = npt.NDArray[np.uint8]
"""A picture: rows, columns, and red, green and blue."""


class Tile(NamedTuple):
    """A part of a picture; right and bottom are the first column and row outside."""

    left: int
    top: int
    right: int
    bottom: int


def split(width: int, height: int, edge: int) -> list[Tile]:
    """Square tiles of a picture, row by row; the last ones of rows and columns may be smaller."""
    return [Tile(left, top, min(left + edge, width), min(top + edge, height))
            for top in range(0, height, edge) for left in range(0, width, edge)]


def stitch(width: int, height: int, parts: Iterable[tuple[Tile, Pixels]]) -> Pixels:
    """The picture of its tiles, which may come in any order."""
    picture = np.zeros((height, width, 3), np.uint8)
    for tile, pixels in parts:
        picture[tile.top:tile.bottom, tile.left:tile.right] = pixels
    return picture


def contact_sheet(picture: Pixels, film: Sequence[Pixels], columns: int = 4) -> Pixels:
    """A grid of frames; the picture, twice as wide and as high, takes the first two places of the first two rows."""
    height, width, _ = film[0].shape
    free = ((row, column) for row in itertools.count() for column in range(columns) if row > 1 or column > 1)
    places = list(itertools.islice(free, len(film)))
    rows = max(2, places[-1][0] + 1)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    sheet[:2 * height, :2 * width] = picture
    for (row, column), frame in zip(places, film, strict=True):
        sheet[row * height:(row + 1) * height, column * width:(column + 1) * width] = frame
    return sheet


def difference(expected: Pixels, actual: Pixels) -> str:
    """What differs between two pictures; empty when they are the same."""
    if expected.shape != actual.shape:
        return f"{actual.shape[1]} x {actual.shape[0]} pixels, not {expected.shape[1]} x {expected.shape[0]}"
    rows, columns = (expected != actual).any(axis=2).nonzero()
    return f"{len(rows)} pixels differ, the first at column {columns[0]}, row {rows[0]}" if len(rows) else ""


def povray(scene: Path, width: int, height: int, *options: str, output: str = "-") -> bytes:
    """Run POV-Ray, with one thread, on a scene of its examples; returns the PNG, if `output` does not name a file for it.

    Raises:
        RuntimeError: POV-Ray failed; with its last words.
    """
    path = EXAMPLES / scene
    argv = ["povray", path.name, f"+W{width}", f"+H{height}", *options]
    argv += ["+A0.3", f"+BS{BLOCK}", "+WT1", "-D", "+FN", f"+O{output}"]
    # Scenes name the files that they include relative to their own folder.
    done = subprocess.run(argv, cwd=path.parent, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"povray ended with status {done.returncode}: {done.stderr.decode(errors='replace')[-500:].strip()}")
    return done.stdout


def decode(png: bytes) -> Pixels:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def render_tile(width: int, height: int, tile: Tile) -> Pixels:
    """One tile of the picture."""
    # POV-Ray counts from 1 and includes the last; what it does not render of the picture is black.
    area = (f"+SC{tile.left + 1}", f"+EC{tile.right}", f"+SR{tile.top + 1}", f"+ER{tile.bottom}")
    return decode(povray(PICTURE, width, height, *area))[tile.top:tile.bottom, tile.left:tile.right].copy()


def render_frame(width: int, height: int, frames: int, number: int) -> Pixels:
    """One frame of the film, from 1."""
    return decode(povray(FILM, width, height, "+KFI1", f"+KFF{frames}", f"+SF{number}", f"+EF{number}"))


def render_film(width: int, height: int, frames: int) -> list[Pixels]:
    """All frames of the film, by one run of POV-Ray."""
    with tempfile.TemporaryDirectory() as folder:
        povray(FILM, width, height, "+KFI1", f"+KFF{frames}", output=f"{folder}/frame.png")
        return [decode(path.read_bytes()) for path in sorted(Path(folder).iterdir())]


def save(folder: Path, picture: Pixels, film: Sequence[Pixels]) -> None:
    """Write the picture, the film as an animated GIF, and both on one sheet."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / "picture.png")
    first, *others = (Image.fromarray(frame) for frame in film)
    first.save(folder / "film.gif", save_all=True, append_images=others, duration=80, loop=0)
    Image.fromarray(contact_sheet(picture, film)).save(folder / "sheet.png")


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the wall-clock time of a phase."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Render in clones of this VM with POV-Ray and compare with a serial run.")
    parser.add_argument("--width", type=multiple_of(8), default=256, metavar="W",
                        help="of the picture, in pixels (%(default)s); the height is 3/4 of it, and frames are half as large")
    parser.add_argument("--tile", type=multiple_of(BLOCK), default=96, metavar="T",
                        help="edge of a tile, in pixels (%(default)s)")
    parser.add_argument("--frames", type=multiple_of(1), default=12, metavar="F", help="frames of the film (%(default)s)")
    parser.add_argument("--no-check", action="store_true", help="skip the serial run and the comparison")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the pictures (%(default)s)")
    return parser.parse_args(argv)


def multiple_of(unit: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < 1 or value % unit:
            raise argparse.ArgumentTypeError(f"must be a multiple of {unit}")
        return value

    return number


def missing() -> str | None:
    """What the guest image lacks for this example, with the remedy."""
    lacking = [] if shutil.which("povray") else ["povray"]
    lacking += [str(EXAMPLES / scene) for scene in (PICTURE, FILM) if not (EXAMPLES / scene).exists()]
    lacking += [] if importlib.util.find_spec("PIL") else ["PIL"]
    if not lacking:
        return None
    return (f"not in this guest: {', '.join(lacking)}\n  hint: sf image build render --package povray --package povray-examples "
            "--package python3-pil --package python3-rich, then sfrun --image render")


def main() -> int:
    options = arguments()
    problem = missing()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    size = options.width, options.width * 3 // 4
    half = size[0] // 2, size[1] // 2
    seconds: dict[str, float] = {}

    def tile(place: Tile) -> tuple[Tile, Pixels]:
        return place, render_tile(*size, place)

    def frame(number: int) -> Pixels:
        return render_frame(*half, options.frames, number)

    # Once here: what POV-Ray reads for its start is in this VM's memory then, and so in that of every clone.
    with timed(seconds, "first start"):
        povray(PICTURE, 16, 12)
    with timed(seconds, "tiles in clones"):
        picture = stitch(*size, sf.parallel_imap(tile, split(*size, options.tile), ordered=False, progress=True))
    with timed(seconds, "frames in clones"):
        film = list(sf.parallel_imap(frame, range(1, options.frames + 1), progress=True))
    save(options.output, picture, film)
    wrong = [] if options.no_check else compare(picture, film, seconds)
    for phase, value in seconds.items():
        print(f"{phase:<16}  {value:6.1f} s")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if not options.no_check:
        print("All pixels are those of the serial run.")
    return 0


def compare(picture: Pixels, film: Sequence[Pixels], seconds: dict[str, float]) -> list[str]:
    """Render both by one run of POV-Ray each, in this VM; returns what differs."""
    height, width, _ = picture.shape
    with timed(seconds, "picture serial"):
        expected = decode(povray(PICTURE, width, height))
    with timed(seconds, "film serial"):
        frames = render_film(width // 2, height // 2, len(film))
    pairs = [("picture", expected, picture)]
    pairs += [(f"frame {number}", *pair) for number, pair in enumerate(zip(frames, film, strict=True), 1)]
    return [f"{name}: {found}" for name, one, other in pairs if (found := difference(one, other))]


if __name__ == "__main__":
    sys.exit(main())
