"""Builds what is not Python: the cffi module, the paging layer for QEMU, and the static programs of the guest.

Everything else about the package is in setup.cfg. A wheel carries the built parts and none of their sources, an
sdist the sources. In an editable installation the parts are built beside their sources, where `make build` builds them anew.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
OLDEST_PYTHON = "cp311"
"""The stable ABI that the cffi module uses; `python_requires` in setup.cfg."""
PARTS = {
    "sfparallel/vmm/native": "libsfpage.so",
    "sfparallel/runtime/agent": "sfagent",
    "sfparallel/runtime/cpu_check": "cpu_check",
}
"""Folders with a Makefile, and what it makes there (or in OUT)."""
NEEDED = "apt install gcc make libc6-dev python3-dev libmsgpack-dev"


class BuildParts(Command):
    """Has `make` build PARTS: into the folder that becomes the wheel, or in place for an editable installation."""

    description = "build the paging layer and the guest's programs"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    editable_mode = False
    build_lib: str | None  # None is what `set_undefined_options` fills in

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        for folder, name in PARTS.items():
            out = (ROOT if self.editable_mode else Path(str(self.build_lib)).absolute()) / folder
            out.mkdir(parents=True, exist_ok=True)
            # No debugging information: it names the folder of the build, and is as large as the rest.
            flags = [] if self.editable_mode or name != "libsfpage.so" else ["CFLAGS=-O2 -g0"]
            try:
                subprocess.run(["make", "-C", str(ROOT / folder), f"OUT={out}", *flags, f"{out}/{name}"], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"cannot build {name}: {error}\nsfparallel is built on Debian, with: {NEEDED}") from error

    def get_source_files(self) -> list[str]:
        found = (path for folder in PARTS for path in (ROOT / folder).iterdir())
        return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in (".c", ".h") or path.name == "Makefile")

    def get_outputs(self) -> list[str]:
        return [f"{self.build_lib}/{folder}/{name}" for folder, name in PARTS.items()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """With the parts."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_parts", None)]


class BuildPy(build_py):
    """Without the module that only this file uses."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "_native_build"]


class Wheel(bdist_wheel):
    """A wheel for each Python from OLDEST_PYTHON on, and each Linux whose C library has what the built parts ask for."""

    def finalize_options(self) -> None:
        self.py_limited_api = OLDEST_PYTHON
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        libraries = list(Path(self.bdist_dir).rglob("*.so"))
        if platform.startswith("linux_") and libraries:
            # PEP 600. Names of versions stand in an ELF file as they are; the guest's programs are static, and need no library.
            found = (re.findall(rb"\0GLIBC_2\.(\d+)", path.read_bytes()) for path in libraries)
            minor = max(int(number) for numbers in found for number in numbers)
            platform = platform.replace("linux_", f"manylinux_2_{minor}_")
        return python, abi, platform


setup(
    cffi_modules=["sfparallel/_native_build.py:ffibuilder"],
    cmdclass={"build": Build, "build_parts": BuildParts, "build_py": BuildPy, "bdist_wheel": Wheel},
)
