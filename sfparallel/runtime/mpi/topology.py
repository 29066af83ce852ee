"""Topologies: grids and graphs of processes, and collective calls with the neighbours there."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.blocks import fill, parts_of
from sfparallel.runtime.mpi.collectives import Collective, raw
from sfparallel.runtime.mpi.comm import Comm, Intracomm
from sfparallel.runtime.mpi.core import Call, CommCore, Prepared
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_DIMS, ERR_RANK, ERR_TOPOLOGY, MPIException
from sfparallel.runtime.mpi.info import INFO_NULL, Info
from sfparallel.runtime.mpi.messages import Block, simple, vector, vector_w
from sfparallel.runtime.mpi.pickling import Payload, pickle
from sfparallel.runtime.mpi.request import Prequest, Request

UNWEIGHTED, WEIGHTS_EMPTY = c.UNDEFINED - 1, c.UNDEFINED - 2


class Grid:
    """A Cartesian topology: rank 0 is at the origin, the last coordinate changes fastest."""

    kind = c.CART

    def __init__(self, dims: Sequence[int], periods: Sequence[bool]) -> None:
        self.dims = list(dims)
        self.periods = [bool(period) for period in periods]

    def coords(self, rank: int) -> list[int]:
        coords = []
        for dim in reversed(self.dims):
            coords.append(rank % dim)
            rank //= dim
        return coords[::-1]

    def rank(self, coords: Sequence[int]) -> int:
        rank = 0
        for coord, dim, period in zip(coords, self.dims, self.periods, strict=True):
            if not 0 <= coord < dim:
                if not period:
                    return c.PROC_NULL
                coord %= dim
            rank = rank * dim + coord
        return rank

    def shift(self, me: int, direction: int, disp: int) -> tuple[int, int]:
        here = self.coords(me)
        there = [self.rank([*here[:direction], here[direction] + step, *here[direction + 1:]]) for step in (-disp, disp)]
        return there[0], there[1]

    def neighbours(self, me: int) -> tuple[list[int], list[int]]:
        ranks = [rank for direction in range(len(self.dims)) for rank in self.shift(me, direction, 1)]
        return ranks, ranks


class Graph:
    """A graph that every process knows."""

    kind = c.GRAPH

    def __init__(self, index: Sequence[int], edges: Sequence[int]) -> None:
        self.index = list(index)
        self.edges = list(edges)

    def of(self, rank: int) -> list[int]:
        return self.edges[self.index[rank - 1] if rank else 0:self.index[rank]]

    def neighbours(self, me: int) -> tuple[list[int], list[int]]:
        return self.of(me), self.of(me)


class DistributedGraph:
    """A graph of which every process knows its own edges; weights are None if there are none."""

    kind = c.DIST_GRAPH

    def __init__(self, sources: list[int], destinations: list[int], weights: tuple[list[int], list[int]] | None) -> None:
        self.sources = sources
        self.destinations = destinations
        self.weights = weights

    def neighbours(self, me: int) -> tuple[list[int], list[int]]:
        return self.sources, self.destinations


def volume(dims: Sequence[int]) -> int:
    """Number of places of a grid."""
    size = 1
    for dim in dims:
        if dim < 0:
            raise MPIException(ERR_DIMS, f"{dim}")
        size *= dim
    return size


def map_rank(comm: Comm, size: int) -> int:
    """The rank in a topology of `size` processes."""
    core = comm._live()
    if size > core.size:
        core.raise_error(MPIException(ERR_ARG, f"{size} places for {core.size} processes"))
    return core.rank if core.rank < size else c.UNDEFINED


def _made(comm: Comm, cls: type[Any], size: int, topology: Any) -> Any:
    core = comm._live()
    if size > core.size:
        core.raise_error(MPIException(ERR_ARG, f"{size} places for {core.size} processes"))
    made = comm._child(cls, core.child_context(9), core.ranks[:size])
    if made._core is not None:
        made._core.topology = topology
    return made


def _periods(periods: Sequence[bool] | bool | None, ndims: int) -> list[bool]:
    if periods is None or isinstance(periods, bool | int):
        return [bool(periods)] * ndims
    if len(periods) != ndims:
        raise ValueError(f"expecting {ndims} items, got {len(periods)}")
    return list(periods)


def create_cart(comm: Comm, dims: Sequence[int], periods: Sequence[bool] | bool | None) -> Any:
    grid = Grid(dims, _periods(periods, len(dims)))
    return _made(comm, Cartcomm, volume(dims), grid)


def graph_index(index: Sequence[int]) -> list[int]:
    """The standard's index; mpi4py also takes one that begins with a 0."""
    return list(index[1:] if len(index) > 1 and index[0] == 0 else index)


