"""What must change in a clone's Python process before user code runs: everything that would repeat in all clones.

The agent has renewed the machine (addresses, names, kernel random numbers, clock; DESIGN.md section 5). What is left are random
generators that live in this process's memory and are therefore the same in every clone. Modules that nobody imported are not
imported here: they start with fresh state of their own, and imports are dear in a clone under emulation.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any


def _expand(entropy: bytes, purpose: str, length: int) -> bytes:
    """Independent bytes for each purpose, so that no two generators of one clone are related."""
    return hashlib.blake2b(purpose.encode(), key=entropy[:64], digest_size=length).digest()


def refresh(entropy: bytes) -> None:
    """Renew the identity of this process.

    Args:
        entropy: at least 16 bytes from the host that no other VM got.

    Raises:
        ValueError: too little entropy. The clone must not go on then.
    """
    if len(entropy) < 16:
        raise ValueError(f"{len(entropy)} bytes of entropy cannot make a clone unique")
    modules: dict[str, Any] = sys.modules
    if (random := modules.get("random")) is not None:
        random.seed(_expand(entropy, "random", 32))
    if (numpy_random := modules.get("numpy.random")) is not None:
        seed = _expand(entropy, "numpy.random", 32)
        numpy_random.seed([int.from_bytes(seed[i:i + 4], "little") for i in range(0, len(seed), 4)])
    if (tempfile := modules.get("tempfile")) is not None:
        # The generator of names guards itself by process id, which is the same in every clone.
        tempfile._name_sequence = None
    if (uuid := modules.get("uuid")) is not None:
        # libuuid keeps the parent's MAC address in a static variable, so that uuid1() would repeat: bypass it, and use a random
        # node id with the multicast bit set (RFC 4122 section 4.5).
        uuid._generate_time_safe = None
        uuid._node = int.from_bytes(_expand(entropy, "uuid", 6), "big") | 1 << 40
        uuid._last_timestamp = None
    if (ssl := modules.get("ssl")) is not None:
        # OpenSSL notices a fork by the process id only.
        ssl.RAND_add(_expand(entropy, "ssl", 32), 32.0)
