"""The outer VM: QEMU emulates an AMD processor with SVM and nested paging, so that a real kvm_amd runs in it.

Disks: the root (writes are discarded), the project as it is in this work tree with its native parts (squashfs), and a cache
folder that lasts (ext4: guest image, templates). Results come back through a shared folder (9p), output through a console.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

from sfparallel.vmm import subprocesses
from sfparallel.vmm.image import Image
from sfparallel.vmm.machine import TCG_CPU_MODEL
from tests.kvm import tsc
from tests.kvm.outer_root import Say, write_initrd

# Without what TCG computes wrong: guests get this processor by `-cpu host`, and prove it at their boot. A name of its own:
# guests look for "QEMU TCG" in the name (runtime/emulation.py), and theirs is that of this processor.
CPU = f"{TCG_CPU_MODEL},model-id=SVM emulated"
MEMORY = "8G"
_CACHE_BYTES = 16 << 30
_FULL_BYTES = 8 << 30
# Not by setup.py, which asks for a newer cffi than Debian's, though that compiles the module as well.
_COMPILE_NATIVE = "from sfparallel._native_build import ffibuilder; ffibuilder.compile()"
PROJECT = Path(__file__).parent.parent.parent


def project_disk(root: Path, target: Path, say: Say) -> None:
    """The work tree, with its native parts and its bytecode made in the outer VM's root."""
    say("compiling the project for the outer VM")
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, check=True,
                           capture_output=True).stdout.decode().split("\0")  # fmt: skip
    inside = root / "project"
    shutil.rmtree(inside, ignore_errors=True)
    for name in filter(None, names):
        if (PROJECT / name).is_file():  # listed, but deleted in the work tree: not there
            (inside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, inside / name)
    make = "make -s --no-print-directory -C /project/sfparallel"
    script = (f"cd /project && {make}/vmm/native && {make}/runtime/agent && {make}/runtime/cpu_check && "
              f"python3 -c '{_COMPILE_NATIVE}' && python3 -m compileall -q sfparallel tests")
    subprocesses.run(["chroot", root, "sh", "-c", script], what="compile the project for the outer VM",
                     environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"})  # fmt: skip
    subprocesses.run(["mksquashfs", inside, target, "-comp", "lz4", "-noappend", "-quiet", "-no-progress"],
                     what="make the project's disk")  # fmt: skip
    shutil.rmtree(inside)
    inside.mkdir()


def cache_disk(folder: Path, image: Image, say: Say) -> Path:
    """The disk with the guest image; what earlier runs have put beside it (templates) stays, until it is too much."""
    target = folder / f"cache-{image.key[:12]}.img"
    if target.exists() and target.stat().st_blocks * 512 < _FULL_BYTES:
        return target
    for old in folder.glob("cache-*.img"):
        old.unlink()
    say("making the outer VM's cache disk")
    tree, new = folder / "cache.tree", folder / "cache.new"
    shutil.rmtree(tree, ignore_errors=True)
    images = tree / "images"
    shutil.copytree(image.folder, images / image.folder.name)
    shutil.copy2(image.folder.parent / f"{image.name}.json", images)
    with open(new, "wb") as disk:
        disk.truncate(_CACHE_BYTES)
    subprocesses.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, new], what="make the outer VM's cache disk")
    shutil.rmtree(tree)
    os.rename(new, target)
    return target


def run(
    built: Path, project: Path, cache: Path, share: Path, limit_s: float, *,
    output: IO[bytes] | None = None, steady: bool = False,
) -> int | None:
    """Boot it and have it run `share`/job; returns the job's exit code, or None if it did not come to its end in time.

    What its kernel says is in `share`/console.

    Args:
        output: where the job's output goes; ours, if it is None.
        steady: its clocks count instructions, a nanosecond for each, so that how busy we are makes no time limit in it run
            out. It has one processor then.
    """
    write_initrd(built, share / "initrd")
    # With a reliable TSC, KVM has its master clock, as on bare metal. TCG's is that of the host. Its rate must be told: a kernel
    # that has to wait for a processor while it measures takes another, and has clocks that are up to three times too fast (seen).
    rate = 1_000_000 if steady else tsc.kilohertz()
    kernel = f"root=/dev/vda rw console=ttyS0 quiet mitigations=off panic=-1 tsc=reliable tsc_early_khz={rate}"
    # While nothing runs, its clocks jump to the next timer. With two processors it gets on far slower: they run in turn.
    clock = ["-accel", "tcg,thread=single,tb-size=1024", "-icount", "shift=0,sleep=off", "-smp", "1"] if steady else \
        ["-accel", "tcg,thread=multi,tb-size=1024", "-smp", "2"]  # fmt: skip
    argv = ["qemu-system-x86_64", "-M", "q35", *clock, "-cpu", CPU, "-m", MEMORY, "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(built / "vmlinuz"), "-initrd", str(share / "initrd"), "-append", kernel,
            "-drive", f"file={built}/root.img,format=raw,if=virtio,cache=unsafe,snapshot=on",
            "-drive", f"file={project},format=raw,if=virtio,readonly=on",
            "-drive", f"file={cache},format=raw,if=virtio,cache=unsafe",
            "-device", "virtio-serial", "-chardev", "stdio,id=out,signal=off", "-device", "virtconsole,chardev=out",
            "-device", "virtio-rng-pci", "-virtfs", f"local,path={share},mount_tag=share,security_model=none",
            "-serial", f"file:{share}/console"]  # fmt: skip
    setpriv = subprocesses.require("setpriv", "util-linux")
    command = [setpriv, "--pdeathsig", "KILL", "--", *argv]
    (share / "exit").unlink(missing_ok=True)
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, timeout=limit_s, check=True)
        return int((share / "exit").read_text())
    except (subprocess.SubprocessError, OSError, ValueError):
        return None
