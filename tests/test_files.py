"""Host folders in guests: the file server with the host's own kernel as its client, and copy-back against a real overlay."""

from __future__ import annotations

import errno
import hashlib
import mmap
import multiprocessing
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel import wire
from sfparallel.errors import GuestError, ProtocolError, UsageError
from sfparallel.runtime import copyback
from sfparallel.vmm import fuse_wire
from sfparallel.vmm.copy_back import CopyBack
from sfparallel.vmm.exports import exports_for, is_system_folder
from sfparallel.vmm.files import FileServer
from sfparallel.vmm.fuse_wire import Opcode

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
            answer = server.handle(TAG, request)
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
        stack.callback(lambda: holder.communicate(b"end\n", timeout=20))
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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@needs_kernel
def test_kernel_sees_the_same_tree(source: Path, tmp_path: Path) -> None:
    make_tree(source)
    expected = snapshot(source)
    with mounted(source, tmp_path / "top") as guest:
        assert snapshot(guest.low) == expected
        assert snapshot(guest.merged) == expected
        assert sorted(os.listdir(guest.merged / "many")) == sorted(os.listdir(source / "many"))
        assert os.stat(guest.low / "plain").st_nlink == 2
        for missing in ("nothing", "nothing", "many/nothing", "plain/nothing"):
            assert not (guest.merged / missing).exists()
        with pytest.raises(OSError, match="Read-only file system"):
            (guest.low / "new").touch()
        with pytest.raises(OSError, match="Operation not supported"):
            os.getxattr(guest.low / "plain", "user.anything")
        assert os.statvfs(guest.low).f_blocks == os.statvfs(source).f_blocks


@needs_kernel
def test_kernel_reads_at_random_maps_and_executes(source: Path, tmp_path: Path) -> None:
    make_tree(source)
    data = (source / "big").read_bytes()
    chance = random.Random(2)
    with mounted(source, tmp_path / "top") as guest:
        with open(guest.merged / "big", "rb") as file:
            for _ in range(200):
                offset, size = chance.randrange(len(data) + 10_000), chance.randrange(1, 300_000)
                assert os.pread(file.fileno(), size, offset) == data[offset:offset + size]
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
                assert mapping[5_000_000:5_100_000] == data[5_000_000:5_100_000]
        assert subprocess.run([guest.merged / "program"], capture_output=True, check=True).stdout == b"ran\n"


