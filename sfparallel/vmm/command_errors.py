"""Errors as users of the commands see them: one clear message with a hint, and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from sfparallel.config import CACHE_HINT, debugging
from sfparallel.errors import SfError, UsageError
from sfparallel.text import printable
from sfparallel.vmm.processes import address_space_hint

EXIT_USAGE = 2
EXIT_FAILED = 70

_DOCTOR = "`sf doctor` says what this machine lacks"
_HINTS = {
    errno.ENOSPC: _DOCTOR, errno.EACCES: _DOCTOR, errno.EPERM: _DOCTOR, errno.ENOMEM: _DOCTOR, errno.EROFS: CACHE_HINT,
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`; each clone takes about 10",
    errno.ENFILE: "the host's limit of open files is reached (sysctl fs.file-max)",
    errno.EAGAIN: "the limit of processes and threads is reached: `ulimit -u`, or pids.max of this control group",
}  # fmt: skip
"""Errors of the system that are the machine's, and what to do about them."""
_LIMITS = {errno.EMFILE, errno.ENFILE, errno.EAGAIN}
_NO_THREAD = "can't start new thread"


def say(line: str) -> None:
    """Show the user a line."""
    print(printable(line), file=sys.stderr, flush=True)


def hint_for(error: OSError, otherwise: str = "") -> str:
    """What to do about an error of the system.

    Args:
        otherwise: what to do where it is no limit of the system that was reached.
    """
    if otherwise and error.errno not in _LIMITS:
        return otherwise
    return _hint(error) or "see `sf doctor`"


def _hint(error: OSError) -> str | None:
    """None if it is no error of the machine's."""
    # Whatever call needs memory first meets the limit of address space: to read a folder, say.
    limited = address_space_hint() if error.errno == errno.ENOMEM else None
    return limited or _HINTS.get(error.errno or 0)


def late_hint(program: str | os.PathLike[str], limit: str = "") -> str:
    """What to do about a program that was not done in time: it is there.

    Args:
        limit: the setting that gives it more time, if there is one.
    """
    more = f"; {limit} gives it more time" if limit else ""
    return f"the machine is busy, or a disk that {os.fspath(program)} needs does not answer: try again{more}"


@contextlib.contextmanager
def errors_told(command: str) -> Iterator[None]:
    """Turn errors into one clear message and an exit code; a traceback would only hide it."""
    try:
        yield
    except SfError as error:
        if debugging():
            say(traceback.format_exc())
        say(f"{command}: {error}")
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `sf df | head`: exit like a program killed by SIGPIPE; the buffered output has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        hint = _hint(error)
        if debugging() or not hint:
            raise
        say(f"{command}: {error}\n  hint: {hint}")
        sys.exit(EXIT_FAILED)
    except (MemoryError, ImportError, RuntimeError, SystemError) as error:
        # Without memory, a library cannot be mapped (ImportError), a thread not be started (RuntimeError), and some C code of
        # modules fails without saying why (SystemError).
        no_thread = str(error) == _NO_THREAD
        hint = address_space_hint() or (_HINTS[errno.EAGAIN] if no_thread else None)
        if debugging() or not hint:
            raise
        say(f"{command}: {'' if no_thread else 'out of memory: '}{error}\n  hint: {hint}")
        sys.exit(EXIT_FAILED)
