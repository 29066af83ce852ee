"""Forks of clones, and forks with clones alive: right values, identities of their own, and no more memory than was dirtied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm.record import PARENT, Phase
from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")


def commits(path: Path, vm: str | None = None) -> list[dict[str, Any]]:
    """What each commit of a trace did, in order of time; of one VM or of all."""
    events = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found = [event for event in events if event["name"] == Phase.COMMIT.value and vm in (None, names[event["pid"]])]
    return [event["args"] for event in sorted(found, key=lambda event: event["ts"])]


def test_three_levels_of_clones_alive_at_once(sfrun: Sfrun) -> None:
    """Eight clones of four clones of two clones: a server in the first parent lets the eight go when all of them are there."""
    ended = sfrun(
        """
        import os, pathlib, socket, threading
        import sfparallel as sf

        path = []
        listener = socket.create_server(("0.0.0.0", 7000))

        def meet():
            guests = [listener.accept()[0] for _ in range(8)]
            seen = sorted(guest.recv(100).decode() for guest in guests)
            for guest in guests:
                guest.sendall(b"go")
            print("met", *seen, flush=True)

        def identity():
            return socket.gethostname(), pathlib.Path("/etc/machine-id").read_text(), os.urandom(8), sf.rng().random()

        def descend(level):
            path.append(sf.comm().rank)
            mine = identity()
            if level < 3:
                below = sf.parallel(n=2)(descend)(level + 1)
            else:
                with socket.create_connection(("10.83.0.1", 7000)) as line:
                    line.sendall("".join(map(str, path)).encode())
                    assert line.recv(2) == b"go"
                below = []
            assert mine[:2] == identity()[:2]
            return list(path), mine, below

        threading.Thread(target=meet).start()
        tree = sf.parallel(n=2)(descend)(1)

        def flat(nodes):
            return [found for path, mine, below in nodes for found in [(path, mine), *flat(below)]]

        found = flat(tree)
        print("paths", *("".join(map(str, path)) for path, _ in found))
        for part in zip(*(mine for _, mine in found)):
            assert len({*part}) == 14, part
        print("parent", path, sf.parallel(n=1)(lambda: list(path))())
        """,
        "--trace", "out.json",
    ).ok()  # fmt: skip
    lines = sorted(ended.out.splitlines())
    leaves = [f"{a}{b}{c}" for a in "01" for b in "01" for c in "01"]
    assert lines[0] == "met " + " ".join(leaves)
    assert lines[1] == "parent [] [[]]"
    assert lines[2].split()[1:] == sorted(leaves + [leaf[:2] for leaf in leaves[::2]] + ["0", "1"])
    made = commits(sfrun.folder / "out.json")
    assert len(made) == 1 + 2 + 4 + 1
    # An image has the template's layer and one for each VM from the first parent down; at the end all others are gone.
    assert sorted(commit["layers"] for commit in made) == [2, 2, 3, 3, 4, 4, 4, 4]
    assert made[-1]["layers_of_job"] == 2


def test_a_fork_with_the_clones_of_the_one_before_alive(sfrun: Sfrun) -> None:
    """The second fork must leave the layer alone that the first clones map, and stores only what was dirtied since."""
    sfrun(
        """
        import threading
        import numpy as np
        import sfparallel as sf

        data = np.ones(16 << 20, dtype=np.uint8)
        ticket = sf.request_ticket(2)
        me = sf.clone(ticket)
        if me:
            inner = sf.parallel(n=1)(lambda: int(data.sum()))
            data[:1 << 20] += me                    # each clone goes on by itself, and forks with its own changes
            seen = inner()[0]
            sf.exit(100 + me if seen == len(data) + me * (1 << 20) else 1)
        data[:1 << 20] = 7
        assert sf.parallel(n=2)(lambda: int(data[0]) + int(data[-1]))() == [8, 8]
        assert sf.join(ticket) == {1: 101, 2: 102}
        assert sf.parallel(n=1)(lambda: int(data[0]))() == [7]
        """,
        "--trace", "out.json", "--no-label",
    ).ok()  # fmt: skip
    made = commits(sfrun.folder / "out.json", PARENT)
    assert made[0]["stored_pages"] > 4096
    assert 256 <= made[1]["stored_pages"] < 1536
    assert made[-1]["layers"] <= 3 and made[-1]["layers_of_job"] <= 3


def test_the_second_of_two_forks_stores_what_was_touched(sfrun: Sfrun) -> None:
    """1 MB of an array of 2 GiB, and what Python and the guest's kernel write anyway: together under 4 MB."""
    sfrun(
        """
        import numpy as np
        import sfparallel as sf

        big = np.ones(1 << 28)
        look = sf.parallel(n=1)(lambda: float(big[5 << 20]))
        assert look() == [1.0]
        big[5 << 20:(5 << 20) + 125_000] = 2.0
        assert look() == [2.0]
        """,
        "--memory", "3G", "--trace", "out.json",
    ).ok()  # fmt: skip
    first, second = commits(sfrun.folder / "out.json")
    assert first["stored_pages"] * 4096 > 2 << 30
    assert 1_000_000 <= second["stored_pages"] * 4096 < 4_000_000


def test_images_in_tens_of_thousands_of_pieces(sfrun: Sfrun) -> None:
    """Neither what shells are mapped by while they wait, nor what is laid over it, comes near the kernel's limit of mappings."""
    ended = sfrun(
        """
        import time
        import numpy as np
        import sfparallel as sf

        pages = np.ones((100 << 10, 4096), np.uint8)

        def probe():
            return int(pages[::6, 0].sum()), int(pages[3::6, 0].sum()), int(pages[::97, 7].sum())

        def fork(n):
            got = sf.parallel(n=n)(probe)()
            assert got == [probe()] * n, (got, probe())
            time.sleep(2)  # the pool becomes full, with shells that are mapped by what the parent is now

        fork(1)
        earlier = sf.checkpoint_parent()
        pages[::6, 0] += 1  # to a layer of its own, of which half goes back to the large one with each fork
        fork(2)
        earlier.close()
        for half in (slice(0, 51_198, 6), slice(51_198, 102_300, 6)):
            pages[half, 0] += 1
            fork(1)
        earlier = sf.checkpoint_parent()
        pages[3::6, 0] += 1
        fork(3)
        print("right")
        """,
        "-n", "4", "--memory", "768M",
    ).ok()  # fmt: skip
    assert ended.out == "right\n"
