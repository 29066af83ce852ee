"""What must differ between clones does, and what must not be inherited is not."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")

PROGRAM = """
    import json, os, random, socket, tempfile, time, uuid
    import numpy as np
    import sfparallel as sf

    random.seed(1); np.random.seed(1); random.random(); tempfile.mkstemp()

    def address():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.83.255.1", 9))
            return probe.getsockname()[0]

    @sf.parallel(n=6)
    def who():
        net = "/sys/class/net/eth0/address"
        return {
            "mac": open(net).read().strip(),
            "address": address(),
            "hostname": socket.gethostname(),
            "machine_id": open("/etc/machine-id").read().strip(),
            "kernel_random": os.urandom(16).hex(),
            "random": [random.random() for _ in range(4)],
            "numpy": np.random.random(4).tolist(),
            "rng": sf.rng().random(4).tolist(),
            "tempfile": tempfile.mktemp(),
            "uuid1": str(uuid.uuid1()),
            "uuid4": str(uuid.uuid4()),
            "pid": os.getpid(),
        }

    answers = who()
    now = {"mac": open("/sys/class/net/eth0/address").read().strip(), "hostname": socket.gethostname(),
           "machine_id": open("/etc/machine-id").read().strip(), "pid": os.getpid(), "address": address()}
    print(json.dumps({"clones": answers, "parent": now}))
"""


def test_no_two_ranks_share_an_identity(sfrun: Sfrun) -> None:
    said = json.loads(sfrun(PROGRAM).ok().out)
    clones, parent = said["clones"], said["parent"]
    machine = ("mac", "address", "hostname", "machine_id")
    for key in (*machine, "kernel_random", "random", "numpy", "rng", "tempfile", "uuid1", "uuid4"):
        values = [json.dumps(clone[key]) for clone in clones]
        assert len(set(values)) == len(values), f"{key} is shared: {values}"
        if key in parent:
            assert json.dumps(parent[key]) not in values, f"{key} is the parent's"
    # getpid() is the same in all clones: nothing may be keyed on it (DESIGN, section 5).
    assert {clone["pid"] for clone in clones} == {parent["pid"]}


def test_no_two_ranks_make_the_same_keys(sfrun: Sfrun) -> None:
    """With any OpenSSL that is in the process: Python's, and one that another library brings along."""
    ended = sfrun(
        """
        import ctypes, glob, shutil, ssl
        import sfparallel as sf

        shutil.copy(glob.glob("/usr/lib/*/libcrypto.so.3")[0], "/tmp/libcrypto-copy.so.3")
        copy = ctypes.CDLL("/tmp/libcrypto-copy.so.3")

        def draw():
            data = ctypes.create_string_buffer(16)
            assert copy.RAND_bytes(data, 16) == 1
            return data.raw, ssl.RAND_bytes(16)

        draw()
        for _ in range(2):
            drawn = sf.parallel(draw, n=3)()
            assert len({*sum(drawn, ()), *draw()}) == 8, drawn
        print("differ")
        """
    ).ok()
    assert ended.out == "differ\n"


@pytest.mark.needs("numba")
def test_compiled_functions_draw_other_numbers_in_each_rank(sfrun: Sfrun) -> None:
    """numba has generators of its own."""
    ended = sfrun(
        """
        import random
        import numpy as np
        import sfparallel as sf
        from numba import njit

        @njit
        def draw():
            return np.random.random(), random.random()

        draw()
        drawn = sf.parallel(draw, n=3)()
        assert len({*sum(drawn, ()), *draw()}) == 8, drawn
        print("differ")
        """, "--image", "numba", "--memory", "1024",
    ).ok()  # fmt: skip
    assert ended.out == "differ\n"


def test_seeded_streams_repeat_and_do_not_depend_on_n(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import sfparallel as sf

        draw = sf.parallel(seed=7)(lambda: sf.rng().integers(1 << 62))
        one, two = draw.options(n=2)(), draw.options(n=2)()
        assert one == two and one[0] != one[1]
        def item(i):
            return int(sf.rng().integers(1 << 62))
        assert sf.parallel_map(item, range(6), n=2, seed=7) == sf.parallel_map(item, range(6), n=3, seed=7)
        print("same")
        """
    ).ok()
    assert ended.out.strip() == "same"


def test_wall_clock_and_hooks(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import time
        import sfparallel as sf

        seen = []
        sf.on_clone(lambda rank: seen.append(rank))

        @sf.parallel(n=2)
        def now():
            return time.time(), seen

        parent = time.time()
        for rank, (clone, hooks) in enumerate(now()):
            assert abs(clone - parent) < 30, (clone, parent)
            assert len(hooks) == 1
        assert seen == []
        print("in step")
        """
    ).ok()
    assert ended.out.strip() == "in step"


def test_sockets_of_the_parent_are_dead_in_clones(sfrun: Sfrun) -> None:
    """A clone must not speak on a connection that the parent has to a peer."""
    ended = sfrun(
        """
        import socket, threading
        import sfparallel as sf

        @sf.parallel(n=1)
        def ghost(sock):
            sock.settimeout(5)
            try:
                sock.sendall(b"from the clone")
                return "sent"
            except OSError as error:
                return type(error).__name__

        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        probe.connect(("10.83.0.2", 9))
        address = probe.getsockname()[0]
        listener = socket.create_server((address, 0))
        mine = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        print(ghost(mine)[0])
        mine.sendall(b"from the parent")
        print(theirs.recv(100).decode())
        """
    ).ok()
    said = ended.out.split("\n")
    assert said[0] in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
    assert said[1] == "from the parent"
