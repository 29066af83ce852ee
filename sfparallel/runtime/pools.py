"""Every OpenSSL in this process, for it to take fresh entropy.

OpenSSL notices that it is in another process by the process id only (crypto/threads_pthread.c: openssl_get_fork_id), and that is
the same in all clones: without this, all of them would make the same private keys and session keys. There may be several in one
process: Python's own, the one inside of `cryptography`, and those that wheels bring along (psycopg, say).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Pool = Callable[[bytes], object]

_RTLD_DI_LINKMAP = 2  # <dlfcn.h>
_LINK_MAP_WORDS, _NAME, _NEXT = 5, 1, 3
"""struct link_map of <link.h>, in words."""


class _Libraries:
    """Copies of libcrypto that a libssl uses; found anew only when the dynamic linker has loaded something since."""

    def __init__(self) -> None:
        self._last: memoryview | None = None
        self._pools: dict[int, Pool] = {}

    def pools(self) -> dict[int, Pool]:
        """By the address of their RAND_add."""
        if self._last is None or self._last[_NEXT]:
            names = list(self._names())
            # Others only hash with it, as Python's hashlib does.
            wanted = any(os.path.basename(name).startswith("libssl") for name in names)
            self._pools = {address: pool for name in names if wanted and os.path.basename(name).startswith("libcrypto")
                           for address, pool in _pool_in(name).items()}
        return self._pools

    def _names(self) -> Iterator[str]:
        libc = ctypes.CDLL(None)
        first = ctypes.c_void_p()
        if not hasattr(libc, "dlinfo") or libc.dlinfo(ctypes.c_void_p(libc._handle), _RTLD_DI_LINKMAP, ctypes.byref(first)):
            return
        address = first.value
        while address:
            self._last = memoryview((ctypes.c_uint64 * _LINK_MAP_WORDS).from_address(address)).cast("B").cast("Q")
            yield os.fsdecode(ctypes.string_at(self._last[_NAME]))
            address = self._last[_NEXT]


_LIBRARIES = _Libraries()


def openssl_pools() -> list[Pool]:
    """What to call in a clone with some entropy each, one for every OpenSSL of this process."""
    modules: dict[str, Any] = sys.modules
    pools: list[Pool] = []
    libraries = dict(_LIBRARIES.pools())
    if "_ssl" in modules:
        # Without ctypes, which costs a clone more.
        pools.append(functools.partial(_add, modules["_ssl"].RAND_add))
        for address in _pool_in(getattr(modules["_ssl"], "__file__", None)):
            libraries.pop(address, None)
    if "cryptography.hazmat.bindings._rust" in modules:
        # Wheels have it linked in, with its names hidden; but pyOpenSSL needs this one.
        library: Any = getattr(getattr(modules["cryptography.hazmat.bindings._rust"], "_openssl", None), "lib", None)
        if hasattr(library, "RAND_add"):
            pools.append(lambda entropy: library.RAND_add(entropy, len(entropy), float(len(entropy))))
    return [*pools, *libraries.values()]


def _add(function: Callable[[bytes, float], object], entropy: bytes) -> object:
    return function(entropy, float(len(entropy)))


def _pool_in(name: str | None) -> dict[int, Pool]:
    """What a loaded library finds under the name RAND_add, in itself or in what it was linked with."""
    try:
        function = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)["RAND_add"]
    except (OSError, AttributeError):
        return {}
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double], None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    return {address: lambda entropy: function(entropy, len(entropy), float(len(entropy)))}
