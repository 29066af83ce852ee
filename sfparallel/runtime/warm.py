"""Goes once along a region's path; see `sfparallel.runtime.warm_up`."""

from __future__ import annotations

import os
import sys

import numpy as np
import zmq
import zmq.utils.garbage

from sfparallel import wire
from sfparallel.runtime import api, collect, communicator, connection, here, lowlevel, region, rng  # noqa: F401
from sfparallel.runtime.emulation import is_emulated
from sfparallel.runtime.identity import ENTROPY_BYTES, refresh
from sfparallel.runtime.link import set_up_dealer
from sfparallel.runtime.payload import IN_BAND_BYTES, dump_error, dumps, load_error, loads


def warm_up() -> None:
    """Look up every public name; send a result and an error over the loopback device; renew the identity."""
    package = sys.modules[__name__.partition(".")[0]]
    for name in package.__all__:
        getattr(package, name)
    is_emulated()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.setsockopt(zmq.LINGER, 0)
        router.bind("tcp://127.0.0.1:*")
        set_up_dealer(dealer)
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        dealer.connect(endpoint)
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        for value in (0, [1.0, "x"], np.zeros(IN_BAND_BYTES, dtype=np.uint8)):
            dealer.send_multipart([wire.pack({"kind": "result", "rank": 0, "key": 0}), *dumps(value)], copy=False)
            poller.poll(10_000)
            parts = router.recv_multipart(copy=False)
            wire.unpack(parts[1].bytes)
            loads([part.buffer for part in parts[2:]])
            router.send_multipart([parts[0].bytes, wire.pack({"kind": "release"})])
            dealer.recv_multipart()
    # Sending without a copy has started a thread and a context of PyZMQ's own, which every clone would have to wake.
    zmq.utils.garbage.gc.stop()
    try:
        raise ValueError("warming up")
    except ValueError as error:
        load_error(*dump_error(error, 0), "rank 0")
    rng.Streams(0).generator(0).random()
    refresh(os.urandom(ENTROPY_BYTES))
