"""The content of a guest image: Debian by mmdebstrap, Python packages by pip, kernel and modules taken out of it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import ImageBuildError, SfError
from sfparallel.vmm import subprocesses

BASE_PACKAGES = (
    "linux-image-cloud-amd64",
    "python3",
    "python3-numpy",
    "python3-zmq",
    "python3-cloudpickle",
    "python3-msgpack",
    "ca-certificates",
    "kmod",
    "iproute2",
    "procps",
)

MODULES = (
    "virtio_pci",
    "virtio_blk",
    "squashfs",
    "overlay",
    "virtio_console",
    "virtio_net",
    "fuse",
    "pvpanic-mmio",
    "tcp_diag",
    "udp_diag",
)
"""What the agent loads at boot, before what they depend on is added; those that are built into the kernel are left out."""

# Documentation and translations are half of the files and of no use there; but Debian's packages of examples and sample data put
# these below their documentation (policy 12.6).
_DPKG_OPTIONS = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/example*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)

_PIP_TARGET = "usr/local/lib/python3.11/dist-packages"
_GLIBC_MINOR = 36
"""Bookworm's glibc is 2.36: wheels for up to manylinux_2_36 run there (PEP 600)."""


@dataclass(frozen=True)
class PipWanted:
    """What pip is to install.

    Attributes:
        names: as on its command line.
        requirements: lines of a requirements file.
        constraints: lines of a file of constraints.
    """

    names: Sequence[str] = ()
    requirements: Sequence[str] = ()
    constraints: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.requirements)

    def words(self, folder: Path) -> list[str]:
        """Arguments for `pip install`, by way of files in a folder."""
        words = []
        for option, name, lines in (("-r", "requirements.txt", self.requirements), ("-c", "constraints.txt", self.constraints)):
            if lines:
                (folder / name).write_text("\n".join([*lines, ""]))
                words += [option, str(folder / name)]
        return [*words, "--", *self.names]


def make_root(work: Path, suite: str, packages: Sequence[str], pip: PipWanted, sources: str,
              progress: Callable[[str, float | None], None]) -> str:  # fmt: skip
    """Make root.sqfs, vmlinuz and modules/ in `work`; returns the magic number of the guest's Python bytecode (hexadecimal).

    Raises:
        ImageBuildError: a step failed; the message has the tool's own words.
    """
    root = work / "root"
    progress("fetch and unpack Debian packages", None)
    _unpack_debian(work, root, suite, packages, sources)
    if pip:
        progress("install Python packages", None)
        _install_pip(root, pip, work / "tmp")
    progress("prepare the root", None)
    magic = _python_magic(root)
    version = _take_kernel(root, work)
    extract_modules(root / "lib" / "modules" / version, work / "modules")
    _prepare(root)
    progress("compress", None)
    # lz4: zstd is smaller, but took minutes to build and doubled import times under emulation.
    subprocesses.run(
        ["mksquashfs", root, work / "root.sqfs", "-comp", "lz4", "-noappend", "-quiet", "-no-progress", "-e", root / "boot"],
        what="compress the guest image", error=ImageBuildError,
    )  # fmt: skip
    progress("clean up", None)
    shutil.rmtree(root)
    shutil.rmtree(work / "tmp")
    (work / "debian.sources").unlink()
    return magic


def _unpack_debian(work: Path, root: Path, suite: str, packages: Sequence[str], sources: str) -> None:
    listing = work / "debian.sources"
    listing.write_text(sources)
    include = ",".join(sorted({*BASE_PACKAGES, *packages}))
    argv: list[str | Path] = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={include}"]
    argv += ["--aptopt=APT::Install-Recommends \"false\"", *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS)]
    # A killed mmdebstrap leaves its temporary files; here they are litter by the name of the folder that they are in.
    temporary = work / "tmp"
    temporary.mkdir()
    try:
        subprocesses.run_tree([*argv, suite, root, listing], what="unpack Debian", error=ImageBuildError,
                              environment={"TMPDIR": str(temporary)})  # fmt: skip
    except ImageBuildError as error:
        raise _explained(error) from None


