"""`sf doctor`: the one place that finds out what this machine can do.

Every probe tries the real thing (opens the device, makes the namespace, runs a guest of twelve instructions) and tells apart
what is not there, what is not permitted and what is there but broken, each with its remedy.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib
import json
import os
import pwd
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sfparallel import native
from sfparallel.config import ACCEL, CLONE_MEMORY, LIBVIRT_REMEDY, QEMU, cache_folder, parse_size, qemu_remedy
from sfparallel.errors import EnvironmentProblem, NetworkError, UsageError
from sfparallel.net.network import CloneNetwork
from sfparallel.vmm import native_parts
from sfparallel.vmm.apt_sources import sources_for
from sfparallel.vmm.capacity import available_bytes
from sfparallel.vmm.command_errors import late_hint
from sfparallel.vmm.confinement import BIND_ROOT, NO_MOUNT_POINT
from sfparallel.vmm.kvm import EMULATED, probe_kvm
from sfparallel.vmm.processes import command_path
from sfparallel.vmm.releases import host_release
from sfparallel.vmm.verdict import Finding, Status, not_installed, verdict_of

_QEMU_LIMIT_S = 20.0
_OLDEST_QEMU = (7, 2)
_CACHE_BYTES = 3 << 30
_MAP_COUNT = 65530  # the kernel's default
_OPEN_FILES = 4096
_PAGEMAP_SCAN = 0xC0606610  # <linux/fs.h>
_NEEDED_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_LIBVIRT_DRIVER = "libvirt_driver_qemu.so"


def diagnose(find_image: Callable[[], object] | None = None) -> list[Finding]:
    """Probes everything, in the order in which a user would mend it. Takes about a second; raises nothing.

    Args:
        find_image: finds the default guest image or raises `ImageMissing`; that of `sfparallel.vmm.image` unless given.
    """
    image = _image(find_image or _find_default_image)
    builders = functools.partial(_program, purpose="builds guest images", needed=image.lacks)
    probes: list[Callable[[], Finding]] = [
        _permission, _qemu, _library,
        lambda: _guest_program("guest agent", native_parts.AGENT),
        lambda: _guest_program("test of processors", native_parts.CPU_CHECK),
        _kvm, _tun, _network, _mounts, _map_count, _open_files, _memory, _cache,
        lambda: builders("mmdebstrap", "mmdebstrap"), lambda: builders("mksquashfs", "squashfs-tools"),
        lambda: _sources(needed=image.lacks), lambda: image,
        _pagemap_scan, _libvirt_binding, _libvirt_driver, _libvirt_user,
    ]  # fmt: skip
    return [probe() for probe in probes]


def render(findings: list[Finding]) -> str:
    """What it all means, and then a line for each finding, with the remedy under those that need one."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = [*_summary(findings), ""]
    for finding in findings:
        word = finding.status.value if finding.needed or finding.status is Status.OK else "optional"
        lines.append(f"{word:<9} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<9} {'':<{width}}  remedy: {finding.remedy}")
    return "\n".join(lines)


def _summary(findings: list[Finding]) -> list[str]:
    """Whether jobs can run here and, if not, all that is to be done, in its order."""
    lacking = [finding for finding in findings if finding.lacks]
    if not lacking:
        kvm = next((finding for finding in findings if finding.name == "KVM"), None)
        return ["ready: jobs can run here" + (f". {EMULATED}" if kvm and kvm.status is not Status.OK else "")]
    count = "1 thing is" if len(lacking) == 1 else f"{len(lacking)} things are"
    packages = sorted({word for finding in lacking for word in finding.packages.split()})
    steps = [f"apt install {' '.join(packages)}"] if packages else []
    steps += dict.fromkeys(finding.remedy for finding in lacking if not finding.packages)
    names = ", ".join(finding.name for finding in lacking)
    return [f"cannot run: {count} missing or not usable: {names}. What to do:", *(f"  {step}" for step in steps),
            "`sfrun --local` runs programs without all this, for development"]  # fmt: skip


# -- programs and libraries ----------------------------------------------------------------------------------------------