def create_graph(comm: Comm, index: Sequence[int], edges: Sequence[int]) -> Any:
    first = graph_index(index)
    if any(not 0 <= edge < len(first) for edge in edges):
        raise MPIException(ERR_ARG, "an edge leads to no node")
    return _made(comm, Graphcomm, len(first), Graph(first, edges))


def _weights(weights: Any, count: int) -> list[int] | None:
    if weights is None or (isinstance(weights, int) and weights == UNWEIGHTED):
        return None
    if isinstance(weights, int) and weights == WEIGHTS_EMPTY:
        if count:
            raise ValueError("empty weights but nonzero degree")
        return []
    found = [operator.index(weight) for weight in weights]
    if len(found) != count:
        raise ValueError(f"expecting {count} weights, got {len(found)}")
    return found


def create_adjacent(comm: Comm, sources: Sequence[int] | None, destinations: Sequence[int] | None, sourceweights: Any,
                    destweights: Any) -> Any:
    sources, destinations = list(sources or ()), list(destinations or ())
    into, out = _weights(sourceweights, len(sources)), _weights(destweights, len(destinations))
    weights = None if into is None and out is None else (into or [], out or [])
    return _made(comm, Distgraphcomm, comm.size, DistributedGraph(sources, destinations, weights))


def create_distributed(comm: Comm, sources: Sequence[int], degrees: Sequence[int] | int, destinations: Sequence[int],
                       weights: Any) -> Any:
    """Every process names some edges; afterwards each knows those that it is at."""
    counts = [degrees] * len(sources) if isinstance(degrees, int) else list(degrees)
    if len(counts) != len(sources):
        raise ValueError(f"expecting {len(sources)} degrees, got {len(counts)}")
    if len(destinations) != sum(counts):
        raise ValueError(f"expecting {sum(counts)} destinations, got {len(destinations)}")
    known = _weights(weights, len(destinations))
    edges, at = [], 0
    for source, count in zip(sources, counts, strict=True):
        for _ in range(count):
            edges.append((source, destinations[at], 1 if known is None else known[at]))
            at += 1
    everything = comm.allgather((edges, known is not None))
    me = comm.Get_rank()
    into = [(source, weight) for each, _ in everything for source, dest, weight in each if dest == me]
    out = [(dest, weight) for each, _ in everything for source, dest, weight in each if source == me]
    weighted = any(has for _, has in everything)
    graph = DistributedGraph([source for source, _ in into], [dest for dest, _ in out],
                             ([weight for _, weight in into], [weight for _, weight in out]) if weighted else None)
    return _made(comm, Distgraphcomm, comm.size, graph)


def _exchange(core: CommCore, call: Call, payloads: Sequence[Payload], places: Sequence[memoryview | None]) -> Collective:
    """To and from all neighbours: the receives. Edges may be double, in both directions: those between two processes are told
    apart by their order, which is the same at both ends."""
    sources, destinations = core.topology.neighbours(core.rank)
    grid = isinstance(core.topology, Grid)
    pending: list[Any] = []
    receives: list[Any] = [None] * len(sources)
    ch = call.local
    # In a grid of one or two places a neighbour may be the same on both sides: what goes up arrives from below.
    order = [k ^ 1 for k in range(len(sources))] if grid else list(range(len(sources)))
    for k in order:
        if sources[k] != c.PROC_NULL:
            receives[k] = ch.recv(sources[k], places[k])
            pending.append(receives[k])
    for dest, payload in zip(destinations, payloads, strict=True):
        if dest != c.PROC_NULL:
            pending.append(ch.send(dest, payload))
    yield pending
    return receives


