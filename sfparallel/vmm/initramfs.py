"""The guest half: an initramfs with the agent as its /init, the test of the processor, kernel modules, and our Python files.

It is apart from the guest's root, because it changes with this package and takes well under a second to make, while a root takes
a minute. It is not compressed: under emulation, unpacking costs more than reading.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sfparallel
from sfparallel.config import CACHE_HINT, cache_folder
from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import locks, subprocesses
from sfparallel.vmm.command_errors import hint_for
from sfparallel.vmm.native_parts import AGENT, CPU_CHECK, TOOLS, has_sources, require

_PACKAGE = Path(sfparallel.__file__).parent
GUEST_PACKAGE = "/usr/lib/python3/dist-packages/sfparallel"
"""Where the agent mounts the package."""
_TOP_MODULES = ("__init__.py", "MPI.py", "errors.py", "config.py", "wire.py", "text.py")


_BUILDER = 1
"""Part of the key: to be raised when equal sources give another archive."""


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
    for folder in ("bootstrap", "runtime", "shims"):
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
    if not has_sources(program):
        return require(program)
    sources = [path for path in folder.iterdir() if path.suffix in (".c", ".h") or path.name == "Makefile"]
    if program.exists() and all(path.stat().st_mtime_ns <= program.stat().st_mtime_ns for path in sources):
        return program
    output = folder
    if not os.access(folder, os.W_OK):  # an installed package; the program then belongs into the cache
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()
        output = cache_folder() / folder.name / digest[:16]
        output.mkdir(parents=True, exist_ok=True)
    subprocesses.require("make", TOOLS)
    with locks.folder_locked(output):  # two starts at once; make sees what the other one has made
        subprocesses.run(["make", "-s", "-C", folder, f"OUT={output}", f"{output}/{program.name}"],
                         what=f"build the guest's {program.name}")  # fmt: skip
    return output / program.name


# Run by a fresh interpreter, as its own program: `python -I -S -c … package folder names`.
_COMPILE = """
import py_compile, sys
package, folder, *names = sys.argv[1:]
for number, name in enumerate(names):
    py_compile.compile(f"{package}/{name}", cfile=f"{folder}/{number}", doraise=True, optimize=0,
                       dfile=f"/usr/lib/python3/dist-packages/sfparallel/{name}",
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


def _bytecode(sources: list[Path]) -> Iterator[Entry]:
    """Bytecode that is loaded without a look at the source's time: nothing is compiled under emulation.

    It is compiled in an interpreter of its own, because it tells of each string whether the compiling interpreter had interned it
    (marshal's TYPE_INTERNED), and that depends on whatever this one has done before.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv: list[str | Path] = [sys.executable, "-I", "-S", "-B", "-c", _COMPILE, _PACKAGE, folder, *sources]
        subprocesses.run(argv, what="compile the guest's Python files")
        for number, path in enumerate(sources):
            cached = importlib.util.cache_from_source(str(path), optimization="")
            yield Entry(f"sf/package/{cached}", (Path(folder) / str(number)).read_bytes())


def _key(entries: list[Entry], guest_magic: str) -> str:
    digest = hashlib.sha256(f"{_BUILDER} {guest_magic} {sys.version}".encode())
    for entry in entries:
        digest.update(f"{entry.name}\0{entry.mode}\0{len(entry.data)}\0".encode() + entry.data)
    return digest.hexdigest()[:16]


def write_initramfs(modules: Path, guest_magic: str) -> Path:
    """The initramfs for a guest with these kernel modules, from the cache if what it is made of has not changed.

    Args:
        modules: folder with the modules and a file `order`, which lists them in loading order.
        guest_magic: magic number of the guest's Python bytecode, hexadecimal.

    Raises:
        EnvironmentProblem: a program of the guest cannot be built.
    """
    entries = [Entry("init", build(AGENT).read_bytes(), 0o755), Entry("sf/cpu_check", build(CPU_CHECK).read_bytes(), 0o755)]
    for path in sorted(modules.iterdir()):
        entries.append(Entry(f"sf/modules/{path.name}", path.read_bytes()))
    sources = list(package_files())
    entries += (Entry(f"sf/package/{path}", (_PACKAGE / path).read_bytes()) for path in sources)
    folder = cache_folder() / "initrd"
    target = folder / f"{_key(entries, guest_magic)}.img"
    if target.exists():
        return target
    # Bytecode is of use only if the guest's Python is of our version; it makes its own otherwise.
    if guest_magic == importlib.util.MAGIC_NUMBER.hex():
        entries += _bytecode(sources)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work, locks.folder_locked(Path(work)):
            made = Path(work) / target.name
            made.write_bytes(write_cpio(entries))
            os.replace(made, target)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target}: {error.strerror}", hint=hint_for(error, CACHE_HINT)) from error
    return target
