"""Checkpoints: clones that begin in the past, layers that merge, manifests that say what differs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import sfparallel as sf
from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem
from sfparallel.vmm import manifest
from sfparallel.vmm.layers import PAGE_BYTES, MemoryMap
from sfparallel.vmm.machine import Accelerator, MachineSpec
from sfparallel.vmm.plans import copy_pages
from tests.conftest import Sfrun
from tests.fork_double import Doubles
from tests.fork_double import double_fixture as double_fixture
from tests.test_nested import commits

vms = pytest.mark.needs("qemu", "image", "root")


@vms
def test_clones_of_old_checkpoints_begin_where_they_were_made(sfrun: Sfrun) -> None:
    """The parent goes on, forks, makes more checkpoints and closes some; each clone sees the state of its own checkpoint."""
    ended = sfrun(
        """
        import os, socket
        import sfparallel as sf

        hooks = []
        sf.on_clone(hooks.append)
        steps = ["begin"]
        data = bytearray(8 << 20)

        def keep(step):
            steps.append(step)
            data[:] = bytes([len(steps)]) * len(data)
            checkpoint = sf.checkpoint_parent()
            if checkpoint.rank:
                assert sf.in_clone() and hooks == [checkpoint.rank] and data.count(len(steps)) == len(data)
                data[0] = 99                             # reaches nobody else
                print(*steps, "rank", checkpoint.rank, socket.gethostname(), sf.rng().random(), flush=True)
                for wrong in (lambda: sf.create_clones(checkpoint, sf.request_ticket(1)), lambda: sf.join(ticket)):
                    try:
                        wrong()
                    except (sf.StateError, NameError):
                        continue
                    sf.exit(99)
                checkpoint.close()                       # the parent's, so that nothing happens
                sf.exit(checkpoint.rank)
            return checkpoint

        def clones(checkpoint):
            ticket = sf.request_ticket(2)
            sf.create_clones(checkpoint, ticket)
            assert sf.join(ticket) == {1: 1, 2: 2}

        first = keep("one")
        clones(first)
        with keep("two") as second:
            assert sf.parallel(n=2)(lambda: (list(steps), data[0]))() == [(["begin", "one", "two"], 3)] * 2
            clones(first)
            clones(second)
            clones(second)
        try:
            sf.create_clones(second, sf.request_ticket(1))
        except sf.Closed as error:
            print("closed:", error.message)
        clones(first)
        first.close()
        first.close()
        steps.append("end")
        assert sf.parallel(n=1)(lambda: (list(steps), data[0]))() == [(["begin", "one", "two", "end"], 3)]
        assert not sf.in_clone() and hooks == []
        """,
        "--no-label", "--trace", "out.json", "--seed", "1",
    ).ok()  # fmt: skip
    lines = [line.split() for line in ended.out.splitlines() if " rank " in line]
    assert sorted(line[:-2] for line in lines) == sorted(
        ["begin", *steps, "rank", rank] for steps in [["one"]] * 3 + [["one", "two"]] * 2 for rank in "12"
    )
    assert len({line[-1] for line in lines}) == 10, "clones of one checkpoint must not repeat each other's numbers"
    assert "closed: this checkpoint was closed" in ended.out
    # A layer of the first checkpoint, one of the second, and the template's: no clone costs one.
    assert max(commit["layers_of_job"] for commit in commits(sfrun.folder / "out.json")) <= 4


@vms
def test_many_checkpoints_merge_their_layers_and_stay_right(sfrun: Sfrun) -> None:
    """More checkpoints than an image may have layers; the small layers are merged while all checkpoints hold the old ones."""
    sfrun(
        """
        import sfparallel as sf

        data = bytearray(4 << 20)
        kept = []
        for step in range(70):
            data[step << 12] = step + 1
            checkpoint = sf.checkpoint_parent()
            if checkpoint.rank:
                right = all(data[k << 12] == (k + 1 if k <= step else 0) for k in range(70))
                sf.exit(step if right else 255)
            kept.append(checkpoint)
        for step in (0, 31, 62, 63, 64, 69):
            ticket = sf.request_ticket(1)
            sf.create_clones(kept[step], ticket)
            assert sf.join(ticket) == {1: step}, step
        for checkpoint in kept:
            checkpoint.close()
        assert sf.parallel(n=1)(lambda: data[69 << 12])() == [70]
        """,
        "--trace", "out.json",
    ).ok()  # fmt: skip
    made = commits(sfrun.folder / "out.json")
    layers = [commit["layers"] for commit in made]
    assert max(layers) <= 64 and min(layers[62:70]) < 32
    assert max(commit["layers_of_job"] for commit in made) > 70
    assert made[-1]["layers_of_job"] < 32
    stored = [commit["stored_pages"] for commit in made]
    assert max(stored[1:]) < 4096, "a checkpoint stores what was dirtied since the last one"


@vms
def test_a_clone_makes_checkpoints_of_its_own(sfrun: Sfrun) -> None:
    """And its clones go with it, as those of a fork."""
    sfrun(
        """
        import sfparallel as sf

        @sf.parallel(n=2)
        def outer():
            rank = sf.comm().rank
            checkpoint = sf.checkpoint_parent()
            if checkpoint.rank:
                sf.exit(10 * rank + checkpoint.rank)
            results = []
            for _ in range(2):
                ticket = sf.request_ticket(2)
                sf.create_clones(checkpoint, ticket)
                results.append(sf.join(ticket))
            return results

        assert outer() == [[{1: 1, 2: 2}] * 2, [{1: 11, 2: 12}] * 2], outer()
        """
    ).ok()


def test_checkpoints_of_processes(double: Doubles) -> None:
    """`sfrun --local` has them too: a process is kept, and forks."""
    steps = ["then"]
    checkpoint = sf.checkpoint_parent()
    if checkpoint.rank:
        if checkpoint.rank == 3:
            os.kill(os.getpid(), 9)
        sf.exit(100 * len(steps) + checkpoint.rank)
    steps.append("now")
    with checkpoint:
        for _ in range(2):
            ticket = sf.request_ticket(3)
            sf.create_clones(checkpoint, ticket)
            assert sf.join(ticket) == {1: 101, 2: 102, 3: None}
    with pytest.raises(sf.Closed):
        sf.create_clones(checkpoint, ticket := sf.request_ticket(1))
    sf.kill(ticket)


# -- zero pages ----------------------------------------------------------------------------------------------------------


def test_merging_layers_stores_no_zero_page() -> None:
    """Short gaps of zeros are said to come from the layer around them; a merge must leave them holes."""
    old, new = os.memfd_create("old"), os.memfd_create("new")
    try:
        source = np.zeros(600, dtype=np.uint16)
        for page in (0, 1, 5, 300, 599):
            os.pwrite(old, bytes([page % 255 + 1]) * PAGE_BYTES, page * PAGE_BYTES)
            source[page] = 1
        before = MemoryMap(source).filled()
        assert before.source[3] == 1, "otherwise this tests nothing"
        plan = before.flatten(2)
        copy_pages(plan, {1: old}, new)
        assert os.fstat(new).st_blocks * 512 == 5 * PAGE_BYTES
        assert os.pread(new, 1 << 22, 0) == os.pread(old, 1 << 22, 0)
    finally:
        os.close(old)
        os.close(new)


def _templates() -> list[Path]:
    """Folders of templates of this format, the newest one last."""
    manifests = (cache_folder() / "templates").glob("[!.]*/manifest.json")
    found = [path.parent for path in manifests if json.loads(path.read_text())["format"] == 2]
    return sorted(found, key=lambda folder: folder.stat().st_mtime)


@vms
def test_a_template_has_no_zero_page(sfrun: Sfrun) -> None:
    sfrun("pass").ok()
    folder = _templates()[-1]
    memory_map = MemoryMap.decode((folder / "memory.map").read_bytes(), (folder / "memory").stat().st_size // PAGE_BYTES)
    rows = memory_map.rows_of(1)
    assert sum(length for _, length in rows) > 50 << 20
    with open(folder / "memory", "rb") as file:
        for offset, length in rows:
            pages = np.frombuffer(os.pread(file.fileno(), length, offset), dtype=np.uint8).reshape(-1, PAGE_BYTES)
            assert pages.any(axis=1).all(), f"a zero page between {offset} and {offset + length}"
        assert os.fstat(file.fileno()).st_blocks * 512 < sum(length for _, length in rows) * 1.3 + (8 << 20)


# -- manifests -----------------------------------------------------------------------------------------------------------

LAYERS, FILES = {"memory": 1}, ("devices", "memory.map")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint on disk."""
    memory_map = MemoryMap(np.array([1, 1, 0, 1], dtype=np.uint16))
    (tmp_path / "memory").write_bytes(b"\1" * PAGE_BYTES + b"\2" * PAGE_BYTES + b"\0" * PAGE_BYTES + b"\3" * PAGE_BYTES)
    (tmp_path / "memory.map").write_bytes(memory_map.encode())
    (tmp_path / "devices").write_bytes(b"state")
    manifest.write(tmp_path, machine(), LAYERS, FILES, memory_map)
    return tmp_path


