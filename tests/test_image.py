"""Guest images: recipes, apt sources, modules, the initramfs, and builds that are interrupted."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfparallel.errors import EnvironmentProblem, ImageBuildError, ImageMissing, UsageError
from sfparallel.vmm import cache as cache_module
from sfparallel.vmm import guest_root, image, initramfs, native_parts, subprocesses
from sfparallel.vmm.apt_sources import parse_deb822, parse_one_line, sources_for

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://example.org/debian
Suites: bookworm bookworm-updates trixie
Components: main extra
# another one, inside the stanza
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
Enabled: no
URIs: http://example.org/off
Suites: bookworm
Components: main

Types: deb
URIs: http://example.org/security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SF_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def make_image(cache: Path, name: str = "default", key: str = "0123456789abcdef") -> Path:
    """A folder that looks like a finished image."""
    folder = cache / "images" / f"{name}-{key[:12]}"
    (folder / "modules").mkdir(parents=True)
    (folder / "modules" / "order").write_text("a.ko\n")
    (folder / "modules" / "a.ko").write_bytes(b"module")
    recipe = {"name": name, "suite": "bookworm", "packages": ["less"], "pip": []}
    (folder / "manifest.json").write_text(json.dumps({"key": key, "recipe": recipe, "python_magic": "00"}))
    (cache / "images" / f"{name}.json").write_text(json.dumps({"folder": folder.name}))
    return folder


# -- apt sources -------------------------------------------------------------------------------------------------------


def test_deb822_sources() -> None:
    first, second = parse_deb822(DEB822)
    assert first.suites == ("bookworm", "bookworm-updates", "trixie")
    assert first.options == (("Signed-By", "/usr/share/keyrings/debian.gpg"),)
    assert second.uris == ("http://example.org/security",)
    assert dict(second.options)["Signed-By"].splitlines()[-1] == " abc"
    assert parse_deb822(second.deb822()) == [second]


def test_one_line_sources() -> None:
    text = """
    # deb http://example.org/no bookworm main
    deb-src http://example.org/src bookworm main
    deb [arch=amd64 signed-by=/k.gpg trusted=yes] http://example.org/debian bookworm main contrib # why
    deb http://example.org/plain bookworm-security main
    """
    first, second = parse_one_line(text)
    assert first.components == ("main", "contrib")
    assert first.options == (("Signed-By", "/k.gpg"), ("Trusted", "yes"))
    assert second.suites == ("bookworm-security",) and not second.options


def test_only_debian_of_the_suite_is_taken(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "vendor.list").write_text("deb http://example.org/vendor bookworm stable\n")
    (tmp_path / "sources.list.d" / "pg.list").write_text("deb http://example.org/pg bookworm-pgdg main\n")
    (tmp_path / "sources.list.d" / "old.list.save").write_text("deb http://example.org/save bookworm main\n")
    text = sources_for("bookworm", tmp_path)
    found = parse_deb822(text)
    assert [source.uris[0] for source in found] == ["http://example.org/debian", "http://example.org/security"]
    assert found[0].suites == ("bookworm", "bookworm-updates") and found[0].components == ("main",)
    (tmp_path / "sources.list.d" / "debian.sources").unlink()
    with pytest.raises(EnvironmentProblem, match="no apt source of Debian") as caught:
        sources_for("bookworm", tmp_path)
    assert caught.value.hint


# -- names and keys ----------------------------------------------------------------------------------------------------


def test_key_depends_on_all_that_matters() -> None:
    recipes = [
        image.Recipe(suite="bookworm"), image.Recipe(suite="trixie"),
        image.Recipe(packages=("less",)), image.Recipe(pip=("tqdm",)),
    ]  # fmt: skip
    keys = {recipe.key(sources) for recipe in recipes for sources in ("a", "b")}
    assert len(keys) == 8
    assert image.Recipe().key("a") == image.Recipe().key("a")


def test_missing_image_says_how_to_build_it(cache: Path) -> None:
    with pytest.raises(ImageMissing) as caught:
        image.find()
    assert caught.value.hint == "sf image build"
    with pytest.raises(ImageMissing, match="'blast'") as caught:
        image.find("blast")
    assert caught.value.hint == "sf image build blast"
    assert image.list_images() == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-b", "x" * 65])
def test_bad_names_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(UsageError):
        image.find(name)
    with pytest.raises(UsageError):
        image.build(image.Recipe(name), print)


def test_find_list_remove(cache: Path) -> None:
    folder = make_image(cache)
    make_image(cache, "blast")
    make_image(cache, "blast", "fedcba9876543210")  # a later build under the same name
    assert [(found.name, found.key[:4]) for found in image.list_images()] == [("blast", "fedc"), ("default", "0123")]
    found = image.find()
    assert (found.root, found.kernel) == (folder / "root.sqfs", folder / "vmlinuz")
    assert found.describe() == "bookworm, with less"
    image.remove("blast")
    assert [found.name for found in image.list_images()] == ["default"]
    assert not list((cache / "images").glob("*blast*"))
    with pytest.raises(ImageMissing):
        image.remove("blast")


def test_half_an_image_is_none(cache: Path) -> None:
    folder = make_image(cache)
    (folder / "manifest.json").write_text('{"key": "01')
    with pytest.raises(ImageMissing):
        image.find()


# -- builds ------------------------------------------------------------------------------------------------------------


def test_equal_image_is_not_built_again(cache: Path) -> None:
    recipe = image.Recipe()
    key = recipe.key(sources_for(recipe.suite))
    folder = make_image(cache, key=key)
    (cache / "images" / "default.json").unlink()
    stages: list[str] = []
    assert image.build(recipe, lambda stage, percent: stages.append(stage)).folder == folder
    assert stages == [] and image.find().folder == folder


def test_a_name_is_not_written_by_what_another_build_writes(cache: Path) -> None:
    """Of another recipe for the same name, which has another lock."""
    folder = make_image(cache)
    others = folder.with_name(".default.json.new")
    others.write_text("half")
    image._point("default", folder)
    assert image.find().folder == folder and others.read_text() == "half"
    assert not [path for path in others.parent.glob(".*") if path != others]


def test_second_builder_waits_for_the_first(cache: Path) -> None:
    recipe = image.Recipe()
    key = recipe.key(sources_for(recipe.suite))
    (cache / "images").mkdir(parents=True)
    with open(cache / "images" / f".lock-default-{key[:12]}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = "from sfparallel.vmm import image; image.build(image.Recipe(), lambda stage, percent: print(stage, flush=True))"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout
            assert other.stdout.readline().startswith("waiting for another process")
            make_image(cache, key=key)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert other.wait(60) == 0
            assert other.stdout.read() == ""


def test_clean_leaves_a_build_that_is_going_on(cache: Path) -> None:
    folder = cache / "images"
    for name in ("busy", "dead"):
        (folder / f".build-{name}" / "root").mkdir(parents=True)
    with open(folder / ".lock-busy", "w") as lock, open(folder / ".lock-dead", "w"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        removed = list(cache_module.clean(everything=False))
    assert (folder / ".build-busy" / "root").exists() and (folder / ".lock-busy").exists()
    assert not (folder / ".build-dead").exists() and "removed unfinished .build-dead" in removed


def test_missing_tool_names_its_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="mmdebstrap") as caught:
        image.build(image.Recipe(), lambda stage, percent: None)
    assert caught.value.hint == "apt install mmdebstrap squashfs-tools"


def test_an_environment_without_pip_is_told_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(EnvironmentProblem, match="has no pip") as caught:
        image.build(image.Recipe(pip=("six",)), lambda stage, percent: pytest.fail(stage))
    assert "ensurepip" in str(caught.value.hint)


@pytest.mark.needs("root")
def test_too_small_a_disk_is_told_before(cache: Path) -> None:
    (cache / "images").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20M", "tiny", str(cache / "images")], check=True)
    try:
        with pytest.raises(ImageBuildError, match="MiB of free space") as caught:
            image.build(image.Recipe(), lambda stage, percent: None)
        assert "SF_CACHE" in str(caught.value.hint)
    finally:
        subprocess.run(["umount", str(cache / "images")], check=True)


def _running_in(folder: Path) -> list[str]:
    """Processes that have a folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.needs("root")
