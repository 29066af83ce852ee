"""Which tests run in the outer VM: a plugin of pytest there, which also writes down how each one ended, as it ends.

Every test that runs Linux in a VM or needs KVM is one of them, also one that is written tomorrow. What is left out stands in
LEFT_OUT.

Its settings are variables of the environment: KVM_RESULTS is the file to write to, KVM_TESTS one that lists tests, one a line
(without it: all), KVM_STOP one that ends the run after the present test, once it is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = {
    "tests/test_agent.py": "starts QEMU without the engine, always with TCG (tests/agent_guest.py)",
    "tests/test_bench_fork.py": "whether the benchmark takes samples; an hour of guests' boots here",
    "tests/test_cpu_check.py": "about QEMU's emulation of the processor",
    "tests/test_emulation.py": "about emulated guests",
    "tests/test_template.py": "compares the processor model that emulated guests get",
    "tests/test_dist.py": "about the wheel, with pip",
    "tests/test_image.py": "unpacks an image; no VM",
    "tests/test_executor_suite.py": "about code of others in Python, 20 minutes here",
    "tests/test_upstream_suites.py": "about code of others in Python, hours here",
}
"""File, or test, and why it does not run here."""

IMAGES_MISSING = frozenset({"ml", "numba", "blast", "render"})
"""What the cache disk does not have: these tests are about packages in a guest, not about how the guest is run."""

SMOKE = (
    "tests/test_kvm.py",
    "tests/test_fork.py::test_eight_clones_return_their_ranks",
    "tests/test_fork.py::test_fork_of_a_clone",
    "tests/test_fork.py::test_low_level_calls_have_the_meaning_of_fork",
)
"""Enough to see within minutes that forks work under KVM. They are also the first ones of a run of all."""

NEXT = tuple(f"tests/test_{name}.py" for name in ("fork", "nested", "checkpoints", "shapes", "identity", "job_control"))
"""What comes next: a run may be cut off, and these save, load and stop VMs in all ways that there are."""


def needs_of(item: pytest.Item) -> set[str]:
    return {need for marker in item.iter_markers("needs") for need in marker.args}


def is_one_of(test: str, names: Iterator[str] | tuple[str, ...]) -> bool:
    """If a test is named by its own identifier, without its parameters, or by its file."""
    return not {test, test.partition("[")[0], test.partition("::")[0]}.isdisjoint(names)


def belongs(item: pytest.Item) -> bool:
    """If a test runs in the outer VM."""
    needs = needs_of(item)
    return bool(needs & {"image", "kvm"}) and not needs & IMAGES_MISSING and not is_one_of(item.nodeid, tuple(LEFT_OUT))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # KVM's own tests are parametrized with emulation next to it: these run everywhere else.
    chosen = [item for item in items if belongs(item) or item.nodeid.startswith(SMOKE[0])]
    listed = os.environ.get("KVM_TESTS")
    if listed and Path(listed).exists():
        names = tuple(Path(listed).read_text().split("\n"))
        chosen = [item for item in chosen if is_one_of(item.nodeid, names)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = sorted(chosen, key=lambda item: (not is_one_of(item.nodeid, SMOKE), not is_one_of(item.nodeid, NEXT)))


class Ends:
    """Writes one line for each test: its identifier, how it ended, seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds = 0.0
        self._worst = "passed"

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds += report.duration
        if report.outcome != "passed" and self._worst != "failed":
            self._worst = report.outcome
        if report.when == "teardown":
            self._write({"test": report.nodeid, "outcome": self._worst, "seconds": round(self._seconds, 1)})
            self._seconds, self._worst = 0.0, "passed"

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    stop = os.environ.get("KVM_STOP")
    if stop and Path(stop).exists():
        item.session.shouldstop = "its time is over"


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get("KVM_RESULTS"):
        config.pluginmanager.register(Ends(Path(path)), "kvm-ends")
