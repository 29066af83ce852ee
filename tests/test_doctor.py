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

import sfparallel
from sfparallel.config import ACCEL, CACHE, QEMU
from sfparallel.errors import EnvironmentProblem, ImageMissing, UsageError
from sfparallel.vmm import doctor, kvm, native_parts, template, venv
from sfparallel.vmm.doctor import Finding, Status, diagnose, render
from sfparallel.vmm.verdict import not_installed, verdict_of


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
    assert QEMU.variable in finding.remedy, "no package has what only the setting names"
    monkeypatch.delenv(QEMU.variable)
    monkeypatch.setenv("PATH", "")
    assert found("QEMU").remedy == "apt install qemu-system-x86"


def test_what_is_not_done_in_time_is_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever program is asked: there is nothing to install or to build anew."""
    monkeypatch.setattr(venv, "_LIMIT_S", 0.2)
    monkeypatch.setattr(doctor, "_QEMU_LIMIT_S", 0.2)
    monkeypatch.setattr(native_parts, "_LIMIT_S", 0.2)
    monkeypatch.setenv("SF_START_LIMIT", "0.2")
    program = fake_program(tmp_path, "exec sleep 1000")
    monkeypatch.setenv(QEMU.variable, program)
    with pytest.raises(EnvironmentProblem, match=r"--version` has not ended in 0\.2 s\n  hint: the machine is busy") as caught:
        template.qemu_version(program)
    assert "SF_START_LIMIT" in str(caught.value)
    (tmp_path / "bin").mkdir()
    shutil.copy(program, tmp_path / "bin/python")
    with pytest.raises(UsageError, match=r"has not said its version in 0\.2 s\n  hint: the machine is busy"):
        venv.Venv(tmp_path, tmp_path).check("default", "cb0d0d0a")
    finding = doctor._qemu()
    assert finding.status is Status.BROKEN and "the machine is busy" in finding.remedy and "install" not in finding.remedy
    finding = doctor._guest_program("guest agent", Path(program))
    assert finding.status is Status.BROKEN and finding.remedy.startswith("the machine is busy")


# -- the native parts ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("qemu")
def test_the_native_parts_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = shutil.which(QEMU.get())
    for program in (None, qemu):
        assert native_parts.trouble_with_library(program) == ""
    half = tmp_path / "libsfpage.so"
    half.write_bytes(native_parts.LIBRARY.read_bytes()[:5000])
    assert "does not load" in native_parts.trouble_with_library(qemu, half)
    assert native_parts.trouble_with_program(native_parts.AGENT) == ""
    assert native_parts.trouble_with_program(native_parts.CPU_CHECK) == ""
    stranger = Path(fake_program(tmp_path, "echo I am another"))
    assert "I am another" in native_parts.trouble_with_program(stranger)
    stranger.write_bytes(native_parts.AGENT.read_bytes()[:1000])
    assert native_parts.trouble_with_program(stranger), "half of it"
    monkeypatch.setattr(native_parts, "_LIMIT_S", 1.0)
    other = next(Path(sys.base_prefix).rglob("lib-dynload/_json*.so"))
    try:
        said = native_parts.trouble_with_library(qemu, other)
    except TimeoutError as error:
        said = str(error)
    assert "answer in QEMU" in said


def installed(folder: Path, *, wheel: bool) -> dict[str, str]:
    """A copy of the package, as in a checkout or from a wheel; returns the environment in which that copy is imported."""
    without = shutil.ignore_patterns("__pycache__", *(("*.c", "*.h", "Makefile") if wheel else ()))
    shutil.copytree(Path(sfparallel.__file__).parent, folder / "sfparallel", ignore=without)
    return {**os.environ, "PYTHONPATH": str(folder)}


def called(environment: dict[str, str], command: str, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from sfparallel.cli import {command}; {command}(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, cwd="/var/tmp", capture_output=True, text=True,
                          timeout=120)


@pytest.mark.needs("root")
@pytest.mark.needs("qemu")
@pytest.mark.parametrize(("wheel", "remedy"), [(False, "make build"), (True, "pip install --force-reinstall")])
def test_a_missing_paging_layer_is_told_with_its_remedy(tmp_path: Path, wheel: bool, remedy: str) -> None:
    environment = installed(tmp_path, wheel=wheel)
    (tmp_path / "sfparallel" / "vmm" / "native" / "libsfpage.so").unlink()
    done = called(environment, "sf", "doctor")
    summary = done.stdout.partition("\n\n")[0]
    assert done.returncode == 1 and summary.startswith("cannot run") and "paging layer" in summary and remedy in summary, done
    done = called(environment, "sfrun", "-c", "pass")
    assert done.returncode == 70 and "libsfpage.so" in done.stderr and remedy in done.stderr, done


def test_all_packages_that_are_missing_are_named_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), CACHE.variable: str(tmp_path / "cache")}
    environment.pop(QEMU.variable, None)
    done = called(environment, "sf", "doctor")
    assert done.returncode == 1
    lines = done.stdout.partition("\n\n")[0].splitlines()
    assert [line for line in lines if "apt install" in line] == ["  apt install mmdebstrap qemu-system-x86 squashfs-tools"]
    assert "  sf image build" in lines


# -- KVM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.needs("qemu")
def test_the_counting_guest_runs_and_ends() -> None:
    program = shutil.which(QEMU.get())
    assert program is not None
    assert kvm.run_firmware(program, "tcg", timeout_s=30) == ""
    with pytest.raises(TimeoutError, match="did not end"):
        kvm.run_firmware(program, "tcg", timeout_s=0.001)
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
    assert "vmx" in finding.detail and "none is needed" in finding.remedy


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


def test_a_busy_machine_is_no_word_about_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guest that does not end in time was taken for a KVM that runs none, until the next boot of the machine."""
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "cache"))
    monkeypatch.setattr(kvm, "_PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(kvm, "_DOUBT_S", 0.0)
    monkeypatch.setenv(QEMU.variable, fake_program(tmp_path, f"[ -e {tmp_path}/quiet ] && exit 65; exec sleep 1000"))
    assert "did not end in 0.2 s" in kvm._remembered_run()
    (tmp_path / "quiet").touch()
    monkeypatch.setattr(kvm, "_PROBE_TIMEOUT_S", 60.0)
    assert kvm._remembered_run() == ""
    (tmp_path / "quiet").unlink()
    assert kvm._remembered_run() == "", "that it runs is remembered"


def test_accelerator_obeys_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("kvm", "tcg"):
        monkeypatch.setenv(ACCEL.variable, value)
        assert kvm.accelerator() == value
    monkeypatch.setenv(ACCEL.variable, "xen")
    with pytest.raises(UsageError, match="SF_ACCEL"):
        kvm.accelerator()
    monkeypatch.setenv(ACCEL.variable, "auto")
    assert kvm.accelerator() == ("kvm" if kvm.probe_kvm().status is Status.OK else "tcg")


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


@pytest.mark.needs("root")
def test_a_chroot_that_is_no_mount_point_is_told_as_such(tmp_path: Path) -> None:
    """It used to be told as a kernel that lacks something."""
    root = tmp_path / "root"
    script = (f"import os; from sfparallel.vmm import doctor; os.mkdir({str(root)!r}); os.mkdir({str(root / 'tmp')!r}); "
              f"os.chroot({str(root)!r}); os.chdir('/'); print(doctor._mounts())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "chroot" in done.stdout and "mount --bind" in done.stdout, done


def test_a_host_without_apt_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._sources(needed=True).status is Status.OK
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"PRETTY_NAME": "Plan 9"})
    for needed in (True, False):
        finding = doctor._sources(needed=needed)
        assert finding.lacks == needed and "Plan 9" in finding.detail and "--release" in finding.remedy


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE.variable, str(tmp_path / "deep" / "down"))
    assert found("cache folder").status in (Status.OK, Status.BROKEN)
    assert not (tmp_path / "deep").exists(), "the doctor only looks"
    monkeypatch.setenv(CACHE.variable, "/proc/nothing-fits-here")
    assert found("cache folder").status is not Status.OK


