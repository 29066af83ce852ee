"""The guest's processor computes right: the test of it, on this host and under every QEMU that is found, and what it prevents."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import image, initramfs, native_parts, template
from sfparallel.vmm.machine import TCG_CPU_MODEL, Accelerator, Boot, MachineSpec
from sfparallel.vmm.template import ensure_template, qemu_version

PATIENCE_S = 300
GATHERS = {
    f"{name} {size}" for size in ("xmm", "ymm") for name in (
        "vpgatherdd", "vpgatherdq", "vpgatherqd", "vpgatherqq", "vgatherdps", "vgatherdpd", "vgatherqps", "vgatherqpd",
    )
}  # fmt: skip
OTHERS = {
    "aesenc", "aesdec", *(f"blsi {operands}" for operands in ("%rcx,%rax", "%ecx,%eax", "(%rsi),%r11", "(%rsi),%r11d")),
    "adcx %ecx,%eax", "adox %ecx,%eax", "adcx %rdx,%r9; adox %ecx,%eax", "adox %rdx,%r9; adcx (%rsi),%eax",
}
"""The others that QEMU 7.2 computes wrong: AES rounds of YMM registers, and carries."""
INIT = """#!/busybox sh
/busybox mkdir /dev /proc
/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
/sf/cpu_check --list
echo "exit status $?"
/busybox poweroff -f
"""


def qemus() -> list[str]:
    """Every QEMU of this machine: in PATH, and those that SF_TEST_QEMUS names (separated by colons)."""
    found = [Path(name) for name in os.environ.get("SF_TEST_QEMUS", "").split(":") if name]
    for folder in os.environ["PATH"].split(":"):
        found.append(Path(folder) / "qemu-system-x86_64")
    return [str(path) for path in dict.fromkeys(path.resolve() for path in found) if os.access(path, os.X_OK)]


@dataclass
class Report:
    """What the test of the processor said."""

    text: str
    status: int

    @property
    def wrong(self) -> set[str]:
        return {match[1] for match in re.finditer(r"^(\S.*?\S) +\S+ +\d+ executed, wrong$", self.text, re.MULTILINE)}

    @property
    def executed(self) -> int:
        found = re.search(r"(\d+) executed, \d+ wrong\s*$", self.text, re.MULTILINE)
        assert found, self.text
        return int(found[1])


@pytest.fixture(scope="module")
def program() -> Path:
    return initramfs.build(native_parts.CPU_CHECK)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, program: Path) -> Iterator[Path]:
    """An initramfs that runs the test, all of it, and nothing else."""
    path = tmp_path_factory.mktemp("bare") / "initrd"
    path.write_bytes(initramfs.write_cpio([
        initramfs.Entry("init", INIT.encode(), 0o755), initramfs.Entry("sf/cpu_check", program.read_bytes(), 0o755),
        initramfs.Entry("busybox", Path("/bin/busybox").read_bytes(), 0o755),
    ]))  # fmt: skip
    yield path


def in_guest(qemu: str, model: str, initrd: Path) -> Report:
    """Run the test in a guest of this QEMU, emulated."""
    argv = [qemu, "-machine", "q35", "-accel", "tcg", "-cpu", model, "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-serial", "stdio", "-kernel", str(image.find().kernel), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet panic=-1"]  # fmt: skip
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S)
    text = done.stdout.decode(errors="replace").replace("\r", "")
    status = re.search(r"^exit status (\d+)$", text, re.MULTILINE)
    assert status, text[-3000:] + done.stderr.decode()
    return Report(text, int(status[1]))


def test_this_machine_passes(program: Path) -> None:
    done = subprocess.run([program, "--list"], capture_output=True, text=True, timeout=PATIENCE_S)
    report = Report(done.stdout, done.returncode)
    assert report.status == 0 and not report.wrong, report.text
    assert report.executed > 1000


def test_no_processor_has_fsrm_without_erms() -> None:
    """Linux' memmove copies wrong on such a one: the guest stands still (seen with QEMU 10, whose `max` has FSRM)."""
    flags = TCG_CPU_MODEL.split(",")
    assert ("erms=off" in flags) == ("fsrm=off" in flags)


@pytest.mark.needs("qemu", "image")
@pytest.mark.parametrize("qemu", qemus())
def test_what_guests_are_given_computes_right(qemu: str, bare: Path) -> None:
    report = in_guest(qemu, TCG_CPU_MODEL, bare)
    assert report.status == 0 and not report.wrong, report.text
    assert report.executed > 1000


@pytest.mark.needs("qemu", "image")
@pytest.mark.parametrize("qemu", qemus())
def test_what_qemu_computes_wrong_is_found(qemu: str, bare: Path) -> None:
    report = in_guest(qemu, "max", bare)
    if qemu_version(qemu).startswith("7.2."):
        assert report.status == 1 and report.wrong == GATHERS | OTHERS, report.text
        assert "index in register 4" in report.text and not re.search(r"index in register (?!4 )", report.text)
    else:
        assert report.status == 0 and not report.wrong, report.text


class WholeMachine(MachineSpec):
    """A machine with all that TCG emulates."""

    @property
    def cpu_model(self) -> str:
        return "max"


@pytest.mark.needs("qemu")
@pytest.mark.parametrize(("accelerator", "said"), [(Accelerator.TCG, "SF_QEMU"), (Accelerator.KVM, "SF_ACCEL=tcg")])
def test_what_to_do_depends_on_who_computes(accelerator: Accelerator, said: str) -> None:
    """Under KVM another QEMU would compute the same."""
    spec = MachineSpec(accelerator, cpus=1, memory_bytes=512 << 20, root_image=Path("root"))
    error = template._wrong_processor(spec, "vpgatherdd: index in register 4\npdep: wrong")
    assert said in (error.hint or "") and "vpgatherdd" in error.message and "1 more" in error.message
    assert ("SF_QEMU" in (error.hint or "")) == (accelerator is Accelerator.TCG)


@pytest.mark.needs("qemu", "image", "root")
def test_no_template_is_made_with_a_processor_that_computes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = image.find()
    boot = Boot(chosen.kernel, image.guest_half(chosen), image.KERNEL_COMMAND_LINE)
    wrong = [qemu for qemu in qemus() if qemu_version(qemu).startswith("7.2.")]
    assert wrong or not qemu_version("qemu-system-x86_64").startswith("7.2.")
    monkeypatch.setenv("SF_CACHE", str(tmp_path))
    for qemu in wrong:
        spec = WholeMachine(Accelerator.TCG, cpus=1, memory_bytes=512 << 20, root_image=chosen.root, qemu=qemu)
        said: list[str] = []
        with pytest.raises(EnvironmentProblem) as caught:
            asyncio.run(ensure_template(spec, boot, chosen.key, said.append))
        message = str(caught.value)
        assert "-cpu max" in message and "7.2." in message and "index in register 4" in message and "SF_QEMU" in message, message
        assert said == ["booting the guest once to make a template"], "a second boot computes no better"
        assert not [path for path in (tmp_path / "templates").iterdir() if path.is_dir()]
