"""Copy-back: what a program changed in an overlay is on the host afterwards; against a real overlay, and without a guest."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfparallel import wire
from sfparallel.errors import GuestError
from sfparallel.runtime import copyback
from sfparallel.vmm.copy_back import CopyBack
from sfparallel.vmm.rank_files import RankFiles
from tests.host_folders import TAG, make_tree, mounted, needs_kernel, snapshot
from tests.host_folders import source_fixture as source_fixture


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
    with here, pytest.raises(GuestError, match="the guest agent ended"):
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
    "path": st.one_of(st.sampled_from(["a", "a/b", b"a", b"a/b/c", b"l", "l/x", "../x", "/x", "x/" * 40000, b"y" * 300]), values),
    "kind": st.one_of(st.sampled_from(["begin", "data", "commit", "symlink", "mkdir", "delete"]), values)},
    optional={"data": st.one_of(st.just(b".."), values), "offset": st.one_of(st.integers(0, 100), values),
              "size": st.one_of(st.integers(0, 100), values), "mode": values, "mtime_ns": values})


def _check_answer(answer: dict[str, Any]) -> None:
    assert wire.unpack(wire.pack(answer)) == answer
    assert answer.get("ok") or (isinstance(answer["message"], str) and len(answer["message"]) < 5000)


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, max_size=40))
def test_any_request_is_answered_and_nothing_outside_is_touched(tmp_path_factory: pytest.TempPathFactory,
                                                               requests: list[dict[str, Any]]) -> None:
    top = tmp_path_factory.mktemp("fuzz")
    (top / "inside").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with CopyBack({TAG: top / "inside"}) as target:
        for change in requests:
            _check_answer(target.handle(change))
    _check_nothing_outside(top, before)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), changes), max_size=40))
def test_any_request_of_ranks_is_answered_too(tmp_path_factory: pytest.TempPathFactory,
                                              requests: list[tuple[int, dict[str, Any]]]) -> None:
    top = tmp_path_factory.mktemp("fuzz")
    (top / "inside").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    target = RankFiles({TAG: top / "inside"})
    for rank, change in requests:
        _check_answer(target.handle(rank, change))
        for other, (tag, path) in target._written:
            assert (tag, other >= 0) == (TAG, True) and os.path.lexists(os.path.join(os.fsencode(top / "inside"), path))
    assert all(len(rank.digests) <= CopyBack.TRANSFERS for rank in target._ranks.values())
    target.close()
    _check_nothing_outside(top, before)


def _check_nothing_outside(top: Path, descriptors_before: int) -> None:
    assert os.listdir(top) == ["inside"]
    assert len(os.listdir("/proc/self/fd")) == descriptors_before
    assert not [name for _, _, files in os.walk(top) for name in files if name.endswith(".sf-part")]
    shutil.rmtree(top)


# -- bounds ---------------------------------------------------------------------------------------------------------------------


def test_transfers_and_problems_are_bounded(source: Path) -> None:
    with CopyBack({TAG: source}) as target:
        answers = [send(target, f"file {number}", "begin") for number in range(100)]
        assert answers.count(OK) == CopyBack.TRANSFERS == len(os.listdir(source))
        assert answers[-1]["error"] == "invalid" and "at a time" in answers[-1]["message"]
        for number in range(2 * CopyBack.PROBLEMS):
            assert send(target, f"none/{number}/" + "x/" * 10000 + "x", "mkdir", mode=0o755)["error"] == "io"
        assert len(target.problems) == CopyBack.PROBLEMS and max(map(len, target.problems)) < 2000


def test_what_ranks_could_not_write_is_not_remembered(source: Path) -> None:
    files = RankFiles({TAG: source})
    try:
        for number in range(1000):
            request = {"id": 1, "tag": TAG, "path": f"missing/{number}".encode(), "kind": "begin"}
            assert files.handle(1, request)["error"] == "io"
            assert files.handle(1, request | {"kind": "symlink", "data": b"x", "mtime_ns": 0})["error"] == "io"
            ok = {"id": 1, "tag": TAG, "path": f"{number}".encode()}
            assert files.handle(2, ok | {"kind": "begin"}) == {"id": 1, "ok": True}
            assert files.handle(2, ok | {"kind": "data", "data": None, "offset": 0})["error"] == "invalid"
        assert (len(files._written), len(files._ranks[2].digests), os.listdir(source)) == (0, 0, [])
        # Another rank's good file is no conflict with one that was never written.
        (source / "missing").mkdir()
        good = {"id": 1, "tag": TAG, "path": b"missing/1", "kind": "mkdir", "mode": 0o755}
        assert files.handle(0, good) == {"id": 1, "ok": True}
    finally:
        files.close()


def test_files_of_ranks_are_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankFiles, "FILES", 10)
    files = RankFiles({TAG: source})
    folder = {"id": 1, "tag": TAG, "kind": "mkdir", "mode": 0o755}
    answers = [files.handle(0, folder | {"path": b"%d" % number}) for number in range(20)]
    files.close()
    assert [answer.get("ok", answer.get("error")) for answer in answers] == [True] * 10 + ["io"] * 10


def test_a_path_is_one_file_however_it_was_sent(source: Path) -> None:
    files = RankFiles({TAG: source})
    link = {"id": 1, "tag": TAG, "kind": "symlink", "mtime_ns": 0}
    assert files.handle(0, link | {"path": b"link", "data": b"a"}) == {"id": 1, "ok": True}
    assert files.handle(1, link | {"path": "link", "data": b"b"})["error"] == "conflict"
    files.close()
    assert os.readlink(source / "link") == "a"