@contextmanager
def host_side(exports: dict[int, Path]) -> Iterator[tuple[socket.socket, CopyBack]]:
    """A `CopyBack` at the other end of a socket, as agent and supervisor connect it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer(target: CopyBack) -> None:
        with there:
            while packet := there.recv(wire.MAX_MESSAGE_BYTES):
                there.send(wire.pack(target.handle(wire.unpack(packet))))

    with CopyBack(exports) as target:
        thread = threading.Thread(target=answer, args=(target,))
        thread.start()
        try:
            with here:
                yield here, target
        finally:
            thread.join()


def bring_back(upper: Path, lower: Path, host: Path) -> tuple[copyback.Report, CopyBack]:
    with host_side({TAG: host}) as (connection, target):
        sender = copyback.Sender(connection)
        sender.send_changes(TAG, upper, copyback.changes(upper, lower))
        return sender.finish(), target


def change_files(top: Path) -> None:
    """What programs do to files."""
    (top / "new").write_bytes(random.Random(3).randbytes(1_000_001))
    (top / "new").chmod(0o640)
    with open(top / "plain", "a") as file:
        file.write("more")
    os.utime(top / "plain", ns=(1, 123_456_789_123_456_789))
    (top / "program").chmod(0o700)
    os.rename(top / "ünïcode €", top / "deep/er/renamed €")
    (top / "x" / "y" / "z").mkdir(parents=True)
    (top / "x/y/z/file").write_text("in new folders")
    (top / "x/y").chmod(0o555)
    (top / "empty").unlink()
    (top / "empty folder").rmdir()
    (top / "empty folder").write_text("a file now")
    (top / "private").unlink()
    (top / "private").mkdir()
    (top / "private/inside").write_text("a folder now")
    for number in range(1000):
        (top / f"many/entry {number:05}").unlink()
    (top / "many/later").symlink_to("entry 02000")
    (top / "link").unlink()
    (top / "link").symlink_to("ne\nw")
    shutil.rmtree(top / "deep/er/still")
    (top / "deep/er/still").mkdir()
    (top / "deep/er/still/other").touch()
    (top / os.fsdecode(b"new \xff\xfe")).write_bytes(b"odd")
    with open(top / "holes", "wb") as file:
        file.seek(100 << 20)
        file.write(b"x")
        file.truncate(200 << 20)


@needs_kernel
def test_copy_back_makes_the_host_look_like_the_overlay(source: Path, tmp_path: Path) -> None:
    make_tree(source)
    with mounted(source, tmp_path / "top") as guest:
        change_files(guest.merged)
        expected = snapshot(guest.merged)
        report, target = bring_back(guest.up, guest.low, source)
    assert report.problems == [] == target.problems
    assert snapshot(source) == expected
    assert report.files == 12 and report.data_bytes < 12_000_000
    assert (source / "holes").stat().st_blocks * 512 < 1 << 20
    assert not list(source.rglob("*.sf-part"))


@needs_kernel
def test_copy_back_of_nothing_and_of_byte_code(source: Path, tmp_path: Path) -> None:
    make_tree(source)
    expected = snapshot(source)
    with mounted(source, tmp_path / "top") as guest:
        snapshot(guest.merged)
        (guest.merged / "deep/er/__pycache__").mkdir()
        (guest.merged / "deep/er/__pycache__/x.pyc").touch()
        os.mkfifo(guest.merged / "deep/er/new fifo")
        report, _ = bring_back(guest.up, guest.low, source)
    assert (report.files, report.deleted, report.problems) == (0, 0, [])
    assert snapshot(source, times=False) == {path: (mode, 0, content) for path, (mode, _, content) in expected.items()}


@needs_kernel
def test_copy_back_leaves_what_others_wrote_meanwhile(source: Path, tmp_path: Path) -> None:
    (source / "old").mkdir()
    (source / "old/seen").touch()
    with mounted(source, tmp_path / "top") as guest:
        shutil.rmtree(guest.merged / "old")
        for name in ("old", "out"):
            (guest.merged / name).mkdir()
            (guest.merged / name / "mine").touch()
            (source / name).mkdir(exist_ok=True)
            (source / name / "another job's").touch()
        report, _ = bring_back(guest.up, guest.low, source)
    assert report.problems == []
    assert sorted(os.listdir(source / "old")) == ["another job's", "mine"] == sorted(os.listdir(source / "out"))


@needs_kernel
def test_full_disk_is_one_problem_per_file_and_leaves_no_half(source: Path, tmp_path: Path) -> None:
    with mounted(source, tmp_path / "top") as guest:
        (guest.merged / "a big one").write_bytes(bytes(range(256)) * 40_000)
        (guest.merged / "small one").write_text("fits")
        report, target = bring_back(guest.up, guest.low, guest.small)
        assert os.listdir(guest.small) == ["small one"]
    assert len(report.problems) == 1 and report.problems == target.problems
    assert report.problems[0].endswith("a big one: No space left on device")
    assert report.codes == {errno.ENOSPC} and "free space" in str(report.error())


def test_agent_that_goes_away_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10 << 20))
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    with here, pytest.raises(GuestError, match="went away"):
        sender = copyback.Sender(here)
        sender.send_changes(TAG, tmp_path, copyback.changes(tmp_path, tmp_path / "none"))
        sender.finish()


@contextmanager
def agent(path: Path, host: Path) -> Iterator[None]:
    """An agent's socket with the host behind it, for one client."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, CopyBack({TAG: host}) as target:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                while packet := connection.recv(wire.MAX_MESSAGE_BYTES):
                    connection.send(wire.pack({"event": "lost"}))
                    connection.send(wire.pack(target.handle(wire.unpack(packet))))

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