def test_killed_build_leaves_no_image_and_no_process(cache: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of mmdebstrap; the next build clears up."""
    code = "from sfparallel.vmm import image; image.build(image.Recipe('killed'), lambda stage, _: print(stage, flush=True))"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as builder:
        assert builder.stdout
        assert builder.stdout.readline().startswith("fetch")
        deadline = time.monotonic() + 60
        # Until mmdebstrap is at work.
        while not any(list((build / "root").glob("*")) for build in (cache / "images").glob(".build-killed-*")):
            assert time.monotonic() < deadline and builder.poll() is None
            time.sleep(0.01)
        os.kill(builder.pid, signal.SIGKILL)
    while _running_in(cache) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _running_in(cache) == []
    assert image.list_images() == []
    assert list(temporary.iterdir()) == [], "temporary files are litter of the build as well"
    litter = list((cache / "images").glob(".build-*"))
    assert len(litter) == 1
    image._remove_litter()
    assert not list((cache / "images").glob(".build-*"))


def test_litter_of_a_running_build_stays(cache: Path) -> None:
    mine, free = (cache / "images" / f".build-{name}" for name in ("busy-1", "free-1"))
    for folder in (mine, free):
        (folder / "root").mkdir(parents=True)
    with open(cache / "images" / ".lock-busy-1", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        image._remove_litter()
    assert mine.exists() and not free.exists()


def test_failed_command_is_told_with_its_own_words(tmp_path: Path) -> None:
    script = "import sys; print('line one', file=sys.stderr); print('no space', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ImageBuildError) as caught:
        subprocesses.run([sys.executable, "-c", script], what="do it", error=ImageBuildError)
    text = str(caught.value)
    assert "cannot do it" in text and "exit status 3" in text and text.endswith("line one\nno space")
    with pytest.raises(EnvironmentProblem, match="cannot do it"):
        subprocesses.run([tmp_path / "nothing"], what="do it")


@pytest.mark.needs("root", "squashfs")
def test_a_disk_that_fills_up_in_the_middle_is_told(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(os.urandom(4 << 20))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        with pytest.raises(ImageBuildError, match="No space left") as caught:
            subprocesses.run(["mksquashfs", tmp_path / "content", small / "root.sqfs", "-quiet"], what="compress",
                             error=ImageBuildError)  # fmt: skip
    finally:
        subprocess.run(["umount", small], check=True)
    assert caught.value.hint and "SF_CACHE" in caught.value.hint
    script = "import sys; print('No space left on device\\n' + 'and so on\\n' * 100, file=sys.stderr); sys.exit(1)"
    with pytest.raises(ImageBuildError, match="No space left") as caught:
        subprocesses.run([sys.executable, "-c", script], what="unpack", error=ImageBuildError)
    assert caught.value.hint and "SF_CACHE" in caught.value.hint


# -- kernel modules ----------------------------------------------------------------------------------------------------


def _module_tree(folder: Path, missing: str = "") -> Path:
    (folder / "kernel").mkdir(parents=True)
    names = ["core", *(name for name in guest_root.MODULES if name not in (missing, "squashfs"))]
    for name in names:
        (folder / "kernel" / f"{name}.ko").write_text(name)
    lines = [f"kernel/{name}.ko:" + (" kernel/pvpanic-mmio.ko kernel/core.ko" if name == "fuse" else "") for name in names]
    (folder / "modules.dep").write_text("\n".join(lines) + "\n")
    (folder / "modules.builtin").write_text("kernel/fs/squashfs/squashfs.ko\n")
    return folder


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    guest_root.extract_modules(_module_tree(tmp_path / "tree"), tmp_path / "out")
    order = (tmp_path / "out" / "order").read_text().split()
    assert order.index("core.ko") < order.index("pvpanic-mmio.ko") < order.index("fuse.ko")
    assert len(order) == len(set(order)) == len(guest_root.MODULES)  # one more, and one built in
    assert (tmp_path / "out" / "fuse.ko").read_text() == "fuse"


def test_kernel_without_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageBuildError, match="overlay"):
        guest_root.extract_modules(_module_tree(tmp_path / "tree", missing="overlay"), tmp_path / "out")


# -- the initramfs -----------------------------------------------------------------------------------------------------


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """A reader of newc archives, written from the format's description."""
    stream = io.BytesIO(archive)
    found: dict[str, tuple[int, bytes]] = {}
    while True:
        head = stream.read(110)
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * i:14 + 8 * i], 16) for i in range(13)]
        name = stream.read(fields[11])[:-1].decode()
        stream.seek(-stream.tell() % 4, io.SEEK_CUR)
        data = stream.read(fields[6])
        stream.seek(-stream.tell() % 4, io.SEEK_CUR)
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data)


