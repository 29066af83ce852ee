"""What is in the cache folder: how large it is, whether a job uses it, and how it is removed.

Until it ends, a job holds a shared lock (`locks.use`) on everything that it may open again by name: image, template, data images,
initramfs. A removal takes the exclusive lock first, so that it never removes what a job uses.
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, StateError, UsageError
from sfparallel.text import in_one_line, nearest
from sfparallel.vmm import image as images
from sfparallel.vmm import locks, manifest


class Kind(enum.Enum):
    """Kind of an entry of the cache folder."""

    IMAGE = "image"
    TEMPLATE = "template"
    DATA = "data"
    INITRAMFS = "initramfs"
    PROBE = "probe"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Entry:
    """One entry of the cache folder.

    Attributes:
        name: in `sf df` and `sf clean`.
        content: a description for users, in one line.
        key: that of the image, for an image or a template.
    """

    kind: Kind
    name: str
    path: Path
    content: str = ""
    key: str = ""

    @property
    def lock(self) -> Path:
        """The file that is locked by jobs that use this entry, or by its builder."""
        if self.kind is Kind.IMAGE:
            return self.path / "root.sqfs"
        if self.kind is Kind.TEMPLATE:
            return self.path / manifest.NAME
        return locks.of_builder(self.path) if self.kind is Kind.UNFINISHED else self.path

    @property
    def in_use(self) -> bool:
        with locks.taken(self.lock) as ours:
            return not ours

    def size_bytes(self) -> int:
        """Its size on the disk; templates have holes."""
        size = 0
        for path in (self.path, *(Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)):
            with contextlib.suppress(FileNotFoundError):  # a builder has just renamed it
                size += path.lstat().st_blocks << 9
        return size

    def remove(self) -> bool:
        """Delete it, unless it is in use; returns whether it was deleted."""
        with locks.taken(self.lock) as ours:
            if not ours:
                return False
            if self.kind is Kind.IMAGE:
                images.forget(self.path)
            if self.kind is Kind.DATA:
                _source_of(self.path).unlink(missing_ok=True)
            doomed = self.path if self.kind is Kind.UNFINISHED else images.hide(self.path)
        _delete(doomed)
        return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """The contents of the cache folder: images, templates, data images, initramfs, and the remains of interrupted builds."""
    cache = cache_folder()
    found = list(_images())
    names = {entry.key: entry.name for entry in found}
    found += (_template(path, names) for path in sorted(cache.glob("templates/[!.]*")) if path.is_dir())
    found += (Entry(Kind.DATA, path.stem, path, _source(path)) for path in sorted(cache.glob("data/[!.]*.sqfs")))
    found += (Entry(Kind.INITRAMFS, path.stem, path) for path in sorted(cache.glob("initrd/[!.]*.img")))
    found += (Entry(Kind.PROBE, path.name, path, "libvirt's probe of QEMU") for path in cache.glob("libvirt"))
    litter = [*cache.glob("images/.*"), *cache.glob("templates/.*"), *cache.glob("data/.*"), *cache.glob("data/*.part"),
              *cache.glob("initrd/.*")]  # fmt: skip
    found += (Entry(Kind.UNFINISHED, path.name, path) for path in sorted(litter) if not locks.is_lock(path))
    return found


def _images() -> Iterator[Entry]:
    named = {image.folder for image in images.list_images()}
    for path in sorted(cache_folder().glob("images/[!.]*")):
        if not path.is_dir():
            continue
        image = images.load(path)
        if image is None:
            yield Entry(Kind.IMAGE, path.name, path, "of another version of sfparallel")
        elif path in named:
            yield Entry(Kind.IMAGE, image.name, path, image.describe(), image.key)
        else:
            yield Entry(Kind.IMAGE, path.name, path, f"replaced; {image.describe()}", image.key)


def _template(path: Path, names: dict[str, str]) -> Entry:
    try:
        made_of = manifest.read(path)
        key = str(made_of["image"])
        memory, cpus = int(made_of["memory_bytes"]) >> 20, int(made_of["cpus"])
        content = f"of image {names.get(key, key[:12])}, {memory} MiB, processors: {cpus}, {made_of['accelerator']}"
    except (EnvironmentProblem, KeyError, TypeError, ValueError):
        return Entry(Kind.TEMPLATE, path.name, path, "damaged, or of another version of sfparallel")
    return Entry(Kind.TEMPLATE, path.name, path, content, key)


def _source_of(path: Path) -> Path:
    """The file that names the folder of a data image."""
    return path.with_name(path.name.partition("-")[0] + ".source")


def _source(path: Path) -> str:
    try:
        return "of " + os.fsdecode(_source_of(path).read_bytes())
    except OSError:
        return "of a folder"


def choose(names: Sequence[str]) -> list[Entry]:
    """The entries with these names; with an image, its templates.

    Raises:
        UsageError: there is no such entry.
        StateError: a job uses one of them.
    """
    there = entries()
    chosen: dict[Path, Entry] = {}
    for name in names:
        found = [entry for entry in there if entry.name == name]
        if not found:
            near = nearest(name, {entry.name for entry in there})
            raise UsageError(f"there is no {name!r} in the cache folder" + (f"; did you mean {near}?" if near else ""),
                             hint="`sf df` lists its contents")  # fmt: skip
        keys = {entry.key for entry in found if entry.kind is Kind.IMAGE and entry.key}
        found += (entry for entry in there if entry.kind is Kind.TEMPLATE and entry.key in keys)
        chosen |= {entry.path: entry for entry in found}
    if busy := [f"{entry.kind.value} {entry.name}" for entry in chosen.values() if entry.in_use]:
        raise StateError(f"in use: {', '.join(busy)}", hint="wait until no job uses it; `sf ps` lists the jobs")
    return list(chosen.values())


def clean(*, everything: bool) -> Iterator[str]:
    """Remove the remains of interrupted builds, and templates, unless they are in use; yields a line for each.

    Args:
        everything: images, data images, initramfs and probes as well.
    """
    kinds = set(Kind) if everything else {Kind.TEMPLATE, Kind.UNFINISHED}
    for entry in entries():
        if entry.kind in kinds:
            yield described_removal(entry)
    for path in cache_folder().glob("*/*"):
        if locks.is_lock(path):
            with locks.taken(path) as ours:  # a process that waits for it finds that it has no name, and makes another
                if ours:
                    path.unlink(missing_ok=True)


def described_removal(entry: Entry) -> str:
    """Remove an entry, and describe the result in one line."""
    what = f"{entry.kind.value} {entry.name}"
    return f"removed {what}" if entry.remove() else f"kept {what}: it is in use"


@dataclass(frozen=True)
class Row:
    """One line of `sf df`."""

    entry: Entry
    size_bytes: int
    in_use: bool

    def to_json(self) -> dict[str, object]:
        entry = self.entry
        return {"kind": entry.kind.value, "name": entry.name, "bytes": self.size_bytes, "in_use": self.in_use,
                "content": entry.content}  # fmt: skip


def measured() -> list[Row]:
    """All entries, with their sizes, and whether they are in use."""
    return [Row(entry, entry.size_bytes(), entry.in_use) for entry in entries()]


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of `sf df`."""
    width = max((len(row.entry.name) for row in rows), default=4)
    lines = [f"{'KIND':10} {'NAME':{width}} {'SIZE':>10} IN USE  CONTENT"]
    sums: dict[Kind, int] = {}
    for row in rows:
        entry, size, used = row.entry, f"{row.size_bytes >> 20} MiB", "yes" if row.in_use else ""
        line = f"{entry.kind.value:10} {in_one_line(entry.name):{width}} {size:>10} {used:>6}  {in_one_line(entry.content)}"
        lines.append(line.rstrip())
        sums[entry.kind] = sums.get(entry.kind, 0) + row.size_bytes
    shares = ", ".join(f"{kind.value}: {size >> 20}" for kind, size in sums.items())
    lines.append(f"total: {sum(sums.values()) >> 20} MiB in {cache_folder()}" + (f" ({shares})" if shares else ""))
    return lines
