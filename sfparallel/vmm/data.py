"""`--data DIR`: a folder as a read-only block image, for inputs too large to go through the file server.

The image is a squashfs without compression: it is made as fast as the disk goes, and the guest, which may be an emulated one,
does not have to unpack. It is kept in the cache folder under a name that says which folder it is of and what was in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, UsageError
from sfparallel.vmm import processes
from sfparallel.vmm.command_errors import hint_for
from sfparallel.vmm.locks import locked, taken, use
from sfparallel.vmm.subprocesses import require, run
from sfparallel.vmm.waiting import in_thread, while_it_moves

_UNCOMPRESSED = ("-noI", "-noD", "-noF", "-noX")
# All files belong to root, as those that the file server shows. Without -exit-on-error, a file that cannot be read becomes an
# empty one and mksquashfs ends with status 0.
_OPTIONS = (*_UNCOMPRESSED, "-no-duplicates", "-no-xattrs", "-all-root", "-exit-on-error", "-quiet", "-no-progress",
            "-mem", "512M")
_SPARE_BYTES = 64 << 20
STILL_LIMIT_S = 300.0
"""So long may nothing be read or written before an image is given up."""


@dataclass(frozen=True, slots=True)
class _Content:
    """What is in a folder: a digest of names, sizes and times, and how much of it there is."""

    digest: str
    files: int
    size_bytes: int


class Steps:
    """How far `data_image` is, for who watches it from another thread."""

    def __init__(self) -> None:
        self.files = 0
        self.waits = False
        """For another job, which is watched itself."""

    def moved(self) -> object:
        """Another value when something has been done meanwhile, by us or by the program that writes the image."""
        return object() if self.waits else (self.files, [processes.cpu_seconds(pid) for pid in processes.children(os.getpid())])


async def data_image_in_time(folder: Path, progress: Callable[[str], None]) -> Path:
    """`data_image` in a thread, given up when the folder's file system does not answer any more.

    Raises:
        EnvironmentProblem: as there, and when it does not.
    """
    steps = Steps()
    return await while_it_moves(in_thread(data_image, folder, progress, steps), steps.moved, STILL_LIMIT_S,
                                f"the image of --data {folder} to be made", error=EnvironmentProblem,
                                hint="does the file system of that folder answer? `ls -lR` of it shows where not")


def data_image(folder: Path, progress: Callable[[str], None], steps: Steps | None = None) -> Path:
    """The image of a folder: the one in the cache while nothing in the folder changed, else a new one.

    The image is not removed as long as the calling process lives, and older images of the folder that nobody uses are.

    Args:
        folder: the folder; it is resolved.
        progress: called with a line for the user when it takes time.
        steps: told how far it is.

    Raises:
        UsageError: not a folder.
        EnvironmentProblem: it cannot be read, it changes all the time, the disk is full, or squashfs-tools is missing.
    """
    steps = steps or Steps()
    source = folder.resolve()
    if not source.is_dir():
        raise UsageError(f"--data {folder} is not a folder")
    cache = cache_folder() / "data"
    if source == cache or source in cache.parents:
        raise UsageError(f"--data {folder} contains the cache folder {cache_folder()}", hint="set SF_CACHE to another place")
    prefix = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)

        def waits() -> None:
            steps.waits = True
            progress(f"waiting for another job that is making the image of {source}")

        with locked(cache / f"{prefix}.lock", waits):
            steps.waits = False
            image = _find_or_build(source, cache, prefix, progress, steps)
            # Shells of the pool open the image by its name at any time until the job ends. `sf clean` may just have removed it.
            while not use(image):
                image = _find_or_build(source, cache, prefix, progress, steps)
            _remove_others(cache, prefix, image)
    except OSError as error:
        hint = hint_for(error, "free some space, or make it writable, or set SF_CACHE to another place")
        raise EnvironmentProblem(f"cannot keep an image of {source} in {cache}: {error.strerror}", hint=hint) from error
    return image


def _find_or_build(source: Path, cache: Path, prefix: str, progress: Callable[[str], None], steps: Steps) -> Path:
    """Under the folder's lock: the image of what is in it now."""
    content = _content(source, steps)
    for _ in range(2):
        image = cache / f"{prefix}-{content.digest[:32]}.sqfs"
        if image.exists():
            return image
        progress(f"making an image of {source}: {content.files} files, {content.size_bytes / 1e6:.0f} MB")
        unfinished = image.with_suffix(".part")
        try:
            _build(source, unfinished, content)
            before, content = content, _content(source, steps)
            if content == before:
                os.rename(unfinished, image)
                (cache / f"{prefix}.source").write_bytes(os.fsencode(source))  # for `sf df`
                return image
        finally:
            unfinished.unlink(missing_ok=True)
    raise EnvironmentProblem(f"{source} changed while its image was being made", hint="wait until nothing writes to it")


def _build(source: Path, image: Path, content: _Content) -> None:
    # A tenth of a KiB per file, roughly, for inodes and names; the blocks themselves are stored as they are.
    needed = content.size_bytes + 128 * content.files
    free = shutil.disk_usage(image.parent).free
    hint = "free some space, or set SF_CACHE to a place with more"
    if free < needed:
        raise EnvironmentProblem(f"the image of {source} needs {needed / 1e6:.0f} MB in {image.parent}, "
                                 f"where {free / 1e6:.0f} MB are free", hint=hint)
    mksquashfs = require("mksquashfs", "squashfs-tools")
    try:
        run([mksquashfs, source, image, *_OPTIONS], what=f"make an image of {source}")
    except EnvironmentProblem as error:
        # Its exit status does not say why; that somebody else filled the disk meanwhile is worth a message of its own.
        if shutil.disk_usage(image.parent).free < _SPARE_BYTES:
            raise EnvironmentProblem(f"the disk with {image.parent} is full: no image of {source}", hint=hint) from error
        raise


def _content(source: Path, steps: Steps) -> _Content:
    """Walk a folder (links are not followed).

    Raises:
        EnvironmentProblem: something in it cannot be read.
    """
    digest = hashlib.sha256()
    files = size_bytes = 0
    top = os.fsencode(source)
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            names = sorted(os.listdir(os.path.join(top, folder)))
            for name in names:
                path = os.path.join(folder, name)
                status = os.lstat(os.path.join(top, path))
                digest.update(b"%s\0%o %d %d\0" % (path, status.st_mode, status.st_size, status.st_mtime_ns))
                files += 1
                steps.files += 1
                if stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                elif stat.S_ISREG(status.st_mode):
                    size_bytes += status.st_size
        except OSError as error:
            where = os.fsdecode(error.filename or folder)
            raise EnvironmentProblem(f"{where!r} cannot be read for the image of {source}: {error.strerror}",
                                     hint=hint_for(error, "permit reading it, or name a folder without it")) from error
    return _Content(digest.hexdigest(), files, size_bytes)


def _remove_others(cache: Path, prefix: str, image: Path) -> None:
    """Under the folder's lock: remove its older images that nobody holds, and what killed builders left."""
    for path in cache.glob(f"{prefix}-*"):
        if path == image:
            continue
        with taken(path) as free:
            if free:
                path.unlink()
