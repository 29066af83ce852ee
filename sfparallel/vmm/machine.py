"""The shape of the virtual machine: one description, written out as a QEMU command line or as a libvirt domain.

A clone's device state can be loaded only by a QEMU with the same devices at the same addresses, so shells (raw QEMU) and a parent
that is a libvirt domain must come from one description. The addresses are fixed here:

    pcie.0  0x1   virtio-serial, port 1 "sf.agent"
            0x2   virtio-blk: the guest's root, read-only, shared by all
            0x3   virtio-net
            0x8.k pcie-root-port for data disk k (hot-plugged into the parent, given at the start to shells)
    ISA           serial console, pvpanic

What a machine has by default and no guest here uses is left out, because every device costs each clone: of the time to load
its state (TCG, one clone: 19 ms with all of it, 11 without) and of its private memory (23.5 MiB, now 20.5).
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DATA_SLOTS = 4
"""Data disks that a VM with `--data` can have; each needs a root port, and ports are part of the template."""

AGENT_PORT = "sf.agent"

# Offloads are off in parent and clones alike: a clone's state can be loaded only into a NIC with the same features, and what
# features there are depends on the backend (a hub port for the parent, a tap for clones). Without a control queue the device
# takes every frame that comes to its port, whatever MAC address the guest has given itself, and the guest has no command to
# wait for when it changes that address.
NIC_OPTIONS = ",".join(
    f"{name}=off"
    for name in (
        "csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo", "guest_announce",
        "host_tso4", "host_tso6", "host_ecn", "host_ufo", "ctrl_vq", "ctrl_mac_addr", "ctrl_rx", "ctrl_rx_extra", "ctrl_vlan",
    )
)  # fmt: skip


# Legacy registers are an I/O range more to map; a virtio-serial device has queues for 31 ports unless it is told.
_VIRTIO = "bus=pcie.0,disable-legacy=on"
_SERIAL_PORTS = 2

_LEFT_OUT = "usb=off,sata=off,smbus=off,i8042=off,hpet=off"


TCG_CPU_MODEL = "max,la57=off,erms=off,fsrm=off,avx2=off,vaes=off,bmi1=off,bmi2=off,adx=off,abm=off"
"""TCG's `max` without what it computes wrong, or slowly (docs/decisions/0001-emulated-processor.md).

* avx2: in QEMU 7.2 a gather whose index is in register 4 reads the first element of its table over and over, so that numpy sorts
  wrong without a word. vaes: QEMU 7.2 encrypts wrong with YMM registers.
* bmi1, adx: in QEMU 7.2 BLSI and the 32-bit ADCX and ADOX leave a wrong carry. bmi2: no processor has it without BMI1.
* abm (LZCNT): QEMU 10 executes LZCNT as BSR where there is no BMI1.
* la57: five-level paging only makes each TLB miss dearer.
* erms: the guest would copy and clear memory by REP MOVSB, which TCG does byte by byte: five times as long.
* fsrm: QEMU 10's `max` has it. Linux takes for granted that it comes with ERMS (arch/x86/lib/memmove_64.S), and without stands
  still early in its boot.

What is left, runtime/cpu_check proves at the boot of each template.
"""


class Accelerator(enum.Enum):
    """How guest code is executed."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True)
class MachineSpec:
    """What must be equal in all VMs of a job.

    Attributes:
        memory_bytes: size of guest RAM.
        root_image: squashfs with the guest's root.
        data_images: squashfs images of `--data` folders, in slot order; a VM may get more of them while it runs (`Vm.disks`).
        data_slots: how many data disks there can be in all; DATA_SLOTS at most.
        mtu: largest packet on the clone network, bytes.
    """

    accelerator: Accelerator
    cpus: int
    memory_bytes: int
    root_image: Path
    data_images: tuple[Path, ...] = ()
    data_slots: int = 0
    qemu: str = "qemu-system-x86_64"
    mtu: int = 9000

    @property
    def cpu_model(self) -> str:
        return "host" if self.accelerator is Accelerator.KVM else TCG_CPU_MODEL

    @property
    def machine(self) -> str:
        return f"q35,{_LEFT_OUT},dump-guest-core=off,suppress-vmdesc=on,memory-backend=pc.ram"

    @property
    def code_bytes(self) -> int:
        """What QEMU translates in a clone until it has answered (measured: 8.2 to 8.5 MiB for a function that does nothing)."""
        return 0 if self.accelerator is Accelerator.KVM else 8 << 20

    def fingerprint(self) -> dict[str, object]:
        """What a template depends on; a data disk is not part of it."""
        return {
            "accelerator": self.accelerator.value,
            "cpus": self.cpus,
            "memory_bytes": self.memory_bytes,
            "machine": self.machine,
            "cpu_model": self.cpu_model,
            "devices": devices(replace(self, data_images=())),
            "mtu": self.mtu,
        }


