"""Guest images: a Debian root as squashfs, its kernel, and the modules that the initramfs loads.

    <cache>/images/<name>-<key>/root.sqfs       the root, read-only; changes go to an overlay in RAM
                                vmlinuz
                                modules/        in loading order (`order`), for the initramfs
                                manifest.json   what it was made of
    <cache>/images/<name>.json                  which of the folders `name` means now
    <cache>/images/.build-<name>-<key>          one in the making; renamed when it is whole

`key` is a digest of everything that the image is made of, so an equal image is never built twice. Whoever builds holds a lock
(flock(2), which ends with its process, however that ends); a `.build-` folder whose lock is free is litter, and is removed by
the next build.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, ImageBuildError, ImageMissing, StateError, UsageError
from sfparallel.vmm.apt_sources import sources_for
from sfparallel.vmm.guest_root import MODULES, PipWanted, base_packages, make_root
from sfparallel.vmm.initramfs import write_initramfs
from sfparallel.vmm.locks import locked, taken
from sfparallel.vmm.processes import command_path
from sfparallel.vmm.releases import host_release

BUILDER_VERSION = 2
"""Part of every key: to be raised when the same recipe gives another image."""

NEEDED_BYTES = 1500 << 20

KERNEL_COMMAND_LINE = " ".join((
    "console=ttyS0 quiet panic=-1 tsc=unstable random.trust_cpu=on",
    # Otherwise the kernel waits for four ticks of the timer within 40 ms of its own, and panics or stands still if they are late
    # (arch/x86/kernel/apic/io_apic.c, check_timer): an emulated guest on a busy host. Measured on a core with 8 busy loops: 7 of
    # 15 boots failed, with this 0 of 9. Guests of KVM skip it by themselves.
    "no_timer_check",
    # Every kernel path that a clone takes when it wakes up has to be translated anew under emulation, and costs time under KVM
    # as well. A guest runs its user's own program and holds nothing else: what guards programs from each other is left out,
    # and so is what a VM of a few seconds does not need.
    "mitigations=off lsm= apparmor=0 audit=0 hardened_usercopy=off init_on_alloc=0 kfence.sample_interval=0",
    "transparent_hugepage=never cgroup_disable=memory psi=0 nowatchdog noirqdebug ipv6.disable=1",
))
"""What guests are booted with."""

Progress = Callable[[str, float | None], None]
"""Called with the name of a stage and, where it is known, a percentage."""


@dataclass(frozen=True)
class Recipe:
    """What an image is made of.

    Attributes:
        name: what users call it.
        suite: the release of Debian or Ubuntu, as apt sources call it.
        packages: Debian packages beyond the base, sorted.
        pip: Python packages, as `pip install` understands them, sorted.
        requirements: lines of requirements files, see `vmm.requirements`.
        constraints: lines of files of constraints.
    """

    name: str = "default"
    suite: str = field(default_factory=host_release)
    packages: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()

    def over(self, base: Recipe) -> Recipe:
        """This recipe with all that `base` has, of this one's release."""
        return replace(
            self, packages=tuple(sorted({*base.packages, *self.packages})),
            pip=tuple(sorted({*base.pip, *self.pip})),
            requirements=tuple(dict.fromkeys((*base.requirements, *self.requirements))),
            constraints=tuple(dict.fromkeys((*base.constraints, *self.constraints))),
        )  # fmt: skip

    def key(self, sources: str) -> str:
        """Digest of the recipe, this builder, and where packages come from."""
        builder = {"version": BUILDER_VERSION, "base": base_packages(self.suite), "modules": MODULES}
        # What is empty does not count, so that a new field makes no image new.
        recipe = {name: value for name, value in asdict(self).items() if value or name in ("packages", "pip")}
        content = {"recipe": recipe, "builder": builder, "sources": sources}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Image:
    """A finished image."""

    name: str
    key: str
    folder: Path
    recipe: Recipe
    python_magic: str

    @property
    def root(self) -> Path:
        return self.folder / "root.sqfs"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"

    def describe(self) -> str:
        """Its release, and what it has beyond the base, in one line."""
        recipe = self.recipe
        added = [*recipe.packages, *(f"pip:{name}" for name in (*recipe.pip, *recipe.requirements))]
        return f"{recipe.suite}, " + ("with " + ", ".join(added) if added else "base system")


def _images() -> Path:
    return cache_folder() / "images"


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"{name!r} is not a valid image name",
                         hint="letters, digits, dots, hyphens and underscores, at most 64, with a letter or digit first")
    return name


def load(folder: Path) -> Image | None:
    """The image in a folder; None if there is none, or one of an older format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        written = manifest["recipe"]
        parts = {name: tuple(map(str, written.get(name, ()))) for name in ("packages", "pip", "requirements", "constraints")}
        recipe = Recipe(str(written["name"]), str(written["suite"]), **parts)
        return Image(recipe.name, str(manifest["key"]), folder, recipe, str(manifest["python_magic"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _named(name: str) -> Image | None:
    try:
        folder = json.loads((_images() / f"{name}.json").read_text())["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return load(_images() / str(folder))


def find(name: str = "default") -> Image:
    """The image that `name` means.

    Raises:
        ImageMissing: it was not built yet.
    """
    image = _named(_check_name(name))
    if image is None:
        words = "sf image build" if name == "default" else f"sf image build {name}"
        raise ImageMissing(f"there is no guest image {name!r}", hint=words)
    return image


def replaced_by(recipe: Recipe) -> Image | None:
    """The image that has this recipe's name now, if it has another content than the recipe would give it."""
    image = _named(_check_name(recipe.name))
    return None if image is None or image.recipe == recipe else image


