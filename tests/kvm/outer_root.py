"""The outer VM's own Linux: Debian with its full kernel, which has kvm_amd, and all that sfparallel needs on a host.

    <cache>/test-kvm/root-<key>/root        the root as a folder: the project's native parts are compiled in it (chroot)
                                root.img    the same as an ext4 image, never written to
                                vmlinuz

The initramfs is made for each run: it carries outer-init. `key` is a digest of all that the root is made of: Debian's packages
only, from the apt sources from which guest images come.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sfparallel.errors import ImageBuildError
from sfparallel.vmm import subprocesses
from sfparallel.vmm.apt_sources import sources_for
from sfparallel.vmm.guest_root import extract_modules
from sfparallel.vmm.initramfs import Entry, write_cpio

RELEASE = "bookworm"
"""Whatever the host has. PACKAGES are those of this release."""

PACKAGES = (
    # The system: the full kernel, because the cloud kernel has no 9p; and what outer-init calls.
    "linux-image-amd64", "iproute2", "kmod", "procps", "util-linux", "busybox-static",
    # What the README has a user install, and what compiles the native parts.
    "qemu-system-x86", "libvirt-daemon-system", "libnftables1", "mmdebstrap", "squashfs-tools",
    "gcc", "libc6-dev", "make", "pkg-config", "libmsgpack-dev", "libfuse3-dev", "python3-dev", "python3-setuptools",
    # What setup.cfg names, as Debian has it.
    "python3-cffi", "python3-cloudpickle", "python3-libvirt", "python3-msgpack", "python3-numpy", "python3-zmq", "python3-rich",
    "python3-hypothesis", "python3-pytest", "python3-pytest-timeout", "python3-joblib",
)  # fmt: skip

_MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "ext4")
"""What the initramfs loads: enough to mount the root. With udev and all drivers, Debian's own takes 20 s more under TCG."""

BUILDER_VERSION = 1
"""Part of the key: to be raised when the same packages give another root."""

_IMAGE_BYTES = 8 << 30
_INIT = Path(__file__).with_name("outer-init")
_COMMANDS = ("sf", "sfrun")

Say = Callable[[str], None]


def _key(sources: str) -> str:
    parts = (str(BUILDER_VERSION), RELEASE, sources, *PACKAGES)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def root_folder(folder: Path) -> Path:
    """What `ensure_root` returns; it may not be there yet."""
    return folder / f"root-{_key(sources_for(RELEASE))}"


def ensure_root(folder: Path, say: Say) -> Path:
    """The folder with root/, root.img and vmlinuz; made if there is none of this version yet (about 3 minutes).

    Raises:
        SfError: a step failed; the message has the tool's own words.
    """
    target, sources = root_folder(folder), sources_for(RELEASE)
    if target.exists():
        return target
    for old in folder.glob("root-*"):
        shutil.rmtree(old)
    work = target.with_suffix(".new")
    work.mkdir(parents=True)
    say("unpacking Debian for the outer VM (2 to 5 minutes)")
    _unpack(work, sources)
    say("making the outer VM's disk")
    _prepare(work / "root")
    kernel = max((work / "root" / "boot").glob("vmlinuz-*"))
    shutil.copyfile(kernel, work / "vmlinuz")
    with open(work / "root.img", "wb") as image:
        image.truncate(_IMAGE_BYTES)
    # Never written to, so it needs no journal.
    subprocesses.run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", work / "root", work / "root.img"],
                     what="make the outer VM's disk", error=ImageBuildError)  # fmt: skip
    os.rename(work, target)
    return target


def _unpack(work: Path, sources: str) -> None:
    listing = work / "debian.sources"
    listing.write_text(sources)
    (work / "tmp").mkdir()
    argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(PACKAGES)}",
            "--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*", RELEASE, work / "root", listing]  # fmt: skip
    subprocesses.run_tree(argv, what="unpack Debian", error=ImageBuildError, environment={"TMPDIR": str(work / "tmp")})


def _prepare(root: Path) -> None:
    """The commands of sfparallel, for the project that outer-init mounts at /project."""
    for name in ("project", "cache", "share"):
        (root / name).mkdir()
    (root / "usr/lib/python3/dist-packages/project.pth").write_text("/project\n")
    for name in _COMMANDS:
        command = root / "usr/bin" / name
        command.write_text(f"#!/usr/bin/python3\nimport sys\nfrom sfparallel.cli import {name}\nsys.exit({name}())\n")
        command.chmod(0o755)


def write_initrd(built: Path, target: Path) -> None:
    """The initramfs that mounts the root and goes on with outer-init.

    Args:
        built: what `ensure_root` returned.
    """
    (version,) = (path.name for path in (built / "root" / "lib" / "modules").iterdir())
    with tempfile.TemporaryDirectory() as folder:
        modules = Path(folder) / "modules"
        extract_modules(built / "root" / "lib" / "modules" / version, modules, _MODULES)
        order = (modules / "order").read_text().split()
        drivers = [Entry(f"modules/{name}", (modules / name).read_bytes()) for name in order]
    script = ["#!/bin/busybox sh", *(f"/bin/busybox insmod /modules/{name}" for name in order),
              "/bin/busybox mount -t devtmpfs dev /dev", "/bin/busybox mount -t ext4 -o rw /dev/vda /new",
              "/bin/busybox cp /outer-init /new/sbin/outer-init", "/bin/busybox mount -o move /dev /new/dev",
              "exec /bin/busybox switch_root /new /sbin/outer-init"]  # fmt: skip
    # The kernel's archive has no empty folders (initramfs.write_cpio): these two are mount points.
    entries = [Entry("init", ("\n".join(script) + "\n").encode(), 0o755), Entry("outer-init", _INIT.read_bytes(), 0o755),
               Entry("bin/busybox", (built / "root/bin/busybox").read_bytes(), 0o755),
               Entry("new/.mount-point", b""), Entry("dev/.mount-point", b""), *drivers]  # fmt: skip
    target.write_bytes(write_cpio(entries))
