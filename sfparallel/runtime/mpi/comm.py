"""Communicators: what they are, and how others are made of them. Their calls are in `p2p`, `objects`, `blocks` and `survival`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, Self

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.attributes import Attributes, Keyvals
from sfparallel.runtime.mpi.blocks import BlockCollectives, BlockScans
from sfparallel.runtime.mpi.buffered import Buffered
from sfparallel.runtime.mpi.core import SELF_CONTEXT, WORLD_CONTEXT, CommCore, WorldCore, mix
from sfparallel.runtime.mpi.errhandler import WithErrhandler
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_COMM, ERR_REVOKED, MPIException, last_used_code
from sfparallel.runtime.mpi.group import Group, GroupCore
from sfparallel.runtime.mpi.handle import Handle, predefined
from sfparallel.runtime.mpi.info import INFO_NULL, Info, InfoCore
from sfparallel.runtime.mpi.objects import ObjectCollectives, ObjectScans
from sfparallel.runtime.mpi.p2p import PointToPoint
from sfparallel.runtime.mpi.request import Finished, Request
from sfparallel.runtime.mpi.survival import Survival
from sfparallel.runtime.mpi.unsupported import unsupported

_KEYVALS = Keyvals()


class Comm(PointToPoint, ObjectCollectives, BlockCollectives, Buffered, Survival, WithErrhandler, Attributes, Handle):
    """A communicator (mpi4py's `MPI.Comm`)."""

    _invalid: ClassVar[int] = ERR_COMM
    _null_name = "COMM_NULL"
    _keyvals: ClassVar[Keyvals] = _KEYVALS
    _core: Any

    def __repr__(self) -> str:
        if self._core is None:
            return f"<{type(self).__name__} null>"
        return f"<{type(self).__name__} rank {self._core.rank} of {self._core.size}>"

    @classmethod
    def _accepts(cls, handle: Handle) -> bool:
        if not isinstance(handle, Comm):
            return False
        return handle._core is None or cls._is_kind_of(handle._core)

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return True

    @classmethod
    def _family(cls) -> type[Handle]:
        return Comm

    @classmethod
    def fromhandle(cls, handle: int) -> Any:
        return wrap(super().fromhandle(handle)._core)

    @classmethod
    def _wrapped(cls, core: Any) -> Comm:
        return wrap(core)

    def _live(self) -> Any:
        core = self._core
        if core is None:
            raise MPIException(ERR_COMM, "null communicator")
        if core.revoked:
            core.raise_error(MPIException(ERR_REVOKED))
        return core

    def _any(self) -> Any:
        """The core, also of a revoked communicator."""
        if self._core is None:
            raise MPIException(ERR_COMM, "null communicator")
        return self._core

    # Who

    def Get_rank(self) -> int:
        return int(self._any().rank)

    def Get_size(self) -> int:
        return int(self._any().size)

    def Get_group(self) -> Group:
        core = self._any()
        return Group._of(GroupCore(core.ranks, core.endpoint.rank))

    rank = property(Get_rank)
    size = property(Get_size)
    group = property(Get_group)

    def Is_inter(self) -> bool:
        return self._any().remote is not None

    def Is_intra(self) -> bool:
        return self._any().remote is None

    is_inter = property(Is_inter)
    is_intra = property(Is_intra)

    def Get_topology(self) -> int:
        topology = self._any().topology
        return c.UNDEFINED if topology is None else int(topology.kind)

    topology = property(Get_topology)

    @property
    def is_topo(self) -> bool:
        return self._core is not None and self._core.topology is not None

    @property
    def is_open(self) -> bool:
        """Whether this process has used the network."""
        return bool(self._any().endpoint.is_open)

    def Compare(self, comm: Comm) -> int:
        mine, theirs = self._any(), comm._any()
        if mine is theirs:
            return c.IDENT
        if (mine.remote is None) != (theirs.remote is None):
            return c.UNEQUAL
        if mine.ranks == theirs.ranks and mine.remote == theirs.remote:
            return c.CONGRUENT
        if set(mine.ranks) == set(theirs.ranks) and set(mine.remote or ()) == set(theirs.remote or ()):
            return c.SIMILAR
        return c.UNEQUAL

    def Get_name(self) -> str:
        return "MPI_COMM_NULL" if self._core is None else str(self._core.name)

    def Set_name(self, name: str) -> None:
        self._any().name = name[:c.MAX_OBJECT_NAME - 1]

    name = property(Get_name, Set_name)

    def Get_info(self) -> Info:
        return Info._of(InfoCore(self._any().info))

    def Set_info(self, info: Info) -> None:
        self._any().info.update(dict(info.items()))

    info = property(Get_info, Set_info)

    def _predefined_attribute(self, keyval: int) -> tuple[bool, Any]:
        values = {c.TAG_UB: c.TAG_LIMIT, c.IO: c.ANY_SOURCE, c.WTIME_IS_GLOBAL: False, c.UNIVERSE_SIZE: None, c.APPNUM: None,
                  c.LASTUSEDCODE: last_used_code()}
        if keyval not in values:
            return False, None
        return True, values[keyval]

    # Making others

    def _child(self, cls: type[Any], ctx: int, ranks: Sequence[int], remote: Sequence[int] | None = None) -> Any:
        """A communicator of some processes; null in those that do not belong to it."""
        parent = self._core
        if parent.endpoint.rank not in ranks or (remote is not None and not remote):
            return COMM_NULL
        core = CommCore(parent.endpoint, ctx, ranks, remote)
        core.errhandler = parent.errhandler
        return cls._of(core)

    def Dup(self, info: Info | None = None) -> Self:
        """The same processes, other messages."""
        parent = self._live()
        copy = self._child(type(self), parent.child_context(), parent.ranks, parent.remote)
        copy._core.topology = parent.topology
        copy._core.info = dict(parent.info if info is None else info.items())
        self._copy_attributes(parent, copy._core)
        return copy  # type: ignore[no-any-return]

    def Clone(self) -> Self:
        return self.Dup()

    def Dup_with_info(self, info: Info) -> Self:
        return self.Dup(info)

    def Idup(self, info: Info | None = None) -> tuple[Self, Request]:
        return self.Dup(info), Request._of(Finished(self._core.endpoint, source=c.ANY_SOURCE))

    def Idup_with_info(self, info: Info) -> tuple[Self, Request]:
        return self.Idup(info)

    def Create(self, group: Group) -> Any:
        """A communicator of some of the processes; all call it."""
        parent = self._live()
        if parent.remote is not None:
            from sfparallel.runtime.mpi.intercomm import create
            return create(self, group)
        ranks = group._live().ranks
        if not set(ranks) <= set(parent.ranks):
            parent.raise_error(MPIException(ERR_ARG, "the group holds processes that are not in the communicator"))
        return self._child(Intracomm, parent.child_context(0, *ranks), ranks)

    def Split(self, color: int = 0, key: int = 0) -> Any:
        """Communicators of those with the same color, in the order of their keys; null for color UNDEFINED."""
        parent = self._live()
        if parent.remote is not None:
            from sfparallel.runtime.mpi.intercomm import split
            return split(self, color, key)
        if color != c.UNDEFINED and color < 0:
            parent.raise_error(MPIException(ERR_ARG, f"color {color}"))
        everybody = self.allgather((color, key))
        members = sorted((key, rank) for rank, (each, key) in enumerate(everybody) if each == color)
        ctx = parent.child_context(1, color & 0xFFFFFFFF)
        if color == c.UNDEFINED:
            return COMM_NULL
        return self._child(Intracomm, ctx, [parent.ranks[rank] for _, rank in members])

    def Split_type(self, split_type: int, key: int = 0, info: Info = INFO_NULL) -> Any:
        """Communicators of processes that share something. Every rank has a machine of its own."""
        parent = self._live()
        known = (c.COMM_TYPE_SHARED, c.COMM_TYPE_HW_GUIDED, c.COMM_TYPE_HW_UNGUIDED, c.COMM_TYPE_RESOURCE_GUIDED, c.UNDEFINED)
        if split_type not in known:
            parent.raise_error(MPIException(ERR_ARG, f"split type {split_type}"))
        guided = split_type in (c.COMM_TYPE_HW_GUIDED, c.COMM_TYPE_RESOURCE_GUIDED)
        alone = split_type == c.COMM_TYPE_SHARED or (guided and info.get("mpi_hw_resource_type") == "mpi_shared_memory")
        return self.Split(parent.rank if alone else c.UNDEFINED, key)

    def Free(self) -> None:
        core = self._any()
        if core.constant:
            core.raise_error(MPIException(ERR_COMM, "a predefined communicator cannot be freed"))
        self._delete_attributes(core)
        core.endpoint.retire(core.contexts)
        self._core = None

    def _release(self) -> None:
        self._delete_attributes(self._core)

    def Disconnect(self) -> None:
        """Free it when all messages are through."""
        self.Free()

    def Abort(self, errorcode: int = 0) -> NoReturn:
        """End all ranks."""
        from sfparallel.runtime.mpi.environment import abort
        abort(errorcode)

    # Partitioned communication

    def Psend_init(self, buf: Any, partitions: int, dest: int, tag: int = 0, info: Info = INFO_NULL) -> Any:
        from sfparallel.runtime.mpi.partitioned import send_init
        return send_init(self, buf, partitions, dest, tag)

    def Precv_init(self, buf: Any, partitions: int, source: int = c.ANY_SOURCE, tag: int = c.ANY_TAG,
                   info: Info = INFO_NULL) -> Any:
        from sfparallel.runtime.mpi.partitioned import recv_init
        return recv_init(self, buf, partitions, source, tag)

    # Other programs

    @classmethod
    def Get_parent(cls) -> Any:
        """The program that spawned this one: none."""
        from sfparallel.runtime.mpi.intercomm import Intercomm
        return Intercomm()

    @classmethod
    def Join(cls, fd: int) -> NoReturn:
        unsupported("Comm.Join", "all ranks of a region are in COMM_WORLD")


class Intracomm(Comm, ObjectScans, BlockScans):
    """A communicator with one group (mpi4py's `MPI.Intracomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return core.remote is None

    def Create_group(self, group: Group, tag: int = 0) -> Any:
        """A communicator of some of the processes; only these call it."""
        parent = self._live()
        ranks = group._live().ranks
        salt = (2, tag, *ranks)
        # Counted apart: the others do not know of this call.
        counts = parent.group_counts
        counts[salt] = counts.get(salt, 0) + 1
        return self._child(Intracomm, mix(parent.ctx, *salt, counts[salt]), ranks)

    @classmethod
    def Create_from_group(cls, group: Group, stringtag: str = "org.mpi4py", info: Info = INFO_NULL,
                          errhandler: Any = None) -> Any:
        """A communicator of a group alone."""
        tag = int.from_bytes(stringtag.encode(), "little") % ((1 << 61) - 1)
        comm = Intracomm(COMM_WORLD).Create_group(group, tag)
        if errhandler:
            comm.Set_errhandler(errhandler)
        return comm

    def Create_intercomm(self, local_leader: int, peer_comm: Any, remote_leader: int, tag: int = 0) -> Any:
        """Connect two groups by their leaders, who know each other in `peer_comm`."""
        from sfparallel.runtime.mpi.intercomm import connect
        return connect(self, local_leader, peer_comm, remote_leader, tag)

    def Create_cart(self, dims: Sequence[int], periods: Sequence[bool] | bool | None = None, reorder: bool = False) -> Any:
        from sfparallel.runtime.mpi import topology
        return topology.create_cart(self, dims, periods)

    def Create_graph(self, index: Sequence[int], edges: Sequence[int], reorder: bool = False) -> Any:
        from sfparallel.runtime.mpi import topology
        return topology.create_graph(self, index, edges)

    def Create_dist_graph_adjacent(self, sources: Sequence[int], destinations: Sequence[int], sourceweights: Any = None,
                                   destweights: Any = None, info: Info = INFO_NULL, reorder: bool = False) -> Any:
        from sfparallel.runtime.mpi import topology
        return topology.create_adjacent(self, sources, destinations, sourceweights, destweights)

    def Create_dist_graph(self, sources: Sequence[int], degrees: Sequence[int], destinations: Sequence[int], weights: Any = None,
                          info: Info = INFO_NULL, reorder: bool = False) -> Any:
        from sfparallel.runtime.mpi import topology
        return topology.create_distributed(self, sources, degrees, destinations, weights)

    def Cart_map(self, dims: Sequence[int], periods: Sequence[bool] | bool | None = None) -> int:
        from sfparallel.runtime.mpi import topology
        return topology.map_rank(self, topology.volume(dims))

    def Graph_map(self, index: Sequence[int], edges: Sequence[int]) -> int:
        from sfparallel.runtime.mpi import topology
        return topology.map_rank(self, len(topology.graph_index(index)))

    def Spawn(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered."""
        unsupported("Spawn", "start a parallel region (sf.parallel), whose clones have the program's memory")

    def Spawn_multiple(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered."""
        unsupported("Spawn_multiple", "start parallel regions (sf.parallel), whose clones have the program's memory")

    def Accept(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered."""
        unsupported("Accept", "all ranks of a region are in COMM_WORLD")

    def Connect(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered."""
        unsupported("Connect", "all ranks of a region are in COMM_WORLD")


def wrap(core: CommCore | None) -> Comm:
    """The communicator object of the right class."""
    if core is None:
        return COMM_NULL
    if core.remote is not None:
        from sfparallel.runtime.mpi.intercomm import Intercomm
        return Intercomm._of(core)
    if core.topology is not None:
        from sfparallel.runtime.mpi import topology
        return topology.class_of(core)._of(core)
    return Intracomm._of(core)


COMM_NULL: Comm = predefined(Comm(), "COMM_NULL")
COMM_WORLD: Intracomm = predefined(Intracomm._of(WorldCore(WORLD_CONTEXT, "MPI_COMM_WORLD", alone=False)), "COMM_WORLD")
COMM_SELF: Intracomm = predefined(Intracomm._of(WorldCore(SELF_CONTEXT, "MPI_COMM_SELF", alone=True)), "COMM_SELF")
