"""What is in the cache folder: `sf df` tells it, `sf clean` and `sf image rm` remove it; nobody takes from a job what it uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfparallel.config import CACHE, cache_folder
from sfparallel.errors import StateError, UsageError
from sfparallel.vmm import cache, image, locks
from tests.conftest import HANG_S, Sfrun

Sf = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with two images, of which one was replaced, a template of each, a data image, and litter."""
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "cache"))
    for name, key in (("chem", "a" * 64), ("chem", "b" * 64), ("other", "c" * 64)):
        root = tmp_path / "cache" / "images" / f"{name}-{key[:12]}"
        root.mkdir(parents=True)
        (root / "root.sqfs").write_bytes(b"x" * 5000)
        recipe = {"name": name, "suite": "bookworm", "packages": ["less"], "pip": []}
        (root / "manifest.json").write_text(json.dumps({"key": key, "recipe": recipe, "python_magic": "00"}))
        (root.parent / f"{name}.json").write_text(json.dumps({"folder": root.name}))
    for name, key in (("1111", "b" * 64), ("2222", "c" * 64), ("3333", "d" * 64)):
        place = tmp_path / "cache" / "templates" / name
        place.mkdir(parents=True)
        (place / "manifest.json").write_text(
            json.dumps({"image": key, "memory_bytes": 1 << 30, "cpus": 2, "accelerator": "tcg"}))
        with open(place / "memory", "wb") as memory:
            memory.truncate(1 << 30)
    for name in ("data/ab-cd.sqfs", "data/ab.lock", "initrd/77.img", "templates/.1111-x", "images/.lock-chem"):
        path = tmp_path / "cache" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "cache" / "data" / "ab.source").write_text("/data/genomes")
    return tmp_path / "cache"


@contextmanager
def used(path: Path) -> Iterator[None]:
    """Another process uses it."""
    code = ("import sys, pathlib; from sfparallel.vmm import locks; "
            "print(locks.use(pathlib.Path(sys.argv[1])), flush=True); input()")
    argv = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "True\n"
        yield
        process.communicate("\n")


def names() -> set[str]:
    return {entry.name for entry in cache.entries()}


def test_everything_is_listed_with_its_size(folder: Path, sf: Sf) -> None:
    rows = {row["name"]: row for row in json.loads(sf("df", "--json").stdout)}
    assert {(row["kind"], name) for name, row in rows.items()} == {
        ("image", "chem"), ("image", f"chem-{'a' * 12}"), ("image", "other"), ("template", "1111"), ("template", "2222"),
        ("template", "3333"), ("data", "ab-cd"), ("initramfs", "77"), ("unfinished", ".1111-x"),
    }  # fmt: skip
    assert rows[f"chem-{'a' * 12}"]["content"].startswith("replaced; ") and "less" in rows["chem"]["content"]
    assert rows["1111"]["content"] == "of image chem, 1024 MiB, processors: 2, tcg"
    assert rows["3333"]["content"].startswith("of image dddddddddddd,") and rows["ab-cd"]["content"] == "of /data/genomes"
    assert rows["1111"]["bytes"] < 1 << 20, "holes take no room"
    assert not any(row["in_use"] for row in rows.values())
    *table, total = sf("df").stdout.splitlines()
    assert len(table) == 10 and total.startswith("total: 0 MiB in ") and "template: 0" in total


def test_clean_keeps_what_is_used_and_says_so(folder: Path, sf: Sf) -> None:
    with used(folder / "templates" / "2222" / "manifest.json"), used(folder / "images" / f"other-{'c' * 12}" / "root.sqfs"):
        lines = sf("clean").stdout.splitlines()
        assert sorted(lines) == ["kept template 2222: it is in use", "removed template 1111", "removed template 3333",
                                 "removed unfinished .1111-x"]  # fmt: skip
        lines = sf("clean", "--all").stdout.splitlines()
        assert {line for line in lines if line.startswith("kept")} == {
            "kept template 2222: it is in use", "kept image other: it is in use"}  # fmt: skip
        assert names() == {"2222", "other"}
        assert image.find("other").name == "other"
    sf("clean", "--all")
    assert names() == set() and not list(cache_folder().glob("*/.*")) and not list(cache_folder().glob("*/*.*"))