def test_copy_back_finds_its_layers_by_tag_and_says_what_failed(source: Path, tmp_path: Path) -> None:
    for name in (f"{TAG}/up", f"{TAG}/low", "not a tag"):
        (tmp_path / "mnt" / name).mkdir(parents=True)
    (tmp_path / f"mnt/{TAG}/up/file").write_text("content")
    with agent(tmp_path / "first", source):
        report = copyback.copy_back(tmp_path / "mnt", str(tmp_path / "first"))
    assert (report.files, report.problems, (source / "file").read_text()) == (1, [], "content")
    (source / "file").unlink()
    (source / "file").mkdir()
    (tmp_path / f"mnt/{TAG}/up/later").touch()
    with agent(tmp_path / "second", source), pytest.raises(GuestError, match=r"file: Is a directory\n.*hint"):
        copyback.copy_back(tmp_path / "mnt", str(tmp_path / "second"))
    assert sorted(os.listdir(source)) == ["file", "later"]


# -- the server without a kernel ------------------------------------------------------------------------------------------------


class Client:
    """Asks a server as the kernel does."""

    def __init__(self, server: FileServer, tag: int = TAG) -> None:
        self.server, self.tag, self.unique = server, tag, 0

    def ask(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        self.unique += 1
        answer = self.server.handle(self.tag, request(opcode, node, body, unique=self.unique))
        assert answer is not None
        length, code, unique = struct.unpack_from("<IiQ", answer)
        assert (length, unique) == (len(answer), self.unique)
        if code:
            raise OSError(-code, os.strerror(-code))
        return answer[16:]

    def look(self, node: int, *names: str) -> int:
        """Node of a path below a node."""
        for name in names:
            node = int.from_bytes(self.ask(Opcode.LOOKUP, node, os.fsencode(name) + b"\0")[:8], "little")
        return node

    def open(self, node: int, flags: int = os.O_RDONLY) -> bytes:
        return self.ask(Opcode.OPEN, node, struct.pack("<II", flags, 0))

    def read(self, node: int, offset: int = 0, size: int = 4096, opcode: int = Opcode.READ) -> bytes:
        return self.ask(opcode, node, struct.pack("<QQIIQII", node, offset, size, 0, 0, 0, 0))


def request(opcode: int, node: int, body: bytes, unique: int = 1) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


@pytest.fixture
def client(source: Path) -> Iterator[Client]:
    with FileServer({TAG: source}, open_files=4) as server:
        yield Client(server)


def refused(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == number


def test_links_are_never_followed(source: Path, tmp_path: Path, client: Client) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    (source / "link").symlink_to("../outside")
    link = client.look(1, "link")
    assert client.ask(Opcode.READLINK, link) == b"../outside"
    refused(errno.ENOTDIR, lambda: client.look(link, "file"))
    for name in (b"..", b".", b"", b"link/file", b"a\0b"):
        refused(errno.EINVAL, partial(client.ask, Opcode.LOOKUP, 1, name + b"\0"))


def test_folder_swapped_for_a_link_leads_nowhere(source: Path, tmp_path: Path, client: Client) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    (source / "folder").mkdir()
    (source / "folder/file").write_text("own")
    folder = client.look(1, "folder")
    (source / "folder").rename(source / "moved")
    (source / "folder").symlink_to("../outside")
    # Whether the server has the old folder open still or not, nothing of the other is seen.
    for _ in range(2):
        refused(errno.ESTALE, lambda: client.read(client.look(folder, "file")))


def test_replaced_file_is_stale_and_the_new_one_found(source: Path, client: Client) -> None:
    (source / "file").write_text("old")
    old = client.look(1, "file")
    (source / "other").write_text("new content")
    (source / "other").rename(source / "file")
    refused(errno.ESTALE, lambda: client.open(old))
    new = client.look(1, "file")
    assert new != old and client.read(new) == b"new content"


def test_nodes_are_the_same_for_every_vm_and_more_than_the_open_files(source: Path, client: Client) -> None:
    names = [str(number) for number in range(300)]
    deepest = source.joinpath(*names[:50])
    deepest.mkdir(parents=True)
    (deepest / "bottom").write_text("bottom")
    for name in names:
        (source / f"file {name}").write_text(name)
    nodes = {name: client.look(1, f"file {name}") for name in names}
    bottom = client.look(1, *names[:50], "bottom")
    before = len(os.listdir("/proc/self/fd"))
    clone = Client(client.server)
    for _ in range(2):
        for name, node in nodes.items():
            assert clone.look(1, f"file {name}") == node
            assert clone.read(node) == name.encode()
        assert clone.read(bottom) == b"bottom"
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_listings_go_on_where_they_ended(source: Path, client: Client) -> None:
    for number in range(500):
        (source / f"{number}").touch()
    for opcode, head in ((Opcode.READDIR, 0), (Opcode.READDIRPLUS, fuse_wire.ENTRY_BYTES)):
        names, offset = [], 0
        while data := client.read(1, offset, 1000, opcode):
            assert len(data) <= 1000
            while data:
                _, offset, length, _ = struct.unpack_from("<QQII", data, head)
                names.append(data[head + 24:head + 24 + length])
                data = data[head + 24 + length + -length % 8:]
            client.server._listings.clear()  # as if many others had been read meanwhile
        assert sorted(names) == sorted([b".", b"..", *(b"%d" % number for number in range(500))])
    refused(errno.EINVAL, lambda: client.read(1, 0, 10, Opcode.READDIR))


def test_refusals(source: Path, client: Client) -> None:
    (source / "file").write_text("x")
    (source / "folder").mkdir()
    os.mkfifo(source / "fifo")
    file, folder, fifo = (client.look(1, name) for name in ("file", "folder", "fifo"))
    assert client.look(1, "missing") == 0
    refused(errno.ESTALE, lambda: client.ask(Opcode.GETATTR, 99, bytes(16)))
    refused(errno.EACCES, lambda: client.open(fifo))
    refused(errno.EISDIR, lambda: client.open(folder))
    refused(errno.ENOTDIR, lambda: client.look(file, "x"))
    refused(errno.ENOTDIR, lambda: client.ask(Opcode.OPENDIR, file, bytes(8)))
    refused(errno.EROFS, lambda: client.open(file, os.O_RDWR))
    refused(errno.ENAMETOOLONG, lambda: client.look(1, "x" * 256))
    for opcode in fuse_wire.WRITING:
        refused(errno.EROFS, partial(client.ask, opcode, file, bytes(100)))
    for number in (Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.STATX, Opcode.FLUSH, 999):
        refused(errno.ENOSYS, partial(client.ask, number, file, bytes(100)))
    assert client.server.handle(TAG, request(Opcode.FORGET, file, bytes(8))) is None
    with pytest.raises(ProtocolError, match="export 8"):
        client.server.handle(8, request(Opcode.GETATTR, 1, bytes(16)))
    with FileServer({1: source, 2: source / "folder"}) as server:
        node = Client(server, 1).look(1, "file")
        refused(errno.ESTALE, lambda: Client(server, 2).open(node))
    with pytest.raises(UsageError, match="cannot be shown"):
        FileServer({1: source, 2: source / "missing"})


SECRET = b"never to be seen in a guest"


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    top = tmp_path_factory.mktemp("fuzz")
    (top / "secret").write_bytes(SECRET)
    inside = top / "inside"
    (inside / "folder/below").mkdir(parents=True)
    (inside / "folder/file").write_bytes(b"open" * 1000)
    (inside / "link").symlink_to("../secret")
    (inside / "folder link").symlink_to("..")
    os.mkfifo(inside / "fifo")
    with FileServer({TAG: inside}, open_files=4) as server:
        client = Client(server)
        for path in (["folder", "below"], ["folder", "file"], ["link"], ["folder link"], ["fifo"]):
            client.look(1, *path)
        yield client


names = st.sampled_from([b"folder", b"file", b"link", b"folder link", b"secret", b"..", b"../secret", b"fifo", b""])
reads = st.builds(lambda *values: struct.pack("<QQIIQII", *values), *(st.integers(0, (1 << bits) - 1) for bits in
                                                                   (64, 64, 32, 32, 64, 32, 32)))
bodies = st.one_of(st.binary(max_size=80), names.map(lambda name: name + b"\0"), reads, st.just(bytes(8)), st.just(bytes(40)))
requests = st.builds(request, st.one_of(st.sampled_from(list(Opcode)).map(int), st.integers(0, (1 << 32) - 1)),
                     st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1)), bodies)


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.binary(max_size=100), requests))
def test_any_bytes_are_answered_and_nothing_outside_is_read(fuzzed: Client, data: bytes) -> None:
    try:
        answer = fuzzed.server.handle(TAG, data)
    except ProtocolError:
        return
    if answer is None:
        assert int.from_bytes(data[4:8], "little") in fuzz_silent
        return
    length, code, _ = struct.unpack_from("<IiQ", answer)
    assert length == len(answer) <= fuse_wire.MAX_READ_BYTES + 16 and -512 < code <= 0 and (code == 0 or length == 16)
    assert answer[8:16] == data[8:16] and SECRET not in answer


