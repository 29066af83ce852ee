"""The content of a guest image: Debian by mmdebstrap, Python packages by pip, kernel and modules taken out of it."""

from __future__ import annotations

import json
import lzma
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import ImageBuildError, SfError
from sfparallel.vmm import subprocesses
from sfparallel.vmm.releases import GuestPython, distribution_of, guest_python

_BASE_PACKAGES = (
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


def base_packages(release: str) -> tuple[str, ...]:
    """What each image has."""
    return (distribution_of(release).kernel, *_BASE_PACKAGES)


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
              progress: Callable[[str, float | None], None]) -> GuestPython:  # fmt: skip
    """Make root.sqfs, vmlinuz and modules/ in `work`; returns what Python the guest has.

    Raises:
        ImageBuildError: a step failed; the message has the tool's own words.
    """
    root = work / "root"
    progress("fetch and unpack Debian packages", None)
    _unpack_debian(work, root, suite, packages, sources)
    python = guest_python(root)
    if pip:
        progress("install Python packages", None)
        install_pip(root, python, pip, work / "tmp")
    progress("prepare the root", None)
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
    return python


def _unpack_debian(work: Path, root: Path, suite: str, packages: Sequence[str], sources: str) -> None:
    listing = work / "debian.sources"
    listing.write_text(sources)
    include = ",".join(sorted({*base_packages(suite), *packages}))
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


def _wheel_tags(python: GuestPython) -> list[str]:
    """Which wheels run in the guest (PEP 425, PEP 600)."""
    words = ["--only-binary=:all:", "--python-version", python.full_version, "--implementation", "cp"]
    for abi in (f"cp{python.version.replace('.', '')}", "abi3", "none"):
        words += ["--abi", abi]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(python.glibc_minor, 4, -1)]
    for platform in (*platforms, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64", "any"):
        words += ["--platform", platform]
    return words


def install_pip(root: Path, python: GuestPython, wanted: PipWanted, temporary: Path) -> None:
    """Into /usr/local of a root. The index is the one that pip is configured for on this host."""
    target, what = root / python.packages, wanted.words(temporary)
    pip = [sys.executable, "-m", "sfparallel.vmm.guest_pip", json.dumps(python.markers())]
    base = [*pip, "install", "--quiet", "--no-compile", "--target", str(target)]

    def run(*words: str) -> None:
        subprocesses.run([*base, *words, *what], what="install Python packages", error=ImageBuildError,
                         environment={"TMPDIR": str(temporary)})  # fmt: skip

    try:
        run(*_wheel_tags(python))
    except ImageBuildError as error:
        if not python.runs_what_is_built_here:
            error.hint = (f"packages without a wheel for the guest's Python {python.version} and glibc 2.{python.glibc_minor} "
                          "cannot be built on this host, which has others; choose the host's release, or packages with wheels")
            raise
        # Something has no wheel; what is built here runs there.
        run()
    subprocesses.run(["chroot", root, "python3", "-m", "compileall", "-q", f"/{python.packages}"], what="compile Python packages",
                     error=ImageBuildError)  # fmt: skip


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


def extract_modules(folder: Path, target: Path, modules: Sequence[str] = MODULES) -> None:
    """Copy modules and what they depend on to `target`, with a file `order` that lists them in loading order."""
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

    for module in modules:
        name = canonical(module)
        if name in paths:
            add(paths[name])
        elif name not in built_in:
            raise ImageBuildError(f"the kernel has no module {module}", hint="this kernel cannot be used for guests")
    target.mkdir()
    names = [_unpack_module(folder / path, target) for path in order]
    (target / "order").write_text("".join(f"{name}\n" for name in names))


def _unpack_module(path: Path, target: Path) -> str:
    """Debian 13 and Ubuntu compress modules; here they are unpacked once, and not by the kernel at each boot."""
    name = f"{path.name.partition('.ko')[0]}.ko"
    if path.suffix == ".xz":
        (target / name).write_bytes(lzma.decompress(path.read_bytes()))
    elif path.suffix == ".zst":
        program = subprocesses.require("zstd", "zstd")
        subprocesses.run([program, "-q", "-d", "-o", target / name, path], what="unpack a kernel module", error=ImageBuildError)
    else:
        shutil.copyfile(path, target / name)
    return name


def _prepare(root: Path) -> None:
    """What every guest needs and what must not be equal in two images."""
    for name in ("etc/machine-id", "etc/hostname", "var/lib/dbus/machine-id"):
        (root / name).unlink(missing_ok=True)
    # The clone network has no name server; without the file, programs would try 127.0.0.1 and wait.
    (root / "etc" / "resolv.conf").unlink(missing_ok=True)
    (root / "etc" / "resolv.conf").write_text("options timeout:1 attempts:1\n")