def test_cpio_archive() -> None:
    entries = [initramfs.Entry("init", b"program", 0o755), initramfs.Entry("a/b/c", b"x"), initramfs.Entry("a/b/d", b"")]
    found = read_cpio(initramfs.write_cpio(entries))
    assert found == {
        "a": (0o040755, b""), "a/b": (0o040755, b""), "init": (0o100755, b"program"), "a/b/c": (0o100644, b"x"),
        "a/b/d": (0o100644, b""),
    }  # fmt: skip
    assert list(found).index("a/b") < list(found).index("a/b/c")


def test_guest_half(cache: Path) -> None:
    folder = make_image(cache)
    first = image.guest_half(image.find())
    assert image.guest_half(image.find()) == first, "equal content, equal file"
    found = read_cpio(first.read_bytes())
    assert found["init"][0] == 0o100755 and found["init"][1][:4] == b"\x7fELF"
    assert found["sf/modules/a.ko"][1] == b"module"
    package = {name.removeprefix("sf/package/") for name in found if name.startswith("sf/package/")}
    assert {"errors.py", "wire.py", "bootstrap/sitecustomize.py", "runtime/__init__.py"} <= package
    assert not any(name.startswith(("vmm", "net", "cli")) for name in package), "the host half stays at home"
    assert not any(name.endswith(".pyc") for name in package), "bytecode of another Python is of no use"
    (folder / "modules" / "a.ko").write_bytes(b"another")
    assert image.guest_half(image.find()) != first


