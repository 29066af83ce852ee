"""Files that clones wrote, brought back. On the double all "clones" share one file system, so each works in a folder of its own
below which the region's root is looked up; the logic of comparing, sending and writing is tested on two folders."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from sfparallel.errors import CollectConflict, UsageError
from sfparallel.runtime.clone_messages import FileNote
from sfparallel.runtime.collect import Collector, check_patterns


class Tree:
    """A parent's folder, and copies of it that stand for its clones' private views."""

    def __init__(self, folder: Path, patterns: Sequence[str]) -> None:
        self.parent = folder / "parent"
        self.parent.mkdir(exist_ok=True)
        self.collector = Collector(patterns, self.parent)
        self._folder = folder

    def clone(self, rank: int, files: dict[str, bytes]) -> None:
        """Run "fn" in a clone, and send what changed."""
        view = self._folder / f"clone{rank}"
        shutil.copytree(self.parent, view, copy_function=_link)
        for path, content in files.items():
            target = view / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(content)
            target.chmod(0o750)
        clones = copy.copy(self.collector)
        clones._root, clones._before = view, dict(clones._before)
        descriptions, contents = clones.changed()
        notes = [FileNote(os.fsdecode(each["path"]), each["mode"]) for each in descriptions]
        assert self.collector.unwanted(notes) is None
        self.collector.receive(rank, notes, [memoryview(bytes(content)) for content in contents])

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.parent)): path.read_bytes() for path in self.parent.rglob("*") if path.is_file()}


def _link(source: str, target: str) -> None:
    os.link(source, target)  # same inode and times, as in a clone


def test_new_and_changed_files_come_back(tmp_path: Path) -> None:
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent" / "out" / "old.png").write_bytes(b"old")
    (tmp_path / "parent" / "out" / "same.png").write_bytes(b"same")
    tree = Tree(tmp_path, ["out/*.png", "deep/**/*.txt"])
    tree.clone(0, {"out/0.png": b"zero", "out/0.jpg": b"not asked for", "out/old.png": b"new"})
    tree.clone(1, {"out/1.png": b"1" * 200_000, "deep/a/b/c.txt": b"", "out/empty.png": b""})
    assert "out/0.png" not in tree.files()
    tree.collector.write()
    assert tree.files() == {"out/0.png": b"zero", "out/1.png": b"1" * 200_000, "out/old.png": b"new", "out/same.png": b"same",
                            "deep/a/b/c.txt": b"", "out/empty.png": b""}
    assert (tree.parent / "out/0.png").stat().st_mode & 0o777 == 0o750


def test_a_conflict_names_both_ranks_and_writes_neither(tmp_path: Path) -> None:
    tree = Tree(tmp_path, ["*"])
    tree.clone(2, {"x": b"two", "only2": b"2"})
    tree.clone(1, {"x": b"one"})
    tree.clone(0, {"x": b"zero"})
    with pytest.raises(CollectConflict, match="ranks 1 and 2 both wrote 'x'") as caught:
        tree.collector.write()
    assert (caught.value.path, caught.value.ranks) == ("x", (1, 2))
    assert tree.files() == {"only2": b"2"}


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    tree = Tree(tmp_path, ["*"])
    name = os.fsdecode(b"caf\xe9")
    tree.clone(0, {name: b"x"})
    tree.collector.write()
    assert tree.files() == {name: b"x"}


def test_paths_outside_are_refused(tmp_path: Path) -> None:
    assert check_patterns("a/**/*.png") == ("a/**/*.png",)
    assert check_patterns(["a", "b*"]) == ("a", "b*")
    for bad in ("/tmp/*", "../x", "a/../../x", "", ["a", "/b"]):
        with pytest.raises(UsageError):
            check_patterns(bad)
    tree = Tree(tmp_path, ["*", "out/*.png"])
    for path in ("/tmp/evil", "../evil", "out/evil.txt", "out/more/evil.png", ".bashrc"):
        assert tree.collector.unwanted([FileNote("out/good.png", 0o600), FileNote(path, 0o600)]) == path


def test_a_file_that_cannot_be_written_does_not_keep_the_others(tmp_path: Path) -> None:
    """Of two ranks, one may have made a folder where the other has a file."""
    tree = Tree(tmp_path, ["**"])
    tree.clone(0, {"a": b"file", "z": b"other"})
    tree.collector.receive(1, [FileNote("a/b", 0o600), FileNote("c" * 250, 0o600)], [memoryview(b"x"), memoryview(b"y")])
    with pytest.raises(OSError, match="a") as caught:
        tree.collector.write()
    assert "rank 1" in caught.value.__notes__[0]
    assert tree.files() == {"a": b"file", "z": b"other"}


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    tree = Tree(tmp_path, ["*"])
    tree.clone(0, {"a": b"x"})
    (tree.parent / "a").mkdir()
    (tree.parent / "a" / "in the way").touch()
    with pytest.raises(OSError):
        tree.collector.write()
    assert set(tree.files()) == {"a/in the way"}
