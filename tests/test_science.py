"""A scientist's program gives in clones of an emulated VM what it gives on the host.

It uses pandas, scipy and scikit-learn from PyPI, a time zone, a search path, a hash seed, asyncio in workers, and an extension
module that prints. On the host it runs in the guest image's own files (chroot), so that both have the same libraries.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import image as images
from tests.conftest import Sfrun

SCIENCE = Path(__file__).parent / "science"
FOLDER = Path("/tmp/science")
VARIABLES = {"TZ": "Europe/Berlin", "PYTHONHASHSEED": "42", "PYTHONPATH": str(FOLDER / "lib"), "PYTHONWARNINGS": "ignore",
             "LOKY_MAX_CPU_COUNT": "1"}  # fmt: skip


@pytest.fixture(name="folder")
def folder_fixture(sfrun: Sfrun) -> Path:
    """The program's folder, with the modules that PYTHONPATH leads to."""
    library = sfrun.folder / "lib"
    library.mkdir()
    shutil.copy(SCIENCE / "analysis.py", sfrun.folder)
    shutil.copy(SCIENCE / "stations.py", library)
    argv = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", SCIENCE / "wavelet.c",
            "-o", library / f"wavelet{sysconfig.get_config_var('EXT_SUFFIX')}"]  # fmt: skip
    subprocess.run(argv, check=True)
    return sfrun.folder


def on_the_host(folder: Path, image: images.Image, work: Path) -> subprocess.CompletedProcess[str]:
    root = work / "root"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", root, image.root], check=True, stdout=subprocess.DEVNULL)
    try:
        shutil.copytree(folder, root / FOLDER.relative_to("/"))
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **VARIABLES}
        chroot = shutil.which("chroot") or "/usr/sbin/chroot"
        return subprocess.run([chroot, root, "python3", FOLDER / "analysis.py", "--plain"], env=environment, text=True,
                              stdout=subprocess.PIPE, check=True)  # fmt: skip
    finally:
        shutil.rmtree(root)


def taken_apart(out: str) -> tuple[list[str], dict[str, Any]]:
    """What the extension module printed, sorted, and what came out."""
    lines = out.splitlines()
    result = json.loads(next(line for line in lines if line.startswith("{")))
    return sorted(line[line.index("wavelet:"):] for line in lines if "wavelet:" in line), result


@pytest.mark.needs("qemu", "ml", "root", "squashfs")
def test_an_analysis_in_clones_gives_what_it_gives_on_the_host(
    sfrun: Sfrun, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected_lines, expected = taken_apart(on_the_host(folder, images.find("ml"), tmp_path_factory.mktemp("host")).stdout)
    variables = {**VARIABLES, "PYTHONPATH": str(folder / "lib")}
    options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    ended = sfrun((folder / "analysis.py").read_text(), "--image", "ml", *options, timeout=500).ok()
    lines, found = taken_apart(ended.out)
    assert lines == expected_lines and len(lines) == 8
    assert found["exact"] == expected["exact"]
    assert found["numbers"].keys() == expected["numbers"].keys()
    for name, numbers in expected["numbers"].items():
        assert found["numbers"][name] == pytest.approx(numbers, rel=1e-6, abs=1e-9), name