fuzz_silent = {int(opcode) for opcode in fuse_wire.NO_REPLY}


# -- copy-back without a guest --------------------------------------------------------------------------------------------------


def send(target: CopyBack, path: str | bytes, kind: str, **fields: Any) -> dict[str, Any]:
    return target.handle({"op": "file", "id": 5, "tag": TAG, "path": path, "kind": kind} | fields)


OK = {"id": 5, "ok": True}
WHOLE = {"size": 1, "mode": 0o6644, "mtime_ns": 1_000_000_001}


def test_file_is_there_when_it_is_whole(source: Path) -> None:
    with CopyBack({TAG: source}) as target:
        assert send(target, "file", "begin") == OK
        assert send(target, "file", "data", offset=0, data=b"x") == OK
        assert not (source / "file").exists()
        assert send(target, "file", "commit", **WHOLE) == OK
        status = (source / "file").stat()
        assert (status.st_mode, status.st_mtime_ns, (source / "file").read_text()) == (0o100644, 1_000_000_001, "x")
        assert send(target, "half", "begin") == OK
        assert len(os.listdir(source)) == 2
        target.abort()
    assert os.listdir(source) == ["file"]


@pytest.mark.parametrize("path", ["../out", "a/../../out", "/out", "", ".", "a//b", "a/", b"a\0b", None, 3, "\ud800"])
@pytest.mark.parametrize("kind", ["begin", "symlink", "mkdir", "delete"])
def test_paths_outside_are_refused(source: Path, path: Any, kind: str) -> None:
    with CopyBack({TAG: source}) as target:
        assert send(target, path, kind, data=b"x", mode=0o755, mtime_ns=0)["error"] == "invalid"
        assert send(target, "ok", "mkdir", mode=0o755) == OK
        assert target.handle({"id": 5, "tag": 9, "path": "x", "kind": "mkdir"})["error"] == "invalid"
    assert os.listdir(source) == ["ok"]


