"""The agent's parts that do I/O (the program's streams, local clients), on the host, with ASan and UBSan."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import sfparallel

AGENT = Path(sfparallel.__file__).parent / "runtime" / "agent"
DRIVER = Path(__file__).parent / "native_agent" / "agent_parts.c"
PATIENCE_S = 60

Parts = Callable[..., str]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Runs the driver: `parts(mode, ...) -> what it printed`."""
    folder = tmp_path_factory.mktemp("agent")
    subprocess.run(["make", "-s", "-C", str(AGENT), f"OUT={folder}", f"DRIVER={DRIVER}", f"{folder}/agent_parts"], check=True)

    def call(*arguments: object) -> str:
        argv = [str(folder / "agent_parts"), *map(str, arguments)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.mark.parametrize("sizes", [(1001, 4001), (4095, 4095, 10, 4095), (1000,) * 8, (30000, 20000)])
def test_input_that_waits_for_its_reader_loses_nothing(parts: Parts, sizes: tuple[int, ...]) -> None:
    """A terminal in line mode drops what is more than its 4 KiB, and tells nobody."""
    assert parts("typed", *sizes) == f"{sum(sizes)} of {sum(sizes)}, right\n"


def test_an_end_of_file_is_read_before_the_line_behind_it(parts: Parts) -> None:
    assert parts("end") == "0 4 -1\n"


def test_a_clone_finds_no_input_of_its_parent_in_a_pipe_beside_a_terminal(parts: Parts) -> None:
    """As in `cat data | sfrun program.py`, seen on a terminal."""
    assert parts("discard") == "0\n"


@pytest.mark.needs("root")
def test_a_terminal_that_was_hung_up_does_not_hold_a_clone_up(parts: Parts) -> None:
    assert parts("hung") == "goes on\n"


def test_a_client_is_hung_up_if_it_cannot_be_answered(parts: Parts) -> None:
    assert parts("undeliverable") == "hung up\nhung up\n"
