"""Clones that do their worst, in real VMs: they lose themselves, and the host's memory does not grow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import HANG_S, Sfrun, job_of

pytestmark = pytest.mark.needs("qemu", "image", "root")

GENEROUS_BYTES = 500 << 20
"""Of a supervisor with a parent, three clones and their pool; undisturbed it has less than 150 MiB."""

FLOODS = """
import ctypes, mmap, os, struct, time
import sfparallel as sf

open("big", "rb").read(1)
libc = ctypes.CDLL(None, use_errno=True)

def files_that_are_never_read():
    agent = libc.syscall(434, 1, 0)
    ports = [int(fd) for fd in os.listdir("/proc/1/fd") if "vport" in os.readlink(f"/proc/1/fd/{fd}")]
    port = libc.syscall(438, agent, ports[0], 0)
    assert libc.ptrace(16, 1, 0, 0) == 0  # it reads no more
    reads = b"".join(struct.pack("<IHH IIQQIIIHH QQIIQII", 80, 7, 1, 80, 15, 2, node, 0, 0, 0, 0, 0, node, 0, 1 << 20, 0, 0, 0, 0)
                     for node in range(2, 10))
    while True:
        os.write(port, reads * 40)

def console():
    end = time.monotonic() + 15
    with open("/dev/ttyS0", "wb", buffering=0) as serial:
        while time.monotonic() < end:
            serial.write(b"x" * 4096)
    return "still there"

def events():
    assert libc.iopl(3) == 0
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\\x89\\xf2\\x89\\xf8\\xee\\xc3")  # mov edx, esi; mov eax, edi; out dx, al; ret
    outb = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    base = 0xcd8  # the registers of processor hot-plug (docs/specs/acpi_cpu_hotplug in QEMU)
    outb(0, base)
    outb(2, base + 5)
    while True:
        outb(0, base + 8)

@sf.parallel(n=3, timeout=200, on_error="return")
def flood():
    return (files_that_are_never_read, console, events)[sf.comm().rank]()

for result in flood():
    print(result if isinstance(result, str) else result.cause)
print(sf.parallel(n=2)(lambda: sf.comm().rank)(), flush=True)
input()
"""


def test_floods_cost_the_flooding_clone_only(sfrun: Sfrun) -> None:
    (sfrun.folder / "big").write_bytes(bytes(1 << 20))
    process = sfrun.start(FLOODS, stdin=-1)
    assert process.stdout and process.stdin
    told = [process.stdout.readline().strip() for _ in range(4)]
    assert all(told), process.communicate()[1]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{job_of(process.pid)}/status").read_text())
    _, err = process.communicate("\n", timeout=HANG_S)
    assert process.returncode == 0, err
    assert "does not read the answers" in told[0] and told[1] == "still there" and "ACPI_DEVICE_OST" in told[2], told
    assert told[3] == "[0, 1]"
    assert peak and int(peak[1]) << 10 < GENEROUS_BYTES
