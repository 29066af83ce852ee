"""`sfrun --venv PATH`: a virtual environment of the host, whose packages are available in VMs, read-only, at the same path."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sfparallel.errors import UsageError
from sfparallel.vmm.command_errors import late_hint

_LIMIT_S = 30.0
_ASK = "import importlib.util as u, platform as p; print(u.MAGIC_NUMBER.hex(), p.python_version())"


@dataclass(frozen=True)
class Venv:
    """A virtual environment.

    Attributes:
        folder: its resolved path.
        packages: the folder with its packages.
    """

    folder: Path
    packages: Path

    def check(self, image: str, magic: str) -> None:
        """Check that its packages are for the Python of a guest image, by the magic number of its bytecode (hexadecimal).

        Raises:
            UsageError: they are not, or its Python does not run.
        """
        python = self.folder / "bin" / "python"
        try:
            done = subprocess.run([python, "-I", "-S", "-c", _ASK], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  timeout=_LIMIT_S, check=True)  # fmt: skip
            own, version = done.stdout.split()
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"--venv {self.folder}: its Python has not said its version in {error.timeout:g} s",
                             hint=late_hint(python)) from error  # fmt: skip
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise UsageError(f"the Python of --venv {self.folder} does not run: {error}",
                             hint="create the environment again") from error  # fmt: skip
        if own != magic:
            raise UsageError(
                f"--venv {self.folder} has packages for Python {version}, but the guest image {image!r} has another version",
                hint="use an image with that Python (`sf image build --release`), or put the packages into the image: "
                     "`pip freeze > FILE`, then `sf image build --requirements FILE`",
            )  # fmt: skip


def find(text: str) -> Venv:
    """The environment in a folder.

    Raises:
        UsageError: there is none.
    """
    folder = Path(os.path.realpath(text))
    if not (folder / "pyvenv.cfg").is_file():
        raise UsageError(f"--venv {text} is not a virtual environment: it has no pyvenv.cfg",
                         hint="name the folder that `python3 -m venv` created")  # fmt: skip
    found = sorted(folder.glob("lib/python3*/site-packages"))
    if len(found) != 1:
        raise UsageError(f"--venv {text} must have exactly one folder lib/python3*/site-packages, not {len(found)}")
    return Venv(folder, found[0])
