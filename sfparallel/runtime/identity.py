"""What must change in a clone's Python process before user code runs: everything that would repeat in all clones.

The agent has renewed the machine (addresses, names, kernel random numbers, clock; DESIGN.md section 5). What is left are random
generators that live in this process's memory and are therefore the same in every clone. Modules that nobody imported are left
alone: they start with fresh state of their own.

Whatever can be done before the fork is done then, by `prepare`, because under emulation code that runs for the first time in a
clone is slow: `numpy.random.seed` alone took 120 to 150 ms there (measured), and the way it is done here takes 1 to 6.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from sfparallel.runtime.pools import openssl_pools

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ENTROPY_BYTES = 32
"""The least that makes a clone unique."""

_MT_WORDS = 624
_MT_KEY_BYTES = 4 * _MT_WORDS

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
"""All that a process has (setitimer(2))."""


class Renewal:
    """What to renew in this process; made before a fork, applied in the clones.

    Args:
        modules: whose state is renewed.
        timers: that are disarmed.
    """

    def __init__(self, modules: Mapping[str, Any] = sys.modules, timers: Sequence[int] = TIMERS) -> None:
        # A program may have modules of its own with these names.
        self._random = _with(modules, "random", "_inst")
        self._tempfile = _with(modules, "tempfile", "_name_sequence")
        self._uuid = _with(modules, "uuid", "_last_timestamp")
        self._openssls = openssl_pools()
        self._renew_numba = _numba_renewer(modules["numba._helperlib"]) if "numba._helperlib" in modules else None
        self._asyncio = modules.get("asyncio.events")
        self._reset_sqlite = _sqlite_reset(modules["_sqlite3"]) if "_sqlite3" in modules else None
        # A forked process has none of its parent's timers (fork(2)), whose signals would strike every clone.
        self._timers = [timer for timer in timers if signal.getitimer(timer) != (0.0, 0.0)]
        numpy_random = _with(modules, "numpy.random", "mtrand")
        self._renew_numpy = _renewer(numpy_random) if numpy_random is not None else None

    def apply(self, entropy: bytes) -> None:
        """Give this process an identity of its own.

        Args:
            entropy: bytes from the host that no other VM got. More is taken from the kernel, whose generator has been renewed.

        Raises:
            ValueError: too little entropy. The clone must not go on then.
        """
        if len(entropy) < ENTROPY_BYTES:
            raise ValueError(f"{len(entropy)} bytes of entropy cannot make a clone unique")
        if self._random is not None:
            # What random.seed(int) does, without its many cases.
            generator = self._random._inst
            self._random._random.Random.seed(generator, int.from_bytes(entropy, "little"))
            generator.gauss_next = None
        if self._renew_numpy is not None:
            self._renew_numpy()
        if self._tempfile is not None:
            # The generator of names guards itself by process id, which is the same in every clone.
            self._tempfile._name_sequence = None
        if self._uuid is not None:
            # libuuid keeps the parent's MAC address in a static variable, so that uuid1() would repeat: bypass it, and use a
            # random node id with the multicast bit set (RFC 4122 section 4.5).
            self._uuid._generate_time_safe = None
            self._uuid._node = int.from_bytes(os.urandom(6), "big") | 1 << 40
            self._uuid._last_timestamp = None
        for add in self._openssls:
            add(os.urandom(32))
        if self._renew_numba is not None:
            self._renew_numba()
        if self._reset_sqlite is not None:
            self._reset_sqlite()
        for timer in self._timers:
            signal.setitimer(timer, 0.0)

    def leave_event_loop(self) -> None:
        """Let the calling thread run an event loop of its own, when it was cloned inside a coroutine and will not go back there.

        In a forked process, asyncio's C code does not take the loop for running because the process id has changed
        (Modules/_asynciomodule.c: get_running_loop), and Python 3.12 and later forget the policy's loop (asyncio.events).
        """
        if self._asyncio is not None:
            self._asyncio._set_running_loop(None)
            local = getattr(self._asyncio._event_loop_policy, "_local", None)
            if local is not None:
                vars(local).clear()  # of this thread: others go on with theirs


def _with(modules: Mapping[str, Any], name: str, attribute: str) -> Any:
    """A module that has an attribute which is known of it, else None."""
    module = modules.get(name)
    return module if hasattr(module, attribute) else None


def _numba_renewer(helper: Any) -> Callable[[], None]:
    """How to renew the generators that compiled functions have for `random` and `numpy.random`, of the calling thread. numba does
    so itself in a forked process, by pthread_atfork (numba/_random.c)."""
    states = helper.rnd_get_np_state_ptr(), helper.rnd_get_py_state_ptr()

    def renew() -> None:
        for state in states:
            helper.rnd_seed(state, os.urandom(ENTROPY_BYTES))

    return renew


def _sqlite_reset(module: Any) -> Callable[[], object] | None:
    """How to have SQLite take fresh entropy, for `random()` and new row ids: it does so by itself only when it opens a database
    under another process id (os_unix.c: unixOpen), or when it is asked to (sqlite3_randomness with no bytes)."""
    import ctypes

    try:
        randomness = ctypes.CDLL(getattr(module, "__file__", None), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)["sqlite3_randomness"]
    except (OSError, AttributeError):  # linked into the module, and hidden there
        return None
    randomness.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return functools.partial(randomness, 0, None)


def _renewer(numpy_random: Any) -> Callable[[], None]:
    """How to renew numpy's global generator: in a clone, the result is called."""

    def by_seeding() -> None:
        seed = os.urandom(32)
        numpy_random.seed([int.from_bytes(seed[i:i + 4], "little") for i in range(0, len(seed), 4)])

    state = numpy_random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937" or state["has_gauss"]:
        # Not what numpy starts with; or half of a pair of normal deviates is waiting, which only seeding throws away.
        return by_seeding
    import ctypes

    generator = numpy_random.mtrand._rand._bit_generator
    # numpy publishes the address of the state, for C code. It is `uint32_t key[624]; int pos` (mt19937.h, since numpy 1.17).
    memory = memoryview((ctypes.c_uint8 * (_MT_KEY_BYTES + 4)).from_address(generator.ctypes.state_address)).cast("B")
    if bytes(memory[:_MT_KEY_BYTES]) != state["state"]["key"].tobytes():
        return by_seeding
    used_up = _MT_WORDS.to_bytes(4, sys.byteorder)
    lock = generator.lock

    def in_place() -> None:
        with lock:
            memory[:_MT_KEY_BYTES] = os.urandom(_MT_KEY_BYTES)
            memory[_MT_KEY_BYTES:] = used_up

    return in_place
