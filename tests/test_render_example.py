"""examples/render: its parts, and the whole in real VMs."""

from __future__ import annotations

import contextlib
import importlib.util
import pty
import random
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.conftest import BIN, HANG_S

EXAMPLE = Path(__file__).parents[1] / "examples/render/render.py"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_example", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("width", "height", "edge", "tiles"), [(64, 48, 16, 12), (72, 54, 32, 6), (16, 12, 80, 1)])
def test_tiles_make_the_picture_in_any_order(render: ModuleType, width: int, height: int, edge: int, tiles: int) -> None:
    picture = noise(height, width)
    places = render.split(width, height, edge)
    assert len(places) == tiles
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in places) == width * height
    assert all(place.left % edge == place.top % edge == 0 for place in places)
    random.Random(1).shuffle(places)
    parts = [(place, picture[place.top:place.bottom, place.left:place.right]) for place in places]
    assert render.difference(picture, render.stitch(width, height, parts)) == ""


def test_difference_says_where(render: ModuleType) -> None:
    picture = noise(6, 8)
    other = picture.copy()
    other[2, 5, 1] ^= 1
    other[4, 0] ^= 1
    assert render.difference(picture, other) == "2 pixels differ, the first at column 5, row 2"
    assert render.difference(picture, picture[:5]) == "8 x 5 pixels, not 8 x 6"


@pytest.mark.parametrize(("frames", "rows"), [(1, 2), (4, 2), (5, 3), (12, 4)])
def test_contact_sheet_shows_all(render: ModuleType, frames: int, rows: int) -> None:
    film = [noise(3, 4, seed) for seed in range(frames)]
    sheet = render.contact_sheet(noise(6, 8, 99), film)
    assert sheet.shape == (rows * 3, 4 * 4, 3)
    assert np.array_equal(sheet[:6, :8], noise(6, 8, 99))
    assert np.array_equal(sheet[:3, 8:12], film[0])
    # No frame is black anywhere: as many pixels as frames and picture have are on the sheet.
    assert np.count_nonzero(sheet.any(axis=2)) == (frames + 4) * 12


def test_arguments(render: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert render.arguments(["--tile", "32"]).tile == 32
    with pytest.raises(SystemExit):
        render.arguments(["--tile", "40"])
    assert "must be a multiple of 16" in capsys.readouterr().err


@pytest.mark.needs("qemu", "root", "render")
def test_clones_render_the_pixels_of_a_serial_run(tmp_path: Path) -> None:
    """The example itself, small, in real VMs, with a terminal for its progress bars."""
    terminal, end = pty.openpty()
    with open(end, "wb") as stderr, open(tmp_path / "terminal", "wb") as seen:
        command = ["sfrun", "-n", "2", "--image", "render", str(EXAMPLE), "--width", "64", "--tile", "32", "--frames", "3"]
        process = subprocess.Popen([str(BIN / command[0]), *command[1:]], cwd=tmp_path, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=stderr, text=True)  # fmt: skip
        stderr.close()
        # The terminal reads as an error once nobody has its other end open.
        with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as screen:
            while piece := screen.read(1 << 16):
                seen.write(piece)
    out, _ = process.communicate(timeout=HANG_S)
    shown = (tmp_path / "terminal").read_text()
    assert process.returncode == 0, shown
    assert "All pixels are those of the serial run." in out
    assert "━" in shown and "4/4" in shown and "3/3" in shown
    for name, start in (("picture.png", b"\x89PNG"), ("film.gif", b"GIF89a"), ("sheet.png", b"\x89PNG")):
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(start) and len(content) > 1000


@pytest.mark.needs("qemu", "root", "image")
def test_another_image_is_told_what_it_lacks(tmp_path: Path) -> None:
    ended = subprocess.run([str(BIN / "sfrun"), str(EXAMPLE)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "not in this guest: povray, " in ended.stderr and "hint: sf image build render --package povray" in ended.stderr
