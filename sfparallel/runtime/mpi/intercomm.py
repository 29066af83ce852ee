"""Intercommunicators: two groups that talk to each other."""

from __future__ import annotations

from typing import Any

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.comm import COMM_NULL, COMM_WORLD, Comm, Intracomm
from sfparallel.runtime.mpi.core import CommCore, mix
from sfparallel.runtime.mpi.errors import ERR_ARG, MPIException
from sfparallel.runtime.mpi.group import Group, GroupCore
from sfparallel.runtime.mpi.info import INFO_NULL, Info


class Intercomm(Comm):
    """A communicator with two groups (mpi4py's `MPI.Intercomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return core.remote is not None

    @classmethod
    def Create_from_groups(cls, local_group: Group, local_leader: int, remote_group: Group, remote_leader: int,
                           stringtag: str = "org.mpi4py", info: Info = INFO_NULL, errhandler: Any = None) -> Any:
        """Connect two groups of the world."""
        local, remote = local_group._live().ranks, remote_group._live().ranks
        tag = int.from_bytes(stringtag.encode(), "little") % ((1 << 61) - 1)
        first, second = sorted([tuple(local), tuple(remote)])
        world = COMM_WORLD._live()
        salt = (5, tag, *first, -1, *second)
        world.group_counts[salt] = count = world.group_counts.get(salt, 0) + 1
        comm = Intercomm._of(CommCore(world.endpoint, mix(*salt, count), local, remote))
        if errhandler:
            comm.Set_errhandler(errhandler)
        return comm

    def Get_remote_group(self) -> Group:
        core = self._live()
        return Group._of(GroupCore(core.remote, core.endpoint.rank))

    def Get_remote_size(self) -> int:
        return len(self._live().remote)

    remote_group = property(Get_remote_group)
    remote_size = property(Get_remote_size)

    def Merge(self, high: bool = False) -> Any:
        """One group of both; those with `high` come last."""
        core = self._live()
        theirs = self.allgather(bool(high))
        first = not high if bool(theirs[0]) != bool(high) else min(core.ranks) < min(core.remote)
        ranks = (*core.ranks, *core.remote) if first else (*core.remote, *core.ranks)
        return self._child(Intracomm, core.child_context(6), ranks)


def local_comm(comm: Comm) -> Intracomm:
    """A communicator of the own group, for what has to be agreed on there."""
    core = comm._core
    if core.local is None:
        core.local = CommCore(core.endpoint, mix(core.ctx, 7), core.ranks)
    return Intracomm._of(core.local)


def connect(comm: Intracomm, local_leader: int, peer_comm: Comm, remote_leader: int, tag: int) -> Any:
    """`Intracomm.Create_intercomm`."""
    core = comm._live()
    mine = None
    if core.rank == local_leader:
        core.children += 1
        proposal = (core.ranks, mix(core.ctx, core.children, 8))
        theirs = Comm(peer_comm).sendrecv(proposal, remote_leader, tag, None, remote_leader, tag)
        mine = (theirs[0], max(proposal[1], theirs[1]))
    else:
        core.children += 1
    remote, ctx = comm.bcast(mine, local_leader)
    if set(remote) & set(core.ranks):
        core.raise_error(MPIException(ERR_ARG, "the groups overlap"))
    made = CommCore(core.endpoint, mix(ctx), core.ranks, remote)
    made.errhandler = core.errhandler
    return Intercomm._of(made)


def split(comm: Comm, color: int, key: int) -> Any:
    """`Comm.Split` between groups: those of both groups with the same color."""
    core = comm._live()
    local = local_comm(comm).allgather((color, key))
    remote = comm.allgather((color, key))
    ctx = core.child_context(1, color & 0xFFFFFFFF)

    def members(everybody: Any, ranks: Any) -> list[int]:
        return [ranks[rank] for _, rank in sorted((each[1], rank) for rank, each in enumerate(everybody) if each[0] == color)]

    theirs = members(remote, core.remote)
    if color == c.UNDEFINED or not theirs:
        return COMM_NULL
    return comm._child(Intercomm, ctx, members(local, core.ranks), theirs)


def create(comm: Comm, group: Group) -> Any:
    """`Comm.Create` between groups."""
    core = comm._live()
    remote = comm.allgather(group._live().ranks)[0]
    ctx = core.child_context(0)
    if not group._live().ranks or not remote:
        return COMM_NULL
    return comm._child(Intercomm, ctx, group._live().ranks, remote)
