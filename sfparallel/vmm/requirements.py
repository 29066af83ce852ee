"""Requirements files of pip, read for an image: what is in them becomes part of the image's recipe, by content and not by name.

A line that an image cannot have is refused at once, and not by pip after minutes of building. The format is
that of pip's documentation ("Requirements File Format").
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sfparallel.errors import UsageError

_COMMENT = re.compile(r"(^|\s+)#.*$")
_NESTED = ("-r", "--requirement")
_CONSTRAINTS = ("-c", "--constraint")
_EDITABLE = ("-e", "--editable")
_PLACES = ("-f", "--find-links")
_PASSED = ("-i", "--index-url", "--extra-index-url", "--no-index", "--pre", "--trusted-host", "--prefer-binary",
           "--require-hashes", *_PLACES)  # fmt: skip
_SHORT = {"-r": _NESTED, "-c": _CONSTRAINTS, "-e": _EDITABLE, "-f": _PLACES, "-i": ("-i",)}
_MOST_FILES = 100


@dataclass
class Requirements:
    """What a requirements file, and all that it refers to, ask for.

    Attributes:
        lines: requirements and options of pip's, one a line, without comments; paths are absolute.
        constraints: the same, of files of constraints.
    """

    lines: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    _seen: set[tuple[Path, bool]] = field(default_factory=set)

    def read(self, path: Path, where: str = "--requirements", *, constraint: bool = False) -> None:
        """Add a file.

        Raises:
            UsageError: it cannot be read, or has a line that means nothing for an image.
        """
        path = path.resolve()
        if (path, constraint) in self._seen:
            return
        self._seen.add((path, constraint))
        if len(self._seen) > _MOST_FILES:
            raise UsageError(f"{where}: more than {_MOST_FILES} files refer to each other")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UsageError(f"{where}: {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise UsageError(f"{where}: {path} is not UTF-8 text", hint="is it a requirements file?") from None
        for number, line in _logical_lines(text):
            self._add(line, path, f"{path}, line {number}", constraint=constraint)

    def _add(self, line: str, path: Path, where: str, *, constraint: bool) -> None:
        option, value = _option(line, where)
        target = self.constraints if constraint else self.lines
        if option in _NESTED:
            self.read(path.parent / value, where, constraint=constraint)
        elif option in _CONSTRAINTS:
            self.read(path.parent / value, where, constraint=True)
        elif option in _EDITABLE:
            raise UsageError(f"{where}: {line}: an editable package links to a folder, which an image cannot hold",
                             hint="omit the line, and run the script in that folder or with --env PYTHONPATH=FOLDER; "
                                  "or build a wheel with `pip wheel` and name that")  # fmt: skip
        elif option in _PLACES and "://" not in value:
            target.append(f"{option} {(path.parent / value).resolve()}")
        elif option in _PASSED:
            target.append(line)
        elif option:
            raise UsageError(f"{where}: {line}: an image cannot have this option of pip",
                             hint="omit it; wheels are used if there are any, otherwise packages are built on this host")
        else:
            target.append(_located(line, path.parent, where))


def check_spec(spec: str) -> None:
    """One `--pip SPEC`.

    Raises:
        UsageError: it is an option of pip's, or a requirements file.
    """
    words = spec.split()
    if not words:
        raise UsageError("--pip without a package")
    if words[0].startswith("-"):
        file = ""
        if words[0].startswith(("-r", "--r")):
            file = spec.strip().removeprefix("--requirement").removeprefix("-r").strip(" =")
        raise UsageError(f"--pip {spec!r}: not a package, but an option of pip",
                         hint=f"sf image build --requirements {file or 'FILE'} takes a requirements file")  # fmt: skip
    path = Path(spec)
    if path.is_file() and not spec.endswith((".whl", ".tar.gz", ".zip", ".tar.bz2")):
        raise UsageError(f"--pip {spec!r}: not a package, but a file", hint=f"sf image build --requirements {spec}")


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments, those that end with a backslash joined with the next; each with the number of its first one."""
    begun, joined = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        begun = begun or number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            joined += line[:-1] + " "
            continue
        whole = _COMMENT.sub("", joined + line).strip()
        if whole:
            yield begun, whole
        begun, joined = 0, ""
    if whole := _COMMENT.sub("", joined).strip():
        yield begun, whole


def _option(line: str, where: str) -> tuple[str, str]:
    """An option that a line begins with, and its value; two empty strings where it is a requirement."""
    if not line.startswith("-"):
        return "", ""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{where}: {line}: {error}") from None
    first, *rest = words
    if not first.startswith("--") and first[:2] in _SHORT:
        name, value = first[:2], first[2:]
    else:
        name, _, value = first.partition("=")
    value = value or " ".join(rest)
    if name in (*_NESTED, *_CONSTRAINTS, *_EDITABLE, *_PLACES) and not value:
        raise UsageError(f"{where}: {line}: {name} needs a value")
    return name, value


def _located(line: str, folder: Path, where: str) -> str:
    """A requirement; of a file of this host with its whole path, and what it holds: the image depends on that."""
    word = line.split(";")[0].split(" --hash")[0].strip()
    if "://" in word or " @ " in word or "@" in word.split("[")[0]:
        return line
    if not (word.startswith((".", "/")) or "/" in word or word.endswith((".whl", ".tar.gz", ".zip"))):
        return line
    path = (folder / word).resolve()
    if path.is_dir():
        raise UsageError(f"{where}: {line}: an image cannot depend on a folder of this host",
                         hint=f"build a wheel with `pip wheel --no-deps {path}` and name that")  # fmt: skip
    if not path.is_file():
        raise UsageError(f"{where}: {line}: there is no file {path}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{path}{line[len(word):]}  # sha256 {digest}"
