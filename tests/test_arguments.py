"""Arguments that name files of the host which the VM will not have are told before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfparallel.vmm.arguments import tell, unseen
from sfparallel.vmm.options import Program


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The current folder, with a folder beside it and links to that."""
    folder = tmp_path / "here"
    (folder / "own").mkdir(parents=True)
    (tmp_path / "big data").mkdir()
    (tmp_path / "big data" / "x.csv").write_text("")
    (folder / "own" / "y.csv").write_text("")
    (folder / "link.csv").symlink_to("../big data/x.csv")
    (folder / "round").symlink_to("round")
    return folder


@pytest.mark.parametrize(("argument", "told"), [
    ("../big data/x.csv", True), ("link.csv", True), ("--input=../big data/x.csv", True), ("../big data", True),
    ("../big data/new.png", True), ("../nothere/x.csv", False),
    ("own/y.csv", False), ("own/new.png", False), ("own", False), ("x.csv", False), ("round", False),
    ("", False), ("-v", False), ("--n=3", False), ("a\0b", False), ("https://example.org/x.csv", False), ("s/a/b/", False),
    ("/dev/null", False), ("/usr/bin/env", False), ("/", False), ("/tmp", False),
])  # fmt: skip
def test_what_is_told(here: Path, argument: str, told: bool) -> None:
    program = Program("script", ("../big data/x.csv", argument), here, here)
    found = unseen(program, [here])
    assert bool(found) == told, found
    assert not unseen(program, [here, here.parent / "big data"])
    assert set(found.values()) <= {here.parent / "big data"}
    assert unseen(Program("module", ("../big data/x.csv", argument), here, None), [here]) == found


def test_the_message_names_files_and_what_to_do(here: Path) -> None:
    notes: list[str] = []
    tell(Program("command", ("", "own", "link.csv", "../big data/x.csv"), here, None), [here], notes.append)
    big = here.parent / "big data"
    assert notes == [f"sfrun: arguments name files outside of the folders that the VM has: {here}/link.csv, {big}/x.csv\n"
                     f"  to read them, add `--data '{big}'`, or copy them here; "
                     "what is written there is lost: write below the current folder"]  # fmt: skip
    tell(Program("command", ("", "own", "3"), here, None), [here], notes.append)
    assert len(notes) == 1
