"""The guest half: an initramfs with the agent as its /init, the test of the processor, kernel modules, and our Python files.

It is apart from the guest's root, because it changes with this package and takes well under a second to make, while a root takes
a minute. It is not compressed: under emulation, unpacking costs more than reading.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import py_compile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sfparallel
from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import subprocesses

_PACKAGE = Path(sfparallel.__file__).parent
AGENT = _PACKAGE / "runtime" / "agent" / "sfagent"
"""The guest's init."""
CPU_CHECK = _PACKAGE / "runtime" / "cpu_check" / "cpu_check"
"""The test of the processor, which the agent runs before a template is taken."""
_TOP_MODULES = ("__init__.py", "MPI.py", "errors.py", "config.py", "wire.py", "text.py")


@dataclass(frozen=True)
class Entry:
    """A file of the archive; folders follow from the names.

    Attributes:
        name: path without a leading slash.
        mode: permissions.
    """

    name: str
    data: bytes
    mode: int = 0o644


def _header(inode: int, name: str, mode: int, size: int, links: int) -> bytes:
    # "newc" (Documentation/driver-api/early-userspace/buffer-format.rst): times are 0, so that equal content is an equal file.
    fields = (inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(name.encode()) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4)


def write_cpio(entries: list[Entry]) -> bytes:
    """A cpio archive as the kernel unpacks it."""
    pieces = []
    folders: dict[str, None] = {}
    for entry in entries:
        for parent in reversed(Path(entry.name).parents):
            if str(parent) != ".":
                folders[str(parent)] = None
    number = 0
    for folder in folders:
        number += 1
        pieces.append(_header(number, folder, 0o040755, 0, 2))
    for entry in entries:
        number += 1
        pieces.append(_header(number, entry.name, 0o100000 | entry.mode, len(entry.data), 1))
        pieces.append(entry.data + b"\0" * (-len(entry.data) % 4))
    pieces.append(_header(0, "TRAILER!!!", 0, 0, 1))
    archive = b"".join(pieces)
    return archive + b"\0" * (-len(archive) % 512)


def package_files() -> Iterator[Path]:
    """The Python files that a guest needs, relative to the package."""
    yield from (Path(name) for name in _TOP_MODULES)
    for folder in ("runtime", "shims"):
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            yield path.relative_to(_PACKAGE)


def build(program: Path) -> Path:
    """A static program of the guest, made with `make` if its sources are newer.

    Args:
        program: AGENT or CPU_CHECK.

    Returns:
        Where it is: there, or in the cache folder.

    Raises:
        EnvironmentProblem: it is missing and cannot be made.
    """
    folder = program.parent
    sources = [path for path in folder.iterdir() if path.suffix in (".c", ".h") or path.name == "Makefile"]
    if program.exists() and all(path.stat().st_mtime_ns <= program.stat().st_mtime_ns for path in sources):
        return program
    output = folder
    if not os.access(folder, os.W_OK):  # an installed package; the program then belongs into the cache
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
        output = cache_folder() / folder.name / digest[:16]
        output.mkdir(parents=True, exist_ok=True)
    subprocesses.require("make", "gcc make libc6-dev libmsgpack-dev")
    subprocesses.run(["make", "-s", "-C", folder, f"OUT={output}", f"{output}/{program.name}"],
                     what=f"build the guest's {program.name}")  # fmt: skip
    return output / program.name


def _compiled(source: Path, name: str, folder: Path) -> bytes:
    """Bytecode that is loaded without a look at the source's time: nothing is compiled under emulation."""
    target = folder / "compiled.pyc"
    py_compile.compile(str(source), cfile=str(target), dfile=f"/usr/lib/python3/dist-packages/sfparallel/{name}", doraise=True,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)  # fmt: skip
    return target.read_bytes()


def _package_entries(guest_magic: str) -> Iterator[Entry]:
    # Bytecode is of use only if the guest's Python is of our version; it makes its own otherwise.
    compile_too = guest_magic == importlib.util.MAGIC_NUMBER.hex()
    with tempfile.TemporaryDirectory() as folder:
        for path in package_files():
            source = _PACKAGE / path
            yield Entry(f"sf/package/{path}", source.read_bytes())
            if compile_too:
                cached = Path(importlib.util.cache_from_source(str(path), optimization=""))
                yield Entry(f"sf/package/{cached}", _compiled(source, str(path), Path(folder)))


def write_initramfs(modules: Path, guest_magic: str) -> Path:
    """The initramfs for a guest with these kernel modules, from the cache if its content has not changed.

    Args:
        modules: folder with the modules and a file `order`, which lists them in loading order.
        guest_magic: magic number of the guest's Python bytecode, hexadecimal.

    Raises:
        EnvironmentProblem: a program of the guest cannot be built.
    """
    entries = [Entry("init", build(AGENT).read_bytes(), 0o755), Entry("sf/cpu_check", build(CPU_CHECK).read_bytes(), 0o755)]
    for path in sorted(modules.iterdir()):
        entries.append(Entry(f"sf/modules/{path.name}", path.read_bytes()))
    entries += _package_entries(guest_magic)
    archive = write_cpio(entries)
    folder = cache_folder() / "initrd"
    target = folder / f"{hashlib.sha256(archive).hexdigest()[:16]}.img"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
            made = Path(work) / target.name
            made.write_bytes(archive)
            os.replace(made, target)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target}: {error.strerror}", hint="set SF_CACHE to another folder") from error
    return target
