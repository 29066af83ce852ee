"""How the program's interpreter is started: by the command `python3 script.py …`, as its user would, with its own environment.

There is one thing more: this folder comes first in PYTHONPATH, so that `site` finds `sitecustomize.py` here, just before the
program begins. That module takes the folder out again, restores PYTHONPATH, has `runtime.program` set up what is ours, and
imports the program's own `sitecustomize`. The interpreter then runs the program by itself: nothing of Python's start is imitated.

Both sides of the agreement are here: `environment` is for those who start the interpreter, `take_orders` for the interpreter.
Nothing is imported but `os`, because this is in every program's interpreter, whether it uses sfparallel or not.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = os.path.dirname(__file__)

_ORDERS = "SFRUN_ORDERS"
_PYTHONPATH = "SFRUN_PYTHONPATH"
"""What PYTHONPATH was, if there was one."""

orders: dict[str, str] = {}
"""In the program's interpreter: what it was started with; see `environment`."""


def environment(program: dict[str, str], orders: Mapping[str, object], folder: str = FOLDER) -> dict[str, str]:
    """The environment to start the interpreter with.

    Args:
        program: what the program shall find in its environment.
        orders: `ranks`: the program is run by so many clones; `mpi4py`: `import mpi4py` finds ours; `closed`:
            those of the descriptors 0 to 2 that are closed on the host; `image`: the guest image's name; `packages`: a
            folder of packages, its name in hexadecimal; others for `--local`.
            Their values have no spaces.
        folder: where this folder is, for the interpreter.
    """
    path = program.get("PYTHONPATH")
    added = {"PYTHONPATH": f"{folder}{os.pathsep}{path}" if path else folder,
             _ORDERS: " ".join(f"{name}={value}" for name, value in orders.items())}
    return {**program, **added, **({} if path is None else {_PYTHONPATH: path})}


def take_orders() -> None:
    """In the interpreter: read `orders`, and give the program the environment that is meant for it."""
    words = os.environ.pop(_ORDERS, "")
    orders.update(word.partition("=")[::2] for word in words.split())
    path = os.environ.pop(_PYTHONPATH, None)
    if path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = path