def machine(**changes: object) -> dict[str, object]:
    spec = MachineSpec(Accelerator.TCG, cpus=1, memory_bytes=1 << 30, root_image=Path("root"))
    return {"format": 2, "qemu": "7.2.22", **spec.fingerprint(), **changes}


def test_a_manifest_that_fits(folder: Path) -> None:
    assert manifest.check(folder, machine(), LAYERS, FILES).layers == (1,)
    written = json.loads((folder / "manifest.json").read_text())
    assert {"format", "qemu", "machine", "cpu_model", "devices", "layers"} <= written.keys()
    assert any("virtio-serial-pci" in device for device in written["devices"])


@pytest.mark.parametrize(("changes", "said"), [
    ({"qemu": "8.2.0"}, "qemu: wanted '8.2.0', found '7.2.22'"),
    ({"format": 3}, "format: wanted 3, found 2"),
    ({"cpu_model": "host"}, f"cpu_model: wanted 'host', found {machine()['cpu_model']!r}"),
    ({"cpus": 2, "memory_bytes": 1 << 31}, "cpus: wanted 2, found 1; memory_bytes: wanted 2147483648, found 1073741824"),
    ({"devices": ["pvpanic"]}, "devices.0: wanted 'pvpanic', found 'isa-serial,chardev=console,index=0'"),
])  # fmt: skip
def test_another_machine_is_named(folder: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        manifest.check(folder, machine(**changes), LAYERS, FILES)
    assert said in caught.value.message and "sf clean" in (caught.value.hint or "")


def test_damaged_files_are_named(folder: Path) -> None:
    def message() -> str:
        with pytest.raises(EnvironmentProblem) as caught:
            manifest.check(folder, machine(), LAYERS, FILES)
        return caught.value.message

    with open(folder / "memory", "r+b") as file:
        os.pwrite(file.fileno(), b"x", 3 * PAGE_BYTES + 5)
    assert "layers.memory: wanted" in message()
    with open(folder / "memory", "r+b") as file:
        file.truncate(2 * PAGE_BYTES)
    assert "found 'cut short at 12288'" in message()
    (folder / "devices").unlink()
    assert "devices: wanted" in message() and "found 'none'" in message()
    (folder / "manifest.json").write_text("{")
    assert "cannot read its manifest" in message()


def test_a_map_of_more_than_the_guests_memory_is_damaged(folder: Path) -> None:
    """Also if its digest is that of the manifest: it would take memory for all that it announces."""
    (folder / "memory.map").write_bytes(MemoryMap.zero((1 << 30) // PAGE_BYTES + 1).encode())
    written = json.loads((folder / "manifest.json").read_text())
    written["files"]["memory.map"] = manifest.file_digest(folder / "memory.map")
    (folder / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(EnvironmentProblem, match="is damaged: a memory map of 262145 pages for a memory of 262144") as caught:
        manifest.check(folder, machine(), LAYERS, FILES)
    assert "sf clean" in (caught.value.hint or "")


def test_what_lies_in_holes_does_not_count(folder: Path) -> None:
    with open(folder / "memory", "r+b") as file:
        os.pwrite(file.fileno(), b"junk", 2 * PAGE_BYTES)
    manifest.check(folder, machine(), LAYERS, FILES)


@vms
def test_a_template_that_does_not_fit_is_refused_before_a_vm_starts(
    sfrun: Sfrun, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache folder of its own, with templates whose manifests name another QEMU."""
    sfrun("pass").ok()
    cache = tmp_path_factory.mktemp("cache")
    for name in ("images", "initrd", "libvirt"):
        (cache / name).symlink_to(cache_folder() / name)
    (cache / "templates").mkdir()
    for template in _templates():
        copy = shutil.copytree(template, cache / "templates" / template.name, copy_function=os.symlink)
        found = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").unlink()
        (copy / "manifest.json").write_text(json.dumps(found | {"qemu": "6.0.0 (other)"}))
    monkeypatch.setenv("SF_CACHE", str(cache))
    ended = sfrun("print('ran')")
    assert (ended.code, ended.out) == (70, "")
    assert f"qemu: wanted {found['qemu']!r}, found '6.0.0 (other)'" in ended.err