@dataclass(frozen=True)
class Boot:
    """What only the VM that boots the template needs; shells get the guest's memory instead."""

    kernel: Path
    initrd: Path
    command_line: str


@dataclass(frozen=True)
class Endpoints:
    """Descriptors that a raw QEMU inherits: connected sockets, a console file, a tap."""

    qmp: int
    agent: int
    console: int
    tap: int | None


def _core_arguments(spec: MachineSpec) -> list[str]:
    return [
        "-machine", spec.machine,
        "-accel", spec.accelerator.value,
        "-cpu", spec.cpu_model,
        "-m", str(spec.memory_bytes >> 20),
        "-object", f"memory-backend-ram,id=pc.ram,size={spec.memory_bytes}",
        "-smp", f"{spec.cpus},sockets={spec.cpus},cores=1,threads=1",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S",
        "-global", "migration.send-configuration=off",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]  # fmt: skip


def _nic_device() -> str:
    return f"virtio-net-pci,netdev=net0,id=nic0,{_VIRTIO},addr=0x3,mac=0a:53:46:ff:ff:ff,romfile=,{NIC_OPTIONS}"


def _root_ports(spec: MachineSpec) -> list[str]:
    ports = []
    for slot in range(spec.data_slots):
        first = ",multifunction=on" if slot == 0 else ""
        ports += ["-device", f"pcie-root-port,id=data{slot},port={slot},chassis={slot + 1},bus=pcie.0,addr=0x8.{slot}{first}"]
    return ports


