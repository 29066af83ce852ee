"""What `make dist` makes: an sdist, and from it a wheel that runs where there is no checkout and no compiler's input."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sfparallel

ROOT = Path(__file__).parent.parent
PARTS = ("vmm/native/libsfpage.so", "runtime/agent/sfagent", "runtime/cpu_check/cpu_check", "_native.abi3.so", "_native.pyi",
         "bootstrap/sitecustomize.py", "shims/mpi4py/__init__.py", "shims/mpi4py/futures/__init__.py")  # fmt: skip
PROGRAM = """
import sfparallel as sf

@sf.parallel(n=3)
def share():
    return sf.comm().rank

print(share(), sf.__version__)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Not in an environment of its own, which would be downloaded: setup.cfg's `dev` has what builds it.
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_the_wheel_has_the_parts_built_and_no_sources(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert "-cp311-abi3-manylinux_2_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for part in PARTS[1:3]:
            assert archive.getinfo(f"sfparallel/{part}").external_attr >> 16 & 0o111, f"{part} is not executable"
    assert {f"sfparallel/{part}" for part in PARTS} <= set(names)
    assert {"sf.1", "sfrun.1"} <= {name.rpartition("/share/man/man1/")[2] for name in names}
    assert not [name for name in names if name.endswith((".c", ".h", "Makefile", "_native_build.py"))]
    python = {f"sfparallel/{path.relative_to(ROOT / 'sfparallel')}" for path in (ROOT / "sfparallel").rglob("*.py")}
    assert python - set(names) == {"sfparallel/_native_build.py"}


def test_the_sdist_has_the_sources_and_nothing_built(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = ("runtime/agent/Makefile", "runtime/cpu_check/main.c", "vmm/native/serve.c", "_native_calls.c")
    assert {"setup.py", *(f"sfparallel/{name}" for name in sources)} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "sfagent", "cpu_check/cpu_check"))]


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_the_wheel_forks_where_nothing_else_is(dist: Path, tmp_path: Path) -> None:
    """In a fresh environment that is mounted read-only, from another folder."""
    (wheel,) = dist.glob("*.whl")
    venv, folder = tmp_path / "venv", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "script.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*argv: str | Path) -> str:
        done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{argv}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    run(sys.executable, "-m", "venv", "--without-pip", venv)
    run(sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet", "--no-compile",
        "--disable-pip-version-check", wheel)
    where = run(venv / "bin" / "python", "-c", "import sfparallel; print(sfparallel.__file__)")
    assert where.startswith(str(venv))
    assert {path.name for path in (venv / "share" / "man" / "man1").iterdir()} == {"sf.1", "sfrun.1"}  # where man(1) looks
    told = run(venv / "bin" / "sf", "doctor").splitlines()
    assert told[0].startswith("ready: ") and {"libsfpage.so answers in QEMU", "sfagent runs", "cpu_check runs"} <= {
        line.partition("  ")[2].strip().partition("  ")[2].strip() for line in told}, told  # fmt: skip
    read_only = ('mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ! touch "$0/x" 2>/dev/null && '
                 'exec "$0/bin/sfrun" script.py')
    out = run("unshare", "--mount", "sh", "-c", read_only, venv)
    assert out == f"[0, 1, 2] {sfparallel.__version__}\n"
