"""What `mpi4py.rc` and the variables MPI4PY_RC_... and MPI4PY_PICKLE_... say when `mpi4py.MPI` is imported first.

(mpi4py, "Reference", chapter mpi4py, "Runtime configuration options".)
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import mpi4py
from sfparallel.runtime.mpi import environment
from sfparallel.runtime.mpi.errhandler import ERRORS_ABORT, ERRORS_ARE_FATAL
from sfparallel.runtime.mpi.pickling import pickle

_TRUE = ("1", "y", "yes", "t", "true", "on")
_FALSE = ("0", "n", "no", "f", "false", "off")


def _truth(text: str) -> bool | str:
    return text.lower() in _TRUE if text.lower() in _TRUE + _FALSE else text


def _number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


rc: Any = vars(mpi4py).get("rc") or mpi4py.Rc()  # a program may have deleted it

_DEFAULTS = {name: value for name, value in vars(type(rc)).items() if not name.startswith("_")}

_ERRHANDLERS = {"default": ERRORS_ARE_FATAL, "abort": ERRORS_ABORT, "fatal": ERRORS_ARE_FATAL}
"""What `rc.errors` means where it does not mean exceptions."""

_WORDS = {
    "thread_level": ("single", "funneled", "serialized", "multiple"),
    "errors": ("default", "exception", "abort", "fatal"),
}


def _read(name: str, text: str) -> Any:
    if name in _WORDS:
        return text
    return _number(text) if type(_DEFAULTS[name]) is int else _truth(text)


def _is_good(name: str, value: Any) -> bool:
    if name in _WORDS:
        return value in _WORDS[name]
    if type(_DEFAULTS[name]) is int:
        return type(value) is int and value >= 0
    return isinstance(value, bool) or value is _DEFAULTS[name]


def _warn(name: str, value: Any) -> None:
    warnings.warn(f"mpi4py.{name}: unexpected value {value!r}", RuntimeWarning, stacklevel=3)


def apply() -> None:
    """Take the variables over, warn about values that mean nothing, and do what `rc` says."""
    for name in _DEFAULTS:
        if (text := os.environ.get(f"MPI4PY_RC_{name.upper()}")) is not None:
            setattr(rc, name, _read(name, text))
        value = getattr(rc, name)
        if not _is_good(name, value):
            _warn(f"rc.{name}", value)
    if rc.errors in _ERRHANDLERS:
        environment.begin_with(_ERRHANDLERS[rc.errors])
    if rc.initialize is False:
        environment.await_init()
    for name in ("PROTOCOL", "THRESHOLD"):
        if (text := os.environ.get(f"MPI4PY_PICKLE_{name}")) is not None:
            value = _number(text)
            if isinstance(value, int):
                setattr(pickle, name, value)
            else:
                _warn(f"pickle.{name}", value)
