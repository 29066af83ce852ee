"""What is renewed in a clone's Python process, and that importing the package costs nothing."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.runtime.identity import ENTROPY_BYTES, Renewal
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture


def fingerprint() -> dict[str, Any]:
    return {
        "random": random.random(),
        "numpy": float(np.random.random()),
        "tempfile": tempfile.mktemp(),
        "uuid1": uuid.uuid1().node,
        "uuid4": uuid.uuid4(),
    }


def test_no_two_ranks_share_a_stream(double: Doubles) -> None:
    fingerprint()  # everything is initialised in the parent, as it would be in a long program
    prints = [*sf.parallel(n=6)(fingerprint)(), fingerprint()]
    for what in prints[0]:
        assert len({each[what] for each in prints}) == 7, what


def test_renewal_renews_every_generator() -> None:
    seen = []
    for _ in range(4):
        state = np.random.get_state(), random.getstate()
        Renewal().apply(os.urandom(ENTROPY_BYTES))
        seen.append((random.random(), float(np.random.random()), uuid.getnode(), tempfile.mktemp()))
        np.random.set_state(state[0])
        random.setstate(state[1])
    for values in zip(*seen, strict=True):
        assert len(set(values)) == 4
    assert uuid.getnode() & 1 << 40, "a random node id has the multicast bit"


def test_numpys_generator_is_sound_after_a_renewal() -> None:
    Renewal().apply(os.urandom(ENTROPY_BYTES))
    state: Any = np.random.get_state(legacy=False)
    assert state["state"]["pos"] == 624
    copy = np.random.RandomState()
    copy.set_state(state)
    assert (np.random.random(2000) == copy.random(2000)).all()
    assert abs(np.random.random(10_000).mean() - 0.5) < 0.05


def test_half_a_pair_of_normal_deviates_is_thrown_away() -> None:
    np.random.seed(1)
    first, second = np.random.normal(), np.random.normal()
    random.seed(1)
    third, fourth = random.gauss(0, 1), random.gauss(0, 1)
    np.random.seed(1)
    random.seed(1)
    assert (np.random.normal(), random.gauss(0, 1)) == (first, third)
    Renewal().apply(os.urandom(ENTROPY_BYTES))
    assert np.random.normal() != second
    assert random.gauss(0, 1) != fourth


def test_another_global_generator_is_seeded() -> None:
    module: Any = np.random
    before = module.get_bit_generator()
    try:
        module.set_bit_generator(np.random.MT19937(3))
        expected = np.random.random()
        module.set_bit_generator(np.random.MT19937(3))
        Renewal().apply(os.urandom(ENTROPY_BYTES))
        assert np.random.random() != expected
    finally:
        module.set_bit_generator(before)


def test_too_little_entropy_is_refused() -> None:
    with pytest.raises(ValueError):
        Renewal().apply(b"")


def test_importing_is_light() -> None:
    program = "import sfparallel as sf, sys; sf.parallel(n=2)(len); sf.in_clone(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "zmq", "libvirt", "cffi", "pyroute2", "rich", "cloudpickle"} & set(modules)


def test_everything_public_is_there() -> None:
    for name in sf.__all__:
        assert getattr(sf, name).__doc__, name
    assert set(sf.__all__) <= set(dir(sf))
    with pytest.raises(AttributeError):
        sf.no_such_thing  # noqa: B018


def test_warm_up_leaves_the_program_as_it_was() -> None:
    program = """
import os, random, sys, uuid
import numpy as np
from sfparallel.runtime.here import HERE
from sfparallel.runtime.warm import warm_up
warm_up()
before = len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task'))
random.seed(1)
np.random.seed(1)
kept = random.getstate(), np.random.get_state()[1].tobytes(), uuid.getnode()
warm_up()
assert (len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task'))) == before
assert (random.getstate(), np.random.get_state()[1].tobytes(), uuid.getnode()) == kept
assert HERE._context is None and HERE.generation == 0
"""
    subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", program], check=True)


def test_warm_up_for_whole_programs() -> None:
    program = """
import sys
from sfparallel.runtime.warm import warm_up
warm_up(whole_program=True)
assert not {'numpy', 'cloudpickle'} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_program_may_have_modules_with_names_of_others(tmp_path: Path) -> None:
    for name in ("numpy", "random", "tempfile", "uuid"):
        (tmp_path / f"{name}.py").write_text(f"print({name!r})")
    program = """
import sys
import sfparallel as sf
from sfparallel.runtime.identity import Renewal
from sfparallel.runtime.warm import warm_up
sf.parallel(n=2)
warm_up()
import random, tempfile, uuid
Renewal().apply(bytes(32))
assert not {"_name_sequence", "_node"} & {*vars(tempfile), *vars(uuid)}
assert "numpy" not in sys.modules, "it is run when the program says so"
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.split()) == ["random", "tempfile", "uuid"]


def test_clones_keep_the_collector_off_their_parents_memory(double: Doubles) -> None:
    clones = sf.parallel(n=2)(gc.get_freeze_count)()
    assert min(clones) > 1000 and gc.get_freeze_count() == 0
