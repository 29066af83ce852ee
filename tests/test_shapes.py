"""Guests of any shape: several processors, more than 4 GiB of memory, disks that are plugged in while the guest runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sfparallel.vmm import job_control
from sfparallel.vmm.confinement import Places, confine
from sfparallel.vmm.data import data_image
from sfparallel.vmm.job import Job
from sfparallel.vmm.machine import Accelerator, Endpoints, MachineSpec, arguments, data_disk, devices
from sfparallel.vmm.options import JobOptions, Program
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.shells import plug_data_disks
from tests.conftest import Sfrun

vms = pytest.mark.needs("qemu", "image", "root", "squashfs")


@vms
def test_two_processors_and_a_data_disk_from_the_first_boot_on(sfrun: Sfrun, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both processors are busy in the parent when it is forked, and go on in the clones.

    A guest of this odd size is booted for the test, with --data given: the disk must not get into the template.
    """
    data = tmp_path_factory.mktemp("data")
    (data / "file").write_text("from the disk")
    sfrun(
        f"""
        import hashlib, os, pathlib, threading
        import sfparallel as sf

        counts, moving = [0, 0], threading.Barrier(3)

        def count(slot):
            os.sched_setaffinity(0, {{slot}})
            while True:
                counts[slot] += 1
                if counts[slot] == 1000:
                    moving.wait()

        for slot in range(2):
            threading.Thread(target=count, args=(slot,), daemon=True).start()
        moving.wait()

        def look():
            before = list(counts)
            while not all(now > then for now, then in zip(counts, before)):
                os.sched_yield()
            assert os.cpu_count() == 2
            return sf.comm().rank, pathlib.Path({str(data / "file")!r}).read_text(), min(before)

        for _ in range(3):
            reached = min(counts)
            results = sf.parallel(n=2)(look)()
            assert [result[:2] for result in results] == [(0, "from the disk"), (1, "from the disk")]
            assert all(result[2] >= reached for result in results), "the clones begin where the parent was"
        assert sf.parallel(n=2)(lambda: sf.parallel(n=1)(look)()[0][0])() == [0, 0]
        os._exit(0)
        """,
        "--cpus", "2", "--memory", "777M", "--data", str(data),
    ).ok()  # fmt: skip


@vms
def test_more_memory_than_lies_below_4_gib(sfrun: Sfrun) -> None:
    """Guest memory is in two ranges then, below and above the hole of the PCI devices, and pages of both are forked."""
    sfrun(
        """
        import numpy as np
        import sfparallel as sf

        ranges = [line for line in open("/proc/iomem") if line.endswith("System RAM\\n")]
        assert any(int(line.split("-")[0], 16) >= 1 << 32 for line in ranges), ranges
        big = np.zeros(4500 << 17)                      # more than one of the ranges
        step = (16 << 10) // 8
        big[::step] = np.arange(big[::step].size)

        def look():
            rows = big[::step]
            big[::step] += 1                            # nobody else's
            return bool((rows == np.arange(rows.size) + 1 + generation).all()), big[1]

        for generation in range(2):
            assert sf.parallel(n=2)(look)() == [(True, 0.0)] * 2
            big[::step] += 1
        """,
        "--memory", "5G",
    ).ok()  # fmt: skip


HOT_PLUG = """
import os, pathlib
import sfparallel as sf
from sfparallel.runtime.data_disks import mount_data_disks

def disks():
    return sorted(path.name for path in pathlib.Path("/sys/block").glob("vd?"))

early = sf.checkpoint_parent()
if early.rank:
    sf.exit(len(disks()))
assert sf.parallel(n=1)(disks)() == [["vda"]]       # at its end the test plugs a disk in
mount_data_disks([("sfdata0", "/mnt/hot")])
assert disks() == ["vda", "vdb"]

def look():
    # Nobody has read this file before: it comes from the clone's own disk.
    return disks(), pathlib.Path(f"/mnt/hot/{sf.comm().rank}").read_bytes() == bytes([sf.comm().rank]) * 100_000

assert sf.parallel(n=2)(look)() == [(["vda", "vdb"], True)] * 2
ticket = sf.request_ticket(1)
sf.create_clones(early, ticket)
assert sf.join(ticket) == {1: 1}, "a clone of a state without the disk has none"
print("right", flush=True)
"""


def _in_a_job(run: Callable[[Places, int], int]) -> int:
    """Run something in a job's namespaces; `confine` may be called once in a process."""
    child = os.fork()
    if child == 0:
        os._exit(confine(run, public_folder=False))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@vms
def test_a_disk_plugged_in_while_the_guest_runs_is_in_later_clones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The shells of the pool were started without it, and get it when they are to load a state that has it."""
    for rank in range(2):
        (tmp_path / str(rank)).write_bytes(bytes([rank]) * 100_000)
    image = data_image(tmp_path, print)

    async def work(places: Places, pid: int) -> int:
        tasks: list[asyncio.Task[None]] = []

        def plug_after_the_first_fork(report: ForkReport) -> None:
            if report.n and not tasks:
                assert job._parent
                tasks.append(asyncio.get_running_loop().create_task(plug_data_disks(job._parent, [image])))

        program = Program("command", (HOT_PLUG,), tmp_path, None)
        job = Job(JobOptions(program, n=2, data_slots=1, on_report=plug_after_the_first_fork), places, pid)
        return await job.run()

    code = _in_a_job(lambda places, pid: job_control.run(work(places, pid)))
    output = capfd.readouterr()
    assert code == 0 and output.out.endswith("right\n"), output


def test_what_is_plugged_in_is_what_shells_start_with() -> None:
    spec = MachineSpec(Accelerator.TCG, 1, 1 << 30, Path("root"), (Path("a"), Path("b")), data_slots=2)
    options = {}
    for slot, image in enumerate(spec.data_images):
        _, device = data_disk(image, slot)
        driver = device.pop("driver")
        options[slot] = ",".join([driver, *(f"{name}={value}" for name, value in device.items())])
    argv = arguments(spec, Endpoints(0, 0, 0, None))
    assert devices(spec)[-2:] == [options[0], options[1]]
    assert [word for word in argv if word.startswith("driver=file") and "filename=b" in word]
