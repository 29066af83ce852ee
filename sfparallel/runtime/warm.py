"""Goes once along a region's way, in the parent; see `lowlevel.prepare`.

Under emulation each path of code that is new in a clone is slow there, and what a clone imports is its private memory: measured
under TCG, eight clones that asked for `sf.comm()` answered after 4.8 to 5.8 s without this, and after 0.5 to 0.9 s with it.
"""

from __future__ import annotations

import _random
import contextlib
import importlib.util
import os
from types import SimpleNamespace

import zmq

from sfparallel import wire
from sfparallel.runtime import api, collect, region  # noqa: F401
from sfparallel.runtime.emulation import is_emulated
from sfparallel.runtime.identity import ENTROPY_BYTES, Renewal
from sfparallel.runtime.link import as_bytes, set_up_dealer
from sfparallel.runtime.payload import IN_BAND_BYTES, UsersCode, dump_error, dumps, load_error, loads


def warm_up(*, whole_program: bool = False) -> None:
    """Import what a clone may ask for, and send a result and an error over the loopback device.

    This runs in the program's process, at a moment of the program's choice: what the program has is left as it is, its random
    generators above all.

    Args:
        whole_program: clones will run all of it, and import themselves what it asks for.
    """
    is_emulated()
    if not whole_program and _has_numpy():
        # Where it cannot be imported, whatever that raises, a program that does not ask for it need not know.
        with UsersCode():
            from sfparallel.runtime import by_value, communicator, rng  # noqa: F401
            from sfparallel.runtime.mpi import comm, endpoint  # noqa: F401
            rng.Streams(0).generator(0).random()
    # Whatever the program lacks for this, descriptors say: the region itself will tell.
    with contextlib.suppress(OSError, zmq.ZMQError), zmq.Context() as context, \
         context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        _exchange(router, dealer)
    try:
        raise ValueError("warming up")
    except ValueError as error:
        load_error(*dump_error(error, 0), "rank 0")
    stand_ins = {"random": SimpleNamespace(_inst=_Generator(), _random=_random),
                 "tempfile": SimpleNamespace(_name_sequence=None), "uuid": SimpleNamespace(_last_timestamp=None)}
    Renewal(stand_ins, timers=()).apply(os.urandom(ENTROPY_BYTES))


class _Generator(_random.Random):
    """What `random.Random` is, without that module, of which name a program may have one of its own."""

    gauss_next: float | None = None


def _has_numpy() -> bool:
    """Whether numpy is what it is elsewhere: a program may have a numpy.py of its own, which is run when the program says so."""
    found = importlib.util.find_spec("numpy")
    return found is not None and found.submodule_search_locations is not None


def _exchange(router: zmq.Socket[bytes], dealer: zmq.Socket[bytes]) -> None:
    router.setsockopt(zmq.LINGER, 0)
    router.bind(as_bytes("tcp://127.0.0.1:*"))
    set_up_dealer(dealer)
    dealer.connect(as_bytes(router.getsockopt_string(zmq.LAST_ENDPOINT)))
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    for value in (0, [1.0, "x"], bytes(IN_BAND_BYTES)):
        # With a copy: without one, PyZMQ starts a thread of its own, which every clone would have to wake.
        dealer.send_multipart([wire.pack({"kind": "result", "rank": 0, "key": 0}), *dumps(value)])
        poller.poll(10_000)
        parts = router.recv_multipart(copy=False)
        wire.unpack(parts[1].bytes)
        loads([part.buffer for part in parts[2:]])
        router.send_multipart([parts[0].bytes, wire.pack({"kind": "release"})])
        dealer.recv_multipart()