def test_render() -> None:
    text = render([Finding("a", Status.OK, "fine"), Finding("long name", Status.ABSENT, "not there", "get it", needed=False)])
    assert text == ("ready: jobs can run here\n"
                    "\n"
                    "ok        a          fine\n"
                    "optional  long name  not there\n"
                    "                     remedy: get it")  # fmt: skip


def test_the_summary_has_one_apt_line_and_each_remedy_once() -> None:
    findings = [Finding("x", Status.FORBIDDEN, "no", "run as root"), not_installed("b", "no b", "deb-z deb-b"),
                not_installed("a", "no a", "deb-b deb-a"), not_installed("c", "no c", "deb-c", needed=False),
                Finding("y", Status.BROKEN, "bad", "mend"), Finding("z", Status.ABSENT, "bad", "mend")]  # fmt: skip
    assert render(findings).split("\n\n")[0].splitlines() == [
        "cannot run: 5 things are missing or not usable: x, b, a, y, z. What to do:", "  apt install deb-a deb-b deb-z",
        "  run as root", "  mend", "`sfrun --local` runs programs without all this, for development",
    ]  # fmt: skip
    slower = [Finding("KVM", Status.BROKEN, "no vmx", "none is needed", needed=False)]
    assert render(slower).startswith("ready: jobs can run here. Guests are emulated")
    assert render(findings[:1]).startswith("cannot run: 1 thing is missing or not usable: x.")
