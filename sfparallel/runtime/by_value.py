"""Pickles what `pickle` itself cannot: functions and classes without a name that can be imported go by value (cloudpickle).

Imported when it is needed: cloudpickle is no part of what `import sfparallel` costs. (In a VM the first fork imports it.)
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle


def _reduce_file(file: io.TextIOWrapper) -> tuple[Any, ...]:
    """cloudpickle would read the file and send a StringIO: a file that is not the file, and cannot be written to."""
    for name in ("stdin", "stdout", "stderr"):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    raise pickle.PicklingError(f"it is, or contains, an open file ({file.name!r}, mode {file.mode!r})")


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    dispatch_table: ClassVar[Any] = ChainMap({io.TextIOWrapper: _reduce_file}, cloudpickle.CloudPickler.dispatch_table)


def dumps(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], object]) -> bytes:
    """Pickle with protocol 5.

    Raises:
        pickle.PicklingError: it is, or has in it, an open text file. Whatever else pickling it raises.
    """
    out = io.BytesIO()
    _Pickler(out, protocol=5, buffer_callback=buffer_callback).dump(value)
    return out.getvalue()