@pytest.mark.needs("image")
def test_the_initramfs_follows_from_its_sources_alone(tmp_path: Path) -> None:
    """Bytecode says of each string whether it was interned, and an interpreter interns what it comes across."""
    chosen = image.find()
    program = ("import sys; sys.argv[2:] and [sys.intern(chr(n)) for n in range(256)]; "
               "from pathlib import Path; from sfparallel.vmm.initramfs import write_initramfs; "
               f"print(write_initramfs(Path({str(chosen.modules)!r}), sys.argv[1]))")  # fmt: skip
    made = []
    for history in ([], ["much"]):
        environment = {**os.environ, "SF_CACHE": str(tmp_path / str(len(history))), "PYTHONOPTIMIZE": "1" * len(history)}
        magic = importlib.util.MAGIC_NUMBER.hex()
        argv = [sys.executable, "-c", program, magic, *history]
        ended = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        made.append(Path(ended.stdout.strip()))
    assert made[0].name == made[1].name and made[0].read_bytes() == made[1].read_bytes()
    assert any(name.endswith(".pyc") for name in read_cpio(made[0].read_bytes()))


MAKE = """#!/bin/sh
mkdir {folder}/busy || echo two at once >> {folder}/log
sleep 0.5
rmdir {folder}/busy
"""


def test_starts_at_the_same_time_build_a_part_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilers that write the same files make what is neither's."""
    for name, text in (("make", MAKE.format(folder=tmp_path)), ("part/Makefile", ""), ("part/part.c", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "make").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code = "import sys; from pathlib import Path; from sfparallel.vmm import initramfs; initramfs.build(Path(sys.argv[1]))"
    starts = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "part" / "part"]) for _ in range(4)]
    assert [start.wait() for start in starts] == [0] * 4
    assert not (tmp_path / "log").exists()


def test_an_initramfs_that_cannot_be_written_leaves_nothing(cache: Path) -> None:
    folder = make_image(cache)
    initramfs.build(native_parts.AGENT)
    initramfs.build(native_parts.CPU_CHECK)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match=r"cannot write(.|\n)*SF_CACHE"):
            initramfs.write_initramfs(folder / "modules", "00")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((cache / "initrd").iterdir()) == []


def test_bytecode_is_ready_for_a_guest_with_our_python(cache: Path) -> None:
    import importlib.util
    import marshal

    folder = make_image(cache)
    found = read_cpio(initramfs.write_initramfs(folder / "modules", importlib.util.MAGIC_NUMBER.hex()).read_bytes())
    compiled = found[f"sf/package/__pycache__/errors.{sys.implementation.cache_tag}.pyc"][1]
    assert compiled[:4] == importlib.util.MAGIC_NUMBER
    assert compiled[4:8] == b"\x01\0\0\0", "unchecked hash: the guest does not even look at the source"
    assert marshal.loads(compiled[16:]).co_filename == "/usr/lib/python3/dist-packages/sfparallel/errors.py"
