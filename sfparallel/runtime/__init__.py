"""The guest half: what runs inside the parent VM and its clones."""

from __future__ import annotations


def warm_up() -> None:
    """Go once along the path of a region, without a fork: called by the zygote before the template is taken, so that the pages of
    that code are in every VM's memory. Leaves no socket, thread or context behind, because the zygote
    becomes a program."""
    # Here, not at the top: `import sfparallel` on the host must not import any of this.
    from sfparallel.runtime.warm import warm_up as warm
    warm()
