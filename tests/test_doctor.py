"""`sf doctor` on this machine, and on what a machine may lack."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sfparallel.config import ACCEL, CACHE, QEMU
from sfparallel.errors import ImageMissing, UsageError
from sfparallel.vmm import doctor, kvm
from sfparallel.vmm.doctor import Finding, Status, diagnose, render
from sfparallel.vmm.verdict import verdict_of


def found(name: str) -> Finding:
    return next(finding for finding in diagnose(lambda: "/image") if finding.name == name)


def fake_program(folder: Path, script: str) -> str:
    path = folder / "fake-qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# -- this machine ------------------------------------------------------------------------------------------------------


def test_every_problem_has_a_remedy_and_every_name_is_its_own() -> None:
    findings = diagnose(lambda: "/image")
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail and "\n" not in finding.detail
        assert bool(finding.remedy) == (finding.status is not Status.OK), finding


@pytest.mark.needs("root")
@pytest.mark.needs("net")
@pytest.mark.needs("qemu")
def test_what_the_other_tests_need_is_found_here() -> None:
    states = {finding.name: finding.status for finding in diagnose(lambda: "/image")}
    for name in ("permission", "QEMU", "clone network", "private mounts", "/dev/net/tun", "libvirt for Python"):
        assert states[name] is Status.OK, name


@pytest.mark.needs("root")
def test_without_privileges_it_says_forbidden() -> None:
    """Modules are loaded before the step down: they may lie where only root can read."""
    program = ("import json, os; from sfparallel.vmm import doctor; import libvirt; "
               "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); "
               "print(json.dumps({f.name: [f.status.value, f.remedy] for f in doctor.diagnose(lambda: 1)}))")
    environment = {**os.environ, CACHE.variable: "/nowhere/at/all"}
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    states = json.loads(done.stdout)
    assert "root" in states["permission"][1]
    for name in ("permission", "clone network", "private mounts", "cache folder"):
        assert states[name][0] == "forbidden", (name, states[name])


# -- QEMU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "status", "words"), [
    ('echo \'{"QMP": {"version": {"qemu": {"major": 5, "minor": 2, "micro": 0}}}}\'', Status.BROKEN, "5.2.0"),
    ('echo \'{"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 1}}}}\'', Status.OK, "9.0.1"),
    ("echo missing libfoo.so >&2; exit 1", Status.BROKEN, "libfoo.so"),
    ("echo '[]'", Status.BROKEN, "no QEMU"),
])  # fmt: skip
def test_qemu_is_asked_for_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, status: Status, words: str
) -> None:
    monkeypatch.setenv(QEMU.variable, fake_program(tmp_path, script))
    finding = found("QEMU")
    assert finding.status is status
    assert words in finding.detail


def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QEMU.variable, "qemu-of-another-world")
    finding = found("QEMU")
    assert (finding.status, finding.needed) == (Status.ABSENT, True)
    assert "apt install" in finding.remedy


# -- KVM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.needs("qemu")
def test_the_counting_guest_runs_and_ends() -> None:
    program = shutil.which(QEMU.get())
    assert program is not None
    assert kvm.run_firmware(program, "tcg", timeout_s=30) == ""
    assert "did not end" in kvm.run_firmware(program, "tcg", timeout_s=0.001)
    assert "nonsense" in kvm.run_firmware(program, "nonsense")


def test_kvm_that_is_absent_forbidden_or_something_else(tmp_path: Path) -> None:
    assert kvm.probe_kvm(str(tmp_path / "kvm")).status is Status.ABSENT
    assert kvm.probe_kvm("/dev/null").status is Status.BROKEN
    findings = [verdict_of(OSError(code, os.strerror(code)), "x", "x fails", "mend", forbidden="ask")
                for code in (errno.ENOENT, errno.EACCES, errno.EIO)]
    assert [(finding.status, finding.remedy) for finding in findings] == [
        (Status.ABSENT, "mend"), (Status.FORBIDDEN, "ask"), (Status.BROKEN, "mend")]  # fmt: skip


@pytest.mark.needs("kvm")
def test_kvm_without_processor_support_is_not_trusted() -> None:
    finding = kvm.probe_kvm(flags=frozenset({"fpu"}))
    assert (finding.status, finding.needed) == (Status.BROKEN, False)
    assert "vmx" in finding.detail and "TCG" in finding.remedy


@pytest.mark.needs("kvm")
@pytest.mark.needs("qemu")
def test_kvm_with_processor_support_is_tried_once_per_boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "runs"
    monkeypatch.setenv(QEMU.variable, fake_program(tmp_path, f"echo run >> {log}; exit 65"))
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "cache"))
    for _ in range(3):
        assert kvm.probe_kvm(flags=frozenset({"vmx"})).status is Status.OK
    assert log.read_text() == "run\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["kvm.json"]
    monkeypatch.setenv(QEMU.variable, fake_program(tmp_path, "echo no luck >&2; exit 1  # another program: asked again"))
    finding = kvm.probe_kvm(flags=frozenset({"vmx"}))
    assert finding.status is Status.BROKEN and "no luck" in finding.detail
    (tmp_path / "cache" / "kvm.json").write_text("[")
    assert kvm.probe_kvm(flags=frozenset({"svm"})).status is Status.BROKEN


def test_accelerator_obeys_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("kvm", "tcg"):
        monkeypatch.setenv(ACCEL.variable, value)
        assert doctor.accelerator() == value
    monkeypatch.setenv(ACCEL.variable, "xen")
    with pytest.raises(UsageError, match="SF_ACCEL"):
        doctor.accelerator()
    monkeypatch.setenv(ACCEL.variable, "auto")
    assert doctor.accelerator() == ("kvm" if kvm.probe_kvm().status is Status.OK else "tcg")


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_image() -> None:
    def missing() -> object:
        raise ImageMissing("there is no image 'default'")

    def unreadable() -> object:
        raise PermissionError(errno.EACCES, "Permission denied")

    def unloadable() -> object:
        raise ModuleNotFoundError("No module named 'x'")

    states = [doctor._image(find) for find in (missing, unreadable, unloadable, lambda: "/image")]
    assert [finding.status for finding in states] == [Status.ABSENT, Status.FORBIDDEN, Status.BROKEN, Status.OK]
    assert states[0].remedy == "sf image build"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "deep" / "down"))
    assert found("cache folder").status in (Status.OK, Status.BROKEN)
    assert not (tmp_path / "deep").exists(), "the doctor only looks"
    monkeypatch.setenv(CACHE.variable, "/proc/nothing-fits-here")
    assert found("cache folder").status is not Status.OK


def test_render() -> None:
    text = render([Finding("a", Status.OK, "fine"), Finding("long name", Status.ABSENT, "not there", "get it", needed=False)])
    assert text == ("ok        a          fine\n"
                    "absent    long name  not there\n"
                    "                     remedy (optional): get it")  # fmt: skip
    assert render([]) == ""