class Topocomm(Intracomm):
    """A communicator with a topology (mpi4py's `MPI.Topocomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return core.topology is not None

    def _neighbours(self) -> tuple[list[int], list[int]]:
        core = self._live()
        if core.topology is None:
            core.raise_error(MPIException(ERR_TOPOLOGY))
        found: tuple[list[int], list[int]] = core.topology.neighbours(core.rank)
        return found

    @property
    def degrees(self) -> tuple[int, int]:
        sources, destinations = self._neighbours()
        return len(sources), len(destinations)

    indegree = property(lambda self: self.degrees[0])
    outdegree = property(lambda self: self.degrees[1])

    @property
    def inoutedges(self) -> tuple[list[int], list[int]]:
        sources, destinations = self._neighbours()
        return list(sources), list(destinations)

    inedges = property(lambda self: self.inoutedges[0])
    outedges = property(lambda self: self.inoutedges[1])

    # Preparations

    def _prepare(self, sendbuf: Any, recvbuf: Any, kind: str, *, same: bool) -> Prepared:
        """One block for each neighbour, or the same one for all."""
        core = self._live()
        sources, destinations = self._neighbours()

        def blocks(buf: Any, parts: int, readonly: bool) -> list[Block]:
            if kind == "w":
                return vector_w(buf, readonly=readonly, parts=parts)
            if kind == "v":
                return vector(buf, readonly=readonly, parts=parts)
            return parts_of(simple(buf, readonly=readonly, parts=parts), parts)

        sends = [simple(sendbuf, readonly=True)] * len(destinations) if same else blocks(sendbuf, len(destinations), True)
        targets = blocks(recvbuf, len(sources), False)

        def steps(call: Call) -> Collective:
            places: list[memoryview | None] = [target.place() for target in targets]
            receives = yield from _exchange(core, call, [raw(block.read()) for block in sends], places)
            for source, target, op in zip(sources, targets, receives, strict=True):
                if op is not None:
                    fill(target, op.buffer[:op.nbytes], op.nbytes, f"rank {source}")

        return steps

    # The calls

    def neighbor_allgather(self, sendobj: Any, *, timeout: float | None = None) -> list[Any]:
        """An object to all neighbours, and one from each of them."""
        _, destinations = self._neighbours()
        return self._objects([pickle.payload(sendobj)] * len(destinations), "neighbor_allgather", timeout)

    def neighbor_alltoall(self, sendobj: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """To each neighbour its object, and one from each of them."""
        _, destinations = self._neighbours()
        objects = list(sendobj)
        if len(objects) != len(destinations):
            raise ValueError(f"expecting {len(destinations)} items, got {len(objects)}")
        return self._objects([pickle.payload(obj) for obj in objects], "neighbor_alltoall", timeout)

    def _objects(self, payloads: list[Payload], name: str, timeout: float | None) -> list[Any]:
        core = self._core
        sources, _ = self._neighbours()
        receives = core.run(name, lambda call: _exchange(core, call, payloads, [None] * len(sources)), timeout)
        return [None if op is None else pickle.object(op.payload, op.flags) for op in receives]

    def Neighbor_allgather(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Neighbor_allgather", self._prepare(sendbuf, recvbuf, "", same=True), timeout)

    def Neighbor_allgatherv(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Neighbor_allgatherv", self._prepare(sendbuf, recvbuf, "v", same=True), timeout)

    def Neighbor_alltoall(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Neighbor_alltoall", self._prepare(sendbuf, recvbuf, "", same=False), timeout)

    def Neighbor_alltoallv(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Neighbor_alltoallv", self._prepare(sendbuf, recvbuf, "v", same=False), timeout)

    def Neighbor_alltoallw(self, sendbuf: Any, recvbuf: Any, *, timeout: float | None = None) -> None:
        self._now("Neighbor_alltoallw", self._prepare(sendbuf, recvbuf, "w", same=False), timeout)

    def Ineighbor_allgather(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._prepare(sendbuf, recvbuf, "", same=True))

    def Ineighbor_allgatherv(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._prepare(sendbuf, recvbuf, "v", same=True))

    def Ineighbor_alltoall(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._prepare(sendbuf, recvbuf, "", same=False))

    def Ineighbor_alltoallv(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._prepare(sendbuf, recvbuf, "v", same=False))

    def Ineighbor_alltoallw(self, sendbuf: Any, recvbuf: Any) -> Request:
        return self._begin(self._prepare(sendbuf, recvbuf, "w", same=False))

    def Neighbor_allgather_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._prepare(sendbuf, recvbuf, "", same=True))

    def Neighbor_allgatherv_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._prepare(sendbuf, recvbuf, "v", same=True))

    def Neighbor_alltoall_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._prepare(sendbuf, recvbuf, "", same=False))

    def Neighbor_alltoallv_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._prepare(sendbuf, recvbuf, "v", same=False))

    def Neighbor_alltoallw_init(self, sendbuf: Any, recvbuf: Any, info: Info = INFO_NULL) -> Prequest:
        return self._repeat_collective(self._prepare(sendbuf, recvbuf, "w", same=False))


class Cartcomm(Topocomm):
    """A grid (mpi4py's `MPI.Cartcomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return isinstance(core.topology, Grid)

    def _grid(self) -> Grid:
        grid: Grid = self._live().topology
        return grid

    def Get_dim(self) -> int:
        return len(self._grid().dims)

    def Get_topo(self) -> tuple[list[int], list[int], list[int]]:
        grid = self._grid()
        return list(grid.dims), [int(period) for period in grid.periods], grid.coords(self._core.rank)

    dim = property(Get_dim)
    ndim = property(Get_dim)
    topo = property(Get_topo)
    dims = property(lambda self: self.Get_topo()[0])
    periods = property(lambda self: self.Get_topo()[1])
    coords = property(lambda self: self.Get_topo()[2])

    def Get_cart_rank(self, coords: Sequence[int]) -> int:
        grid = self._grid()
        if len(coords) != len(grid.dims):
            raise ValueError(f"expecting {len(grid.dims)} items, got {len(coords)}")
        rank = grid.rank(coords)
        if rank == c.PROC_NULL:
            self._core.raise_error(MPIException(ERR_ARG, f"no process at {list(coords)}"))
        return rank

    def Get_coords(self, rank: int) -> list[int]:
        if not 0 <= rank < self._core.size:
            self._core.raise_error(MPIException(ERR_RANK, f"{rank}"))
        return self._grid().coords(rank)

    def Shift(self, direction: int, disp: int) -> tuple[int, int]:
        """Whom to receive from and whom to send to, for a shift along a dimension."""
        grid = self._grid()
        if not 0 <= direction < len(grid.dims):
            self._core.raise_error(MPIException(ERR_ARG, f"direction {direction}"))
        return grid.shift(self._core.rank, direction, disp)

    def Sub(self, remain_dims: Sequence[bool]) -> Any:
        """Grids of fewer dimensions, one for each place in the others."""
        grid, core = self._grid(), self._core
        keep = [bool(each) for each in remain_dims]
        if len(keep) != len(grid.dims):
            raise ValueError(f"expecting {len(grid.dims)} items, got {len(keep)}")
        here = grid.coords(core.rank)
        others = [rank for rank in range(core.size)
                  if all(k or a == b for k, a, b in zip(keep, here, grid.coords(rank), strict=True))]
        fixed = [0 if k else coord for k, coord in zip(keep, here, strict=True)]
        made = self._child(Cartcomm, core.child_context(10, *fixed), [core.ranks[rank] for rank in others])
        made._core.topology = Grid([d for d, k in zip(grid.dims, keep, strict=True) if k],
                                   [p for p, k in zip(grid.periods, keep, strict=True) if k])
        return made


class Graphcomm(Topocomm):
    """A graph that everybody knows (mpi4py's `MPI.Graphcomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return isinstance(core.topology, Graph)

    def _graph(self) -> Graph:
        graph: Graph = self._live().topology
        return graph

    def Get_dims(self) -> tuple[int, int]:
        graph = self._graph()
        return len(graph.index), len(graph.edges)

    def Get_topo(self) -> tuple[list[int], list[int]]:
        graph = self._graph()
        return list(graph.index), list(graph.edges)

    def Get_neighbors_count(self, rank: int) -> int:
        return len(self.Get_neighbors(rank))

    def Get_neighbors(self, rank: int) -> list[int]:
        if not 0 <= rank < self._core.size:
            self._core.raise_error(MPIException(ERR_RANK, f"{rank}"))
        return list(self._graph().of(rank))

    dims = property(Get_dims)
    nnodes = property(lambda self: self.Get_dims()[0])
    nedges = property(lambda self: self.Get_dims()[1])
    topo = property(Get_topo)
    index = property(lambda self: self.Get_topo()[0])
    edges = property(lambda self: self.Get_topo()[1])
    nneighbors = property(lambda self: self.Get_neighbors_count(self.Get_rank()))
    neighbors = property(lambda self: self.Get_neighbors(self.Get_rank()))


class Distgraphcomm(Topocomm):
    """A graph of which everybody knows its own edges (mpi4py's `MPI.Distgraphcomm`)."""

    @classmethod
    def _is_kind_of(cls, core: CommCore) -> bool:
        return isinstance(core.topology, DistributedGraph)

    def Get_dist_neighbors_count(self) -> tuple[int, int, bool]:
        graph = self._live().topology
        return len(graph.sources), len(graph.destinations), graph.weights is not None

    def Get_dist_neighbors(self) -> tuple[list[int], list[int], tuple[list[int], list[int]] | None]:
        graph = self._live().topology
        return list(graph.sources), list(graph.destinations), graph.weights


def class_of(core: CommCore) -> type[Topocomm]:
    """The class for a communicator with a topology."""
    kinds: dict[int, type[Topocomm]] = {c.CART: Cartcomm, c.GRAPH: Graphcomm, c.DIST_GRAPH: Distgraphcomm}
    return kinds[core.topology.kind]


