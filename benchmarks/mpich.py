"""MPICH from Debian under mpi4py's wheel, in a guest."""

from __future__ import annotations

import os

_FOLDER = "/tmp/mpich"
_DEBIANS = "/usr/lib/x86_64-linux-gnu/libmpich.so.12"


def environment() -> dict[str, str]:
    """What to add to the environment: mpi4py's wheel looks for libmpi.so.12, which Debian calls libmpich.so.12."""
    os.makedirs(_FOLDER, exist_ok=True)
    link = f"{_FOLDER}/libmpi.so.12"
    if not os.path.islink(link):
        os.symlink(_DEBIANS, link)
    return {"LD_LIBRARY_PATH": _FOLDER}
