"""Can KVM run a stock guest here? Asked of the device, of the processor, and of a guest that runs."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

from sfparallel.config import ACCEL, QEMU, cache_folder
from sfparallel.errors import EnvironmentProblem, UsageError
from sfparallel.vmm.verdict import Finding, Status, verdict_of

EMULATED = "Guests are emulated (TCG), not run by KVM: all works the same, but programs in them run 10 to 20 times slower"
_DEVICE = "/dev/kvm"
_KVM_GET_API_VERSION = 0xAE00
_KVM_GET_SUPPORTED_CPUID = 0xC008AE05  # <linux/kvm.h>
_KVM_API_VERSION = 12  # fixed since Linux 2.6.22
_PROBE_TIMEOUT_S = 10.0
_DOUBT_S = 600.0
"""A guest that did not end in time is tried again after this time: not at each start, which would take so much longer."""
_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x20

# 16-bit code at the reset vector's target: counts to 100,000 in memory at 0x1000, then writes _EXIT_VALUE to _EXIT_PORT.
_COUNT = bytes.fromhex(
    "31c0"  # xorw %ax,%ax
    "8ed8"  # movw %ax,%ds
    "66c706001000000000"  # movl $0,0x1000
    "66ff060010"  # 1: incl 0x1000
    "66813e0010a0860100"  # cmpl $100000,0x1000
    "75f0"  # jne 1b
    "b020"  # movb $0x20,%al
    "e6f4"  # outb %al,$0xf4
    "f4"  # 2: hlt
    "ebfd"  # jmp 2b
)
_RESET_VECTOR = bytes.fromhex("ea000000f0")  # ljmp $0xf000,$0
_ROM_BYTES = 1 << 16


def firmware() -> bytes:
    """A ROM whose guest counts in memory and ends: the smallest proof that guest code runs, loops and writes."""
    return _COUNT.ljust(_ROM_BYTES - 16, b"\0") + _RESET_VECTOR.ljust(16, b"\0")


def run_firmware(program: str, accelerator: str, *, timeout_s: float = _PROBE_TIMEOUT_S) -> str:
    """Runs the counting guest; returns "" when it counted to the end, or what went wrong.

    Raises:
        OSError: QEMU can't be run.
        TimeoutError: the guest does not end; the machine may be busy.
    """
    rom = os.memfd_create("sf-firmware", os.MFD_CLOEXEC)
    try:
        os.write(rom, firmware())
        argv = [
            program, "-M", "pc", "-accel", accelerator, "-cpu", "qemu64", "-m", "16", "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-bios", f"/proc/self/fd/{rom}",
            "-device", f"isa-debug-exit,iobase={_EXIT_PORT},iosize=4",
        ]  # fmt: skip
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, pass_fds=[rom])
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"a guest of twelve instructions did not end in {timeout_s:g} s") from None
    finally:
        os.close(rom)
    # isa-debug-exit ends QEMU with (value << 1) | 1.
    if done.returncode == _EXIT_VALUE << 1 | 1:
        return ""
    return f"a guest of twelve instructions failed (QEMU's exit code {done.returncode}): {done.stderr.strip()[-200:]}"


def processor_flags() -> frozenset[str]:
    """Features of the first processor, as Linux lists them."""
    with open("/proc/cpuinfo") as file:
        return next((frozenset(line.split()) for line in file if line.startswith("flags")), frozenset())


# Leaves that differ from core to core of one machine: caches and TLBs, topology with the APIC id, the kind of core (Intel's SDM,
# volume 2, CPUID; AMD's APM, volume 3, appendix E). What a guest computes depends on none of them.
_LEAVES_BY_CORE = frozenset((0x2, 0x4, 0xB, 0x18, 0x1A, 0x1F, 0x8000001D, 0x8000001E))
_ENTRY = struct.Struct("<IIIIIII12x")  # struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx
_MOST_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES


def offered_cpuid(device: str = _DEVICE) -> str:
    """Digest of the processor that KVM offers to guests, of all that does not differ from core to core
    (KVM_GET_SUPPORTED_CPUID, Documentation/virt/kvm/api.rst).

    Raises:
        OSError: KVM does not say.
    """
    buffer = bytearray(8 + _MOST_ENTRIES * _ENTRY.size)
    struct.pack_into("<I", buffer, 0, _MOST_ENTRIES)
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _KVM_GET_SUPPORTED_CPUID, buffer)
    finally:
        os.close(fd)
    (count,) = struct.unpack_from("<I", buffer)
    entries = [_ENTRY.unpack_from(buffer, 8 + number * _ENTRY.size) for number in range(count)]
    digest = hashlib.sha256()
    for function, index, flags, eax, ebx, ecx, edx in sorted(entries):
        if function == 1:
            ebx &= 0x0000FFFF  # above: how many of them there are, and the APIC id of this core
        if function not in _LEAVES_BY_CORE:
            digest.update(_ENTRY.pack(function, index, flags, eax, ebx, ecx, edx))
    return digest.hexdigest()


def host_processor() -> dict[str, object]:
    """What a guest's state under KVM depends on beside QEMU: the processor, its microcode, what KVM offers of it, and the kernel.

    Raises:
        EnvironmentProblem: KVM does not say what it offers.
    """
    fields: dict[str, set[str]] = {"vendor_id": set(), "cpu family": set(), "model": set(), "stepping": set(), "microcode": set()}
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in fields:
                fields[name.strip()].add(value.strip())
    try:
        cpuid = offered_cpuid()
    except OSError as error:
        raise EnvironmentProblem(f"KVM does not say which processor it offers: {error}", hint="see `sf doctor`") from error
    # All values that there are: cores of two kinds, or of two microcodes, are one machine.
    values = {name.replace(" ", "_"): " ".join(sorted(found)) for name, found in fields.items()}
    return {**values, "cpuid": cpuid, "kernel": os.uname().release}


def probe_kvm(device: str = _DEVICE, flags: frozenset[str] | None = None) -> Finding:
    """Whether KVM can run a stock Linux guest. The guest's part is remembered until the next boot, per QEMU.

    Args:
        device: the KVM device.
        flags: the processor's features; this machine's unless given.
    """
    name, elsewhere = "KVM", "none is needed; on a host whose KVM runs guests, programs in them run faster"
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return verdict_of(error, name, f"{device} cannot be opened",
                          "for speed: virtualization on in the firmware, and `modprobe kvm`",
                          forbidden="for speed: usermod -aG kvm $USER, and log in again", needed=False)
    try:
        api = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return verdict_of(error, name, f"{device} is not KVM", elsewhere, needed=False)
    finally:
        os.close(fd)
    if api != _KVM_API_VERSION:
        return Finding(name, Status.BROKEN, f"{device} speaks version {api}, not {_KVM_API_VERSION}", elsewhere, needed=False)
    if not (processor_flags() if flags is None else flags) & {"vmx", "svm"}:
        # Seen: such a host runs the counting guest, and Linux never gets past early boot. So there is no point in trying it.
        detail = f"{device} opens, but the processor has neither vmx nor svm: stock Linux guests do not boot on such hosts"
        return Finding(name, Status.BROKEN, detail, elsewhere, needed=False)
    trouble = _remembered_run()
    if trouble:
        return Finding(name, Status.BROKEN, trouble, elsewhere, needed=False)
    return Finding(name, Status.OK, f"{device} runs guests", needed=False)


def _remembered_run() -> str:
    """`run_firmware` under KVM, or its result from earlier since the machine was booted. That it took too long is remembered for
    minutes."""
    program = shutil.which(QEMU.get())
    if program is None:
        return f"not tried: {QEMU.get()} was not found"
    status = os.stat(program)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = [boot, os.uname().release, program, status.st_size, status.st_mtime_ns]
    memory = cache_folder() / "kvm.json"
    try:
        known = json.loads(memory.read_text())
        if known["key"] == key and time.time() < known.get("until", math.inf):
            return str(known["trouble"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing legible: try again
    until = {}
    try:
        trouble = run_firmware(program, "kvm", timeout_s=_PROBE_TIMEOUT_S)
    except TimeoutError as error:  # a busy machine's, it may be, and then it is no word about KVM
        trouble, until = str(error), {"until": time.time() + _DOUBT_S}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f"{memory.name}.{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "trouble": trouble, **until}))
        partial.replace(memory)
    except OSError:
        pass  # a cache that can't be written is not this probe's subject; the next run probes again
    return trouble


@functools.cache
def _automatic() -> str:
    return "kvm" if probe_kvm().status is Status.OK else "tcg"


def accelerator() -> str:
    """ "kvm" or "tcg": what SF_ACCEL says, or else what works; probed once per process.

    Raises:
        UsageError: SF_ACCEL has another value.
    """
    wanted = ACCEL.get()
    if wanted not in ("auto", "kvm", "tcg"):
        raise UsageError(f"{ACCEL.variable}={wanted!r} is not an accelerator", hint="set it to auto, kvm or tcg")
    return _automatic() if wanted == "auto" else wanted
