"""Errors that come of being in a VM say so: what the image lacks, which files of the host there are, that there is no network."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sfparallel.runtime import guest_errors
from tests.conftest import Sfrun

PROGRAM = """
import os
import subprocess
import sys
import urllib.request
import numpy
import sfparallel as sf

def module():
    import nothere.deeper

def library():
    import tkinter

def part_of_a_module():
    import json.nothere

def program():
    subprocess.run(["nothere", "-v"])

def program_by_path():
    subprocess.run(["/usr/bin/nothere"])

def host_file():
    open(sys.argv[1])

def file_that_only_the_message_names():
    numpy.loadtxt(sys.argv[1])

def linked_file():
    open("link.csv")

def linked_folder():
    numpy.loadtxt("link/deeper.csv")

def own_file():
    open("nothere.txt")

def own_file_that_only_the_message_names():
    raise FileNotFoundError("no folder/nothere.txt, see https://example.org/nothere")

def network():
    urllib.request.urlopen("http://192.0.2.1/", timeout=5)

def name():
    urllib.request.urlopen("http://example.org/", timeout=5)

calls = (module, library, part_of_a_module, program, program_by_path, host_file, file_that_only_the_message_names, linked_file,
         linked_folder, own_file, own_file_that_only_the_message_names, network, name)
for call, error in zip(calls, sf.parallel_map(lambda call: call(), calls, n=2, on_error="return")):
    notes, at = [], error
    while at is not None:
        notes += getattr(at, "__notes__", [])
        at = at.__cause__ or at.__context__
    print("##", call.__name__, type(error).__name__, *notes)
os.chdir("/")
import nothere
"""


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
@pytest.mark.needs("image")
def test_what_a_vm_does_not_have_is_told_with_the_remedy(sfrun: Sfrun, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.csv"
    (tmp_path / "link.csv").symlink_to(outside)
    (tmp_path / "link").symlink_to("../outside")
    ended = sfrun(PROGRAM, args=(str(outside),))
    told = {part.split()[0]: part for part in ended.out.split("## ")[1:]}
    assert len(told) == 13, ended
    build = "sf image build default --from default"
    for call, words in {
        "module": ("has no module 'nothere'", f"{build} --pip nothere"), "library": (f"{build} --package python3-full",),
        "program": ("has no program 'nothere'", f"{build} --package PACKAGE"),
        "program_by_path": ("has no program '/usr/bin/nothere'",),
        "host_file": ("--data FOLDER", f"{outside} is in none of them"),
        "file_that_only_the_message_names": ("--data FOLDER", f"{outside} is in none of them"),
        "linked_file": (f"{tmp_path}/link.csv is a link to {outside}, which is in none of them",),
        "linked_folder": (f"{tmp_path}/link/deeper.csv is a link to {tmp_path.parent}/outside/deeper.csv",),
        "network": ("VMs have no network",),
        "name": ("VMs have no network",),
    }.items():  # fmt: skip
        assert all(word in told[call] for word in words), (call, told[call])
    for call in ("part_of_a_module", "own_file", "own_file_that_only_the_message_names"):
        assert "image" not in told[call] and "folders of the host" not in told[call], told[call]
    assert ended.code == 1 and "`sfrun --env PYTHONPATH" in ended.err.splitlines()[-2]
    assert f"{build} --pip nothere" in ended.err
    assert f"arguments name files outside of the folders that the VM has: {outside}\n" in ended.err


def test_a_note_is_added_once() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    group = ExceptionGroup("both", [error, ValueError()])
    group.__cause__ = error
    for _ in range(2):
        guest_errors.explain(group)
    assert error.__notes__ == [guest_errors.FULL_DISK]
