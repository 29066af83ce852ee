"""`sfrun --venv`: programs find the packages of a virtual environment of the host."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sfparallel.errors import UsageError
from sfparallel.vmm import imports
from sfparallel.vmm.command_errors import EXIT_USAGE
from sfparallel.vmm.image import find as find_image
from sfparallel.vmm.options import JobOptions, Program
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


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_the_active_environment_is_brought_if_only_it_has_what_is_imported(sfrun: Sfrun, venv: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("VIRTUAL_ENV", str(venv))
    ended = sfrun("import mine\nimport sfparallel as sf\nprint(sf.parallel(n=1)(lambda: mine.NAME)())").ok()
    assert ended.out == "['mine']\n"
    assert f"the guest image 'default' lacks mine; using the packages of {venv} (--venv)" in ended.err


@pytest.mark.needs("image")
def test_what_nobody_has_is_told_with_the_remedy(tmp_path: Path, venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(venv))
    (tmp_path / "s.py").write_text("import mine, nowhere")
    options = JobOptions(Program("script", ("s.py",), tmp_path, tmp_path))
    notes: list[str] = []
    assert imports.supplied(options, find_image(), notes.append) == options
    assert notes == ["sfrun: s.py imports mine, nowhere, which the guest image 'default' lacks. "
                     "To add packages with these names:\n"
                     "  sf image build default --from default --pip mine --pip nowhere\n"
                     "  or bring a virtual environment that has them: `sfrun --venv PATH`"]  # fmt: skip
    own = replace(options, venv=find(str(venv)))
    assert imports.supplied(own, find_image(), notes.append) == own and "imports nowhere," in notes[1]


@pytest.mark.parametrize(("source", "names"), [
    ("import a, b.c as d\nfrom e.f import g\nfrom . import h\n", {"a", "b", "e"}),
    ("try:\n import a\nexcept ImportError: a = 0\nif a:\n import b\ndef f():\n import c\n", set()),
    ("import a\nimport sys\nsys.path.append('x')\n", set()), ("import a; print 'old'", set()),
    ("# coding: latin-1\nimport a  # ä", {"a"}),
])  # fmt: skip
def test_what_a_script_imports_whatever_happens(source: str, names: set[str]) -> None:
    assert imports.imported(source.encode("latin-1")) == names


@pytest.mark.needs("image")
def test_what_a_script_will_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "package").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for name in ("folder/mine.py", "folder/fast.cpython-311.so", "more/other.py"):
        (tmp_path / name).write_text("")
    script = tmp_path / "folder" / "s.py"
    script.write_text("import os, numpy, zmq, sfparallel, mpi4py, mine, package, fast, _cffi_backend, other, nowhere")

    def missing(**environment: str | None) -> list[str]:
        return imports.missing(Program("script", ("folder/s.py",), tmp_path, script.parent, environment), find_image())

    assert missing() == ["nowhere", "other"] and missing(PYTHONPATH="more:") == ["nowhere"]
    assert imports.missing(Program("command", ("import nowhere",), tmp_path, None), find_image()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing() == [], "without unsquashfs nothing is known"


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pyvenv\.cfg"):
        find(str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("")
    with pytest.raises(UsageError, match=r"exactly one folder .*, not 0"):
        find(str(tmp_path))


def test_an_environment_of_another_python_is_refused(venv: Path) -> None:
    find(str(venv)).check("default", OWN_MAGIC)
    with pytest.raises(UsageError, match="'default' has another version") as caught:
        find(str(venv)).check("default", "00000000")
    assert "--requirements" in str(caught.value.hint)
    (venv / "bin" / "python").unlink()
    with pytest.raises(UsageError, match="does not run"):
        Venv(venv, venv).check("default", OWN_MAGIC)


def test_without_vms_it_is_refused(sfrun: Sfrun, venv: Path) -> None:
    ended = sfrun("", "--local", "--venv", str(venv))
    assert ended.code == EXIT_USAGE and "--venv is not available with --local" in ended.err
