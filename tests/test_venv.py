"""`sfrun --venv`: programs find the packages of a virtual environment of the host."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sfparallel.errors import UsageError
from sfparallel.vmm.command_errors import EXIT_USAGE
from sfparallel.vmm.image import find as find_image
from sfparallel.vmm.venv import Venv, find
from tests.conftest import Sfrun

OWN_MAGIC = importlib.util.MAGIC_NUMBER.hex()
PROGRAM = """
import sys
import cloudpickle
import mine
import sfparallel as sf
from linked import LINKED

def work():
    import late
    return mine.NAME, late.NAME, LINKED, sf.comm().rank

print(sf.parallel(n=2)(work)(), cloudpickle.NAME, sf.parallel_map(lambda x: mine.double(x), range(3)))
own = next(i for i, entry in enumerate(sys.path) if entry.endswith("site-packages"))
print(0 < own < next(i for i, entry in enumerate(sys.path) if entry.endswith("dist-packages")))
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with packages of its own, one that the image has too, and one that is installed by a link."""
    folder = tmp_path / "my env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    packages = find(str(folder)).packages
    (packages / "mine.py").write_text("NAME = 'mine'\ndef double(x):\n    return 2 * x\n")
    (packages / "late.py").write_text("NAME = 'late'\n")
    (packages / "cloudpickle.py").write_text("NAME = 'the environment comes first'\n")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "linked.py").write_text("LINKED = 'by a .pth file'\n")
    (packages / "linked.pth").write_text(f"{tmp_path / 'sources'}\n")
    return folder


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_packages_of_an_environment_are_found_in_clones_too(sfrun: Sfrun, venv: Path) -> None:
    if find_image().python_magic != OWN_MAGIC:
        pytest.fail("this test needs an image with the Python that runs it")
    ended = sfrun(PROGRAM, "--venv", str(venv)).ok()
    assert ended.out == ("[('mine', 'late', 'by a .pth file', 0), ('mine', 'late', 'by a .pth file', 1)] "
                         "the environment comes first [0, 2, 4]\nTrue\n")


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pyvenv\.cfg"):
        find(str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("")
    with pytest.raises(UsageError, match="0 folders"):
        find(str(tmp_path))


def test_an_environment_of_another_python_is_refused(venv: Path) -> None:
    find(str(venv)).check("default", OWN_MAGIC)
    with pytest.raises(UsageError, match="'default' has another one") as caught:
        find(str(venv)).check("default", "00000000")
    assert "--requirements" in str(caught.value.hint)
    (venv / "bin" / "python").unlink()
    with pytest.raises(UsageError, match="does not run"):
        Venv(venv, venv).check("default", OWN_MAGIC)


def test_without_vms_it_is_refused(sfrun: Sfrun, venv: Path) -> None:
    ended = sfrun("", "--local", "--venv", str(venv))
    assert ended.code == EXIT_USAGE and "without --venv" in ended.err
