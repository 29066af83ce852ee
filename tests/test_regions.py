"""How the supervisor answers requests of programs, without VMs."""

from __future__ import annotations

import pytest

from sfparallel.errors import (
    CapacityError,
    EnvironmentProblem,
    NetworkError,
    PagingError,
    ProtocolError,
    SfError,
    StateError,
    UsageError,
    VMError,
)
from sfparallel.vmm.replies import failure


@pytest.mark.parametrize(("error", "kind"), [
    (ProtocolError("undecodable"), "invalid"), (UsageError("no such op"), "invalid"), (StateError("not now"), "state"),
    (CapacityError("full", fits=3), "capacity"), (EnvironmentProblem("no QEMU"), "clone_failed"), (VMError("x"), "clone_failed"),
    (PagingError("x"), "clone_failed"), (NetworkError("x"), "clone_failed"), (OSError(12, "no memory"), "clone_failed"),
    (SfError("x"), "clone_failed"),
])  # fmt: skip
def test_the_kind_of_an_error_follows_from_its_class(error: SfError | OSError, kind: str) -> None:
    answer = failure(error)
    assert answer["error"] == kind
    assert answer.get("fits") == (3 if kind == "capacity" else None)
