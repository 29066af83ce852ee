"""Which jobs run.

A job is known by an abstract unix socket (unix(7)): it has no name in a file system and is gone with its process, so that a
killed job cannot leave a stale entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from sfparallel.errors import EnvironmentProblem, ProtocolError
from sfparallel.text import in_one_line
from sfparallel.vmm.processes import memory_of_family
from sfparallel.wire import pack, unpack

_NAME = re.compile(r"@(sfparallel/job/[\d.]+)$")
_MOST_OF_A_NUMBER = 100
_ANSWER_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred, unix(7)


@dataclass(frozen=True)
class JobStatus:
    """What `sf ps` shows of a job.

    Attributes:
        image: name of its guest image.
        memory_bytes: of it and its VMs, measured by the process that asks; the job does not send it.
    """

    pid: int
    program: str
    clones: int
    forks: int
    seconds: float
    image: str = ""
    memory_bytes: int = 0


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
    raise EnvironmentProblem(f"{_MOST_OF_A_NUMBER} jobs are registered as {pid}", hint="see @sfparallel/job in /proc/net/unix")


def _names() -> list[str]:
    # proc(5): the last column is the path; abstract names begin with @.
    with open("/proc/net/unix") as table:
        found = (_NAME.search(line.rstrip()) for line in table)
        return sorted({match[1] for match in found if match})


def _owner(writer: asyncio.StreamWriter) -> int:
    """Process id of the job in our PID namespace, which may not be the job's own."""
    connection: socket.socket = writer.get_extra_info("socket")
    pid: int = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


async def running_jobs() -> list[JobStatus]:
    """All jobs of this machine that answer."""
    jobs = []
    for name in _names():
        with contextlib.suppress(OSError, TimeoutError, ProtocolError, TypeError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path=f"\0{name}")
                with contextlib.closing(writer):
                    answer = unpack(await reader.read())
                    # A job of another version may send more fields, or fewer.
                    known = {field.name: answer[field.name] for field in fields(JobStatus) if field.name in answer}
                    jobs.append(JobStatus(**{**known, "memory_bytes": memory_of_family(_owner(writer))}))
    return jobs


def table(jobs: Sequence[JobStatus]) -> list[str]:
    """The lines of `sf ps`."""
    lines = [f"{'PID':>8} {'CLONES':>7} {'FORKS':>6} {'SECONDS':>8} {'MEMORY':>10}  {'IMAGE':12}  PROGRAM"]
    for job in jobs:
        memory = f"{job.memory_bytes >> 20} MiB"
        lines.append(f"{job.pid:8} {job.clones:7} {job.forks:6} {job.seconds:8.0f} {memory:>10}  {in_one_line(job.image):12}  "
                     f"{in_one_line(job.program)}")  # fmt: skip
    return lines