@pytest.mark.parametrize(("unfinished", "lock"), [
    ("templates/.1111-x", "templates/1111.lock"), ("data/ab-cd.part", "data/ab.lock"),
    ("images/.build-my-chem-aaaa", "images/.lock-my-chem-aaaa"), ("initrd/.abcd", "initrd/.abcd"),
])  # fmt: skip
def test_clean_leaves_what_somebody_builds(folder: Path, unfinished: str, lock: str) -> None:
    (folder / unfinished).write_bytes(b"x")
    (folder / lock).touch()
    with used(folder / lock):
        assert f"kept unfinished {Path(unfinished).name}: it is in use" in list(cache.clean(everything=True))
        assert (folder / unfinished).exists() and (folder / lock).exists()
    assert f"removed unfinished {Path(unfinished).name}" in list(cache.clean(everything=True))
    assert not (folder / unfinished).exists() and not (folder / lock).exists()


def test_clean_by_name_takes_an_image_with_its_templates(folder: Path, sf: Sf) -> None:
    for name in ("templates/.doomed-3333", f"images/.doomed-chem-{'b' * 12}"):  # left by one who was killed
        (folder / name / "deep").mkdir(parents=True)
    done = sf("clean", "chem", "3333")
    assert sorted(done.stdout.splitlines()) == ["removed image chem", "removed template 1111", "removed template 3333"]
    assert "2222" in names() and "other" in names() and "chem" not in {image.name for image in image.list_images()}
    done = sf("clean", "othr")
    assert done.returncode == 2 and "did you mean other?" in done.stderr
    assert sf("clean", "--all", "other").returncode == 2


def test_what_is_used_is_not_removed_by_name(folder: Path) -> None:
    with used(folder / "templates" / "2222" / "manifest.json"):
        with pytest.raises(StateError, match="in use: template 2222"):
            cache.choose(["other"])
        with pytest.raises(UsageError, match="'nope'"):
            cache.choose(["nope"])
        assert [entry.name for entry in cache.choose(["chem"])] == ["chem", "1111"]
    with used(folder / "images" / f"chem-{'a' * 12}" / "root.sqfs"):
        with pytest.raises(StateError, match="a job uses the image 'chem'"):
            image.remove("chem")
        assert image.find("chem")
        image.remove("other")
    image.remove("chem")
    assert not list(folder.glob("images/[!.]*"))


def test_who_comes_too_late_learns_it(folder: Path) -> None:
    """A job that has found a file, and locks it when it has been removed, must not go on with it."""
    path = folder / "data" / "ab-cd.sqfs"
    descriptor = os.open(path, os.O_RDONLY)
    path.unlink()
    assert not locks._is_at(descriptor, path) and not locks.use(path)
    os.close(descriptor)


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_a_job_keeps_what_it_uses(sfrun: Sfrun, sf: Sf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache folder of its own, with copies of what a job uses."""
    told = sfrun("", "-v").ok().err
    template = Path(next(line.split("template: ")[1] for line in told.splitlines() if "template: " in line))
    root = image.find().folder
    for path in (root, template):
        shutil.copytree(path, tmp_path / "cache" / path.relative_to(cache_folder()))
    shutil.copy(root.with_name("default.json"), tmp_path / "cache" / "images")
    initramfs = image.guest_half(image.find())
    (tmp_path / "cache" / "initrd").mkdir()
    shutil.copy(initramfs, tmp_path / "cache" / "initrd")
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "cache"))
    job = sfrun.start("import sfparallel as sf\nprint('up', flush=True)\ninput()\nprint(sf.parallel(n=2)(lambda: 1)())",
                      stdin=subprocess.PIPE)  # fmt: skip
    assert job.stdout and job.stdout.readline() == "up\n"
    jobs = json.loads(sf("ps", "--json").stdout)
    (listed,) = [entry for entry in jobs if entry["pid"] == job.pid]
    assert listed["image"] == "default" and listed["memory_bytes"] > 20 << 20 and "program.py" in sf("ps").stdout
    lines = sf("clean", "--all").stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("kept ") for line in lines), lines
    refused = sf("image", "rm", "default")
    assert refused.returncode == 70 and "a job uses the image 'default'" in refused.stderr
    out, err = job.communicate("\n", timeout=HANG_S)
    assert (job.returncode, out) == (0, "[1, 1]\n"), err
    assert sorted(line.split()[:2] for line in sf("clean", "--all").stdout.splitlines()) == [
        ["removed", "image"], ["removed", "initramfs"], ["removed", "template"]]  # fmt: skip
