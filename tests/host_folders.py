"""A host folder as a guest shows it, on the host's own kernel: FUSE from our file server, and an overlay on top of it."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import fuse_wire
from sfparallel.vmm.files import FileServer
from tests.conftest import HANG_S

TAG = 7
needs_kernel = pytest.mark.needs("fuse", "root")

# Mounts, in a namespace of its own, what a guest would: FUSE, tmpfs, overlayfs. Each step is answered, the last one ends it.
HOLDER = """
import os, subprocess, sys
fd, top = sys.argv[1:]
def mount(*argv):
    subprocess.run(["mount", "-i", *argv], check=True, stdin=subprocess.DEVNULL, close_fds=False)
mount("-t", "tmpfs", "tmpfs", top)
for name in ("low", "up", "work", "merged", "small"):
    os.mkdir(f"{top}/{name}")
mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", f"{top}/small")
mount("-t", "fuse", "-o", f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,nodev,nosuid,ro", "sf", f"{top}/low")
os.close(int(fd))
print("fuse", flush=True)
sys.stdin.readline()
layers = f"lowerdir={top}/low,upperdir={top}/up,workdir={top}/work"
mount("-t", "overlay", "-o", f"{layers},redirect_dir=off,metacopy=off,index=off", "overlay", f"{top}/merged")
print("overlay", flush=True)
sys.stdin.readline()
"""


def handle(server: FileServer, tag: int, data: bytes) -> bytes | None:
    """The reply to a request as read from /dev/fuse, or None where the kernel waits for none; as FileService.request does."""
    request = fuse_wire.parse(data)
    return None if request.opcode in fuse_wire.NO_REPLY else server.answer(tag, request)


def _serve(device: int, folder: Path) -> None:
    """Relay between /dev/fuse and the server, as agent and supervisor do. ENODEV: unmounted."""
    with FileServer({TAG: folder}) as server:
        while True:
            try:
                request = os.read(device, 1 << 20)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            answer = handle(server, TAG, request)
            if answer is not None:
                os.write(device, answer)


@dataclass(frozen=True)
class Guest:
    """What a guest sees: `low` the served folder, `up` its changes, `merged` both; `small` is a file system of 1 MiB."""

    source: Path
    low: Path
    up: Path
    merged: Path
    small: Path


@contextmanager
def mounted(source: Path, top: Path) -> Iterator[Guest]:
    """The layers of a guest over `source`. The server is a process: one that serves itself can wait for itself (the GIL)."""
    before = Path("/proc/self/mounts").read_text()
    top.mkdir()
    with ExitStack() as stack:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            holder = subprocess.Popen(
                ["unshare", "-m", "--propagation", "private", sys.executable, "-c", HOLDER, str(device), str(top)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[device])
            stack.enter_context(holder)
            assert holder.stdin and holder.stdout
            assert holder.stdout.readline() == b"fuse\n"
            server = multiprocessing.get_context("fork").Process(target=_serve, args=(device, source))
            server.start()
            stack.callback(server.join, 20)
        finally:
            os.close(device)
        stack.callback(lambda: holder.communicate(b"end\n", timeout=HANG_S))
        holder.stdin.write(b"go\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"overlay\n"
        inside = Path(f"/proc/{holder.pid}/root{top}")
        yield Guest(source, inside / "low", inside / "up", inside / "merged", inside / "small")
    assert server.exitcode == 0
    assert Path("/proc/self/mounts").read_text() == before
    assert not list(top.iterdir())


def make_tree(folder: Path) -> None:
    """Files of every kind, with names and sizes that are apt to break things."""
    chance = random.Random(1)
    for name in ("plain", "ünïcode €", "new\nline", "x" * 255, "-rf", " ", "back\\slash"):
        (folder / name).write_bytes(name.encode() * 3)
    (folder / os.fsdecode(b"not utf-8 \xff\xfe")).write_bytes(b"\xff")
    (folder / "empty").touch()
    (folder / "empty folder").mkdir()
    (folder / "deep/er/still").mkdir(parents=True)
    (folder / "deep/er/still/file").write_text("deep")
    (folder / "big").write_bytes(chance.randbytes(9_000_001))
    with open(folder / "sparse", "wb") as sparse:
        sparse.seek(30 << 20)
        sparse.write(b"end")
    (folder / "program").write_text("#!/bin/sh\necho ran\n")
    (folder / "program").chmod(0o755)
    (folder / "private").write_text("secret")
    (folder / "private").chmod(0o600)
    os.link(folder / "plain", folder / "hard link")
    for name, target in {"link": "plain", "up": "../elsewhere", "absolute": "/etc/passwd", "dangling": "nowhere",
                         "to folder": "deep/er"}.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "fifo")
    (folder / "many").mkdir()
    for number in range(3000):
        (folder / f"many/entry {number:05}").write_text(str(number))


def snapshot(folder: Path, *, times: bool = True) -> dict[bytes, tuple[Any, ...]]:
    """Everything that can be seen of a tree, by relative path; without the root's own attributes."""
    top = os.fsencode(folder)
    seen: dict[bytes, tuple[Any, ...]] = {}
    for where, folders, files in os.walk(top):
        for name in folders + files:
            path = os.path.join(where, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = (status.st_size, hashlib.file_digest(file, "sha256").hexdigest())
            seen[os.path.relpath(path, top)] = (status.st_mode, status.st_mtime_ns if times else 0, content)
    return seen


@pytest.fixture(name="source")
def source_fixture(tmp_path: Path) -> Path:
    """A folder of the host."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder
