"""collect= of maps and executors, on the double. Each of its "clones" has a private copy of the folder here, as those of VMs do:
a tmpfs over it in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest

import sfparallel as sf
from sfparallel import native
from sfparallel.runtime.here import HERE
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture

pytestmark = pytest.mark.needs("root")


@pytest.fixture(name="folder")
def folder_fixture(double: Doubles, tmp_path: Path) -> Iterator[Path]:
    """The current folder, of which each clone has a copy of its own, empty at first."""

    def own_files(rank: int) -> None:
        native.mount_private_tmpfs(tmp_path, size_bytes=16 << 20)
        os.chdir(tmp_path)

    sf.on_clone(own_files)
    with contextlib.chdir(tmp_path):
        yield tmp_path
    HERE.hooks.remove(own_files)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(k: int) -> int:
    os.makedirs("out", exist_ok=True)
    Path(f"out/{k}.txt").write_text(f"item {k}" * (20_000 if k == 3 else 1))
    Path("scratch").write_text("private")
    return k


EXPECTED = {f"out/{k}.txt": f"item {k}" * (20_000 if k == 3 else 1) for k in range(9)}


@pytest.mark.parametrize("n", [1, 3])
def test_files_of_a_map_come_back(folder: Path, n: int) -> None:
    assert sf.parallel_map(write, range(9), n=n, collect="out/*.txt") == list(range(9))
    assert contents(folder) == EXPECTED


@pytest.mark.parametrize("n", [1, 3])
def test_a_file_is_there_before_its_result(folder: Path, n: int) -> None:
    for k in sf.parallel_imap(write, range(9), n=n, collect=["out/*.txt"]):
        assert contents(folder).get(f"out/{k}.txt") == EXPECTED[f"out/{k}.txt"]
    assert contents(folder) == EXPECTED


def test_a_file_is_there_before_its_future_is_done(folder: Path) -> None:
    with sf.Executor(2, collect="out/*.txt") as executor:
        for future in as_completed([executor.submit(write, k) for k in range(9)]):
            k = future.result()
            assert contents(folder).get(f"out/{k}.txt") == EXPECTED[f"out/{k}.txt"]
    assert contents(folder) == EXPECTED


def collide(k: int) -> int:
    if k in (2, 5):
        Path("same.txt").write_text(f"{k}")
    Path(f"{k}.txt").write_text(f"{k}")
    return k


@pytest.mark.parametrize("n", [1, 2, 6])
def test_items_that_write_one_file_conflict_whoever_has_them(folder: Path, n: int) -> None:
    """With one clone the second would replace the first, with several it would not: so it is an error in any case."""
    with pytest.raises(sf.CollectConflict, match=r"items 2 and 5 both wrote 'same.txt'; it was not collected") as caught:
        sf.parallel_map(collide, range(6), n=n, chunksize=1, collect="*.txt")
    assert (caught.value.path, caught.value.ranks, caught.value.results) == ("same.txt", (2, 5), {k: k for k in range(6)})
    assert contents(folder) == {f"{k}.txt": str(k) for k in range(6)}


def test_of_tasks_the_first_one_stays(folder: Path) -> None:
    with sf.Executor(1, collect="*.txt") as executor:
        futures = [executor.submit(collide, k) for k in range(6)]
        assert [future.result() for future in futures[:5]] == list(range(5))
        with pytest.raises(sf.CollectConflict, match=r"tasks 2 and 5 both wrote 'same.txt'; that of task 2 was collected"):
            futures[5].result()
    assert contents(folder) == {"same.txt": "2", **{f"{k}.txt": str(k) for k in range(6)}}
    returned = list(sf.parallel_imap(collide, range(6), n=1, collect="*.txt", on_error="return"))
    assert [type(each) for each in returned] == [int] * 5 + [sf.CollectConflict]


def half(k: int) -> int:
    Path(f"{k}.txt").write_text(f"{k}")
    if k % 2:
        raise ValueError(k)
    return k


def test_files_of_items_that_failed_are_nobodys(folder: Path) -> None:
    results: list[Any] = sf.parallel_map(half, range(6), n=1, collect="*.txt", on_error="return")
    assert [result for result in results if isinstance(result, int)] == [0, 2, 4]
    assert contents(folder) == {"0.txt": "0", "2.txt": "2", "4.txt": "4"}


def test_what_cannot_be_written_is_the_error_of_its_task(folder: Path) -> None:
    (folder / "out").touch()
    with sf.Executor(1, collect="out/*.txt") as executor:
        with pytest.raises(FileExistsError) as caught:
            executor.submit(write, 7).result()
        assert "while 'out/7.txt' of task 0 was collected" in caught.value.__notes__
        assert executor.submit(abs, -1).result() == 1


def test_globs_are_checked_at_once(double: Doubles) -> None:
    for call in (lambda: sf.parallel_map(abs, [1], collect="/tmp/*"), lambda: sf.parallel_imap(abs, [1], collect="../x"),
                 lambda: sf.Executor(1, collect="")):
        with pytest.raises(sf.UsageError, match="collect="):
            call()
    assert not double.lines, "no clone was made"