def _explained(error: SfError) -> ImageBuildError:
    text = str(error.args[0])
    if error.hint:
        hint = error.hint
    elif "Unable to locate package" in text or "has no installation candidate" in text:
        hint = "check the names of the packages with apt-cache policy"
    else:
        hint = "check that apt-get update works on this host; packages come from the same sources"
    return ImageBuildError(text, hint=hint)


def _pip_platforms() -> list[str]:
    names = [f"manylinux_2_{minor}_x86_64" for minor in range(_GLIBC_MINOR, 4, -1)]
    return [*names, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64", "any"]


def _install_pip(root: Path, wanted: PipWanted, temporary: Path) -> None:
    """Into /usr/local, which comes before Debian's own packages on Python's path. The index is the one that pip is configured
    for on this host."""
    target, places, what = root / _PIP_TARGET, {"TMPDIR": str(temporary)}, wanted.words(temporary)
    base = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(target)]
    wheels = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
    for abi in ("cp311", "abi3", "none"):
        wheels += ["--abi", abi]
    for platform in _pip_platforms():
        wheels += ["--platform", platform]
    try:
        subprocesses.run([*base, *wheels, *what], what="install Python packages", error=ImageBuildError,
                         environment=places)  # fmt: skip
    except ImageBuildError as error:
        if sys.version_info[:2] != (3, 11):
            error.hint = "only packages that have wheels for CPython 3.11 can be installed from a host with another Python"
            raise
        # Something has no wheel; our Python is of the guest's version, so what it builds here runs there.
        subprocesses.run([*base, *what], what="install Python packages", error=ImageBuildError, environment=places)
    subprocesses.run(["chroot", root, "python3", "-m", "compileall", "-q", f"/{_PIP_TARGET}"], what="compile Python packages",
                     error=ImageBuildError)  # fmt: skip


def _python_magic(root: Path) -> str:
    code = "import importlib.util as u; print(u.MAGIC_NUMBER.hex())"
    magic = subprocesses.run(["chroot", root, "python3", "-c", code], what="run the guest's Python", error=ImageBuildError)
    return magic.strip() or importlib.util.MAGIC_NUMBER.hex()


def _take_kernel(root: Path, work: Path) -> str:
    """Copy the kernel out; returns its version."""
    kernels = sorted((root / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise ImageBuildError("the packages contain no kernel", hint="leave linux-image-cloud-amd64 installable")
    shutil.copyfile(kernels[-1], work / "vmlinuz")
    return kernels[-1].name.removeprefix("vmlinuz-")


def _dependencies(folder: Path) -> dict[str, list[str]]:
    """modules.dep(5): path of every module, and of those it needs, by the former."""
    table = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        table[path] = needs.split()
    return table


def extract_modules(folder: Path, target: Path) -> None:
    """Copy MODULES and what they depend on to `target`, with a file `order` that lists them in loading order."""
    # Module names do not tell "-" from "_"; file names do.
    def canonical(path: str) -> str:
        return Path(path).name.partition(".ko")[0].replace("-", "_")

    table = _dependencies(folder)
    paths = {canonical(path): path for path in table}
    built_in = {canonical(path) for path in (folder / "modules.builtin").read_text().split()}
    order: dict[str, None] = {}

    def add(path: str) -> None:
        for needed in reversed(table[path]):
            add(needed)
        order[path] = None

    for module in MODULES:
        name = canonical(module)
        if name in paths:
            add(paths[name])
        elif name not in built_in:
            raise ImageBuildError(f"the kernel has no module {module}", hint="this kernel cannot be used for guests")
    target.mkdir()
    for path in order:
        shutil.copyfile(folder / path, target / Path(path).name)
    (target / "order").write_text("".join(f"{Path(path).name}\n" for path in order))


def _prepare(root: Path) -> None:
    """What every guest needs and what must not be equal in two images."""
    for name in ("etc/machine-id", "etc/hostname", "var/lib/dbus/machine-id"):
        (root / name).unlink(missing_ok=True)
    # The clone network has no name server; without the file, programs would try 127.0.0.1 and wait.
    (root / "etc" / "resolv.conf").unlink(missing_ok=True)
    (root / "etc" / "resolv.conf").write_text("options timeout:1 attempts:1\n")
