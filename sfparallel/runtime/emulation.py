"""What helps a guest whose processor is emulated by QEMU (TCG); elsewhere nothing of it is done."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
_STEPS = (256, 512, 1024, 2048)
"""Pages that are read between flushes: more each time than 70 % of what the table holds then."""


@functools.cache
def is_emulated() -> bool:
    """Whether this is a guest of QEMU without hardware virtualization; looked up once, before the first fork."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def widen_tlb() -> None:
    """Have QEMU remember the addresses of as many pages as a Python program uses.

    QEMU looks up each access to memory in a table of its own (the TLB of accel/tcg/cputlb.c), and walks the guest's page tables
    for what is not there. The table begins with 256 entries in each clone, and is doubled when the guest flushes it with more
    than 70 % of them used; a guest that runs one program flushes seldom. Here pages are read, and unmapped all at once: of more
    than 33 pages Linux flushes everything. It takes some 15 ms. Measured between two clones: a small message takes three
    quarters of the time.
    """
    if not is_emulated():
        return
    for pages in _STEPS:
        # Pages that can only be read are all the kernel's one page of zeros: no memory is needed.
        with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=_FLAGS, prot=mmap.PROT_READ) as mapping:
            mapping[::mmap.PAGESIZE]
