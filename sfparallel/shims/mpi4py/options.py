"""What `mpi4py.rc` and the variables MPI4PY_RC_... and MPI4PY_PICKLE_... say when `mpi4py.MPI` is imported first.

(mpi4py, "Reference", chapter mpi4py, "Runtime configuration options".)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from mpi4py import rc
from sfparallel.runtime.mpi import environment
from sfparallel.runtime.mpi.pickling import pickle

_TRUE = ("1", "y", "yes", "t", "true", "on")
_FALSE = ("0", "n", "no", "f", "false", "off")


def _truth(text: str) -> bool | str:
    return text.lower() in _TRUE if text.lower() in _TRUE + _FALSE else text


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_READ: dict[str, Callable[[str], Any]] = {
    "initialize": _truth, "threads": _truth, "thread_level": str, "finalize": _truth, "fast_reduce": _truth,
    "recv_mprobe": _truth, "irecv_bufsz": _number, "errors": str,
}  # fmt: skip

_WORDS = {
    "thread_level": ("single", "funneled", "serialized", "multiple"),
    "errors": ("default", "exception", "abort", "fatal"),
}


def _is_good(name: str, value: Any) -> bool:
    if name in _WORDS:
        return value in _WORDS[name]
    if name == "irecv_bufsz":
        return isinstance(value, int) and value >= 0
    return isinstance(value, bool) or (name == "finalize" and value is None)


def apply() -> None:
    """Take the variables over, warn about values that mean nothing, and do what `rc` says."""
    for name, read in _READ.items():
        if (text := os.environ.get(f"MPI4PY_RC_{name.upper()}")) is not None:
            setattr(rc, name, read(text))
        value = getattr(rc, name)
        if not _is_good(name, value):
            warnings.warn(f"mpi4py.rc.{name}: unexpected value {value!r}", RuntimeWarning, stacklevel=2)
    if rc.initialize is False:
        environment.await_init()
    for name in ("PROTOCOL", "THRESHOLD"):
        if (text := os.environ.get(f"MPI4PY_PICKLE_{name}")) is not None:
            setattr(pickle, name, int(text))
