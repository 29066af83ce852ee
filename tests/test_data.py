"""Images of `--data` folders: made once, from what is there, by one job at a time."""

from __future__ import annotations

import asyncio
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfparallel.errors import EnvironmentProblem, UsageError
from sfparallel.vmm import data
from sfparallel.vmm.data import data_image, data_image_in_time
from sfparallel.vmm.locks import taken
from sfparallel.vmm.waiting import while_it_moves
from tests.conftest import PATIENCE
from tests.stuck_folder import stuck_folder

pytestmark = pytest.mark.needs("squashfs")

HANG_S = 60.0 * PATIENCE

USER = """
import sys
from pathlib import Path
from sfparallel.vmm.data import data_image
print(data_image(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr)), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data é"
    (folder / "sub/below").mkdir(parents=True)
    (folder / "big").write_bytes(os.urandom(3 << 20))
    (folder / "sub/below/text").write_text("text" * 10_000)
    (folder / os.fsdecode(b"odd \xff")).touch()
    (folder / "link").symlink_to("sub/below/text")
    return folder


@pytest.fixture
def user(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another job that uses the folder."""
    with subprocess.Popen([sys.executable, "-c", USER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        yield job


def use_and_end(folder: Path) -> Path:
    return Path(subprocess.run([sys.executable, "-c", USER, folder], input="", capture_output=True, text=True,
                               check=True).stdout.strip())


def test_image_holds_the_folder_and_is_made_once(folder: Path, tmp_path: Path, cache: Path) -> None:
    lines: list[str] = []
    image = data_image(folder, lines.append)
    assert len(lines) == 1 and str(folder) in lines[0]
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", tmp_path / "out", image], check=True, capture_output=True)
    subprocess.run(["diff", "-r", "--no-dereference", folder, tmp_path / "out"], check=True)
    assert image.stat().st_size < (3 << 20) + 100_000
    assert data_image(folder, lines.append) == image and len(lines) == 1
    assert sorted(path.suffix for path in (cache / "data").iterdir()) == [".lock", ".source", ".sqfs"]


def test_changed_folder_has_a_new_image_and_the_unused_one_goes(folder: Path, cache: Path) -> None:
    old = use_and_end(folder)
    (folder / "sub/below/text").write_text("changed")
    new = data_image(folder, lambda _: None)
    assert new != old and not old.exists() and new.exists()


def test_image_in_use_stays(folder: Path, user: subprocess.Popen[str]) -> None:
    assert user.stdout is not None
    old = Path(user.stdout.readline().strip())
    (folder / "new").touch()
    assert use_and_end(folder) != old and old.exists()
    user.communicate()
    (folder / "newer").touch()
    use_and_end(folder)
    assert not old.exists()


def test_image_of_another_folder_stays(folder: Path, tmp_path: Path) -> None:
    first = use_and_end(folder)
    use_and_end(folder / "sub")
    assert first.exists()


def test_jobs_at_the_same_time_make_one_image(folder: Path) -> None:
    jobs = [subprocess.Popen([sys.executable, "-c", USER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [job.communicate() for job in jobs]
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0].endswith(".sqfs\n")
    assert sum("making an image" in lines for _, lines in outputs) == 1


def test_an_image_removed_just_before_it_is_used_is_made_again(folder: Path) -> None:
    """By `sf clean --all`, which holds its lock while it removes it."""
    image, again = use_and_end(folder), queue.SimpleQueue[Path]()
    number = f":{image.stat().st_ino} "
    with taken(image) as ours:
        assert ours
        job = threading.Thread(target=lambda: again.put(data_image(folder, lambda _: None)), daemon=True)
        job.start()
        deadline = time.monotonic() + 60
        while not any("->" in line and number in line for line in Path("/proc/locks").read_text().splitlines()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        image.unlink()
    made = again.get(timeout=60)
    assert made == image and made.exists()


@pytest.mark.needs("root")
def test_full_disk(folder: Path, cache: Path) -> None:
    cache.mkdir()
    script = 'mount -t tmpfs -o size=1m tmpfs "$SF_CACHE" && "$@"; ls "$SF_CACHE/data"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", USER, folder], input="",
                          capture_output=True, text=True, check=True)
    assert "needs 3 MB" in done.stderr and "hint: free some space" in done.stderr
    assert ".sqfs" not in done.stdout and ".part" not in done.stdout


def test_folder_that_changes_all_the_time(folder: Path) -> None:
    def change(line: str) -> None:
        (folder / "big").write_bytes(os.urandom(100))

    with pytest.raises(EnvironmentProblem, match="changed while"):
        data_image(folder, change)


def test_no_folder_and_the_cache_itself(folder: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        data_image(folder / "big", lambda _: None)
    with pytest.raises(UsageError, match="cache folder"):
        data_image(cache.parent, lambda _: None)
    cache.write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="SF_CACHE"):
        data_image(folder, lambda _: None)


@pytest.mark.needs("fuse", "root")
def test_a_folder_whose_server_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: the walk and mksquashfs may take any time, as long as they move."""
    monkeypatch.setattr(data, "STILL_LIMIT_S", 2.0)
    (tmp_path / "served").mkdir()
    for name in ("fine", "stuck"):
        (tmp_path / "served" / name).write_text(name * 1000)
    with stuck_folder(tmp_path / "served", tmp_path / "mount") as server:
        with pytest.raises(EnvironmentProblem, match=r"--data .*mount to be made: nothing has moved for 2 s\n  hint: does"):
            asyncio.run(asyncio.wait_for(data_image_in_time(tmp_path / "mount", print), HANG_S))
        assert server.stdout and server.stdout.readline() == "stuck\n"


def test_work_that_moves_may_take_its_time() -> None:
    async def wait() -> int:
        async def work() -> int:
            for _ in range(8):
                steps.append(None)
                await asyncio.sleep(0.1)
            return len(steps)

        steps: list[None] = []
        return await while_it_moves(work(), lambda: len(steps), 0.5, "it")

    assert asyncio.run(wait()) == 8