def _program(name: str, package: str, *, purpose: str, needed: bool) -> Finding:
    path = shutil.which(name)
    if path:
        return Finding(name, Status.OK, f"{path} ({purpose})", needed=needed)
    return not_installed(name, f"not found; {purpose}", package, needed=needed)


def _sources(*, needed: bool) -> Finding:
    """Whether this host knows where the packages of its own release come from."""
    name = "apt sources"
    try:
        release = host_release()
        sources_for(release)
    except (EnvironmentProblem, UsageError) as error:
        remedy = error.hint or "see apt's sources.list(5)"
        return Finding(name, Status.ABSENT, error.message, remedy, needed)
    return Finding(name, Status.OK, f"{release} (for guest images)", needed=needed)


def _library() -> Finding:
    """Has the paging layer answer in a QEMU, or at least loads it."""
    name, part = "paging layer", native_parts.LIBRARY
    qemu = shutil.which(QEMU.get())
    return _part(name, part, lambda: native_parts.trouble_with_library(qemu), "answers in QEMU" if qemu else "loads")


def _guest_program(name: str, part: Path) -> Finding:
    return _part(name, part, lambda: native_parts.trouble_with_program(part), "runs")


def _part(name: str, part: Path, try_it: Callable[[], str], works: str) -> Finding:
    remedy = native_parts.remedy(part)
    if not part.exists():
        return Finding(name, Status.ABSENT, f"{part} is not there", remedy)
    try:
        trouble = try_it()
    except TimeoutError as error:
        return Finding(name, Status.BROKEN, f"{part}: {error}", f"{late_hint(part)}; if it stays so, {remedy}")
    if trouble:
        return Finding(name, Status.BROKEN, f"{part}: {trouble}", remedy)
    return Finding(name, Status.OK, f"{part.name} {works}")


def _kvm() -> Finding:
    """By what SF_ACCEL says, KVM is needed, not wanted, or taken if it works."""
    wanted = ACCEL.get()
    if wanted == "tcg":
        return Finding("KVM", Status.ABSENT, f"not used, because {ACCEL.variable}=tcg", f"unset {ACCEL.variable}", needed=False)
    if wanted not in ("auto", "kvm"):
        return Finding("KVM", Status.BROKEN, f"{ACCEL.variable}={wanted!r} is not an accelerator", "set it to auto, kvm or tcg")
    finding = probe_kvm()
    if wanted == "auto" or finding.status is Status.OK:
        return finding
    return replace(finding, needed=True, remedy=f"unset {ACCEL.variable}, and guests are emulated (TCG)")


def qemu_version(program: str) -> tuple[int, int, int]:
    """The version that a QEMU tells over its monitor.

    Raises:
        OSError: it can't be run.
        EnvironmentProblem: it ran and answered nothing sensible, or nothing in time.
    """
    argv = [program, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    commands = '{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    try:
        done = subprocess.run(argv, input=commands, capture_output=True, text=True, timeout=_QEMU_LIMIT_S)
        numbers = json.loads(done.stdout.partition("\n")[0])["QMP"]["version"]["qemu"]
        return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"{program} did not answer in {error.timeout:g} s", hint=late_hint(program)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise EnvironmentProblem(f"{program} is no QEMU, or fails: {done.stderr.strip()[:200]}") from error


def _qemu() -> Finding:
    name, package = "QEMU", "qemu-system-x86"
    install = f"apt install {package}"
    path = shutil.which(QEMU.get())
    if path is None:
        if QEMU.get() != QEMU.default:
            return Finding(name, Status.ABSENT, f"{QEMU.get()} was not found", qemu_remedy())
        return not_installed(name, f"{QEMU.get()} was not found", package)
    try:
        found = qemu_version(path)
    except OSError as error:
        return verdict_of(error, name, f"{path} cannot be run", install)
    except EnvironmentProblem as error:
        return Finding(name, Status.BROKEN, error.message, error.hint or f"reinstall it: {install}")
    text = ".".join(map(str, found))
    if found[:2] < _OLDEST_QEMU:
        oldest = ".".join(map(str, _OLDEST_QEMU))
        return Finding(name, Status.BROKEN, f"{path} is version {text}, too old", f"install QEMU {oldest} or later")
    return Finding(name, Status.OK, f"{path}, version {text}")


def _libvirt_binding() -> Finding:
    name = "libvirt for Python"
    try:
        # Late: it loads libvirt, which may not be there.
        from sfparallel.vmm.libvirt_domain import library_version

        number = library_version()
        binding = version("libvirt-python")
    except (ImportError, PackageNotFoundError) as error:
        return Finding(name, Status.ABSENT, f"{error} (for --connect)", LIBVIRT_REMEDY, needed=False)
    return Finding(name, Status.OK, f"binding {binding}, library {number // 1000000}.{number // 1000 % 1000}.{number % 1000}")


def _libvirt_driver() -> Finding:
    """What `--connect` could use: a daemon that can be reached, or the driver loaded into the supervisor itself."""
    name = "libvirt's QEMU driver"
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}")
    sockets = {"system daemon": ["/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"],
               "session daemon": [f"{runtime}/libvirt/libvirt-sock", f"{runtime}/libvirt/virtqemud-sock"]}  # fmt: skip
    found = [what for what, paths in sockets.items() if any(os.access(path, os.R_OK | os.W_OK) for path in paths)]
    refused = [what for what, paths in sockets.items() if any(map(os.path.exists, paths)) and what not in found]
    driver = next((path for path in _driver_paths() if path.exists()), None)
    if driver:
        found.append("embedded driver")
    if found:
        return Finding(name, Status.OK, ", ".join(found))
    if refused:
        remedy = "usermod -aG libvirt $USER, and log in again"
        return Finding(name, Status.FORBIDDEN, f"no access to the {refused[0]}'s socket", remedy, needed=False)
    return not_installed(name, "neither a daemon nor the embedded driver is there (for --connect)", "libvirt-daemon-driver-qemu",
                         needed=False)  # fmt: skip


