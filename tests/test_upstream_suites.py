"""Tests that numpy, scipy and pandas bring along, of sorting, linear algebra and indexing, run in a guest: `make test-long`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.needs("qemu", "ml", "root", "net", "fuse")]

SUITES = {
    "numpy sorts": (["numpy._core.tests.test_multiarray::TestMethods"], "sort or partition"),
    "numpy linear algebra": (["numpy.linalg.tests.test_linalg"], ""),
    "numpy indexing": (["numpy._core.tests.test_indexing"], ""),
    "scipy linear algebra": (
        [f"scipy.linalg.tests.{name}" for name in ("test_basic", "test_decomp_lu", "test_decomp_cholesky")], "",
    ),
    "pandas sorts": (
        [f"pandas.tests.{name}" for name in ("test_sorting", "frame.methods.test_sort_values", "series.methods.test_argsort")],
        "",
    ),
    "pandas indexing": (["pandas.tests.indexing.test_loc", "pandas.tests.indexing.test_iloc"], ""),
}  # fmt: skip
PATIENCE_S = 3600


@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize("name", SUITES)
def test_suite(name: str, tmp_path: Path) -> None:
    modules, chosen = SUITES[name]
    command = [str(Path(sys.prefix) / "bin" / "sfrun"), "--image", "ml", "--memory", "2G", "-m", "pytest", "-q",
               "-p", "no:cacheprovider", *(["-k", chosen] if chosen else []), "--pyargs", *modules]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    print(done.stdout[-3000:])
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed[1]) > 50, "the subset is not there any more"
