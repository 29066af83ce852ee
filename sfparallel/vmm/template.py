"""Templates: the checkpoint of a freshly booted guest, made once for each image and machine shape, kept in the cache folder.

    <cache>/templates/<key>/manifest.json   what it was made of, and digests (vmm.manifest)
                            memory          pages, sparse
                            memory.map      which pages (layers.MemoryMap)
                            devices         CPU and device state
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from sfparallel.config import CACHE_HINT, START_LIMIT, cache_folder, qemu_remedy
from sfparallel.errors import EnvironmentProblem, GuestError, ImageBuildError
from sfparallel.vmm import locks
from sfparallel.vmm import manifest as manifests
from sfparallel.vmm.checkpoint import Checkpoint, LayerStore
from sfparallel.vmm.command_errors import hint_for, late_hint
from sfparallel.vmm.kvm import host_processor
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.machine import Accelerator, Boot, MachineSpec
from sfparallel.vmm.paging import PagingRefused
from sfparallel.vmm.plans import CommitMode
from sfparallel.vmm.shells import start_shell
from sfparallel.vmm.vm import Vm, VmState
from sfparallel.vmm.waiting import FILES_LIMIT_S, in_thread, step_limit_s, within

log = logging.getLogger(__name__)

FORMAT = 2
_LAYERS = {"memory": 1}
_FILES = ("devices", "memory.map")
BOOT_TIMEOUT_S = 180.0
_SAVE_LIMIT_S = 180.0
LOCK_LIMIT_S = 2 * BOOT_TIMEOUT_S + _SAVE_LIMIT_S
"""Who makes a template may boot its guest twice."""


def qemu_version(qemu: str) -> str:
    """Version of QEMU with the distribution's package version: device state is not portable between builds.

    Raises:
        EnvironmentProblem: it is not installed, does not run, or does not end.
    """
    try:
        output = subprocess.run(
            [qemu, "--version"], capture_output=True, text=True, check=True, timeout=step_limit_s()
        ).stdout
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"`{qemu} --version` has not ended in {error.timeout:g} s",
                                 hint=late_hint(qemu, START_LIMIT.variable)) from error
    except (OSError, subprocess.SubprocessError) as error:
        hint = qemu_remedy()
        if isinstance(error, OSError) and error.errno != errno.ENOENT:
            hint = hint_for(error)
        raise EnvironmentProblem(f"cannot run {qemu}: {error}", hint=hint) from error
    found = re.search(r"version (.*)", output)
    return found[1] if found else output.strip()


def template_key(spec: MachineSpec, boot: Boot, image_key: str) -> tuple[str, dict[str, object]]:
    """Key of the template and the manifest that it is the digest of."""
    manifest: dict[str, object] = {
        "format": FORMAT,
        "image": image_key,
        "initrd": hashlib.sha256(boot.initrd.read_bytes()).hexdigest(),
        "command_line": boot.command_line,
        "qemu": qemu_version(spec.qemu),
        **spec.fingerprint(),
    }
    if spec.accelerator is Accelerator.KVM:
        # "host" names whatever processor there is. A state of another one loads without an error, and the guest does nothing
        # (seen with SMAP gone: QEMU 7.2 does not look whether KVM took the registers).
        manifest["host"] = host_processor()
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16], manifest


def _files_within(what: str) -> contextlib.AbstractAsyncContextManager[None]:
    return within(FILES_LIMIT_S, what, error=EnvironmentProblem, hint="does that disk answer? SF_CACHE=FOLDER sets another one")


@contextlib.asynccontextmanager
async def _locked(path: Path, say: Callable[[str], None]) -> AsyncIterator[None]:
    waits = functools.partial(say, "waiting for another job that is making this template")
    # In a thread: the other job may be booting its guest, and Ctrl-C is to work meanwhile.
    async with within(LOCK_LIMIT_S, f"another job that is making this template and holds {path}",
                      error=EnvironmentProblem, hint="check whether that job was stopped; `fuser` on that file names it"):
        descriptor = await in_thread(locks.hold, path, waits)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_template(folder: Path) -> bool:
    try:
        manifests.read(folder)
    except EnvironmentProblem:
        return False
    return True


async def ensure_template(
    spec: MachineSpec, boot: Boot, image_key: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, object]]:
    """The template's folder, and what its manifest must say of the machine; boots a guest and saves it when there is none yet (10
    to 20 s under emulation).

    Raises:
        GuestError: the guest did not come up; the message has the end of its console.
        EnvironmentProblem: its processor computes wrong.
        ImageBuildError: the template could not be written.
    """
    async with _files_within(f"the initramfs {boot.initrd} and QEMU, of which the template is made, to be read"):
        key, manifest = await in_thread(template_key, spec, boot, image_key)
    folder = cache_folder() / "templates" / key
    async with _files_within(f"the template {folder} to be looked up"):
        found = await in_thread(_is_template, folder)
    if found:
        return folder, manifest
    try:
        async with _files_within(f"{folder.parent} to be made"):
            await in_thread(functools.partial(folder.parent.mkdir, parents=True, exist_ok=True))
        lock = folder.with_suffix(".lock")
        async with _locked(lock, say):
            try:
                if not _is_template(folder):
                    say("booting the guest once to make a template")
                    await _make(spec, boot, manifest, folder, say)
            finally:
                lock.unlink(missing_ok=True)
    except (OSError, PagingRefused) as error:
        hint = f"free some space, or {CACHE_HINT}"
        reason: object = error
        if isinstance(error, PagingRefused):
            reason = error.message
        else:
            hint = hint_for(error, hint)
        raise ImageBuildError(
            f"there is no template for this image and machine yet, and none can be written to {folder.parent}: {reason}",
            hint=hint,
        ) from error
    return folder, manifest


async def _make(
    spec: MachineSpec, boot: Boot, manifest: Mapping[str, object], folder: Path, say: Callable[[str], None]
) -> None:
    async with _files_within(f"a folder in {folder.parent} to be made"):
        work = await in_thread(_make_room, folder)
    try:
        vm = await _booted(spec, boot, say)
        async with within(_SAVE_LIMIT_S, "QEMU to save the guest that it has booted"):
            memory_map = await _save(vm, spec.memory_bytes, work)
        async with _files_within(f"the manifest of the template in {folder.parent} to be written"):
            await in_thread(manifests.write, work, manifest, _LAYERS, _FILES, memory_map)
            await in_thread(work.rename, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_room(folder: Path) -> Path:
    """A folder to make the template in. What is in its place, or was left behind by one that was not finished, goes."""
    for litter in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(litter, ignore_errors=True)
    if folder.exists():  # without a manifest that can be read: something has removed it, or the host's disk lost it in a crash
        broken = folder.with_name(f".{folder.name}-broken")
        folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))


async def _booted(spec: MachineSpec, boot: Boot, say: Callable[[str], None]) -> Vm:
    try:
        return await _boot(spec, boot)
    except GuestError as error:
        # Once in hundreds of boots an emulated guest stands still before it prints anything.
        say(f"{error.message}; booting it again")
        return await _boot(spec, boot)


async def _boot(spec: MachineSpec, boot: Boot) -> Vm:
    """A guest whose agent is up and has frozen it."""
    # Data disks are no part of a template: they are plugged in when its guest runs.
    vm = await start_shell(replace(spec, data_images=()), 0, None, boot=boot, name="template")
    booted = vm.wait_frozen(BOOT_TIMEOUT_S)
    try:
        async with within(step_limit_s(), "QEMU to run the guest"):
            await vm.qmp.execute("cont")
        await booted
    except BaseException as error:
        booted.close()
        vm.kill()
        if vm.failure:
            raise _wrong_processor(spec, vm.failure) from error
        raise
    vm.state = VmState.FROZEN
    return vm


def _wrong_processor(spec: MachineSpec, findings: str) -> EnvironmentProblem:
    """The error for a guest whose test of the processor (runtime/cpu_check) failed.

    Args:
        findings: a line for each instruction that computed wrong.
    """
    first, *more = findings.splitlines()
    others = f"\n  and {len(more)} more (SF_LOG=debug shows them)" if more else ""
    for line in more:
        log.debug("wrong result: %s", line)
    emulated = spec.accelerator is Accelerator.TCG
    who = "emulated by" if emulated else "that KVM passes on through"
    # Under KVM it is the processor itself that computes, or another hypervisor below this host.
    hint = ("use another version of QEMU (SF_QEMU), or a host with KVM" if emulated else
            "use emulation (SF_ACCEL=tcg), or another host: the fault is in this host's processor or hypervisor")
    return EnvironmentProblem(
        f"the guest's processor gives wrong results, so no template was made: -cpu {spec.cpu_model}, {who} QEMU "
        f"{qemu_version(spec.qemu)}\n  {first}{others}",
        hint=hint,
    )


async def _save(vm: Vm, memory_bytes: int, folder: Path) -> MemoryMap:
    """Write a frozen guest's state into the folder, and end it."""
    try:
        devices = os.open(folder / "devices", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            async with vm.devices_to(devices) as name:
                await (await vm.stop_and_save(name))
        finally:
            os.close(devices)
        memory = os.open(folder / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(memory, memory_bytes)
            empty = MemoryMap.zero(memory_bytes // PAGE_BYTES)
            result = await vm.paging.commit(vm.ram_address, empty, memory, 1, CommitMode.NO_REMAP)
            memory_map = empty.apply(result.runs, 1)
            (folder / "memory.map").write_bytes(memory_map.encode())
            return memory_map
        finally:
            os.close(memory)
    finally:
        vm.kill()


def open_template(folder: Path, manifest: Mapping[str, object], store: LayerStore) -> Checkpoint:
    """The template as a checkpoint; its memory is mapped straight from the file, so that jobs share the page cache.

    Args:
        manifest: what its own must say of the machine.

    Raises:
        EnvironmentProblem: files are missing or damaged, or are of another machine; the message says what differs.
    """
    holder = object()
    try:
        memory_map = manifests.check(folder, manifest, _LAYERS, _FILES)
        memory = os.open(folder / "memory", os.O_RDONLY | os.O_CLOEXEC)
        number = store.add(memory, holder, fixed=True)
        if memory_map.layers != (1,) or number != 1:
            raise EnvironmentProblem(f"template {folder.name} is damaged", hint="run `sf clean`")
        devices = os.open(folder / "devices", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EnvironmentProblem(f"template {folder.name}: {error}", hint=hint_for(error, "run `sf clean`")) from error
    checkpoint = Checkpoint(memory_map, devices, store)
    store.release(holder)
    return checkpoint
