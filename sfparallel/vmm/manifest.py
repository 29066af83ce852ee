"""Manifests of checkpoints that are kept as files: what a QEMU must be like to take one up, and what the files must hold.

A manifest is a JSON object. "format", "qemu", "machine", "cpu_model", "devices" and the other properties of the virtual machine
must be equal in the job that uses the checkpoint; "files" and "layers" have the SHA-256 of each file: of a small one as it is, of
a layer over the pages that the memory map takes from it, each row of them with its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfparallel.errors import EnvironmentProblem, ProtocolError
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap

NAME = "manifest.json"
_PIECE_BYTES = 1 << 20
_CONTENT = ("files", "layers")
_HINT = "`sf clean` removes templates; the next job makes its own again"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def layer_digest(fd: int, memory_map: MemoryMap, number: int) -> str:
    """SHA-256 of the pages that an image takes from a layer. Holes elsewhere do not count: a copy may have them filled."""
    digest = hashlib.sha256()
    for offset, length in memory_map.rows_of(number):
        digest.update(struct.pack("<QQ", offset, length))
        end = offset + length
        while offset < end:
            data = os.pread(fd, min(_PIECE_BYTES, end - offset), offset)
            if not data:
                return f"cut short at {offset}"
            digest.update(data)
            offset += len(data)
    return digest.hexdigest()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key}.")
        elif isinstance(entry, list):
            yield from _flat({str(i): each for i, each in enumerate(entry)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs, one line per field: which, wanted, found."""
    fields, others = dict(_flat(wanted)), dict(_flat(found))
    return [f"{name}: wanted {fields.get(name, 'none')!r}, found {others.get(name, 'none')!r}"
            for name in sorted(fields.keys() | others.keys()) if fields.get(name) != others.get(name)]  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder.

    Raises:
        EnvironmentProblem: there is none that can be read: the folder is no checkpoint.
    """
    try:
        found = json.loads((folder / NAME).read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"checkpoint {folder}: cannot read its manifest: {error}", hint=_HINT) from error
    return found


def write(
    folder: Path, machine: Mapping[str, Any], layers: Mapping[str, int], files: tuple[str, ...], memory_map: MemoryMap
) -> None:
    """Write the manifest of a checkpoint's folder; the last step of making one.

    Args:
        machine: properties of the virtual machine.
        layers: file name to layer number.
        files: names of the other files.
    """
    content = _content(folder, layers, files, memory_map)
    (folder / NAME).write_text(json.dumps({**machine, **content}, indent=1))


def _content(folder: Path, layers: Mapping[str, int], files: tuple[str, ...], memory_map: MemoryMap) -> dict[str, Any]:
    digests = {}
    for name, number in layers.items():
        with open(folder / name, "rb") as file:
            digests[name] = layer_digest(file.fileno(), memory_map, number)
    return {"files": {name: file_digest(folder / name) for name in files}, "layers": digests}


def check(folder: Path, machine: Mapping[str, Any], layers: Mapping[str, int], files: tuple[str, ...]) -> MemoryMap:
    """Check a checkpoint's folder against the machine that is to take it up, and against what was written; returns its map.

    Takes about a second per GiB of stored pages.

    Args:
        machine, layers, files: as for `write`; the map is the file "memory.map".

    Raises:
        EnvironmentProblem: something differs; the message says which field, what is wanted and what was found.
    """
    found = read(folder)
    # First what the machine must be like: of another format, the files mean nothing.
    _raise(folder, differences(machine, {key: value for key, value in found.items() if key not in _CONTENT}))
    written = {key: found.get(key, {}) for key in _CONTENT}
    small = {name: file_digest(folder / name) if (folder / name).is_file() else "none" for name in files}
    _raise(folder, differences(written["files"], small))
    try:
        memory_map = MemoryMap.decode((folder / "memory.map").read_bytes(), machine["memory_bytes"] // PAGE_BYTES)
    except ProtocolError as error:
        raise EnvironmentProblem(f"checkpoint {folder} is damaged: {error.message}", hint=_HINT) from error
    _raise(folder, differences(written, _content(folder, layers, files, memory_map)))
    return memory_map


def _raise(folder: Path, lines: list[str]) -> None:
    if lines:
        raise EnvironmentProblem(
            f"checkpoint {folder} does not match: " + "; ".join(lines),
            hint=_HINT,
        )
