"""Which jobs run, and what interrupted ones left in the cache folder.

A job is known by an abstract unix socket (unix(7)): it has no name in a file system and is gone with its process, so that a
killed job cannot leave a stale entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sfparallel.config import cache_folder
from sfparallel.errors import EnvironmentProblem, ProtocolError
from sfparallel.text import in_one_line
from sfparallel.wire import pack, unpack

_NAME = re.compile(r"@(sfparallel/job/[\d.]+)$")
_MOST_OF_A_NUMBER = 100
_ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class JobStatus:
    """What `sf ps` shows of a job."""

    pid: int
    program: str
    clones: int
    forks: int
    seconds: float


async def announce(pid: int, status: Callable[[], JobStatus]) -> asyncio.Server:
    """Answer `sf ps` for the job of process `pid` until the server is closed."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            now = status()
            writer.write(pack({**asdict(now), "program": in_one_line(now.program)}))
            with contextlib.suppress(OSError):
                await writer.drain()

    # Elsewhere in this network namespace there may be a process of the same number: in a container with the host's network, say.
    for number in range(_MOST_OF_A_NUMBER):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(f"\0sfparallel/job/{pid}" + (f".{number}" if number else ""))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return await asyncio.start_unix_server(answer, sock=sock)
    raise EnvironmentProblem(f"{_MOST_OF_A_NUMBER} jobs are known as {pid}", hint="see @sfparallel/job in /proc/net/unix")


def _names() -> list[str]:
    # proc(5): the last column is the path; abstract names begin with @.
    with open("/proc/net/unix") as table:
        found = (_NAME.search(line.rstrip()) for line in table)
        return sorted({match[1] for match in found if match})


async def running_jobs() -> list[JobStatus]:
    """All jobs of this machine that answer."""
    jobs = []
    for name in _names():
        with contextlib.suppress(OSError, TimeoutError, ProtocolError, TypeError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path=f"\0{name}")
                with contextlib.closing(writer):
                    jobs.append(JobStatus(**unpack(await reader.read())))
    return jobs


def clean(*, everything: bool) -> Iterator[str]:
    """Remove what interrupted builds left, and templates that no job has open; yields a line for each thing removed.

    Args:
        everything: images, data images and kept probes as well.
    """
    cache = cache_folder()
    candidates = [*cache.glob("templates/*"), *cache.glob("images/.*"), *cache.glob("templates/.*"), *cache.glob("data/.*")]
    candidates += cache.glob("initrd/.*")
    if everything:
        candidates += [*cache.glob("images/*"), *cache.glob("data/*"), *cache.glob("initrd/*"), cache / "libvirt"]
    for path in dict.fromkeys(candidates):
        if not path.exists() or _in_use(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        yield f"removed {path.relative_to(cache)}"


def _in_use(path: Path) -> bool:
    """Whether a build holds the lock that belongs to this entry. Open files outlive their names, so that jobs need none."""
    lock = _lock_of(path)
    if not lock.is_file():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_of(path: Path) -> Path:
    """The lock of the build that an entry of the cache folder comes from; a lock's own is the lock itself."""
    if path.suffix == ".lock" or path.name.startswith(".lock-"):
        return path
    for prefix in (".build-", ".doomed-"):
        if path.name.startswith(prefix):  # of an image, which is locked by its name
            return path.with_name(f".lock-{path.name.removeprefix(prefix)}")
    return path.with_suffix(".lock")
