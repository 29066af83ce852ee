"""The boot of a template's guest."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any

import pytest

from sfparallel.errors import EnvironmentProblem, GuestError
from sfparallel.vmm import image as images
from sfparallel.vmm import template
from sfparallel.vmm.machine import TCG_CPU_MODEL


def boots(monkeypatch: pytest.MonkeyPatch, *results: Any) -> None:
    """Have boots end as told, one after the other."""
    left = list(results)

    async def boot(*_: object) -> Any:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(template, "_boot", boot)


def booted(said: list[str]) -> Any:
    return asyncio.run(template._booted(None, None, said.append))  # type: ignore[arg-type]


def test_a_guest_that_does_not_come_up_is_booted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    boots(monkeypatch, GuestError("template: the guest agent did not answer"), "a VM")
    assert booted(said) == "a VM"
    assert said == ["template: the guest agent did not answer; booting it again"]


def test_a_guest_that_never_comes_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    boots(monkeypatch, GuestError("the first"), GuestError("the second"), "a VM")
    with pytest.raises(GuestError, match="the second"):
        booted(said)
    assert said == ["the first; booting it again"]


@pytest.mark.parametrize(("setting", "hint"), [(None, "apt install qemu-system-x86"), ("/nope", "set SF_QEMU to a QEMU")])
def test_a_qemu_that_does_not_run_has_its_remedy(setting: str | None, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SF_QEMU", raising=False)
    if setting:
        monkeypatch.setenv("SF_QEMU", setting)
    with pytest.raises(EnvironmentProblem, match="cannot run /nope") as caught:
        template.qemu_version("/nope")
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.long
@pytest.mark.needs("qemu", "image")
def test_guests_boot_on_a_busy_processor() -> None:
    """Without a tick of its timer in time the kernel used to panic: in half of these boots."""
    image = images.find()
    argv = ["qemu-system-x86_64", "-machine", "q35,usb=off,sata=off,smbus=off,i8042=off,hpet=off", "-accel", "tcg",
            "-cpu", TCG_CPU_MODEL, "-m", "1024", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-serial", "stdio", "-kernel", str(image.kernel), "-initrd", str(images.guest_half(image)),
            "-append", images.KERNEL_COMMAND_LINE]  # fmt: skip
    busy = [subprocess.Popen(["taskset", "-c", "0", "sh", "-c", "while :; do :; done"]) for _ in range(8)]
    try:
        for _ in range(8):
            ended = subprocess.run(["taskset", "-c", "0", *argv], capture_output=True, text=True, timeout=300,
                                   stdin=subprocess.DEVNULL)  # fmt: skip
            # It has no root here, and its agent says so.
            assert "sfagent" in ended.stdout and "panic" not in ended.stdout, ended.stdout
    finally:
        for process in busy:
            process.kill()
            process.wait()
