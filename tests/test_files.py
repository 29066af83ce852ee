"""Host folders in guests: the file server with the host's own kernel as its client, and without one; what may be shown."""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel.errors import ProtocolError, UsageError
from sfparallel.vmm import fuse_wire
from sfparallel.vmm.exports import exports_for, is_system_folder
from sfparallel.vmm.files import FileServer
from sfparallel.vmm.fuse_wire import Opcode
from tests.host_folders import TAG, handle, make_tree, mounted, needs_kernel, snapshot
from tests.host_folders import source_fixture as source_fixture


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


# -- the server without a kernel ------------------------------------------------------------------------------------------------


class Client:
    """Asks a server as the kernel does."""

    def __init__(self, server: FileServer, tag: int = TAG) -> None:
        self.server, self.tag, self.unique = server, tag, 0

    def ask(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        self.unique += 1
        answer = handle(self.server, self.tag, request(opcode, node, body, unique=self.unique))
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
    assert handle(client.server, TAG, request(Opcode.FORGET, file, bytes(8))) is None
    refused(errno.ENODEV, lambda: Client(client.server, 8).ask(Opcode.GETATTR, 1, bytes(16)))
    with FileServer({1: source, 2: source / "folder"}) as server:
        node = Client(server, 1).look(1, "file")
        refused(errno.ESTALE, lambda: Client(server, 2).open(node))
    with pytest.raises(UsageError, match="cannot be shown"):
        FileServer({1: source, 2: source / "missing"})


def test_what_is_no_request_is_answered_too(source: Path, client: Client) -> None:
    """The agent counts it, and waits with the next fork until the answer is there."""
    good = request(Opcode.GETATTR, 1, bytes(16), unique=34)
    extended = good[:36] + b"\1\0" + good[38:]
    for bad in (good[:-1], good + b"x", extended, request(Opcode.WRITE, 1, bytes(1 << 20), unique=34)):
        assert handle(client.server, TAG, bad) == struct.pack("<IiQ", 16, -errno.EINVAL, 34)
    with pytest.raises(ProtocolError, match="header"):
        handle(client.server, TAG, good[:39])


# -- bounds ---------------------------------------------------------------------------------------------------------------------


def test_nodes_are_bounded_and_what_was_forgotten_is_found_again(source: Path) -> None:
    (source / "folder/below").mkdir(parents=True)
    for number in range(300):
        (source / f"folder/below/{number}").write_text(str(number))
    with FileServer({TAG: source}, open_files=8, nodes=50) as server:
        client = Client(server)
        below = client.look(1, "folder", "below")
        first = client.look(below, "0")
        for number in range(300):
            assert client.read(client.look(below, str(number))) == str(number).encode()
        assert server.nodes() == 50
        refused(errno.ESTALE, lambda: client.read(first))
        assert client.read(client.look(below, "0")) == b"0"  # as the kernel does after ESTALE
        for number in range(10000):
            client.look(below, f"missing {number}")
        assert server.nodes() == 50


def test_folders_alone_are_bounded_too(source: Path) -> None:
    for number in range(300):
        (source / str(number)).mkdir()
    with FileServer({TAG: source}, nodes=50) as server:
        for number in range(300):
            assert Client(server).look(1, str(number))
        assert server.nodes() == 50


def test_listings_are_bounded_by_their_names(source: Path) -> None:
    for folder in range(20):
        (source / str(folder)).mkdir()
        for number in range(100):
            (source / f"{folder}/{number}").touch()
    with FileServer({TAG: source}, listed=500) as server:
        client = Client(server)
        for folder in range(20):
            client.read(client.look(1, str(folder)), opcode=Opcode.READDIR)
            assert sum(map(len, server._listings.values())) <= 500
        assert len(server._listings) == 4
        client.read(1, opcode=Opcode.READDIR)
        assert client.read(1, 20, opcode=Opcode.READDIR)  # the one in use stays, whatever its size


def test_warnings_of_replaced_files_end(source: Path, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    (source / "file").write_text("old")
    old = client.look(1, "file")
    (source / "file").unlink()
    (source / "file").mkdir()
    for _ in range(1000):
        refused(errno.ESTALE, lambda: client.open(old))
    assert len(caplog.records) == FileServer.WARNINGS and "later ones are not reported" in caplog.records[-1].getMessage()


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
edges = st.builds(lambda offset, size: struct.pack("<QQIIQII", 0, offset, size, 0, 0, 0, 0),
                  st.sampled_from([0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]), st.sampled_from([0, 1, 4096, (1 << 32) - 1]))
bodies = st.one_of(edges, reads, st.binary(max_size=80), names.map(lambda name: name + b"\0"), st.just(bytes(8)))
requests = st.builds(request, st.one_of(st.sampled_from(list(Opcode)).map(int), st.integers(0, (1 << 32) - 1)),
                     st.one_of(st.integers(0, 9), st.integers(0, (1 << 64) - 1)), bodies)


damaged = st.builds(lambda data, cut, extra: data[:len(data) - cut] + extra, requests, st.integers(0, 40), st.binary(max_size=9))


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.binary(max_size=100), requests, damaged))
def test_any_bytes_are_answered_and_nothing_outside_is_read(fuzzed: Client, data: bytes) -> None:
    if len(data) < 40:
        with pytest.raises(ProtocolError):
            handle(fuzzed.server, TAG, data)
        return
    answer = handle(fuzzed.server, TAG, data)
    if answer is None:
        assert int.from_bytes(data[4:8], "little") in fuzz_silent
        return
    length, code, _ = struct.unpack_from("<IiQ", answer)
    assert length == len(answer) <= fuse_wire.MAX_READ_BYTES + 16 and -512 < code <= 0 and (code == 0 or length == 16)
    assert answer[8:16] == data[8:16] and SECRET not in answer


fuzz_silent = {int(opcode) for opcode in fuse_wire.NO_REPLY}


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
