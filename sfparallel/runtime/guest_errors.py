"""Notes on errors that the VM causes: its disk, packages, programs, files and network differ from those of the host."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import sys

from sfparallel.bootstrap import orders

FULL_DISK = (
    "files written in a VM, including those in the current folder, are kept in the VM's RAM, and their share of it is full.\n"
    "Give each VM more with `sfrun --memory`; delete files that you no longer need; let clones write less, and bring it back\n"
    "with collect= or as results; read big inputs in place, from the current folder or from `--data`, instead of copying them"
)
NETWORK = (
    "VMs have no network outside their job. Put packages into the guest image, and data into the current folder or a folder of\n"
    "`sfrun --data`; `sfrun --forward` forwards a TCP port of the host to the parent VM"
)


def explain(error: BaseException) -> None:
    """Add a note (PEP 678) to what an exception consists of: itself, its causes and contexts, and those in a group."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        note = _note(found)
        if note and note not in getattr(found, "__notes__", ()):
            found.add_note(note)
        waiting += (found.__cause__, found.__context__)
        if isinstance(found, BaseExceptionGroup):
            waiting += found.exceptions


def _note(error: BaseException) -> str | None:
    if isinstance(error, ModuleNotFoundError):
        return _missing_module((error.name or "").partition(".")[0])
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOSPC:
        return FULL_DISK
    if error.errno == errno.ENETUNREACH or type(error).__name__ == "gaierror":
        return NETWORK
    if isinstance(error, FileNotFoundError):
        if isinstance(error.filename, str | bytes):
            return _missing_file(os.fsdecode(error.filename), _from_subprocess(error))
        return next(filter(None, map(_outside, _names_in(str(error)))), None)
    return None


def _addition(option: str) -> str:
    image = orders.get("image", "default")
    return f"sf image build {image} --from {image} {option}"


def _missing_module(name: str) -> str | None:
    try:
        if not name or importlib.util.find_spec(name):
            return None  # something else in it is missing
    except (ImportError, ValueError):
        return None
    image = orders.get("image", "default")
    if name in sys.stdlib_module_names:
        return (f"the guest image {image!r} lacks this part of Python's standard library. To add it:\n"
                f"  {_addition('--package python3-full')}")  # fmt: skip
    return (f"the guest image {image!r} has no module {name!r}. To add a package (its name may differ from the module's):\n"
            f"  {_addition(f'--pip {name}')}\n"
            "or use a virtual environment that has it: `sfrun --venv PATH`.\n"
            "Your own modules are imported from the script's folder, and from the folders in `sfrun --env PYTHONPATH=...`,\n"
            "which must be below the script's folder or the current folder")  # fmt: skip


def _from_subprocess(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_globals.get("__name__") == "subprocess":
            return True
        trace = trace.tb_next
    return False


def _missing_file(name: str, started: bool) -> str | None:
    if started and ("/" not in name or name.startswith(("/usr/", "/bin/", "/sbin/", "/opt/"))):
        image = orders.get("image", "default")
        return (f"the guest image {image!r} has no program {name!r}. To add the Debian package that contains it:\n"
                f"  {_addition('--package PACKAGE')}")  # fmt: skip
    return _outside(name)


def _names_in(message: str) -> list[str]:
    """What may be names of files in a message of numpy, h5py or the program, whose errors have no `filename`."""
    words = ["".join(found) for found in re.findall(r"""'([^']*)'|"([^"]*)"|([^\s'"]+)""", message)]
    return [word.rstrip(".,:;") for word in words if "://" not in word and ("/" in word or os.path.islink(word.rstrip(".,:;")))]


def _outside(name: str) -> str | None:
    """The note on a file of the host that the VM does not have: it, or what it links to, is outside of the shared folders."""
    try:
        path = os.path.abspath(name)
        target = os.path.realpath(path)
        folders = _shared_folders()
    except (OSError, ValueError):
        return None
    if not _is_in(path, folders):
        where = f"{path} is in none of them"
    elif not _is_in(target, folders):
        where = f"{path} is a link to {target}, which is in none of them"
    else:
        return None  # it is not on the host either
    return ("a VM has these folders of the host: the script's folder, the current folder, and those of `sfrun --data FOLDER`;\n"
            f"{where}")  # fmt: skip


def _is_in(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _shared_folders() -> list[str]:
    """Mount points of the host's folders; blanks in them are octal (proc(5))."""
    with open("/proc/self/mounts", errors="surrogateescape") as table:
        mounts = [line.split(" ")[1:3] for line in table]
    places = [place for place, kind in mounts if kind in ("fuse", "overlay", "squashfs") and place != "/"]
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place) for place in places]
