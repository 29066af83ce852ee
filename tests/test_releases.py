"""Guests of another release than the host's: which sources, which Python, which packages of pip, which kernel modules."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sfparallel.cli import sf
from sfparallel.errors import EnvironmentProblem, ImageBuildError, UsageError
from sfparallel.vmm import guest_root, image, releases
from sfparallel.vmm.apt_sources import parse_deb822, sources_for
from sfparallel.vmm.releases import GuestPython
from tests.conftest import Sfrun

OURS = ".".join(map(str, sys.version_info[:2]))
OTHER = "3.13" if OURS != "3.13" else "3.12"
VENDOR = "deb http://example.org/vendor {0} stable\ndeb http://example.org/pg {0}-pgdg main\n"


def codename(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, identity: str) -> None:
    """Has this process see another os-release."""
    (tmp_path / "os-release").write_text(identity)
    monkeypatch.setattr("platform._os_release_candidates", (str(tmp_path / "os-release"),))
    monkeypatch.setattr("platform._os_release_cache", None)


# -- releases and sources ----------------------------------------------------------------------------------------------


def test_an_image_is_of_the_hosts_own_release_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in releases.RELEASES:
        codename(monkeypatch, tmp_path, f'ID=x\nVERSION_CODENAME={name}\n')
        assert image.Recipe().suite == name
    codename(monkeypatch, tmp_path, 'ID=fedora\nPRETTY_NAME="Fedora Linux 41"\n')
    with pytest.raises(EnvironmentProblem, match="this host is Fedora Linux 41") as caught:
        image.Recipe()
    assert "--release" in str(caught.value.hint)
    assert image.Recipe(suite="trixie").suite == "trixie"


@pytest.mark.parametrize("host", ["bookworm", "trixie", "stable", "sid"])
def test_the_hosts_sources_serve_for_another_release(tmp_path: Path, host: str) -> None:
    (tmp_path / "sources.list").write_text(
        VENDOR.format(host) + f"deb [signed-by=/k.gpg] http://example.org/debian {host} main vendor\n"
        f"deb http://example.org/debian {host}-updates main\ndeb http://example.org/security {host}-security main\n")
    for wanted in ("bookworm", "trixie"):
        found = parse_deb822(sources_for(wanted, tmp_path))
        assert [source.suites for source in found] == [(wanted,), (f"{wanted}-updates",), (f"{wanted}-security",)]
        assert {uri for source in found for uri in source.uris} == {"http://example.org/debian", "http://example.org/security"}
        assert found[0].components == ("main",) and found[0].options == (("Signed-By", "/k.gpg"),)


def test_sources_of_the_release_itself_come_first(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://example.org/old bookworm main\ndeb http://example.org/new trixie main\n")
    assert [source.uris for source in parse_deb822(sources_for("trixie", tmp_path))] == [("http://example.org/new",)]
    assert [source.uris for source in parse_deb822(sources_for("bookworm", tmp_path))] == [("http://example.org/old",)]


def test_sources_of_one_distribution_do_not_serve_for_the_other(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://example.org/ubuntu noble main universe\n")
    assert parse_deb822(sources_for("noble", tmp_path))[0].components == ("main", "universe")
    with pytest.raises(EnvironmentProblem, match="no apt source of Debian") as caught:
        sources_for("trixie", tmp_path)
    assert "--release" in str(caught.value.hint)


def test_releases_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="a release 'etch'"):
        sources_for("etch", tmp_path)
    with pytest.raises(SystemExit) as ended:
        sf(["image", "build", "x", "--release", "etch"])
    assert ended.value.code == 2
    assert "bookworm, trixie, noble" in capsys.readouterr().err


def test_an_image_of_another_release_is_another_image() -> None:
    first, second = image.Recipe(suite="bookworm"), image.Recipe(suite="trixie")
    assert first.key("s") != second.key("s")
    base = image.Recipe("base", "bookworm", ("less",))
    assert image.Recipe("new", "trixie").over(base) == image.Recipe("new", "trixie", ("less",))


# -- the guest's Python ------------------------------------------------------------------------------------------------


def wheel(
    folder: Path, name: str, version: str = "1", tag: str = "py3-none-any", needs: tuple[str, ...] = (), python: str = ""
) -> None:
    """A wheel with one module."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {each}" for each in needs)]
    if python:
        metadata.append(f"Requires-Python: {python}")
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"tag = {tag!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's whole index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root in which nothing runs: what pip puts there is looked at from outside."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "chroot").write_text("#!/bin/sh\n")
    (programs / "chroot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "tmp").mkdir()
    return tmp_path / "root"


def installed(root: Path, python: GuestPython, *names: str, lines: tuple[str, ...] = ()) -> set[str]:
    guest_root.install_pip(root, python, guest_root.PipWanted(names, lines), root.parent / "tmp")
    return {path.stem for path in (root / f"usr/local/lib/python{python.version}/dist-packages").glob("*.py")}


@pytest.mark.parametrize("version", [OURS, OTHER])
def test_what_pip_chooses_is_for_the_guests_python(index: Path, root: Path, version: str) -> None:
    """Wheels by tags, dependencies and lines by markers, versions by Requires-Python."""
    python = GuestPython(f"{version}.99", "00", 41)
    needs = tuple(f"for_{word}; python_version {sign} '{version}'" for word, sign in (("it", "=="), ("others", "!=")))
    wheel(index, "chooses", needs=needs)
    wheel(index, "chooses", "2", python=f"!={version}.99")
    for name in ("for_it", "for_others", "in_file", "not_in_file"):
        wheel(index, name)
    digits = version.replace(".", "")
    wheel(index, "compiled", tag=f"cp{digits}-cp{digits}-manylinux_2_40_x86_64")
    wheel(index, "compiled", "0.9")
    lines = (f"in_file; python_version == '{version}'", f"not_in_file; python_full_version != '{version}.99'")
    assert installed(root, python, "chooses", "compiled", lines=lines) == {"chooses", "for_it", "compiled", "in_file"}
    assert "manylinux_2_40" in next(root.rglob("compiled.py")).read_text()


def test_a_wheel_for_a_later_c_library_is_not_taken(index: Path, root: Path) -> None:
    digits = OTHER.replace(".", "")
    wheel(index, "compiled", tag=f"cp{digits}-cp{digits}-manylinux_2_40_x86_64")
    wheel(index, "compiled", "0.9")
    assert installed(root, GuestPython(f"{OTHER}.1", "00", 36), "compiled") == {"compiled"}
    assert "any" in next(root.rglob("compiled.py")).read_text()


def source_package(index: Path) -> None:
    """A source archive whose build would fail with a word of its own."""
    folder = index / "src" / "needs_build-1"
    folder.mkdir(parents=True)
    (folder / "setup.py").write_text("raise SystemExit('it is being built')\n")
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: needs_build\nVersion: 1\n")
    subprocess.run(["tar", "-C", str(index / "src"), "-czf", str(index / "needs_build-1.tar.gz"), "needs_build-1"], check=True)


def test_what_has_no_wheel_is_not_built_for_another_python_or_c_library(index: Path, root: Path) -> None:
    source_package(index)
    for python in (GuestPython(f"{OTHER}.1", "00", 99), GuestPython(f"{OURS}.1", "00", 17)):
        with pytest.raises(ImageBuildError) as caught:
            installed(root, python, "needs_build")
        assert f"Python {python.version} and glibc 2.{python.glibc_minor}" in str(caught.value.hint)
        assert "being built" not in str(caught.value)


def test_what_has_no_wheel_is_built_for_the_hosts_own(index: Path, root: Path) -> None:
    source_package(index)
    with pytest.raises(ImageBuildError) as caught:
        installed(root, GuestPython(f"{OURS}.1", "00", 99), "needs_build")
    # Where `wheel` is installed, pip builds such a package without an environment for its build.
    assert re.search("build dependencies|it is being built", str(caught.value)), "it was not tried to be built"


def test_the_root_is_asked_for_its_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "chroot").write_text(f"#!/bin/sh\nshift 2\nexec {sys.executable} \"$@\"\n")
    (tmp_path / "chroot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = releases.guest_python(tmp_path)
    assert found.version == OURS and found.is_hosts and found.runs_what_is_built_here
    monkeypatch.setattr(releases, "OLDEST_PYTHON", (99, 0))
    with pytest.raises(ImageBuildError, match=r"needs 99\.0 or later") as caught:
        releases.guest_python(tmp_path)
    assert "--release" in str(caught.value.hint)


# -- kernel modules ----------------------------------------------------------------------------------------------------


def test_compressed_modules_are_unpacked(tmp_path: Path) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "virtio_pci.ko.xz").write_bytes(lzma.compress(b"first"))
    (folder / "fuse.ko").write_bytes(b"second")
    (folder / "modules.dep").write_text("fuse.ko: virtio_pci.ko.xz\nvirtio_pci.ko.xz:\n")
    (folder / "modules.builtin").write_text("")
    guest_root.extract_modules(folder, tmp_path / "out", ("fuse",))
    assert (tmp_path / "out" / "order").read_text() == "virtio_pci.ko\nfuse.ko\n"
    assert (tmp_path / "out" / "virtio_pci.ko").read_bytes() == b"first"
    assert (tmp_path / "out" / "fuse.ko").read_bytes() == b"second"


# -- guests whose Python is not the host's -----------------------------------------------------------------------------

COUNT = """
import os
import sfparallel
package = os.path.dirname(sfparallel.__file__)
names = [name for _, _, names in os.walk(package) for name in names]
print(sum(name.endswith(".py") for name in names), sum(name.endswith(".pyc") for name in names))
"""


@pytest.fixture
def other_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which the image `default` says that our bytecode is of no use to it."""
    default = image.find()
    monkeypatch.setenv("SF_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "cache" / "images"
    images.mkdir(parents=True)
    shutil.copytree(default.folder, images / "default-0", copy_function=os.symlink)
    manifest = json.loads((default.folder / "manifest.json").read_text())
    (images / "default-0" / "manifest.json").unlink()
    (images / "default-0" / "manifest.json").write_text(json.dumps({**manifest, "python_magic": "00000000"}))
    (images / "default.json").write_text(json.dumps({"folder": "default-0"}))


@pytest.mark.needs("qemu", "image", "root")
def test_a_guest_compiles_what_the_host_cannot(sfrun: Sfrun, other_image: None) -> None:
    """Once, before the template is taken: programs and clones find all of it compiled."""
    sources, compiled = map(int, sfrun(COUNT).ok().out.split())
    assert sources == compiled > 50