def list_images() -> list[Image]:
    """All images that can be used by name, sorted by name."""
    images = (_named(path.stem) for path in sorted(_images().glob("*.json")))
    return [image for image in images if image]


def remove(name: str) -> None:
    """Delete an image, with what earlier builds under its name have left.

    Raises:
        ImageMissing: there is none.
        StateError: a job uses it.
    """
    if _named(_check_name(name)) is None:
        raise ImageMissing(f"there is no guest image {name!r}", hint="`sf image list` lists the images")
    # An image whose name begins with this one has other folders.
    folders = [path for path in _images().glob(f"{name}-*") if re.fullmatch(r"[0-9a-f]{12}", path.name.removeprefix(f"{name}-"))]
    with contextlib.ExitStack() as stack:
        if not all([stack.enter_context(taken(folder / "root.sqfs")) for folder in folders]):
            raise StateError(f"a job uses the image {name!r}", hint="wait until the job has ended; `sf ps` lists the jobs")
        (_images() / f"{name}.json").unlink()
        doomed = [hide(folder) for folder in folders]
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)


def hide(path: Path) -> Path:
    """Rename a path that will be deleted to a hidden name, so that nobody finds half of it; returns the new path."""
    doomed = path.with_name(f".doomed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # an earlier deletion may have been interrupted
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    return doomed


def forget(folder: Path) -> None:
    """Remove all names of the image in this folder."""
    for image in list_images():
        if image.folder == folder:
            (_images() / f"{image.name}.json").unlink(missing_ok=True)


def guest_half(image: Image) -> Path:
    """The initramfs for an image, with this package's guest half; made anew if that has changed.

    Raises:
        EnvironmentProblem: the agent cannot be built.
    """
    return write_initramfs(image.modules, image.python_magic)


def build(recipe: Recipe, progress: Progress) -> Image:
    """Build an image, or find that it was built already.

    If another process is building the same image, this one waits for it.

    Raises:
        EnvironmentProblem: this host cannot build images; says what it lacks.
        ImageBuildError: the build failed.
    """
    _check_name(recipe.name)
    sources = sources_for(recipe.suite)
    key = recipe.key(sources)
    folder = _images() / f"{recipe.name}-{key[:12]}"
    try:
        _images().mkdir(parents=True, exist_ok=True)
        waits = functools.partial(progress, "waiting for another process that is building this image", None)
        with locked(_images() / f".lock-{folder.name}", waits):
            image = load(folder)
            if image is None:
                _remove_litter()
                image = _build(recipe, key, sources, folder, progress)
            _point(recipe.name, folder)
    except OSError as error:
        raise _build_error(error) from error
    return image


def _build(recipe: Recipe, key: str, sources: str, folder: Path, progress: Progress) -> Image:
    _check_host(recipe)
    work = folder.with_name(f".build-{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        python = make_root(work, recipe.suite, recipe.packages, _wanted_of_pip(recipe), sources, progress)
        manifest = {"key": key, "recipe": asdict(recipe), "python_magic": python.magic, "python": python.full_version,
                    "sources": sources}  # fmt: skip
        _write(work / "manifest.json", manifest)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    image = load(folder)
    if image is None:
        raise ImageBuildError(f"the image just built in {folder} cannot be read", hint="delete that folder and build again")
    return image


def _wanted_of_pip(recipe: Recipe) -> PipWanted:
    return PipWanted(recipe.pip, recipe.requirements, recipe.constraints)


def _write(path: Path, content: object) -> None:
    # Not one name for all: two recipes of one name are built under two locks.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _point(name: str, folder: Path) -> None:
    _write(_images() / f"{name}.json", {"folder": folder.name})


def _remove_litter() -> None:
    """Remove what interrupted builds have left: folders in the making whose builder's lock is free."""
    for folder in [*_images().glob(".build-*"), *_images().glob(".doomed-*")]:
        lock = _images() / f".lock-{folder.name.removeprefix('.build-').removeprefix('.doomed-')}"
        with open(lock, "w") as file, contextlib.suppress(BlockingIOError):
            # Our own lock is held on another open file, so our own folder counts as busy here: _build clears it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _check_host(recipe: Recipe) -> None:
    tools = {"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools"}
    if missing := [program for program in tools if shutil.which(program) is None]:
        raise EnvironmentProblem(f"building a guest image needs programs that are not installed: {', '.join(missing)}",
                                 hint=f"apt install {' '.join(tools[program] for program in missing)}")  # fmt: skip
    if (recipe.pip or recipe.requirements) and importlib.util.find_spec("pip") is None:  # as in environments of uv
        raise EnvironmentProblem("the environment of sf has no pip, which installs Python packages into images",
                                 hint=f"{sys.executable} -m ensurepip, or `uv pip install pip`")  # fmt: skip
    if os.geteuid() != 0:
        raise EnvironmentProblem("building a guest image needs root: its files have several owners",
                                 hint=f"sudo {command_path('sf')} image build")  # fmt: skip
    free = shutil.disk_usage(_images()).free
    if free < NEEDED_BYTES:
        raise ImageBuildError(
            f"{_images()} has {free >> 20} MiB of free space; a build needs about {NEEDED_BYTES >> 20} MiB",
            hint="free some space, or set SF_CACHE to a folder on another disk",
        )


def _build_error(error: OSError) -> ImageBuildError:
    if error.errno == errno.ENOSPC:
        return ImageBuildError("the disk is full", hint="free some space, or set SF_CACHE to a folder on another disk")
    return ImageBuildError(f"cannot write the image: {error}", hint="set SF_CACHE to a writable folder")