def data_disk(image: Path, slot: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of QMP `blockdev-add` and `device_add` for the data disk in a slot."""
    node = {"driver": "raw", "node-name": f"data-image{slot}", "read-only": True,
            "file": {"driver": "file", "filename": str(image), "read-only": True}}  # fmt: skip
    device: dict[str, Any] = {"driver": "virtio-blk-pci", "id": f"data-disk{slot}", "bus": f"data{slot}",
                                 "drive": f"data-image{slot}", "serial": f"sfdata{slot}"}  # fmt: skip
    return dict(node), device


def arguments(spec: MachineSpec, endpoints: Endpoints, boot: Boot | None = None) -> list[str]:
    """Command line of a raw QEMU: a shell that waits for a checkpoint, or the VM that boots the template."""
    argv = [spec.qemu, *_core_arguments(spec)]
    if boot:
        argv += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", boot.command_line]
    else:
        argv += ["-incoming", "defer"]
    argv += [
        "-chardev", f"socket,id=monitor,fd={endpoints.qmp}", "-mon", "chardev=monitor,mode=control",
        "-add-fd", f"set=1,fd={endpoints.console}",
        "-chardev", "file,id=console,path=/dev/fdset/1,append=on", "-device", "isa-serial,chardev=console,index=0",
        "-device", f"virtio-serial-pci,id=serial-bus,{_VIRTIO},addr=0x1,max_ports={_SERIAL_PORTS}",
        "-chardev", f"socket,id=agent,fd={endpoints.agent}",
        "-device", f"virtserialport,bus=serial-bus.0,nr=1,chardev=agent,name={AGENT_PORT}",
        "-blockdev", f"driver=file,node-name=root-file,filename={spec.root_image},read-only=on",
        "-blockdev", "driver=raw,node-name=root,file=root-file,read-only=on",
        "-device", f"virtio-blk-pci,drive=root,{_VIRTIO},addr=0x2",
        "-netdev", "hubport,id=net0,hubid=0" if endpoints.tap is None else f"tap,id=net0,fd={endpoints.tap}",
        "-device", _nic_device(),
        "-device", "pvpanic",
        *_root_ports(spec),
    ]  # fmt: skip
    for slot in range(len(spec.data_images)):
        image = spec.data_images[slot]
        argv += [
            "-blockdev", f"driver=file,node-name=data-file{slot},filename={image},read-only=on",
            "-blockdev", f"driver=raw,node-name=data-image{slot},file=data-file{slot},read-only=on",
            "-device", f"virtio-blk-pci,id=data-disk{slot},bus=data{slot},drive=data-image{slot},serial=sfdata{slot}",
        ]  # fmt: skip
    return argv


def devices(spec: MachineSpec) -> list[str]:
    """The devices of a VM as QEMU's options have them, in order: a shell must have those of the state that it loads."""
    argv = arguments(spec, Endpoints(qmp=0, agent=0, console=0, tap=None))
    return [value for option, value in itertools.pairwise(argv) if option == "-device"]


@dataclass(frozen=True)
class DomainPaths:
    """Where the sockets of a libvirt-managed VM lie, in the job's private folder."""

    qmp: Path
    agent: Path
    paging: Path
    console: Path


@dataclass(frozen=True)
class Confinement:
    """What a libvirt daemon is told about a parent's QEMU, where it would choose by itself.

    Attributes:
        user: to run QEMU as; it must be able to read the images.
        group: likewise.
        models: the daemon's mandatory access control ("apparmor", "selinux"). Their profiles know neither the paging layer nor
            the sockets of a job and would stop QEMU at the start, so that they are left out; QEMU's seccomp sandbox is on.
    """

    user: int
    group: int
    models: tuple[str, ...] = ()


def domain_xml(
    spec: MachineSpec, name: str, paths: DomainPaths, library: Path, confinement: Confinement | None = None
) -> str:
    """The libvirt domain of a parent (https://libvirt.org/formatdomain.html).

    Args:
        confinement: for a daemon; the embedded driver has been configured.

    What libvirt has no element for (incoming state, the NIC on a hub, a second monitor) is passed through its QEMU
    namespace, at the addresses of `arguments`.
    """
    qemu_namespace = "http://libvirt.org/schemas/domain/qemu/1.0"
    ElementTree.register_namespace("qemu", qemu_namespace)
    kind = "kvm" if spec.accelerator is Accelerator.KVM else "qemu"
    domain = ElementTree.Element("domain", type=kind)

    def add(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag, attributes)
        element.text = text or None
        return element

    def address(parent: ElementTree.Element, slot: int, function: int = 0, multifunction: bool = False) -> None:
        extra = {"multifunction": "on"} if multifunction else {}
        add(parent, "address", type="pci", domain="0x0000", bus="0x00", slot=f"{slot:#04x}", function=f"{function:#x}", **extra)

    add(domain, "name", name)
    add(domain, "memory", str(spec.memory_bytes >> 10), unit="KiB")
    add(domain, "vcpu", str(spec.cpus))
    add(add(domain, "os"), "type", "hvm", arch="x86_64", machine="q35")
    add(add(domain, "features"), "acpi")
    add(add(domain, "clock", offset="utc"), "timer", name="hpet", present="no")
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "destroy"), ("on_crash", "destroy")):
        add(domain, event, action)
    if confinement:
        label = add(domain, "seclabel", type="static", model="dac", relabel="no")
        add(label, "label", f"+{confinement.user}:+{confinement.group}")
        for model in confinement.models:
            add(domain, "seclabel", type="none", model=model)
    devices = add(domain, "devices")
    add(devices, "controller", type="usb", model="none")
    add(devices, "memballoon", model="none")
    add(devices, "audio", id="1", type="none")
    modern = "virtio-non-transitional"
    address(add(devices, "controller", type="virtio-serial", index="0", model=modern, ports=str(_SERIAL_PORTS)), 1)
    disk = add(devices, "disk", type="file", device="disk", model=modern)
    add(disk, "driver", name="qemu", type="raw")
    add(disk, "source", file=str(spec.root_image))
    add(disk, "target", dev="vda", bus="virtio")
    add(disk, "readonly")
    address(disk, 2)
    channel = add(devices, "channel", type="unix")
    add(channel, "source", mode="bind", path=str(paths.agent))
    add(channel, "target", type="virtio", name=AGENT_PORT)
    add(channel, "address", type="virtio-serial", controller="0", bus="0", port="1")
    add(add(devices, "serial", type="file"), "source", path=str(paths.console))
    add(devices, "panic", model="isa")
    command_line = add(domain, f"{{{qemu_namespace}}}commandline")
    extra = [
        "-machine", f"{_LEFT_OUT},suppress-vmdesc=on", "-global", "migration.send-configuration=off", "-incoming", "defer",
        "-cpu", spec.cpu_model, "-no-reboot",
        "-chardev", f"socket,id=sfmonitor,path={paths.qmp},server=on,wait=off", "-mon", "chardev=sfmonitor,mode=control",
        "-netdev", "hubport,id=net0,hubid=0", "-device", _nic_device(), *_root_ports(spec),
    ]  # fmt: skip
    for value in extra:
        add(command_line, f"{{{qemu_namespace}}}arg", value=value)
    for variable, value in (("LD_PRELOAD", str(library)), ("SFPAGE_PATH", str(paths.paging))):
        add(command_line, f"{{{qemu_namespace}}}env", name=variable, value=value)
    return ElementTree.tostring(domain, encoding="unicode")
