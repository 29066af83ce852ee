"""A folder whose server is there and does not answer for some of its files: what a hung NFS server or sshfs looks like."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import os, stat, sys
from pathlib import Path
from sfparallel.vmm import fuse_wire as fuse
from sfparallel.vmm.files import FileServer

# It serves `folder`, and answers neither for reads of files "stuck..." nor when one is to be made.
device, folder = int(sys.argv[1]), Path(sys.argv[2])
UNANSWERED = {fuse.Opcode.CREATE, fuse.Opcode.MKNOD, fuse.Opcode.MKDIR}
with FileServer({1: folder}) as server:
    print("ready", flush=True)
    while True:
        request = fuse.parse(os.read(device, 1 << 20))
        stuck = request.opcode == fuse.Opcode.READ and "/stuck" in server.where(1, request)
        if request.opcode in UNANSWERED or stuck:
            print("stuck", flush=True)
        elif request.opcode not in fuse.NO_REPLY:
            os.write(device, server.answer(1, request))
"""


@contextmanager
def stuck_folder(source: Path, where: Path) -> Iterator[subprocess.Popen[str]]:
    """Mount `source` at `where`; its server prints a line for each request that it leaves unanswered."""
    libc = ctypes.CDLL(None, use_errno=True)
    where.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other".encode()
    assert libc.mount(b"stuck", os.fsencode(where), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(device), str(source)], pass_fds=[device],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    os.close(device)
    try:
        assert server.stdout and server.stdout.readline() == "ready\n"
        yield server
    finally:
        server.kill()  # whoever waits for it gets ENOTCONN
        server.wait()
        if server.stdout:
            server.stdout.close()
        libc.umount2(os.fsencode(where), 2)
