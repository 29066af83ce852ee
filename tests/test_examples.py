"""The small examples, in real VMs: examples/montecarlo and examples/stencil."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BIN

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, clones: int, example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "sfrun"), "-n", str(clones), str(EXAMPLES / example), *arguments], cwd=folder,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


@pytest.mark.needs("qemu", "root", "image")
def test_montecarlo_is_right_and_the_same_for_any_number_of_clones(tmp_path: Path) -> None:
    ended = [run(tmp_path, clones, "montecarlo/montecarlo.py", "--batches", "9", "--paths", "5000") for clones in (1, 4)]
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    assert ended[0].stdout == ended[1].stdout
    price, error, geometric, geometric_error, exact = map(float, re.findall(r"\d+\.\d+", ended[0].stdout))
    assert exact == pytest.approx(5.9402, abs=1e-4)
    # With this seed; four standard errors would be missed by one seed in thousands.
    assert 0 < geometric_error < 0.1 and abs(geometric - exact) < 4 * geometric_error
    assert 0 < error < 0.1 and price > geometric


@pytest.mark.needs("qemu", "root", "image")
@pytest.mark.parametrize("clones", [1, 3, 4])
def test_stencil_gives_the_bits_of_the_serial_run(tmp_path: Path, clones: int) -> None:
    ended = run(tmp_path, clones, "stencil/stencil.py", "--size", "21", "--steps", "30")
    assert ended.returncode == 0, ended.stderr
    assert f"The plate of {clones} clones is the serial run's, bit for bit." in ended.stdout
    assert ended.stdout.startswith("@" * 60)
