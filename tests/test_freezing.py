"""The cut before a save: what the guest's programs are doing just then delays a fork, and never stops it for good."""

from __future__ import annotations

import hashlib
import os

import pytest

from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_forks_while_others_read_host_files(sfrun: Sfrun) -> None:
    """A process and a thread always have a file request under way; each gets all of its file, in the parent and in clones."""
    data = os.urandom(8 << 20)
    (sfrun.folder / "big.bin").write_bytes(data)
    ended = sfrun(
        """
        import hashlib, subprocess, threading
        import sfparallel as sf

        def digest():
            with open("big.bin", "rb", buffering=0) as file:
                digest = hashlib.sha256()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(100_000):
                    digest.update(piece)
            return digest.hexdigest()

        import os
        sums, stop = set(), False

        def read():
            while not stop:
                sums.add(digest())

        command = "while dd if=big.bin bs=64k iflag=nocache status=none | sha256sum >> sums; do :; done"
        reader = subprocess.Popen(["sh", "-c", command])
        thread = threading.Thread(target=read)
        thread.start()
        for generation in range(6):
            assert sf.parallel(lambda: sf.comm().rank, n=2)() == [0, 1]
        # In a clone the thread goes on reading where it was.
        assert sf.parallel(digest, n=2)() == [digest()] * 2
        stop = True
        thread.join()
        reader.kill()
        with open("sums") as file:
            whole = [line.split()[0] for line in file.read().splitlines() if line.endswith("-")]
        print(*(sums | set(whole)))
        os.remove("sums")
        """,
        timeout=240,
    ).ok()
    assert ended.out.split() == [hashlib.sha256(data).hexdigest()]


STUCK = """
import ctypes, os, subprocess
import sfparallel as sf
from sfparallel.errors import VMError

libc = ctypes.CDLL(None, use_errno=True)
os.mkdir("/tmp/mnt")
# A file system whose server never answers: who asks for something there waits, and cannot be frozen (fs/fuse/dev.c).
server = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
assert libc.mount(b"stuck", b"/tmp/mnt", b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
stuck = subprocess.Popen(["ls", "/tmp/mnt"])
while "fuse" not in open(f"/proc/{stuck.pid}/stack").read():
    pass
"""


def test_a_guest_that_does_not_come_to_rest_is_an_error_and_goes_on(sfrun: Sfrun) -> None:
    ended = sfrun(
        STUCK + """
try:
    sf.parallel(lambda: None, n=2)()
except VMError as error:
    print("not forked:", error)
try:
    sf.checkpoint_parent()
except VMError as error:
    print("not kept:", error)
stuck.kill()
os.close(server)
stuck.wait()
print(sf.parallel(lambda: sf.comm().rank, n=2)())
""",
        timeout=280,
    ).ok()  # fmt: skip
    lines = [line for line in ended.out.splitlines() if not line.startswith("  hint:")]
    assert [line.split(":")[0] for line in lines] == ["not forked", "not kept", "[0, 1]"]
    assert all("did not come to rest" in line for line in lines[:2])