def test_links_on_the_host_are_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("kept")
    with CopyBack({TAG: source}) as target:
        assert send(target, "link", "symlink", data=b"../outside", mtime_ns=0) == OK
        for path, kind in (("link/new", "begin"), ("link/new", "mkdir"), ("link/file", "delete"), ("link", "mkdir"),
                           ("link/new", "symlink")):
            answer = send(target, path, kind, data=b"x", mode=0o755, mtime_ns=0)
            assert answer["error"] == "io" and str(source / path) in answer["message"]
        assert send(target, "link", "delete") == OK
    assert (os.listdir(source), os.listdir(tmp_path / "outside")) == ([], ["file"])


def test_a_folder_of_the_host_is_not_replaced_by_a_file(source: Path) -> None:
    (source / "name").mkdir()
    (source / "name/file").touch()
    with CopyBack({TAG: source}) as target:
        assert send(target, "name", "begin") == OK
        assert "Is a directory" in send(target, "name", "commit", **WHOLE)["message"]
        assert send(target, "name", "data", offset=0, data=b"")["error"] == "invalid"
        assert send(target, "name", "symlink", data=b"x", mtime_ns=0)["error"] == "io"
        assert os.listdir(source) == ["name"]
        assert send(target, "name", "delete") == OK == send(target, "name", "delete")
        assert send(target, "gone/name", "delete") == OK
    assert os.listdir(source) == []


values = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.binary(max_size=20), st.text(max_size=10),
                   st.lists(st.integers(), max_size=2))
changes = st.fixed_dictionaries({
    "id": st.one_of(st.just(1), values), "tag": st.one_of(st.just(TAG), values),
    "path": st.one_of(st.sampled_from(["a", "a/b", "a/b/c", "l", "l/x", "../x", "/x"]), values),
    "kind": st.one_of(st.sampled_from(["begin", "data", "commit", "symlink", "mkdir", "delete"]), values)},
    optional={"data": st.one_of(st.just(b".."), values), "offset": st.one_of(st.integers(0, 100), values),
              "size": st.one_of(st.integers(0, 100), values), "mode": values, "mtime_ns": values})


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, max_size=40))
def test_any_request_is_answered_and_nothing_outside_is_touched(tmp_path_factory: pytest.TempPathFactory,
                                                               requests: list[dict[str, Any]]) -> None:
    top = tmp_path_factory.mktemp("fuzz")
    (top / "inside").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with CopyBack({TAG: top / "inside"}) as target:
        for change in requests:
            answer = target.handle(change)
            assert wire.unpack(wire.pack(answer)) == answer
            assert answer.get("ok") or isinstance(answer["message"], str)
    assert os.listdir(top) == ["inside"]
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [name for _, _, files in os.walk(top) for name in files if name.endswith(".sf-part")]
    shutil.rmtree(top)


# -- what may be shown ----------------------------------------------------------------------------------------------------------


def test_exports_are_outermost_folders(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    (tmp_path / "link").symlink_to("a")
    a = tmp_path / "a"
    assert exports_for(a, None) == exports_for(a, a) == exports_for(a, a / "b") == exports_for(a / "b", a) == [(1, a)]
    assert exports_for(tmp_path / "ab", a) == [(1, tmp_path / "ab"), (2, a)]
    assert exports_for(tmp_path / "link", a / "b") == [(1, a)]
    assert exports_for(a, Path("/usr/bin")) == [(1, a)]
    for cwd in (Path("/"), Path("/usr/lib"), Path("/proc"), tmp_path / "missing"):
        with pytest.raises(UsageError, match="hint"):
            exports_for(cwd, None)


def test_system_folders() -> None:
    for path in ("/", "/home", "/usr/share/x", "/etc", "/lib64", "/libx32/y", "/run/sfparallel", "/var", "/var/lib", "/dev/shm",
                 "/proc/1", "/sys", "/boot/x", "/sbin", "/bin"):
        assert is_system_folder(Path(path)), path
    for path in ("/root", "/tmp", "/home/me", "/srv", "/var/tmp/x", "/var/lib/jenkins/job", "/dev/shm/x", "/usr/src/x",
                 "/run/media/me/disk", "/mnt", "/opt/x", "/data", "/library"):
        assert not is_system_folder(Path(path)), path
