"""The one module that imports libvirt: connections, and the domain of a parent. It is loaded only where `--connect` asks for it.

`--connect embed` embeds the driver in this process (https://libvirt.org/drvqemu.html#embedded-driver), its files in the job's
private folder. Its probe of the QEMU binary costs seconds, so that result alone is kept in the cache folder.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from xml.etree import ElementTree

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, VMError
from sfparallel.vmm.options import EMBEDDED

# Read when libvirt is loaded: errors reach callers as exceptions, and its warnings (that a domain has arguments of its own,
# each time) would only worry users.
os.environ.setdefault("LIBVIRT_DEBUG", "4")
import libvirt

# The parent runs as the user who started the job, in the job's own mount namespace, so that libvirt's per-domain namespaces
# and security labels would only stand between it and the job's sockets. QEMU's seccomp sandbox stays on.
_EMBEDDED_SETTINGS = """\
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


class EventLoop:
    """libvirt's own event loop in a thread; it must be registered before the first connection."""

    _lock = threading.Lock()
    _started = False

    @classmethod
    def ensure(cls) -> None:
        with cls._lock:
            if cls._started:
                return
            libvirt.virEventRegisterDefaultImpl()
            # Errors reach the caller as exceptions; libvirt would print each to stderr as well.
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
            cls._started = True


def library_version() -> int:
    """Version of the libvirt library: 1,000,000 * major + 1,000 * minor + release."""
    return int(libvirt.getVersion())


class Connection:
    """A libvirt connection that can start parents.

    Args:
        uri: a `qemu:` URI, or EMBEDDED.
        folder: the job's private folder.
        public: a folder outside the job's mount namespace: a daemon's QEMU makes its sockets there.

    Attributes:
        embedded: the driver is in this process, and QEMU in this process's namespaces.
        folder: where the parent's sockets are to be.

    Raises:
        EnvironmentProblem: libvirt cannot be reached.
    """

    def __init__(self, uri: str, folder: Path, public: Path) -> None:
        EventLoop.ensure()
        self.uri = self._embedded(folder) if uri == EMBEDDED else uri
        self.embedded = self.uri.startswith(EMBEDDED)
        self.folder = folder if self.embedded else public
        try:
            self._connection = libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise EnvironmentProblem(
                f"libvirt connection {self.uri} failed: {error}",
                hint="start libvirtd, or omit --connect: no job needs libvirt; see `sf doctor`",
            ) from error

    @staticmethod
    def _embedded(folder: Path) -> str:
        root = folder / "libvirt"
        (root / "etc").mkdir(parents=True)
        settings = _EMBEDDED_SETTINGS
        if os.geteuid() == 0:
            settings += 'user = "root"\ngroup = "root"\n'
        (root / "etc" / "qemu.conf").write_text(settings)
        cache = cache_folder() / "libvirt"
        cache.mkdir(parents=True, exist_ok=True)
        (root / "cache").symlink_to(cache)
        return f"qemu:///embed?root={root}"

    def security_models(self) -> tuple[str, ...]:
        """Names of the mandatory access control that confines this connection's domains ("apparmor", "selinux")."""
        models = ElementTree.fromstring(self._connection.getCapabilities()).findall("./host/secmodel/model")
        return tuple(model.text for model in models if model.text and model.text not in ("dac", "none"))

    def start(self, xml: str) -> Domain:
        """Start a transient domain, paused. Blocks for about half a second.

        Raises:
            VMError: libvirt or QEMU refused.
        """
        try:
            # AUTODESTROY: the domain goes when this connection does, whatever ends it.
            flags = libvirt.VIR_DOMAIN_START_PAUSED
            if not self.embedded:
                flags |= libvirt.VIR_DOMAIN_START_AUTODESTROY
            return Domain(self._connection.createXML(xml, flags))
        except libvirt.libvirtError as error:
            raise VMError(f"libvirt could not start the parent VM: {error}", hint="see `sf doctor`") from error

    def close(self) -> None:
        try:
            self._connection.close()
        except libvirt.libvirtError as error:
            raise VMError(f"libvirt connection {self.uri} did not close: {error}") from error


class Domain:
    """A running parent as libvirt sees it."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain
        self.name: str = domain.name()

    def destroy(self) -> None:
        """End the VM now; it is no error when it has ended by itself."""
        try:
            self._domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise VMError(f"{self.name}: libvirt could not destroy it: {error}") from error