def _driver_paths() -> Iterator[Path]:
    for library in (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib"):
        yield Path(library) / "libvirt" / "connection-driver" / _LIBVIRT_DRIVER


def _libvirt_user() -> Finding:
    name = "user libvirt-qemu"
    try:
        user = pwd.getpwnam("libvirt-qemu")
    except KeyError:
        return not_installed(name, "a system daemon runs parents as this user; the embedded driver does not need it",
                             "libvirt-daemon-system", needed=False)
    return Finding(name, Status.OK, f"uid {user.pw_uid}")


# -- the kernel ----------------------------------------------------------------------------------------------------------


def _permission() -> Finding:
    name = "permission"
    held = next((int(line.split()[1], 16) for line in Path("/proc/self/status").read_text().splitlines()
                 if line.startswith("CapEff:")), 0)
    missing = [capability for capability, bit in _NEEDED_CAPABILITIES.items() if not held >> bit & 1]
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"
    if missing:
        remedy = f"run as root (sudo {command_path('sfrun')} ...), or in a container with these capabilities"
        return Finding(name, Status.FORBIDDEN, f"{who} lacks {', '.join(missing)}", remedy)
    return Finding(name, Status.OK, f"{who}, with {', '.join(_NEEDED_CAPABILITIES)}")


def _tun() -> Finding:
    path = "/dev/net/tun"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "modprobe tun; in a container: pass the device (--device /dev/net/tun)"
        return verdict_of(error, path, "cannot be opened", remedy,
                          forbidden="run as root, or in a container with access to that device")
    return Finding(path, Status.OK, "opens")


def _network() -> Finding:
    """Makes a whole clone network with one port, and takes it down."""
    name = "clone network"
    remedy = "a kernel with namespaces, bridge, tun and nf_tables for bridges (Debian's has them): modprobe bridge tun nf_tables"
    try:
        with CloneNetwork() as network:
            network.add_port(0)
    except NetworkError as error:
        if isinstance(error.__cause__, OSError):
            return verdict_of(error.__cause__, name, error.message, remedy, forbidden="run as root (sudo)")
        return Finding(name, Status.BROKEN, error.message, remedy)
    return Finding(name, Status.OK, "namespace, bridge, tap and packet filter work")


def _mounts() -> Finding:
    """Mounts a tmpfs in a mount namespace of its own; both go with the thread that tries it."""
    name = "private mounts"
    failures: list[OSError] = []

    def attempt() -> None:
        try:
            native.mount_private_tmpfs("/tmp", size_bytes=1 << 20)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if failures and failures[0].errno == errno.EINVAL:
        return Finding(name, Status.BROKEN, NO_MOUNT_POINT, BIND_ROOT)
    if failures:
        remedy = "a kernel with CONFIG_NAMESPACES and CONFIG_TMPFS"
        return verdict_of(failures[0], name, "no mount namespace with a tmpfs", remedy,
                          forbidden="run as root (sudo), or in a container with CAP_SYS_ADMIN")
    return Finding(name, Status.OK, "mount namespace and tmpfs work")


def _pagemap_scan() -> Finding:
    name = "PAGEMAP_SCAN"
    try:
        with open("/proc/self/pagemap", "rb") as file:
            fcntl.ioctl(file, _PAGEMAP_SCAN, bytes(_PAGEMAP_SCAN >> 16 & 0x3FFF))
    except OSError as error:
        # An empty request is invalid (EINVAL) to a kernel that knows it; any other answers ENOTTY.
        if error.errno == errno.EINVAL:
            return Finding(name, Status.OK, "the kernel finds dirtied pages itself")
        if error.errno != errno.ENOTTY:
            return verdict_of(error, name, "/proc/self/pagemap cannot be used", "mount /proc", forbidden="run as root (sudo)")
    detail = "dirtied pages are found by reading pagemap, which is slower"
    return Finding(name, Status.ABSENT, detail, "Linux 6.7 or later", needed=False)


def _map_count() -> Finding:
    name = "vm.max_map_count"
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    if count < _MAP_COUNT:
        detail = f"{count}: too few mappings for scattered memory images"
        return Finding(name, Status.BROKEN, detail, f"sysctl -w {name}={_MAP_COUNT}")
    return Finding(name, Status.OK, str(count))


def _open_files() -> Finding:
    name = "open files"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        return Finding(name, Status.FORBIDDEN, f"limit {hard}; each clone takes a few", f"ulimit -Hn {_OPEN_FILES} (as root)")
    return Finding(name, Status.OK, f"limit {soft}, can be raised to {'any' if hard == resource.RLIM_INFINITY else hard}")


# -- room ----------------------------------------------------------------------------------------------------------------


def _memory() -> Finding:
    name = "memory"
    free = available_bytes()
    parent, clone = 1 << 30, parse_size(CLONE_MEMORY.get())
    detail = f"{free / (1 << 30):.1f} GiB available"
    if free < parent + clone:
        detail += ": a parent of 1 GiB and one clone do not fit"
        return Finding(name, Status.BROKEN, detail, "end other programs, or give the parent less (sfrun --memory)")
    return Finding(name, Status.OK, f"{detail}: a parent of 1 GiB and about {(free - parent) // clone} clones")


def _cache() -> Finding:
    name, folder = "cache folder", cache_folder()
    # os.path, because Path.exists raises where a folder on the way can't be searched.
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, Status.FORBIDDEN, f"{there} is not writable", "set SF_CACHE to a folder of yours")
    free = shutil.disk_usage(there).free
    detail = f"{folder}, {free / (1 << 30):.1f} GiB free"
    if free < _CACHE_BYTES:
        return Finding(name, Status.BROKEN, f"{detail}: an image and its templates take up to {_CACHE_BYTES >> 30} GiB",
                       "make room (`sf clean`), or set SF_CACHE")
    return Finding(name, Status.OK, detail)


def _find_default_image() -> object:
    # Late: the doctor must work where the image code, or what it needs, does not.
    return importlib.import_module("sfparallel.vmm.image").find("default")


def _image(find: Callable[[], object]) -> Finding:
    name, remedy = "guest image", "sf image build"
    try:
        found = find()
    except EnvironmentProblem as error:
        return Finding(name, Status.ABSENT, error.message, remedy)
    except ImportError as error:
        return Finding(name, Status.BROKEN, f"the image code does not load: {error}", "reinstall sfparallel")
    except OSError as error:
        return verdict_of(error, name, "cannot be read", remedy)
    return Finding(name, Status.OK, str(getattr(found, "root", found)))


__all__ = ["Finding", "Status", "diagnose", "qemu_version", "render"]
